"""Who reads what: batches, ranks, what a change of their numbers costs. For any run whatever."""

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import DrawFn, composite, integers, lists, tuples

from pipeline.data import plan
from pipeline.data.plan import Stream
from tests.pipeline.data import plan_oracle
from tests.pipeline.data.plan_cases import MANY, again, positions, samples_at, streams, world_sizes


def shares(first: int, size: int, lanes: int, world_size: int) -> list[np.ndarray]:
    """What each rank reads of one batch."""
    return [
        plan.training_share(first, size, lanes=lanes, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


# -- sharing ----------------------------------------------------------------------------


@MANY
@given(positions, integers(1, 300), integers(1, 130), world_sizes)
def test_the_ranks_of_any_world_read_just_the_batch(first, size, lanes, world_size):
    found = shares(first, size, lanes, world_size)
    assert sorted(np.concatenate(found).tolist()) == list(range(first, first + size))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert all((np.diff(share) > 0).all() for share in found)


@MANY
@given(positions, integers(0, 3000), integers(1, 300))
def test_there_are_equally_many_batches_for_all_and_they_end_at_the_stop(start, length, batch_size):
    """Batches are no rank's own: each rank takes its share of each of them."""
    batches = list(plan.batches(start, start + length, batch_size))
    assert len(batches) == -(-length // batch_size)
    assert [first for first, _ in batches] == list(range(start, start + length, batch_size))
    assert sum(size for _, size in batches) == length
    assert all(size == batch_size for _, size in batches[:-1])


@MANY
@given(integers(0, 5000), world_sizes)
def test_evaluation_reads_every_sample_once_and_pads_none(total, world_size):
    found = [plan.contiguous_share(total, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [number for share in found for number in share] == list(range(total))
    assert max(map(len, found)) - min(map(len, found)) <= 1


# -- runs that are interrupted ----------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """From one start of the workers to the next."""

    world_size: int
    batch_size: int
    saved: int
    """Batches until the checkpoint from which the next launch goes on."""
    lost: int
    """Batches after it, whose updates nobody keeps."""


@composite
def launches(draw: DrawFn) -> Launch:
    world_size = draw(world_sizes)
    batch_size = world_size + draw(integers(0, 40))
    return Launch(world_size, batch_size, draw(integers(0, 2)), draw(integers(0, 1)))


@MANY
@given(streams(), positions, lists(launches(), min_size=2, max_size=3))
def test_a_run_goes_on_exactly_whatever_the_workers_and_the_batch(stream, start, history):
    """Its history is the uninterrupted stream: nothing lost, nothing twice, across epochs too."""
    seen, learned = start, []
    for launch in history:
        fresh, read = again(stream), []
        for first, size in islice(
            plan.batches(seen, seen + 10**6, launch.batch_size), launch.saved + launch.lost
        ):
            read += shares(first, size, stream.lanes, launch.world_size)
        if read:
            taken = np.concatenate(read)
            learned += list(zip(taken.tolist(), samples_at(fresh, taken), strict=True))
        seen += launch.saved * launch.batch_size
        learned = [(position, sample) for position, sample in learned if position < seen]
    learned.sort()
    assert [position for position, _ in learned] == list(range(start, seen))
    assert [sample for _, sample in learned] == samples_at(stream, np.arange(start, seen))


def test_an_interrupted_epoch_is_the_one_that_was_planned():
    """The same against the oracle, over three epochs with every kind of launch."""
    counts, seen, learned = [13, 0, 40, 1, 29], 0, {}
    for world_size, batch_size, batches in ((1, 7, 3), (16, 24, 2), (3, 6, 9), (5, 5, 11), (64, 100, 1)):
        stream = Stream(np.array(counts), lanes=12, window=8, seed=9)
        for first, size in islice(plan.batches(seen, 10**6, batch_size), batches):
            for share in shares(first, size, 12, world_size):
                learned |= dict(zip(share.tolist(), samples_at(stream, share), strict=True))
        seen += batch_size * batches
    expected = plan_oracle.reads(counts, lanes=12, window=8, seed=9, start=0, stop=seen)
    assert [learned[position] for position in range(seen)] == [(read.shard, read.sample) for read in expected]
    assert seen > 3 * sum(counts)


# -- what it costs ----------------------------------------------------------------------


def wander(batch_size: int, lanes: int) -> int:
    """How many lanes further a cut between two ranks may fall in another batch."""
    rest = batch_size % lanes
    return math.ceil(2 * rest * (lanes - rest) / batch_size)


def most_lanes_read(batch_size: int, lanes: int, world_size: int) -> int:
    """The bound in plan.py on the lanes that all ranks read together, each counting its own."""
    if batch_size % lanes == 0:
        return lanes + world_size - math.gcd(lanes, world_size)
    return lanes + (world_size - 1) * (1 + wander(batch_size, lanes))


def most_lanes_of_a_rank(batch_size: int, lanes: int, world_size: int) -> int:
    rest = batch_size % lanes
    share = math.ceil(batch_size / world_size)
    return 1 + math.ceil((share * lanes + 2 * rest * (lanes - rest)) / batch_size)


@composite
def worlds(draw: DrawFn) -> tuple[int, int, int]:
    """(batch size, lanes, ranks): often with lanes that divide the batch, or the default."""
    world_size = draw(world_sizes)
    batch_size = draw(integers(world_size, 200))
    kind = draw(integers(0, 2))
    if kind == 0:
        return batch_size, plan.default_lanes(batch_size), world_size
    lanes = draw(integers(1, 70))
    if kind == 1:
        return lanes * -(-batch_size // lanes), lanes, world_size
    return batch_size, lanes, world_size


@MANY
@given(worlds(), positions, integers(1, 12))
def test_few_ranks_share_a_lane(world, start, batches):
    batch_size, lanes, world_size = world
    readers = set()
    for number in range(batches):
        for rank, share in enumerate(shares(start + number * batch_size, batch_size, lanes, world_size)):
            readers |= {(rank, lane) for lane in (share % lanes).tolist()}
    assert len(readers) <= most_lanes_read(batch_size, lanes, world_size)
    ranks = [rank for rank, _ in readers]
    assert max(map(ranks.count, set(ranks))) <= most_lanes_of_a_rank(batch_size, lanes, world_size)


@MANY
@given(streams(), tuples(integers(0, 100), integers(1, 12), integers(0, 20)), positions, integers(1, 9))
def test_an_epoch_is_fetched_as_often_as_its_lanes_are_shared(stream, sizes, start, piece):
    """In samples, by parts of windows as the reader fetches them, held until the lane's next window."""
    more, world_size, later = sizes
    batch_size, epoch = world_size + more, start // stream.samples + 1
    first, stop = epoch * stream.samples, (epoch + 1) * stream.samples
    begin = first - later % batch_size
    places = stream.locate(np.arange(begin, stop + batch_size))
    rows = np.stack(
        [places.lanes, places.windows, places.shards, places.samples // piece, places.firsts, places.ends]
    ).T.tolist()
    fetched, readers = {}, defaultdict(set)
    for at in range(begin, stop, batch_size):
        for rank, share in enumerate(shares(at, batch_size, stream.lanes, world_size)):
            for position in share.tolist():
                lane, _, _, part, low, high = row = rows[position - begin]
                readers[lane].add(rank)
                if first <= position < stop:
                    pieces = (max(part * piece, low), min((part + 1) * piece, high))
                    fetched[(rank, *row)] = pieces[1] - pieces[0]
    bound = most_lanes_read(batch_size, stream.lanes, world_size)
    longest = -(-stream.samples // stream.lanes)
    assert stream.samples <= sum(fetched.values()) <= longest * sum(map(len, readers.values()))
    assert sum(map(len, readers.values())) <= bound


def test_each_rank_reads_windows_of_its_own_if_the_numbers_divide():
    stream = Stream(np.full(5, 37), lanes=16, window=8, seed=3)
    readers = defaultdict(set)
    for first, size in islice(plan.batches(5, 10**6, 32), 20):
        for rank, share in enumerate(shares(first, size, 16, 4)):
            places = stream.locate(share)
            for window in zip(places.lanes.tolist(), places.windows.tolist(), strict=True):
                readers[window].add(rank)
    assert all(len(ranks) == 1 for ranks in readers.values())


@pytest.mark.parametrize(
    ("batch_size", "lanes"), [(1, 1), (6, 6), (61, 61), (64, 64), (96, 48), (128, 64), (131, 44), (200, 50)]
)
def test_lanes_make_a_batch_or_nearly_divide_it(batch_size, lanes):
    assert plan.default_lanes(batch_size) == lanes


def test_no_batch_size_has_few_lanes_or_many_readers_of_one():
    for batch_size in range(1, 3000):
        lanes = plan.default_lanes(batch_size)
        assert min(batch_size, 33) <= lanes <= 64
        assert wander(batch_size, lanes) <= 1
