"""The order of samples: for any data set, any seed, however far a run has come."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis.strategies import integers, lists

from pipeline.data import plan
from pipeline.data.plan import Stream
from tests.pipeline.data import plan_oracle
from tests.pipeline.data.plan_cases import FAR, MANY, again, positions, samples_at, shard_sizes, streams

# -- against a slow, obvious construction -----------------------------------------------


@MANY
@given(streams(), positions, integers(0, 120))
def test_every_position_holds_what_the_text_of_the_plan_says(stream, start, length):
    places = stream.locate(np.arange(start, start + length))
    expected = plan_oracle.reads(
        stream.counts.tolist(),
        lanes=stream.lanes,
        window=stream.window,
        seed=stream.seed,
        start=start,
        stop=start + length,
    )
    rows = zip(places.shards, places.samples, places.lanes, places.firsts, places.ends, strict=True)
    for (shard, sample, lane, first, end), read in zip(rows, expected, strict=True):
        assert (shard, sample, lane) == (read.shard, read.sample, read.lane)
        # What is fetched together never reaches beyond the window; a cut shard may be in it twice.
        assert sample in range(first, end)
        assert {(shard, number) for number in range(first, end)} <= read.window


# -- every sample once, in another order each time --------------------------------------


@MANY
@given(streams(), integers(0, 10_000))
def test_every_epoch_holds_every_sample_exactly_once_window_by_window(stream, epoch):
    first = epoch * stream.samples
    places = stream.locate(np.arange(first, first + stream.samples))
    found = sorted(zip(places.shards.tolist(), places.samples.tolist(), strict=True))
    assert found == [(shard, sample) for shard, count in enumerate(stream.counts) for sample in range(count)]

    fetched = np.stack([places.lanes, places.windows, places.shards, places.firsts, places.ends])
    parts, sizes = np.unique(fetched, axis=1, return_counts=True)
    # Each sample is in one part of one window, and no window is larger than allowed.
    assert (sizes == parts[4] - parts[3]).all()
    assert np.unique(fetched[:2], axis=1, return_counts=True)[1].max() <= stream.window
    # A lane goes from window to window and never back.
    by_lane = np.argsort(places.lanes, kind="stable")
    same_lane = np.diff(places.lanes[by_lane]) == 0
    assert (np.diff(places.windows[by_lane])[same_lane] >= 0).all()


@MANY
@given(streams(), integers(0, 1000))
def test_epochs_differ_and_seeds_differ(drawn, epoch):
    """Lanes of one or two samples are left out: they have few orders, and two may agree."""
    assume(drawn.samples >= 20)
    lanes, total = min(drawn.lanes, drawn.samples // 20), drawn.samples
    numbers = np.arange(epoch * total, (epoch + 2) * total)
    orders = []
    for seed in (drawn.seed, drawn.seed + 1):
        found = samples_at(Stream(drawn.counts, lanes=lanes, window=drawn.window, seed=seed), numbers)
        orders += [tuple(found[:total]), tuple(found[total:])]
    assert len(set(orders)) == 4


@MANY
@given(streams(), positions, lists(integers(0, 49), min_size=1, max_size=20))
def test_a_place_depends_on_its_position_alone(stream, start, offsets):
    """Not on what was asked before, in which order, how often, or together with what."""
    asked = np.array(offsets) + start
    alone = [samples_at(again(stream), np.array([position]))[0] for position in asked[:2]]
    assert samples_at(stream, asked)[:2] == alone
    in_order = dict(
        zip(range(start, start + 50), samples_at(stream, np.arange(start, start + 50)), strict=True)
    )
    assert samples_at(stream, asked) == [in_order[position] for position in asked.tolist()]


@MANY
@given(shard_sizes())
def test_reading_in_order_goes_through_the_shards_from_end_to_end(counts):
    places = plan.locate_in_order(np.array(counts), np.arange(sum(counts)))
    expected = [(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
    assert list(zip(places.shards.tolist(), places.samples.tolist(), strict=True)) == expected
    assert (places.ends == np.array(counts)[places.shards]).all()


# -- what must never change -------------------------------------------------------------

GOLDEN = {
    "four shards, one of them empty": (
        ([7, 0, 5, 11], 4, 5, 42, 20),
        "0:6 3:4 2:1 0:1 2:1 2:3 3:7 0:0 0:5 2:2 3:5 3:10 2:0 2:4 3:3 0:2 0:4 3:1 3:4 3:8",
    ),
    "one shard": (
        ([50], 8, 16, 1, 0),
        "0:40 0:42 0:3 0:9 0:16 0:17 0:28 0:29 0:37 0:47 0:2 0:7 0:13 0:22 0:27 0:31 0:36 0:44 0:49 0:6",
    ),
    "fewer samples than lanes": (
        ([3, 2], 64, 128, 7, 3),
        "1:0 1:1 1:0 1:1 0:0 0:1 0:2 1:1 0:0 0:1 0:2 1:0 0:2 1:0 1:1 0:0 0:1 0:1 0:2 1:0",
    ),
    "a prime number of uneven shards, far out": (
        ([1, 400, 13, 0, 77, 250, 2], 24, 32, 3, FAR),
        "1:29 1:60 1:80 1:120 1:157 1:169 1:217 1:246 1:285 1:299 1:346 1:367 1:386 4:27 4:39 5:1 "
        "5:46 5:65 5:88 5:123",
    ),
    "a hundred million samples": (
        ([1000] * 100_000, 64, 128, 1, 7 * 10**8 - 9),
        "31146:337 93362:171 62695:942 51746:448 65378:329 35316:466 75972:425 71919:195 "
        "60322:158 70530:292 99885:642 2820:708 56068:290 35489:489 23395:527 16446:805 74224:659 "
        "68367:855 54222:423 23608:998",
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_the_order_of_a_run_never_changes_with_a_version(case):
    (counts, lanes, window, seed, start), recorded = GOLDEN[case]
    stream = Stream(np.array(counts), lanes=lanes, window=window, seed=seed)
    found = samples_at(stream, np.arange(start, start + 20))
    assert " ".join(f"{shard}:{sample}" for shard, sample in found) == recorded


@pytest.mark.parametrize(
    ("counts", "lanes", "window"), [([], 1, 1), ([0, 0], 1, 1), ([1], 0, 1), ([1], 1, 0)]
)
def test_a_stream_of_nothing_is_refused(counts, lanes, window):
    with pytest.raises(ValueError, match="no stream over"):
        Stream(np.array(counts, np.int64), lanes=lanes, window=window, seed=0)


@pytest.mark.parametrize("position", [0, 10**8 - 7, FAR])
def test_a_plan_for_a_hundred_million_samples_is_lazy(position):
    """Only the epoch's shards and the windows of the lanes asked for are ever held."""
    stream = Stream(np.full(100_000, 1000), lanes=64, window=128, seed=1)
    places = stream.locate(np.arange(position, position + 64))
    assert len(set(places.shards.tolist())) > 50
    held = [
        array.nbytes
        for epoch in stream._epochs.values()
        for array in (epoch.order, epoch.starts, *epoch.window_places.values())
    ]
    assert sum(held) < 2 * (16 * 100_001 + 8 * 10**8 / 128 + 64 * 32)
    assert len(stream._orders) <= 64


def test_only_two_epochs_are_held_however_many_a_batch_has():
    stream = Stream(np.array([1, 2]), lanes=5, window=4, seed=1)
    for first, size in itertools.islice(plan.batches(0, FAR, 64), 10):
        stream.locate(np.arange(first, first + size))
    assert len(stream._epochs) == 2
