"""Rows of `make faults` that are quick, with few injections each; all rows in full are `make campaign`."""

import pytest

from tests.faults.training import ROWS
from tests.faults.training_runs import place


@pytest.mark.parametrize("name", ["save", "flip"])
def test_everything_that_is_tried_is_survived(name: str) -> None:
    with place(seed=1, short=True) as here:
        row = ROWS[name](here)
    assert row.tried > 0
    assert row.survived == row.tried, "\n".join(row.broken)
