"""The plan shuffles nearly as well as a full shuffle, and each of its steps is needed for that.

Limits are set between what the plan reaches and what it reaches with one step left out, which
the last test leaves out. What a full shuffle has is exact: 1, or 0 of a correlation.
"""

import numpy as np
import pytest

from pipeline.data import plan
from pipeline.data.plan import Stream
from tests.pipeline.data.shuffling import (
    Orders,
    batches_of,
    distance_of_neighbours,
    full_shuffles,
    lanes_of,
    orders_of,
    rank_correlation,
    same_company,
    same_lane,
    shards_per_batch,
    spread,
)

EPOCHS = 40
DATA_SETS = {
    "one shard": [3500],
    "four shards": [875] * 4,
    "a prime number of shards": [50] * 71,
    "uneven shards": [2000, 3, 1, 0, 750, *[40] * 20],
}
LANES, WINDOW = 32, 32


def shortcomings(orders: Orders, counts: np.ndarray) -> set[str]:
    """Which limits an order of EPOCHS epochs exceeds."""
    heads = (np.cumsum(counts) - counts)[counts > 0]
    # Windows of w samples in C lanes keep samples stored side by side within w C turns.
    reach = min(WINDOW * LANES / orders.shape[1], 1.0)
    limits = {
        "rank correlation": rank_correlation(orders) < 0.12,
        "spread": spread(orders, counts) > 0.55,
        "shards per batch": len(counts) == 1 or shards_per_batch(orders, counts, LANES) > 0.9,
        "distance of neighbours": distance_of_neighbours(orders) > 0.7 * reach,
        "company in batches": same_company(batches_of(orders, LANES)) < 1.3,
        "company of shards": len(heads) < 20 or same_company(lanes_of(orders, LANES)[:, heads]) < 2,
        "same lane": same_lane(orders, LANES) < 5,
    }
    return {name for name, holds in limits.items() if not holds}


def planned(counts: np.ndarray) -> Orders:
    return orders_of(Stream(counts, lanes=LANES, window=WINDOW, seed=5), EPOCHS)


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_the_plan_is_close_to_a_full_shuffle(data_set):
    counts = np.array(DATA_SETS[data_set])
    assert shortcomings(planned(counts), counts) == set()


def test_a_full_shuffle_is_a_full_shuffle():
    counts = np.array(DATA_SETS["four shards"])
    orders = full_shuffles(3500, EPOCHS)
    assert shortcomings(orders, counts) == set()
    assert rank_correlation(orders) == pytest.approx(1 / np.sqrt(3499), rel=0.3)
    for measure in (
        spread(orders, counts),
        shards_per_batch(orders, counts, LANES),
        distance_of_neighbours(orders),
        same_company(batches_of(orders, LANES)),
        same_lane(orders, LANES),
    ):
        assert measure == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("left_out", "data_set", "found"),
    [
        ("cut", "one shard", "same lane"),
        ("windows", "one shard", "rank correlation"),
        ("windows", "uneven shards", "rank correlation"),
        ("window", "four shards", "distance of neighbours"),
        ("window", "one shard", "company in batches"),
        ("shards", "a prime number of shards", "company of shards"),
    ],
)
def test_a_plan_with_one_step_left_out_is_found_wanting(left_out, data_set, found, monkeypatch):
    shuffle, words = plan.permutation, plan.words
    if left_out == "cut":
        monkeypatch.setattr(plan, "words", lambda count, *key: words(count, *key) * np.uint64(0))
    else:
        monkeypatch.setattr(
            plan,
            "permutation",
            lambda count, *key: np.arange(count) if left_out in key else shuffle(count, *key),
        )
    counts = np.array(DATA_SETS[data_set])
    assert found in shortcomings(planned(counts), counts)


def test_a_batch_of_many_lanes_holds_many_shards():
    """At the size of the faces: 280 shards, batches of 64 and of 256 images."""
    counts = np.full(280, 250)
    orders = orders_of(Stream(counts, lanes=64, window=128, seed=1), 2)
    assert shards_per_batch(orders, counts, 64) > 1
    assert shards_per_batch(orders, counts, 256) > 0.4
    assert rank_correlation(orders) < 0.05
    assert spread(orders, counts) > 0.75
