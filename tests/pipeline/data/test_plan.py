"""The order of samples: properties that hold for any data set, any batch, any number of workers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import composite, integers, lists

from pipeline.data import plan
from pipeline.data.plan import Stream

MANY = settings(max_examples=500, deadline=None)


@composite
def streams(draw) -> Stream:
    """Streams over shards of any sizes, empty ones among them."""
    counts = draw(lists(integers(0, 40), min_size=1, max_size=12).filter(any))
    return Stream(
        np.array(counts),
        lanes=draw(integers(1, 70)),
        window=draw(integers(1, 50)),
        seed=draw(integers(0, 2**32)),
    )


def samples(stream: Stream, first: int, stop: int) -> list[tuple[int, int]]:
    places = stream.locate(np.arange(first, stop))
    return list(zip(places.shards.tolist(), places.samples.tolist(), strict=True))


def every_sample(stream: Stream) -> list[tuple[int, int]]:
    return [(shard, sample) for shard, count in enumerate(stream._counts) for sample in range(count)]


@MANY
@given(streams(), integers(0, 10_000))
def test_every_epoch_holds_every_sample_exactly_once(stream, epoch):
    first = epoch * stream.samples
    assert sorted(samples(stream, first, first + stream.samples)) == every_sample(stream)


@MANY
@given(streams(), integers(0, 10**9), integers(1, 200), integers(1, 64))
def test_the_ranks_of_any_world_read_just_the_batch(stream, first, size, world_size):
    shares = [
        plan.training_share(first, size, lanes=stream.lanes, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert sorted(np.concatenate(shares).tolist()) == list(range(first, first + size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all((np.diff(share) > 0).all() for share in shares)


@MANY
@given(streams(), integers(0, 10**6), integers(1, 60), integers(1, 60), integers(0, 100))
def test_where_a_run_was_interrupted_does_not_change_what_follows(stream, start, one, other, length):
    """The same positions hold the same samples whatever batches led there, and in any order of asking."""
    stop = start + length
    whole = samples(stream, start, stop)
    parts = [
        pair
        for first, size in plan.batches(start, stop, one)
        for pair in samples(stream, first, first + size)
    ]
    assert parts == whole
    resumed = Stream(stream._counts, lanes=stream.lanes, window=stream.window, seed=stream.seed)
    last = list(plan.batches(start, stop, other))[-1:]
    for first, size in last:
        assert samples(resumed, first, first + size) == whole[first - start :]


@MANY
@given(integers(0, 10**9), integers(0, 3000), integers(1, 300))
def test_all_ranks_take_equally_many_steps_and_end_at_the_stop(start, length, batch_size):
    batches = list(plan.batches(start, start + length, batch_size))
    assert len(batches) == -(-length // batch_size)
    assert sum(size for _, size in batches) == length
    assert all(size == batch_size for _, size in batches[:-1])


@MANY
@given(integers(0, 5000), integers(1, 64))
def test_evaluation_reads_every_sample_once_and_pads_none(total, world_size):
    shares = [plan.contiguous_share(total, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [number for share in shares for number in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@MANY
@given(lists(integers(0, 30), min_size=1, max_size=10).filter(any))
def test_reading_in_order_goes_through_the_shards_from_end_to_end(counts):
    places = plan.locate_in_order(np.array(counts), np.arange(sum(counts)))
    expected = [(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
    assert list(zip(places.shards.tolist(), places.samples.tolist(), strict=True)) == expected
    assert (places.ends == np.array(counts)[places.shards]).all()


@MANY
@given(streams(), integers(0, 50))
def test_a_window_is_what_a_lane_reads_together_and_no_longer_than_allowed(stream, epoch):
    first = epoch * stream.samples
    places = stream.locate(np.arange(first, first + stream.samples))
    windows: dict[tuple[int, int], set[int]] = {}
    pieces: dict[tuple[int, ...], set[int]] = {}
    for row in zip(
        places.lanes, places.windows, places.shards, places.firsts, places.ends, places.samples, strict=True
    ):
        lane, window, shard, begin, end, sample = (int(value) for value in row)
        windows.setdefault((lane, window), set()).add((shard, sample))
        pieces.setdefault((lane, window, shard, begin, end), set()).add(sample)
    assert max(map(len, windows.values())) <= stream.window
    for (_, _, _, begin, end), read in pieces.items():
        assert read == set(range(begin, end))
    for lane in range(stream.lanes):
        assert (np.diff(places.windows[places.lanes == lane]) >= 0).all()


def test_each_rank_reads_windows_of_its_own_if_the_numbers_divide():
    stream = Stream(np.full(5, 37), lanes=16, window=8, seed=3)
    readers: dict[tuple[int, int], set[int]] = {}
    for first, size in plan.batches(0, 3 * stream.samples, 32):
        for rank in range(4):
            share = plan.training_share(first, size, lanes=16, rank=rank, world_size=4)
            places = stream.locate(share)
            for key in zip(places.lanes.tolist(), places.windows.tolist(), strict=True):
                if size == 32:
                    readers.setdefault(key, set()).add(rank)
    assert all(len(ranks) == 1 for ranks in readers.values())


def test_epochs_differ_and_seeds_differ():
    stream = Stream(np.array([20, 30]), lanes=8, window=16, seed=1)
    epochs = [samples(stream, 50 * epoch, 50 * epoch + 50) for epoch in range(20)]
    other = samples(Stream(np.array([20, 30]), lanes=8, window=16, seed=2), 0, 50)
    assert len({tuple(epoch) for epoch in [*epochs, other]}) == 21


def test_the_order_of_a_run_never_changes_with_a_version():
    stream = Stream(np.array([7, 0, 5, 11]), lanes=4, window=5, seed=42)
    recorded = "0:6 3:4 2:1 0:1 2:1 2:3 3:7 0:0 0:5 2:2 3:5 3:10"
    assert " ".join(f"{shard}:{sample}" for shard, sample in samples(stream, 20, 32)) == recorded


@pytest.mark.parametrize(("shards", "lanes", "window"), [(1, 32, 64), (4, 32, 64), (70, 64, 128)])
def test_shuffling_is_close_to_a_full_shuffle(shards, lanes, window):
    """Places in two epochs are uncorrelated, and each shard is spread over the whole epoch."""
    total = 7000
    stream = Stream(np.full(shards, total // shards), lanes=lanes, window=window, seed=5)
    ranks = np.empty((6, total))
    for epoch in range(6):
        places = stream.locate(np.arange(epoch * total, (epoch + 1) * total))
        ranks[epoch, places.shards * (total // shards) + places.samples] = np.arange(total)
    correlations = np.corrcoef(ranks)[~np.eye(6, dtype=bool)]
    # Between epochs of a full shuffle it is within 0.012 of 0 in two cases of three.
    assert np.abs(correlations).mean() < 0.1
    if shards == 1:
        return
    places = stream.locate(np.arange(total))
    spread = np.array([np.std(np.flatnonzero(places.shards == shard)) for shard in range(shards)])
    assert spread.mean() > (0.25 if shards < lanes else 0.05) * total / np.sqrt(12)


@pytest.mark.parametrize(
    ("batch_size", "lanes"), [(1, 1), (6, 6), (64, 64), (96, 48), (128, 64), (131, 44), (200, 50)]
)
def test_lanes_make_a_batch_or_nearly_divide_it(batch_size, lanes):
    assert plan.default_lanes(batch_size) == lanes


def test_a_plan_for_a_hundred_million_samples_is_lazy():
    stream = Stream(np.full(100_000, 1000), lanes=64, window=128, seed=1)
    places = stream.locate(np.arange(10**10, 10**10 + 64))
    assert len(set(places.shards.tolist())) > 50
