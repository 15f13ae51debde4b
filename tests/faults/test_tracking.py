"""Outages of MLflow under a real training."""

from collections.abc import Iterator

import pytest

from tests.faults.tracking_faults import SCENARIOS, Place, attempt, places

pytestmark = pytest.mark.campaign


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with places(tmp_path_factory.mktemp("tracking"), seed=1) as place:
        yield place


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_mlflow_has_every_point_once_in_the_end(scenario, place: Place) -> None:
    counts = attempt(place, scenario)
    assert counts.broken == []
    assert (counts.survived, counts.lost, counts.doubled) == (1, 0, 0)
    assert counts.points > 200
