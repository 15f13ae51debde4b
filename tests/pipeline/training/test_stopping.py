"""A run that is stopped leaves after the very update, and goes on as if it had not been."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.injecting import Injection, stop
from tests.pipeline.training.launches import Launches, assert_same
from tests.tiny_run import Home


@pytest.fixture(scope="module")
def whole(shared_home: Home, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    run = Launches(shared_home, tmp_path_factory.mktemp("whole"))
    assert run.launch() == "finished"
    assert run.last.record["best"] is not None
    return run


STOPS: dict[str, tuple[Mapping[Any, Injection], int, bool]] = {
    "between two log lines": ({8: stop}, 12, False),
    "when an evaluation falls due": ({20: stop}, 24, True),
    "in the midst of an evaluation": ({("evaluate", 24): stop}, 24, True),
    "in the midst of the last evaluation": ({("evaluate", 48): stop}, 48, True),
}


@pytest.mark.parametrize(
    "when",
    [
        pytest.param(when, marks=pytest.mark.campaign if when == "when an evaluation falls due" else ())
        for when in STOPS
    ],
)
def test_a_run_stopped_at_any_moment_is_the_uninterrupted_one_bit_for_bit(
    home: Home, tmp_path: Path, whole: Launches, when: str
) -> None:
    stops, images_seen, evaluation_due = STOPS[when]
    run = Launches(home, tmp_path)
    assert run.launch(stops) == "stopped"
    assert (run.last.images_seen, run.last.record["evaluation_due"]) == (images_seen, evaluation_due)
    assert run.launch() == "finished"
    assert_same(whole.last, run.last)
    assert run.last.metrics == whole.last.metrics
