"""What the tracker of a training in this process met: without it nobody knows that a fault was one.

A server can be killed and started again between two deliveries, and a training that notices
nothing of it has survived nothing.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from pipeline.training.courier import BackgroundCourier
from pipeline.training.pace import Pace
from pipeline.training.tracking import RunTracker


@dataclass
class Witness:
    """Everything that was seen, in order."""

    call_seconds: list[float] = field(default_factory=list)
    """Of each call that the training made of its tracker."""
    answer_seconds: list[float] = field(default_factory=list)
    """Of each request that MLflow answered in time."""
    errors: list[Exception] = field(default_factory=list)
    """Of each delivery that went wrong."""


@contextmanager
def witnessed() -> Iterator[Witness]:
    """Meanwhile trackers of this process are watched, and used as ever."""
    seen = Witness()

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                seen.call_seconds.append(time.perf_counter() - began)

        return measured

    went_wrong, answered = BackgroundCourier._went_wrong, Pace.answered

    def noting_errors(courier: BackgroundCourier, error: Exception) -> float:
        seen.errors.append(error)
        return went_wrong(courier, error)

    def noting_answers(pace: Pace, seconds: float) -> None:
        seen.answer_seconds.append(seconds)
        answered(pace, seconds)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("log", "picture", "tag", "status"):
            patch.setattr(RunTracker, name, timed(getattr(RunTracker, name)))
        patch.setattr(BackgroundCourier, "_went_wrong", noting_errors)
        patch.setattr(Pace, "answered", noting_answers)
        yield seen
