"""The rows of `make faults-data` with few injections each."""

from collections.abc import Iterator

import pytest

from tests.faults.data import ROWS
from tests.faults.injection import Place, places

pytestmark = pytest.mark.campaign


@pytest.fixture(scope="module")
def each(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Place]]:
    with places(tmp_path_factory.mktemp("faults"), seed=1, short=True) as each:
        yield each


@pytest.mark.parametrize("name", ROWS)
def test_everything_that_is_tried_is_survived(name: str, each: Iterator[Place]) -> None:
    row = ROWS[name](next(each))
    assert row.id == name
    assert row.tried > 0
    assert row.survived == row.tried, "\n".join(row.broken)
