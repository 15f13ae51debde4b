"""Random numbers that stay the same: on every machine, in every version of numpy.

The order of samples is part of a run's identity and portraits are part of a data set's, so
neither may change with a library. numpy guarantees that for its raw generators but not for what
they are turned into, hence SplitMix64 under a BLAKE2 key: a pure function of (key, number).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def words(count: int, *key: int | str) -> Words:
    """(count,) random 64-bit words: the beginning of `key`'s sequence."""
    return words_at(np.arange(count, dtype=np.int64), *key)


def words_at(numbers: Integers, *key: int | str) -> Words:
    """The words with the given numbers (b,) in `key`'s sequence."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    state = np.frombuffer(digest, "<u8")[0] + (numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = state ^ (state >> np.uint64(31))
    return mixed


def uniform(count: int, *key: int | str) -> NDArray[np.float64]:
    """(count,) numbers in [0, 1) with 53 random bits."""
    return (words(count, *key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *key: int | str) -> Integers:
    """A random order of 0 ... count - 1."""
    if count < 2:
        return np.arange(count, dtype=np.int64)
    return np.argsort(words(count, *key), kind="stable").astype(np.int64)
