"""Who reads which sample when: pure functions of (index, seed, lanes, shuffle window).

The training stream is one endless line of positions P = 0, 1, 2, ...; `images_seen` is P.
Epoch e is P in [eN, (e+1)N) of N samples. Neither the number of workers nor the batch size
enters, so a run may continue anywhere, on any number of workers, and nothing is repeated or
left out. A batch may straddle two epochs: there is no tail.

1. In each epoch the shards are permuted and laid end to end to a ring of N samples, which is
   cut open at a random place. (Without that cut the pieces of a data set of one or two shards
   would hold the same samples in every epoch.)
2. The line is cut into C contiguous segments, one for each lane; position P belongs to lane
   P mod C, always. Any C consecutive positions come from C distant places.
3. A lane cuts its segment into windows of w consecutive samples, visits them in random order,
   and shuffles the samples of each. A window is read as a few byte ranges, so requests are large
   and memory is bounded. Lanes end their first windows at different times; otherwise all would
   fetch their next one at the same moment.
4. A global batch is the next B positions. If W divides C and C divides B, rank r takes the
   lanes [rC/W, (r+1)C/W), and each window is read by one rank. Otherwise each rank takes a
   contiguous share of the batch, and a window may be read by up to W ranks.

Everything is computed when it is asked for; an epoch costs one permutation of its shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.data.randomness import Integers, permutation, words

# S shards; N samples; C lanes; w samples of a window; B images of a global batch; W ranks;
# b positions asked for at once.
MOST_LANES = 64


@dataclass(frozen=True)
class Places:
    """Where the samples at some positions are; all arrays (b,)."""

    shards: Integers
    """Number of the shard in the split."""
    samples: Integers
    """Number of the sample in the shard."""
    lanes: Integers
    windows: Integers
    """Number of the window in the lane's endless sequence of windows: equal for samples that
    are read together, and never falling along a lane."""
    firsts: Integers
    """First sample of the same shard that belongs to the window."""
    ends: Integers
    """One past the last such sample."""


@dataclass(frozen=True)
class _Epoch:
    """One epoch's line of samples. Line places count from the cut."""

    order: Integers
    """(S,) shard numbers along the ring."""
    starts: Integers
    """(S + 1,) ring place at which each of them begins; the last is N."""
    cut: int
    """Ring place of the line's beginning."""


class Stream:
    """The endless training stream over shards with the given numbers of samples."""

    def __init__(self, samples_per_shard: Integers, *, lanes: int, window: int, seed: int) -> None:
        """`samples_per_shard` is (S,); at least one sample is needed."""
        self._counts = samples_per_shard.astype(np.int64)
        self.samples = int(self._counts.sum())
        self.lanes, self.window, self.seed = lanes, window, seed
        if self.samples < 1 or lanes < 1 or window < 1:
            raise ValueError(f"no stream over {self.samples} samples, {lanes} lanes, windows of {window}")
        self._epochs: dict[int, _Epoch] = {}

    def locate(self, positions: Integers) -> Places:
        """Where the samples at `positions` (b,) are."""
        places = np.empty((6, len(positions)), np.int64)
        epochs = positions // self.samples
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            places[:, chosen] = self._locate_in_epoch(int(epoch), positions[chosen])
        return Places(*places)

    def _locate_in_epoch(self, epoch: int, positions: Integers) -> Integers:
        """(6, b) rows of Places for positions of one epoch."""
        lanes = positions % self.lanes
        segments, lengths = self._segments(epoch, lanes)
        first_position = epoch * self.samples
        steps = (positions - first_position) // self.lanes
        windows = self._windows(lanes, lengths, steps)
        line = np.empty_like(positions)
        begins = np.empty_like(positions)
        for i in range(len(positions)):
            number, size, step, first_size = (int(row[i]) for row in windows)
            key = (self.seed, epoch, int(lanes[i]))
            places = _window_places(key, int(lengths[i]), first_size, self.window)
            begins[i] = segments[i] + places[number]
            line[i] = begins[i] + _window_order(key, number, size)[step]
        shards, samples, firsts, ends = self._on_the_ring(epoch, line, begins, begins + windows[1])
        # More windows than one lane can have in an epoch lie between two epochs' numbers.
        numbers = epoch * (self.samples + 2) + windows[0]
        return np.stack([shards, samples, lanes, numbers, firsts, ends])

    def _segments(self, epoch: int, lanes: Integers) -> tuple[Integers, Integers]:
        """Line place and length of each lane's segment: as many samples as it has positions."""
        shortest, longer = divmod(self.samples, self.lanes)
        # The first `longer` lanes from the epoch's first position on, cyclically, have one more.
        first_lane = (epoch * self.samples) % self.lanes
        has_more = (lanes - first_lane) % self.lanes < longer
        wrapped = max(first_lane + longer - self.lanes, 0)
        before = np.minimum(lanes, wrapped) + np.clip(lanes - first_lane, 0, longer - wrapped)
        return lanes * shortest + before, shortest + has_more.astype(np.int64)

    def _windows(self, lanes: Integers, lengths: Integers, steps: Integers) -> Integers:
        """(4, b): number of the window in the order of visits, its size, the step within it, and
        the size of the lane's first window."""
        w = self.window
        staggered = np.minimum(1 + (lanes * w) // self.lanes, w)
        first_sizes = np.where(lengths <= w, lengths, staggered)
        numbers = np.where(steps < first_sizes, 0, 1 + (steps - first_sizes) // w)
        done = np.where(numbers == 0, 0, first_sizes + (numbers - 1) * w)
        sizes = np.where(numbers == 0, first_sizes, np.minimum(w, lengths - done))
        return np.stack([numbers, sizes, steps - done, first_sizes])

    def _on_the_ring(
        self, epoch: int, line: Integers, begin: Integers, end: Integers
    ) -> tuple[Integers, Integers, Integers, Integers]:
        """Shard, sample, and the window's first and end sample in that shard, from line places."""
        layout = self._epoch(epoch)
        ring = (line + layout.cut) % self.samples
        slots = np.searchsorted(layout.starts, ring, side="right") - 1
        starts, stops = layout.starts[slots], layout.starts[slots + 1]
        samples = ring - starts
        # The window reaches so far back and forward of this sample, but not beyond its shard.
        firsts = np.maximum(samples - (line - begin), 0)
        ends = np.minimum(samples + (end - line), stops - starts)
        return layout.order[slots], samples, firsts, ends

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            order = permutation(len(self._counts), self.seed, "shards", epoch)
            starts = np.concatenate([[0], np.cumsum(self._counts[order])])
            cut = int(words(1, self.seed, "cut", epoch)[0] % np.uint64(self.samples))
            # A batch straddles two epochs at most, and prefetching runs a little ahead.
            for old in sorted(self._epochs)[:-3]:
                del self._epochs[old]
            self._epochs[epoch] = _Epoch(order, starts, cut)
        return self._epochs[epoch]


def locate_in_order(samples_per_shard: Integers, numbers: Integers) -> Places:
    """Where the samples with these numbers (b,) are when a split is read from end to end, by one lane."""
    starts = np.concatenate([[0], np.cumsum(samples_per_shard)])
    shards = np.searchsorted(starts, numbers, side="right") - 1
    zeros = np.zeros_like(numbers)
    return Places(shards, numbers - starts[shards], zeros, shards, zeros, samples_per_shard[shards])


# --- who reads what ---------------------------------------------------------------------------


def default_lanes(batch_size: int) -> int:
    """The largest divisor of the batch size up to 64."""
    return max(lanes for lanes in range(1, min(batch_size, MOST_LANES) + 1) if batch_size % lanes == 0)


def batches(start: int, stop: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """First position and size of each global batch in [start, stop); only the last may be smaller."""
    for first in range(start, stop, batch_size):
        yield first, min(batch_size, stop - first)


def training_share(first: int, size: int, *, lanes: int, rank: int, world_size: int) -> Integers:
    """The positions of the batch [first, first + size) that are `rank`'s, ascending.

    Shares of all ranks are disjoint, make up the batch, and differ by one position at most.
    """
    positions = np.arange(first, first + size, dtype=np.int64)
    if lanes % world_size == 0 and size % lanes == 0:
        owners = (positions % lanes) // (lanes // world_size)
        mine: Integers = positions[owners == rank]
        return mine
    share = contiguous_share(size, rank=rank, world_size=world_size)
    return positions[share.start : share.stop]


def contiguous_share(total: int, *, rank: int, world_size: int) -> range:
    """`rank`'s part of 0 ... total - 1; parts follow each other and differ by one at most."""
    return range(total * rank // world_size, total * (rank + 1) // world_size)


@lru_cache(maxsize=4 * MOST_LANES)
def _window_places(key: tuple[int, ...], length: int, first_size: int, window: int) -> Integers:
    """Where in a segment of `length` samples each window begins, by the order of visits."""
    later = -(-(length - first_size) // window)
    sizes = np.full(1 + later, window, np.int64)
    sizes[0] = first_size
    if later:
        sizes[-1] = length - first_size - (later - 1) * window
    order = permutation(len(sizes), "windows", *key)
    begins = np.empty_like(sizes)
    begins[order] = np.cumsum(sizes[order]) - sizes[order]
    return begins


@lru_cache(maxsize=4 * MOST_LANES)
def _window_order(key: tuple[int, ...], window: int, size: int) -> Integers:
    return permutation(size, "window", *key, window)
