"""Drawn portraits: the same for ever, and unlike each other."""

import hashlib

import numpy as np

from pipeline.data.portraits import portrait


def test_portraits_are_the_same_on_every_machine_for_ever():
    drawn = b"".join(portrait(seed, 48).tobytes() for seed in range(8))
    assert hashlib.sha256(drawn).hexdigest() == (
        "12c9591413ef06af8a8992d9577177e8c9837fde5739d98b22bbaee7e8ffebc8"
    )


def test_a_portrait_looks_alike_at_every_size():
    large, small = portrait(3, 256).astype(float), portrait(3, 64).astype(float)
    averaged = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(averaged - small).mean() < 3


def test_people_differ_in_more_than_a_few_pixels():
    people = np.stack([portrait(seed, 32).astype(float) for seed in range(40)])
    distances = np.abs(people[:, None] - people[None]).mean((2, 3, 4))
    assert distances[~np.eye(40, dtype=bool)].min() > 5


def test_eyes_are_where_eyes_are():
    # In most portraits the rows of the eyes vary more from left to right than the forehead's and cheeks'.
    people = np.stack([portrait(seed, 64).astype(float).mean(-1) for seed in range(60)])
    middle = people[:, :, 18:46]
    roughness = np.abs(np.diff(middle, axis=2)).mean((0, 2))
    assert 29 <= int(np.argmax(roughness[20:50])) + 20 <= 40
