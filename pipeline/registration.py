"""Patience with MLflow where a trained model is registered: a server may be away just then.

What was trained is safe in the store by then. So a registration that cannot be delivered is no
failure of the training: the run is finished, says what it lacks, and the same command registers
the model without training again.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from pipeline import storage
from pipeline.errors import FailedError
from pipeline.models.names import RegistryError, UnreachableError
from pipeline.progress import duration
from pipeline.training.pace import pause_seconds
from pipeline.training.validation import StoppedError
from pipeline.training.worker import Worker

PATIENCE_SECONDS = 900.0
"""How long a run that is trained waits for MLflow to answer."""

Answer = TypeVar("Answer")


class NotRegisteredError(FailedError):
    """MLflow did not take a trained model; the message says why."""


class Patience:
    """One wait for MLflow, for all that a registration asks of it. On rank 0 alone."""

    def __init__(self, worker: Worker, tracking_uri: str) -> None:
        self._worker, self._tracking_uri = worker, tracking_uri
        self._failures, self._failing_since = 0, 0.0

    def ask(self, request: Callable[[], Answer]) -> Answer:
        """The answer to `request`, which is made again while it raises UnreachableError.

        Raises NotRegisteredError after PATIENCE_SECONDS of nothing but failures, or at once for any
        other RegistryError; StoppedError if the run is asked to stop meanwhile.
        """
        while True:
            self._worker.alive()
            try:
                answer = request()
            except UnreachableError as error:
                if not self._failures:
                    # Not before: evaluating and uploading, for hours perhaps, are no waiting.
                    self._failing_since = time.monotonic()
                self._failures += 1
                self._wait(error)
            except RegistryError as error:
                raise NotRegisteredError(str(error)) from error
            else:
                self._failures = 0
                return answer

    def _wait(self, error: UnreachableError) -> None:
        if time.monotonic() - self._failing_since > PATIENCE_SECONDS:
            raise NotRegisteredError(str(error)) from error
        # A single failure may be a connection that went stale.
        if self._failures == 2:
            self._worker.say(
                f"The model is trained and saved, but MLflow at {storage.shown(self._tracking_uri)} does not "
                f"take it yet; it is tried again for {duration(PATIENCE_SECONDS)} ..."
            )
        until = time.monotonic() + pause_seconds(self._failures, overloaded=False)
        while (left := until - time.monotonic()) > 0:
            if self._worker.stop_wanted():
                raise StoppedError
            time.sleep(min(left, 1.0))
