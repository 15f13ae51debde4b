"""MLflow as a training sees it: one run that is found or made, and entries brought into it.

The only file of the training that imports mlflow, and only when it is first needed (2 s).
Everything here may raise whatever MLflow raises while its server is away, and everything
may be called again: a run is found by a key that it carries, a parameter or tag that is
there is left, a point that was delivered is not sent twice, and one whose delivery is in
doubt is sent again with the same time, which MLflow stores once. A run that was deleted
there, or that went with its database, is made anew.

Used is MlflowClient alone. The fluent interface keeps the current run in a global, and
its asynchronous logging drops what fails after its retries.
"""

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pipeline import storage
from pipeline.training.journal import Entry
from pipeline.training.pace import Pace
from pipeline.training.run_description import RunDescription, Status, redact

Answer = TypeVar("Answer")

KEY_TAG = "nvae.run_key"
"""Tag by which a run is found again, whatever happened while it was made."""

# Of MLflow's own retries one is wanted, for a connection that went stale: its defaults block
# for minutes, and sleep as long as a server likes. We try again ourselves.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_TIME_LIMIT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_MISSING, _REFUSED, _THERE = "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS"
_PER_REQUEST = 100
"""Parameters, or tags; more MLflow does not take at once."""

logger = logging.getLogger(__name__)


class UnusableAnswerError(RuntimeError):
    """What answers is not MLflow, or the run or experiment was deleted there."""


class OutOfTimeError(RuntimeError):
    """The time that was allowed for deliveries is over."""


class Delivery:
    """Brings the entries of a journal into one MLflow run, in order, each point once."""

    def __init__(
        self, tracking_uri: str, description: RunDescription, read_file: Callable[[str], bytes]
    ) -> None:
        """Touches nothing yet. `read_file` gives the pictures that entries name."""
        self.run_id = ""
        """The MLflow run; "" while it is neither found nor made."""
        self.had_points = False
        """Whether the run had points when it was found."""
        self.until = math.inf
        """When requests are no longer begun, by time.monotonic()."""
        self.sent = 0
        """Points and files that MLflow took from here."""
        self.pace = Pace()
        self._tracking_uri, self._description, self._read_file = tracking_uri, description, read_file
        self._client: Any = None
        # The metrics that were delivered at each number of images seen. Mostly the same few
        # sets of names, of which one copy each is kept.
        self._delivered: dict[int, frozenset[str]] = {}
        self._names: dict[frozenset[str], frozenset[str]] = {}
        self._refused: set[str] = set()

    @property
    def points(self) -> int:
        """Different (metric, images seen) that MLflow has."""
        return sum(map(len, self._delivered.values()))

    # -- the run --------------------------------------------------------------------------

    def connect(self, known: Sequence[str] = ()) -> None:
        """Finds the run, under one of the ids `known` or by its key, or makes it. Once.

        Parameters that it has are left, because MLflow does not let them change.
        """
        if self.run_id:
            return
        if self._client is None:
            self._client = _client(self._tracking_uri)
        with _alone(self._tracking_uri):
            run = self._known(known) or self._find() or self._make()
        self._complete(run)
        self.had_points = bool(run.data.metrics)
        self._delivered = {}
        self.run_id = run.info.run_id

    def _known(self, run_ids: Iterable[str]) -> Any:
        for run_id in filter(None, run_ids):
            try:
                run = self._run(run_id)
            except Exception as error:
                if _code(error) not in (_MISSING, _REFUSED):
                    raise
                continue  # Another server's, or of a database that is gone.
            if run.info.lifecycle_stage == "active":
                return run
        return None

    def _run(self, run_id: str) -> Any:
        run = self._ask(lambda: self._client.get_run(run_id))
        if run.info.run_id != run_id:
            raise UnusableAnswerError("what answers is not MLflow")
        return run

    def _with_key(self) -> list[Any]:
        """Active runs that carry the key, the oldest first: more than one if an answer was lost."""
        experiment = self._ask(lambda: self._client.get_experiment_by_name(self._description.experiment))
        if experiment is None:
            return []
        condition = f"tags.`{KEY_TAG}` = '{self._description.key}'"
        found = self._ask(
            lambda: self._client.search_runs(
                [experiment.experiment_id], condition, order_by=["attributes.start_time ASC"]
            )
        )
        return [run for run in found if run.data.tags.get(KEY_TAG) == self._description.key]

    def _find(self) -> Any:
        return max(self._with_key(), key=lambda run: len(run.data.metrics), default=None)

    def _make(self) -> Any:
        tags, name, experiment_id = self._tags(), self._description.run_name, self._experiment()
        run = self._ask(lambda: self._client.create_run(experiment_id, tags=tags, run_name=name))
        if not run.info.run_id:
            raise UnusableAnswerError("what answers is not MLflow")
        return run

    def _tags(self) -> dict[str, str]:
        return {**self._description.tags, KEY_TAG: self._description.key}

    def _experiment(self) -> str:
        """The experiment's id; one that is made on SQLite has its artifacts beside the database."""
        name, database = self._description.experiment, _database(self._tracking_uri)
        root = None if database is None else (database.parent / "mlartifacts").as_uri()
        experiment = self._ask(lambda: self._client.get_experiment_by_name(name))
        if experiment is None:
            try:
                return str(self._ask(lambda: self._client.create_experiment(name, artifact_location=root)))
            except Exception as error:
                if _code(error) != _THERE:
                    raise
                # Somebody else was faster.
                experiment = self._ask(lambda: self._client.get_experiment_by_name(name))
        if experiment is None or experiment.lifecycle_stage != "active":
            raise UnusableAnswerError(f"the experiment {name!r} was deleted; restore it or purge it")
        return str(experiment.experiment_id)

    def _complete(self, run: Any) -> None:
        """Adds the parameters and tags that the run lacks."""
        from mlflow.entities import Param, RunTag

        run_id, has = run.info.run_id, run.data
        new = [Param(k, v) for k, v in self._description.parameters.items() if k not in has.params]
        for part in _parts(new, _PER_REQUEST):
            self._accepted(
                lambda part=part: self._client.log_batch(run_id, params=part),  # type: ignore[misc]
                "parameters",
            )
        tags = [RunTag(k, v) for k, v in self._tags().items() if has.tags.get(k) != v]
        for part in _parts(tags, _PER_REQUEST):
            self._accepted(
                lambda part=part: self._client.log_batch(run_id, tags=part),  # type: ignore[misc]
                "tags",
            )

    def set_status(self, status: Status) -> None:
        """Makes the run say how it is, if it says something else."""
        if self._run(self.run_id).info.status == status:
            return
        if status == "RUNNING":
            self._ask(lambda: self._client.update_run(self.run_id, status=status))
        else:
            self._ask(lambda: self._client.set_terminated(self.run_id, status))

    def delete_strays(self) -> None:
        """Deletes empty runs of the same key: MLflow made them, but its answer was lost."""
        for run in self._with_key():
            if run.info.run_id != self.run_id and not run.data.metrics:
                self._ask(lambda run=run: self._client.delete_run(run.info.run_id))  # type: ignore[misc]

    # -- entries --------------------------------------------------------------------------

    def skip(self, entries: Iterable[Entry]) -> None:
        """Takes note of entries that were delivered before."""
        for entry in entries:
            if entry.kind == "metrics":
                self._mark(entry.body["at"], entry.body["values"])

    def ask(self) -> None:
        """Asks MLflow which points it has, and believes nothing else any more."""
        found: dict[int, set[str]] = {}
        for name in self._run(self.run_id).data.metrics:
            history = self._ask(lambda name=name: self._client.get_metric_history(self.run_id, name))  # type: ignore[misc]
            if not history:
                raise UnusableAnswerError("what answers is not MLflow")
            for metric in history:
                found.setdefault(metric.step, set()).add(name)
        self._delivered = {}
        for at, names in found.items():
            self._mark(at, names)

    def send(self, entries: Iterable[Entry]) -> None:
        """Delivers points, tags and status. If it raises, call it again with the same entries.

        A point whose (metric, images seen) was delivered is dropped: it was computed again
        after a crash. What MLflow refuses for good is a warning, once for each name.
        """
        from mlflow.entities import Metric

        batch: dict[tuple[int, str], Any] = {}
        for entry in entries:
            if entry.kind == "metrics":
                at = entry.body["at"]
                known = self._refused.union(self._delivered.get(at, ()))
                for name in entry.body["values"].keys() - known:
                    batch.setdefault((at, name), Metric(name, entry.body["values"][name], entry.time, at))
            if entry.kind != "metrics" or len(batch) >= self.pace.points:
                self._send_points(batch)
                batch = {}
            self._send_other(entry)
        self._send_points(batch)

    def _send_points(self, batch: Mapping[tuple[int, str], Any]) -> None:
        for part in _parts(list(batch.items()), self.pace.points):
            if not self._accepted(lambda part=part: self._log(part), None):  # type: ignore[misc]
                for name in sorted({name for (_, name), _ in part}):
                    own = [item for item in part if item[0][1] == name]
                    self._accepted(lambda own=own: self._log(own), name)  # type: ignore[misc]
            for (at, name), _ in part:
                self._mark(at, (name,))
            self.sent += len(part)

    def _log(self, points: Sequence[tuple[tuple[int, str], Any]]) -> None:
        self._client.log_batch(self.run_id, metrics=[metric for _, metric in points])

    def _send_other(self, entry: Entry) -> None:
        body = entry.body
        if entry.kind == "tag":
            key, value = body["key"], body["value"]
            self._accepted(lambda: self._client.set_tag(self.run_id, key, value), key)
        elif entry.kind == "status":
            self._accepted(
                lambda: self._client.set_terminated(self.run_id, body["value"], entry.time), "status"
            )

    def send_file(self, path: str, folder: str) -> None:
        """Delivers a picture or file, which may be called again; one that is gone is a warning."""
        try:
            data = self._read_file(path)
        except (storage.MissingError, FileNotFoundError):
            logger.warning("%s is gone and cannot be sent to MLflow", path)
            return
        with tempfile.TemporaryDirectory(prefix="nvae-artifact-") as temporary:
            local = Path(temporary) / PurePosixPath(path).name
            local.write_bytes(data)
            self._accepted(lambda: self._client.log_artifact(self.run_id, str(local), folder or None), path)
        self.sent += 1

    def _mark(self, at: int, names: Iterable[str]) -> None:
        known = self._delivered.get(at, frozenset()).union(names)
        self._delivered[at] = self._names.setdefault(known, known)

    # -- requests -------------------------------------------------------------------------

    def _accepted(self, request: Callable[[], object], name: str | None) -> bool:
        """Whether MLflow took a request; False if it never will. Raises if it may later."""
        try:
            self._ask(request)
        except Exception as error:
            code = _code(error)
            if self.run_id and code in (_MISSING, _REFUSED) and self._is_gone():
                self.run_id = ""
                raise UnusableAnswerError("the MLflow run was deleted; another one is made") from error
            if code != _REFUSED:
                raise
            if name is not None and name not in self._refused:
                self._refused.add(name)
                logger.warning("MLflow refuses %s, it stays in the journal: %s", name, redact(str(error)))
            return False
        return True

    def _is_gone(self) -> bool:
        return self._known([self.run_id]) is None

    def _ask(self, request: Callable[[], Answer]) -> Answer:
        """The answer to a request, within the time that the server's pace allows."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise OutOfTimeError("the time that was allowed is over")
        # MLflow reads its time limit here for each request; there is no other way to give it one.
        os.environ[_TIME_LIMIT] = str(math.ceil(min(self.pace.limit_seconds, left)))
        began = time.monotonic()
        try:
            answer = request()
        except Exception as error:
            if _code(error) in (_MISSING, _REFUSED, _THERE):
                self.pace.answered(time.monotonic() - began)
            elif any(isinstance(cause, TimeoutError) for cause in _causes(error)):
                self.pace.too_slow()
            raise
        self.pace.answered(time.monotonic() - began)
        return answer


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


def _code(error: Exception) -> str:
    """MLflow's name for what is wrong; "" if it was not MLflow that said so."""
    return str(getattr(error, "error_code", ""))


def _parts(items: Sequence[Any], length: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), length):
        yield items[first : first + length]


def _client(tracking_uri: str) -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # It would announce every single retry; an outage is one warning of ours.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    from mlflow import MlflowClient

    database = _database(tracking_uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    with _alone(tracking_uri):
        # Makes the tables of a new SQLite database, which two processes must not do at once.
        return MlflowClient(tracking_uri=tracking_uri)


def _database(tracking_uri: str) -> Path | None:
    """The file of a SQLite database; None for every other kind of tracking server."""
    prefix, _, path = tracking_uri.partition(":///")
    return Path(path).absolute() if prefix == "sqlite" and path else None


@contextmanager
def _alone(tracking_uri: str) -> Iterator[None]:
    """Keeps other processes of this machine out, where MLflow is a SQLite file on it."""
    database = _database(tracking_uri)
    if database is None:
        yield
        return
    import fcntl

    with database.with_name(database.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
