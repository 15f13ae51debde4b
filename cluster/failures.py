"""What becomes of a start that failed: try again, or give up and say why.

A worker whose process is gone, a node that vanished, a start that found no place: such a loss
is nobody's mistake, and passes. What a worker raised, it will most likely raise again. Of
either, only so many in a row are tried without the run having come any further.
"""

from collections.abc import Callable

import ray.train
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import RayTrainError

from pipeline.errors import FailedError
from pipeline.run_folder import RunError

MAX_ERRORS = 3
"""Times in a row that an error is tried again without the run having come any further."""
MAX_LOSSES = 12
"""The same of losses; with the pauses they last a quarter of an hour."""
LONGEST_PAUSE_SECONDS = 120.0
_OF_OTHERS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
"""In the text of what a rank raises when it waits for another that is gone."""

START_FAILED = (ray.train.TrainingFailedError, RayActorError)
"""What a start of workers ends with that failed; the latter if the process that led them is gone."""


class RefusedError(Exception):
    """What a worker raises for an error that trying again does not mend; its text says what it is.

    The errors themselves may need more than a text to be unpickled on the driver.
    """

    def __init__(self, message: str, is_input: bool) -> None:
        super().__init__(message, is_input)
        self.message, self.is_input = message, is_input


class Failures:
    """Counts the starts that failed without the run coming any further."""

    def __init__(self, progress: Callable[[], int]) -> None:
        self.last = ""
        """The last one, in a few words."""
        self._progress, self._reached = progress, progress()
        self._losses = self._errors = 0
        """In a row, without the run having come any further."""

    def note(self, error: Exception, reason: str) -> float:
        """Take note of one; returns how many seconds to wait before the next start.

        `error` is one of START_FAILED; `reason` is why the workers were ended, if they were: not why
        they were asked to leave. Raises RunError or FailedError if trying again is of no use.
        """
        errors = _worker_errors(error)
        for refused in errors:
            if isinstance(refused, RefusedError):
                kind: type[Exception] = RunError if refused.is_input else FailedError
                raise kind(refused.message) from error
        own = [each for each in errors if not _is_loss(each)]
        is_loss = bool(reason) or not own
        self.last = reason or (f"A worker failed ({_in_short(own[0])})" if own else _lost(error))
        reached = self._progress()
        if reached > self._reached:
            self._losses = self._errors = 0
        self._reached = reached
        self._losses += is_loss
        self._errors += not is_loss
        in_a_row = self._losses + self._errors
        if self._losses > MAX_LOSSES or self._errors > MAX_ERRORS:
            raise FailedError(
                f"The workers failed {in_a_row} times without coming any further; the last time: "
                f"{self.last}. `nvae -v train ...` shows everything; when the cause is mended, the same "
                "command continues the run."
            ) from error
        return min(5.0 * 2 ** (in_a_row - 2), LONGEST_PAUSE_SECONDS) if in_a_row > 2 else 0.0


def _worker_errors(error: Exception) -> list[Exception]:
    """What the ranks raised, in their order; the error itself if it was none of theirs."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    return [failures[rank] for rank in sorted(failures)] or [getattr(error, "controller_failure", error)]


def _is_loss(error: Exception) -> bool:
    """Whether a rank is gone, or misses another that is."""
    return isinstance(error, RayTrainError | RayActorError) or any(text in str(error) for text in _OF_OTHERS)


def _lost(error: Exception) -> str:
    """Which ranks are gone."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    gone = [str(rank) for rank in sorted(failures) if isinstance(failures[rank], RayTrainError)]
    if gone:
        return f"Lost worker {', '.join(gone)}"
    return f"Lost a worker ({_in_short(_worker_errors(error)[0])})"


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]
