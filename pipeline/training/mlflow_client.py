"""MLflow's own client, asked within time limits that follow the server's pace: curves and registry.

mlflow is imported when it is first asked (2 s). Used is MlflowClient alone: the fluent
interface keeps the current run in a global, and its asynchronous logging drops what fails
after its retries.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipeline.training.pace import Pace
from pipeline.training.run_description import redact

Answer = TypeVar("Answer")

# Of MLflow's own retries one is wanted, for a connection that went stale: its defaults block
# for minutes, and sleep as long as a server likes. We try again ourselves.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_TIME_LIMIT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_limits: list[float] = []
"""Of the requests that are being made in this process."""
_limits_lock = threading.Lock()

MISSING, REFUSED, THERE = "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS"
"""What MLflow calls its definite answers. A proxy's answers have other names."""


class OutOfTimeError(RuntimeError):
    """The time that was allowed for requests is over."""


class Client:
    """One MLflow. Raises whatever MLflow raises while its server is away."""

    def __init__(self, tracking_uri: str, pace: Pace | None = None) -> None:
        """Touches nothing yet."""
        self.until = math.inf
        """When requests are no longer begun, by time.monotonic()."""
        self.pace = pace or Pace()
        self._tracking_uri = tracking_uri
        self._client: Any = None

    def ask(self, request: Callable[[Any], Answer]) -> Answer:
        """The answer to a request, which gets an MlflowClient, within the time that the pace allows.

        A request that is several for MLflow has that time for each.
        """
        left = self.until - time.monotonic()
        if left <= 0:
            raise OutOfTimeError("the time that was allowed is over")
        self.open()
        began = time.monotonic()
        try:
            with _time_limit(min(self.pace.limit_seconds, left)):
                answer = request(self._client)
        except Exception as error:
            if code(error) in (MISSING, REFUSED, THERE):
                self.pace.answered(time.monotonic() - began)
            elif any(isinstance(cause, TimeoutError) for cause in _causes(error)):
                self.pace.too_slow()
            raise
        self.pace.answered(time.monotonic() - began)
        return answer

    def open(self) -> None:
        """Imports mlflow, and makes a SQLite database that is not there, once."""
        if self._client is not None:
            return
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # It would announce every single retry; an outage is one warning of ours.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        from mlflow import MlflowClient

        if self.database is not None:
            self.database.parent.mkdir(parents=True, exist_ok=True)
        with self.alone():
            # Makes the tables of a new SQLite database, which two processes must not do at once.
            self._client = MlflowClient(self._tracking_uri, registry_uri=self._tracking_uri)

    @property
    def database(self) -> Path | None:
        """The file of a SQLite database; None for every other kind of tracking server."""
        prefix, _, path = self._tracking_uri.partition(":///")
        return Path(path).absolute() if prefix == "sqlite" and path else None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes of this machine out, where MLflow is a SQLite file on it.

        For one who has opened it, and not twice at once.
        """
        if self.database is None:
            yield
            return
        import fcntl

        try:
            file = self.database.with_name(self.database.name + ".lock").open("w")
        except PermissionError:
            # Who may not write there, and only looks, makes no tables either.
            yield
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """MLflow's limit for a request meanwhile.

    MLflow reads it from the environment for each request; there is no other way to give it one. So
    of several threads that ask, the most patient one decides.
    """

    def put() -> None:
        if _limits:
            os.environ[_TIME_LIMIT] = str(math.ceil(max(_limits)))

    with _limits_lock:
        _limits.append(seconds)
        put()
    try:
        yield
    finally:
        with _limits_lock:
            _limits.remove(seconds)
            put()


def code(error: Exception) -> str:
    """MLflow's name for what is wrong; "" if it was not MLflow that said so."""
    return str(getattr(error, "error_code", ""))


def is_overload(error: Exception) -> bool:
    """Whether a server asked to be left alone for a while (status 429)."""
    return any("too many 429" in str(cause) for cause in _causes(error))


def in_short(error: Exception) -> str:
    """What is at the bottom of an error, in one line without secrets; MLflow's own go on for pages."""
    *_, root = _causes(error)
    return redact(f"{type(root).__name__}: {' '.join(str(root).split())}")[:250]


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
