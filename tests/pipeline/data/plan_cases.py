"""Data sets and runs as hypothesis draws them for the tests of the plan."""

import numpy as np
from hypothesis import settings
from hypothesis.strategies import DrawFn, SearchStrategy, composite, integers, lists, one_of, sampled_from

from pipeline.data.plan import Stream

MANY = settings(max_examples=500, deadline=None)
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
FAR = 10**12

positions: SearchStrategy[int] = one_of(integers(0, 2000), integers(0, FAR))
"""Images seen, near and far."""
world_sizes = integers(1, 64)


@composite
def shard_sizes(draw: DrawFn) -> list[int]:
    """Samples of each shard: few shards, a prime number of them, very uneven ones, empty ones."""
    return draw(
        one_of(
            lists(integers(1, 150), min_size=1, max_size=1),
            sampled_from(PRIMES).flatmap(lambda count: lists(integers(1, 6), min_size=count, max_size=count)),
            lists(sampled_from((0, 1, 2, 90)), min_size=1, max_size=6),
            lists(integers(0, 40), min_size=1, max_size=8),
        ).filter(any)
    )


@composite
def streams(draw: DrawFn) -> Stream:
    return Stream(
        np.array(draw(shard_sizes())),
        lanes=draw(integers(1, 70)),
        window=draw(integers(1, 50)),
        seed=draw(integers(0, 2**32 - 1)),
    )


def again(stream: Stream) -> Stream:
    """The same stream in another process."""
    return Stream(stream.counts, lanes=stream.lanes, window=stream.window, seed=stream.seed)


def samples_at(stream: Stream, positions: np.ndarray) -> list[tuple[int, int]]:
    """(shard, sample) at each of the positions."""
    places = stream.locate(positions)
    return list(zip(places.shards.tolist(), places.samples.tolist(), strict=True))
