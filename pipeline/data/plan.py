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
4. A global batch is the next B positions. Sorted by (lane, position) it is cut into W contiguous
   shares that differ by one position at most; rank r takes the r-th. So neighbouring lanes go to
   the same rank, whatever B, W and the position at which a run was resumed.

How often a sample is fetched: what a rank fetches at once ends where the window does, and a rank
fetches a window's parts once (the few exceptions are in reader.py). So a window is fetched as
often as there are ranks that read its lane. With m = B mod C, over all batches of B together,
from whatever position,

    lanes read, summed over ranks  <=  C + (W - 1) (1 + ceil(2 m (C - m) / B)),

or C + W - gcd(C, W) if C divides B: then every batch holds each lane B / C times, the cuts fall on
the same slots of the same lanes always, and only the lanes with a cut inside have a second
reader; with W dividing C nothing is fetched twice. Otherwise the number of a batch's positions
in the lanes before a lane differs from its mean by m (C - m) / C at most, which is how far a cut
may wander. A lane has ceil(N / C) samples of an epoch at most; so that many times the bound is the
most samples that all ranks fetch for an epoch: fewer than 2 (N + C) while W <= C and C divides B.
If there is one lane every rank fetches everything: hence `default_lanes`. A resumed run fetches
the current window of each lane once more.

Memory: a rank reads at most 1 + ceil(ceil(B / W) C / B + 2 m (C - m) / B) lanes, and holds of each
what is left of a window of w samples.

Everything is computed when it is asked for. An epoch costs one permutation of its shards and, for
each lane that is asked for, one of its windows: 16 S + 8 N / w bytes, of two epochs at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pipeline.data.randomness import Integers, permutation, words

# S shards; N samples; C lanes; w samples of a window; B images of a global batch; W ranks;
# b positions asked for at once; V windows of one lane in one epoch.
MOST_LANES = 64
_NO_ORDER = ((-1, -1), np.zeros(0, np.int64))


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
    window_places: dict[int, Integers] = field(default_factory=dict)
    """Of each lane asked for, (V,) where in its segment each window begins, by the order of visits."""


@dataclass(frozen=True)
class _Visits:
    """When in its lane's epoch each position's turn comes; all arrays (b,)."""

    numbers: Integers
    """Number of the window in the order of visits."""
    sizes: Integers
    """Samples of that window."""
    steps: Integers
    """How many samples of the window come before."""
    first_sizes: Integers
    """Samples of the lane's first window."""


class Stream:
    """The endless training stream over shards with the given numbers of samples."""

    def __init__(self, samples_per_shard: Integers, *, lanes: int, window: int, seed: int) -> None:
        """`samples_per_shard` is (S,); at least one sample is needed."""
        self.counts = samples_per_shard.astype(np.int64)
        self.samples = int(self.counts.sum())
        self.lanes, self.window, self.seed = lanes, window, seed
        if self.samples < 1 or lanes < 1 or window < 1:
            raise ValueError(f"no stream over {self.samples} samples, {lanes} lanes, windows of {window}")
        self._epochs: dict[int, _Epoch] = {}
        self._orders: dict[int, tuple[tuple[int, int], Integers]] = {}

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
        visits = self._visits(lanes, lengths, (positions - epoch * self.samples) // self.lanes)
        begins, places = self._in_the_segment(epoch, lanes, lengths, visits)
        begins += segments
        shards, samples, firsts, ends = self._on_the_ring(
            epoch, segments + places, begins, begins + visits.sizes
        )
        # More windows than one lane can have in an epoch lie between two epochs' numbers.
        numbers = epoch * (self.samples + 2) + visits.numbers
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

    def _visits(self, lanes: Integers, lengths: Integers, steps: Integers) -> _Visits:
        """The turns of lanes' positions; `steps` counts them from the lane's first in the epoch."""
        w = self.window
        staggered = np.minimum(1 + (lanes * w) // self.lanes, w)
        first_sizes = np.where(lengths <= w, lengths, staggered)
        numbers = np.where(steps < first_sizes, 0, 1 + (steps - first_sizes) // w)
        done = np.where(numbers == 0, 0, first_sizes + (numbers - 1) * w)
        sizes = np.where(numbers == 0, first_sizes, np.minimum(w, lengths - done))
        return _Visits(numbers, sizes, steps - done, first_sizes)

    def _in_the_segment(
        self, epoch: int, lanes: Integers, lengths: Integers, visits: _Visits
    ) -> tuple[Integers, Integers]:
        """Where in the lanes' segments the windows begin, and where the samples are; both (b,)."""
        windows = lanes * (self.samples + 2) + visits.numbers
        _, members, groups = np.unique(windows, return_index=True, return_inverse=True)
        begins, orders = np.empty(len(members), np.int64), []
        rows = (lanes, lengths, visits.numbers, visits.sizes, visits.first_sizes)
        for group, row in enumerate(zip(*(values[members].tolist() for values in rows), strict=True)):
            lane, length, number, size, first_size = row
            begins[group] = self._window_places(epoch, lane, length, first_size)[number]
            orders.append(self._window_order(epoch, lane, number, size))
        sizes = visits.sizes[members]
        before = np.cumsum(sizes) - sizes
        shuffled = np.concatenate(orders)[before[groups] + visits.steps]
        return begins[groups], begins[groups] + shuffled

    def _window_places(self, epoch: int, lane: int, length: int, first_size: int) -> Integers:
        """(V,) where in the lane's segment of `length` samples each window begins."""
        known = self._epoch(epoch).window_places
        if lane not in known:
            later = -(-(length - first_size) // self.window)
            sizes = np.full(1 + later, self.window, np.int64)
            sizes[0] = first_size
            if later:
                sizes[-1] = length - first_size - (later - 1) * self.window
            order = permutation(len(sizes), "windows", self.seed, epoch, lane)
            begins = np.empty_like(sizes)
            begins[order] = np.cumsum(sizes[order]) - sizes[order]
            known[lane] = begins
        return known[lane]

    def _window_order(self, epoch: int, lane: int, number: int, size: int) -> Integers:
        """(size,) the order of a window's samples; that of the window last asked for is kept."""
        known, order = self._orders.get(lane, _NO_ORDER)
        if known != (epoch, number):
            order = permutation(size, "window", self.seed, epoch, lane, number)
            self._orders[lane] = (epoch, number), order
        return order

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
            order = permutation(len(self.counts), self.seed, "shards", epoch)
            starts = np.concatenate([[0], np.cumsum(self.counts[order])])
            cut = int(words(1, self.seed, "cut", epoch)[0] % np.uint64(self.samples))
            # The batch that ends an epoch begins the next; nobody goes back.
            for old in sorted(self._epochs)[:-1]:
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
    """As many lanes as make a batch, or so many of 33 to 64 that few are read by several ranks.

    They divide the batch if possible. If not, the cuts between ranks wander by one lane at most,
    so that W ranks read at most 2 (W - 1) lanes more than there are.
    """
    if batch_size <= MOST_LANES:
        return batch_size

    def wander(lanes: int) -> int:
        rest = batch_size % lanes
        return -(-2 * rest * (lanes - rest) // batch_size)

    return min(range(MOST_LANES, MOST_LANES // 2, -1), key=wander)


def batches(start: int, stop: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """First position and size of each global batch in [start, stop); only the last may be smaller."""
    for first in range(start, stop, batch_size):
        yield first, min(batch_size, stop - first)


def training_share(first: int, size: int, *, lanes: int, rank: int, world_size: int) -> Integers:
    """The positions of the batch [first, first + size) that are `rank`'s, ascending.

    Shares of all ranks are disjoint, make up the batch, and differ by one position at most.
    """
    positions = np.arange(first, first + size, dtype=np.int64)
    by_lane = np.argsort(positions % lanes, kind="stable")
    share = contiguous_share(size, rank=rank, world_size=world_size)
    return np.sort(positions[by_lane[share.start : share.stop]])


def contiguous_share(total: int, *, rank: int, world_size: int) -> range:
    """`rank`'s part of 0 ... total - 1; parts follow each other and differ by one at most."""
    return range(total * rank // world_size, total * (rank + 1) // world_size)
