"""The rows of `make faults` with few injections each."""

import os

import pytest

from tests.faults.training import ROWS
from tests.faults.training_runs import place

pytestmark = pytest.mark.campaign


@pytest.mark.parametrize("name", ROWS)
def test_everything_that_is_tried_is_survived(name: str) -> None:
    if name == "disk" and os.getuid() != 0:
        pytest.skip("only root may mount a disk that gets full")
    with place(seed=1, short=True) as here:
        row = ROWS[name](here)
    assert row.tried > 0
    assert row.survived == row.tried, "\n".join(row.broken)
