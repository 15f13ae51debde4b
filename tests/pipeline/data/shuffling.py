"""How good a shuffle is: a few numbers, each set against a full shuffle of the same samples.

All take `orders` (E, N): the samples, numbered shard after shard, by their turn in E epochs
that follow each other, and return 1 (or, of a correlation, 0) for full shuffles.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.data.plan import Stream

Orders = NDArray[np.int64]


def orders_of(stream: Stream, epochs: int) -> Orders:
    """The first epochs of a stream."""
    places = stream.locate(np.arange(epochs * stream.samples))
    before = np.cumsum(stream.counts) - stream.counts
    return (before[places.shards] + places.samples).reshape(epochs, stream.samples)


def full_shuffles(samples: int, epochs: int, seed: int = 0) -> Orders:
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(samples) for _ in range(epochs)])


def turns(orders: Orders) -> Orders:
    """(E, N) when each sample's turn comes."""
    return np.argsort(orders, axis=1)


def rank_correlation(orders: Orders) -> float:
    """Spearman's, of the samples' turns in one epoch and the next: root of the mean square.

    A full shuffle of N samples has 1 / sqrt(N - 1). What comes late comes late again: 1.
    """
    when = turns(orders)
    pairs = [np.corrcoef(one, other)[0, 1] for one, other in pairwise(when)]
    return float(np.sqrt(np.mean(np.square(pairs))))


def spread(orders: Orders, counts: NDArray[np.int64]) -> float:
    """Standard deviation of the turns of a shard's samples, as a share of a full shuffle's.

    Mean over shards; 0 if each shard is read in one go.
    """
    when, samples = turns(orders), orders.shape[1]
    parts = [part for part in np.split(when, np.cumsum(counts)[:-1], axis=1) if part.shape[1] > 1]
    return float(np.mean([part.std(axis=1, ddof=1).mean() for part in parts]) / (samples / np.sqrt(12)))


def shards_per_batch(orders: Orders, counts: NDArray[np.int64], batch_size: int) -> float:
    """Different shards in a batch, as a share of those in batches of full shuffles.

    More than 1 is possible: the lanes of a batch begin at places far from each other.
    """
    shard_of = np.repeat(np.arange(len(counts)), counts)

    def mean_shards(some: Orders) -> float:
        whole = some[:, : some.shape[1] // batch_size * batch_size].reshape(-1, batch_size)
        return float(np.mean([len(np.unique(shard_of[batch])) for batch in whole]))

    return mean_shards(orders) / mean_shards(full_shuffles(orders.shape[1], len(orders)))


def distance_of_neighbours(orders: Orders) -> float:
    """How many turns lie between samples that are stored beside each other, as a share of N / 3."""
    when = turns(orders)
    return float(np.abs(np.diff(when, axis=1)).mean() / (orders.shape[1] / 3))


def same_company(groups: Orders) -> float:
    """How often two members of a group are in one group again an epoch later, relative to chance.

    `groups` (E, K): the group, such as batch or lane, of each of K samples in each epoch.
    """
    again = expected = 0.0
    for one, other in pairwise(groups):
        together = one * (int(groups.max()) + 1) + other
        counts = [np.unique(each, return_counts=True)[1] for each in (together, one, other)]
        pairs = [float((count * (count - 1) / 2).sum()) for count in counts]
        again += pairs[0]
        expected += pairs[1] * pairs[2] / (groups.shape[1] * (groups.shape[1] - 1) / 2)
    return again / expected


def batches_of(orders: Orders, batch_size: int) -> Orders:
    """(E, N) the batch of each sample."""
    return turns(orders) // batch_size


def lanes_of(orders: Orders, lanes: int) -> Orders:
    """(E, N) the lane of each sample: which of the samples `lanes` turns away it shares."""
    epochs, samples = orders.shape
    return (turns(orders) + np.arange(epochs)[:, None] * samples) % lanes


def same_lane(orders: Orders, lanes: int) -> float:
    """How often a sample is in the same lane again an epoch later, relative to chance."""
    found = lanes_of(orders, lanes)
    return float((found[1:] == found[:-1]).mean() * lanes)
