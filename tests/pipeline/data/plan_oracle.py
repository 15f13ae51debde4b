"""The order of samples by the text of pipeline/data/plan.py: slow, obvious, without numpy.

Everything is a list that is cut and shuffled; nothing is computed for one position alone.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

MASK = 2**64 - 1


def word(number: int, *key: int | str) -> int:
    """The word of SplitMix64 with this number, under a BLAKE2 key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    state = (int.from_bytes(digest, "little") + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def shuffled(count: int, *key: int | str) -> list[int]:
    return sorted(range(count), key=lambda number: word(number, *key))


@dataclass(frozen=True)
class Read:
    """One sample in its turn."""

    shard: int
    sample: int
    lane: int
    window: frozenset[tuple[int, int]]
    """All samples of its window."""


@dataclass(frozen=True)
class Epoch:
    counts: Sequence[int]
    lanes: int
    window: int
    seed: int
    epoch: int

    def line(self) -> list[tuple[int, int]]:
        """1: shards in random order, cut open at a random place."""
        order = shuffled(len(self.counts), self.seed, "shards", self.epoch)
        ring = [(shard, sample) for shard in order for sample in range(self.counts[shard])]
        cut = word(0, self.seed, "cut", self.epoch) % len(ring)
        return ring[cut:] + ring[:cut]

    @cached_property
    def positions(self) -> range:
        total = sum(self.counts)
        return range(self.epoch * total, (self.epoch + 1) * total)

    def segments(self) -> Iterator[list[tuple[int, int]]]:
        """2: one contiguous segment for each lane, as long as the lane has positions."""
        line = self.line()
        for lane in range(self.lanes):
            length = sum(position % self.lanes == lane for position in self.positions)
            yield line[:length]
            line = line[length:]

    def windows(self, lane: int, segment: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """3: windows in the order of visits. The first is short, the last takes what is left."""
        first = min(1 + lane * self.window // self.lanes, self.window)
        sizes = [first] if len(segment) > self.window else [len(segment)]
        while sum(sizes) < len(segment):
            sizes.append(min(self.window, len(segment) - sum(sizes)))
        cut: dict[int, list[tuple[int, int]]] = {}
        for number in shuffled(len(sizes), "windows", self.seed, self.epoch, lane):
            cut[number], segment = segment[: sizes[number]], segment[sizes[number] :]
        return [cut[number] for number in range(len(sizes))]

    def reads(self) -> list[Read]:
        """The epoch's samples by position."""
        lanes = []
        for lane, segment in enumerate(self.segments()):
            reads = []
            for number, window in enumerate(self.windows(lane, segment)):
                together = frozenset(window)
                for place in shuffled(len(window), "window", self.seed, self.epoch, lane, number):
                    reads.append(Read(*window[place], lane, together))
            lanes.append(iter(reads))
        return [next(lanes[position % self.lanes]) for position in self.positions]


def reads(
    counts: Sequence[int], *, lanes: int, window: int, seed: int, start: int, stop: int
) -> Iterator[Read]:
    """The samples at the positions start ... stop - 1."""
    total = sum(counts)
    for epoch in range(start // total, -(-stop // total)):
        whole = Epoch(counts, lanes, window, seed, epoch)
        for position, read in zip(whole.positions, whole.reads(), strict=True):
            if start <= position < stop:
                yield read
