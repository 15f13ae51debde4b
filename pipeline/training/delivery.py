"""MLflow as a training sees it: one run that is found or made, and entries brought into it.

The only file of the training that imports mlflow, and only when it is first needed (2 s).
Everything here may raise whatever MLflow raises while its server is away, and everything
may be called again: a run is found by a key that it carries, a parameter or tag that is
there is left, a point that was delivered is not sent twice, and one whose delivery is in
doubt is sent again with the same time, which MLflow stores once.

Used is MlflowClient alone. The fluent interface keeps the current run in a global, and
its asynchronous logging drops what fails after its retries.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline import storage
from pipeline.errors import InputError
from pipeline.training.journal import Entry

KEY_TAG = "nvae.run_key"
"""Tag by which a run is found again, whatever happened while it was made."""

# Of MLflow's own retries few are wanted: its defaults block for minutes, and we try again.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks")

# MLflow's limits.
_PARAMETER_LENGTH, _TAG_LENGTH = 6000, 8000
_METRICS_PER_REQUEST, _PARAMETERS_PER_REQUEST = 1000, 100

_USER_AND_PASSWORD = re.compile(r"(?<=://)[^/@\s]*@")
_SECRET_IN_QUERY = re.compile(
    r"([?&][^=&\s]*(?:signature|token|password|secret|credential|key)[^=&\s]*=)[^&\s]+", re.IGNORECASE
)

logger = logging.getLogger(__name__)


class TrackingError(InputError):
    """A tracking server or run that cannot be used as asked."""


def redact(text: str) -> str:
    """`text` without the passwords and signatures of the URLs in it."""
    return _SECRET_IN_QUERY.sub(r"\1***", _USER_AND_PASSWORD.sub("", text))


@dataclass(frozen=True)
class RunDescription:
    """What an MLflow run is made from, so that it can be made later; free of secrets."""

    key: str
    """Unique to this run of ours, in all of MLflow."""
    experiment: str
    run_name: str
    parameters: Mapping[str, str]
    tags: Mapping[str, str]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "RunDescription":
        return cls(**json.loads(data))


def as_parameter(value: Any) -> str:
    """A setting as MLflow stores it: text as it is, all else as JSON; cut at MLflow's limit."""
    text = redact(value if isinstance(value, str) else json.dumps(value))
    return _cut(text, _PARAMETER_LENGTH)


def as_tag(value: str) -> str:
    return _cut(redact(value), _TAG_LENGTH)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def check_tracking_uri(uri: str) -> None:
    """Raises TrackingError if MLflow cannot know what `uri` means."""
    scheme = uri.partition(":")[0].partition("+")[0] if ":" in uri else ""
    if scheme not in _SCHEMES:
        raise TrackingError(
            f"{redact(uri)!r} is no address of MLflow: give http(s)://HOST:PORT or sqlite:////PATH/mlflow.db."
        )


def find_or_make(tracking_uri: str, description: RunDescription, run_id: str = "") -> str:
    """The id of the run that `description` describes, running, with parameters and tags.

    Looks for `run_id` if it is given, else for the description's key; makes the run if there
    is none. Parameters that it has are left, because MLflow does not let them change.
    """
    client = _client(tracking_uri)
    from mlflow.entities import Param, RunTag

    with _alone(tracking_uri):
        run_id = run_id or _find(client, description) or _make(client, tracking_uri, description)
    run = client.get_run(run_id)
    new = [Param(k, v) for k, v in description.parameters.items() if k not in run.data.params]
    for first in range(0, len(new), _PARAMETERS_PER_REQUEST):
        client.log_batch(run_id, params=new[first : first + _PARAMETERS_PER_REQUEST])
    tags = [RunTag(k, v) for k, v in description.tags.items() if run.data.tags.get(k) != v]
    for first in range(0, len(tags), _PARAMETERS_PER_REQUEST):
        client.log_batch(run_id, tags=tags[first : first + _PARAMETERS_PER_REQUEST])
    if run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")
    return run_id


def _find(client: Any, description: RunDescription) -> str:
    experiment = client.get_experiment_by_name(description.experiment)
    if experiment is None:
        return ""
    found = client.search_runs(
        [experiment.experiment_id], f"tags.`{KEY_TAG}` = '{description.key}'", max_results=1
    )
    return found[0].info.run_id if found else ""


def _make(client: Any, tracking_uri: str, description: RunDescription) -> str:
    tags = {**description.tags, KEY_TAG: description.key}
    experiment_id = _experiment(client, tracking_uri, description.experiment)
    run_id: str = client.create_run(experiment_id, tags=tags, run_name=description.run_name).info.run_id
    return run_id


def _experiment(client: Any, tracking_uri: str, name: str) -> str:
    """The experiment's id; one that is made on SQLite has its artifacts beside the database."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = _database(tracking_uri)
        root = None if database is None else (database.parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=root))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # Somebody else was faster.
    if experiment.lifecycle_stage != "active":
        raise TrackingError(f"the MLflow experiment {name!r} was deleted; restore it or delete it for good.")
    return str(experiment.experiment_id)


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


class Delivery:
    """Brings the entries of a journal into one MLflow run, in order, each point once."""

    def __init__(
        self,
        tracking_uri: str,
        description: RunDescription,
        run_id: str,
        read_file: Callable[[str], bytes],
    ) -> None:
        """Touches nothing yet. `read_file` gives the pictures that entries name."""
        self.run_id = run_id
        self._tracking_uri, self._description, self._read_file = tracking_uri, description, read_file
        self._client: Any = None
        # The metrics that were delivered at each number of images seen. Mostly the same few
        # sets of names, of which one copy each is kept.
        self._delivered: dict[int, frozenset[str]] = {}
        self._names: dict[frozenset[str], frozenset[str]] = {}
        self._refused: set[str] = set()

    @property
    def points(self) -> int:
        """Different (metric, images seen) that were delivered."""
        return sum(map(len, self._delivered.values()))

    def connect(self) -> None:
        """Finds or makes the run, once."""
        if self._client is None:
            self.run_id = find_or_make(self._tracking_uri, self._description, self.run_id)
            self._client = _client(self._tracking_uri)

    def skip(self, entries: Iterable[Entry]) -> None:
        """Takes note of entries that were delivered before."""
        for entry in entries:
            if entry.kind == "metrics":
                self._mark(entry.body["at"], entry.body["values"])

    def send(self, entries: Iterable[Entry]) -> None:
        """Delivers entries. If it raises, call it again with the same ones.

        A point whose (metric, images seen) was delivered is dropped: it was computed again
        after a crash. What MLflow refuses for good is a warning, once for each name.
        """
        self.connect()
        from mlflow.entities import Metric

        batch: dict[tuple[int, str], Any] = {}
        for entry in entries:
            if entry.kind != "metrics":
                self._send_points(batch)
                batch = {}
                self._send_other(entry)
                continue
            at = entry.body["at"]
            for name, value in entry.body["values"].items():
                if name not in self._delivered.get(at, ()):
                    batch.setdefault((at, name), Metric(name, value, entry.time, at))
            if len(batch) >= _METRICS_PER_REQUEST:
                self._send_points(batch)
                batch = {}
        self._send_points(batch)

    def _send_points(self, batch: Mapping[tuple[int, str], Any]) -> None:
        points = list(batch.items())
        for first in range(0, len(points), _METRICS_PER_REQUEST):
            part = points[first : first + _METRICS_PER_REQUEST]
            if not self._accepted(lambda part=part: self._log([m for _, m in part]), None):  # type: ignore[misc]
                for (_, name), metric in part:
                    self._accepted(lambda metric=metric: self._log([metric]), name)  # type: ignore[misc]
            for (at, name), _ in part:
                self._mark(at, (name,))

    def _log(self, metrics: list[Any]) -> None:
        self._client.log_batch(self.run_id, metrics=metrics)

    def _send_other(self, entry: Entry) -> None:
        body = entry.body
        match entry.kind:
            case "artifact":
                self._accepted(lambda: self._send_file(body["path"], body["folder"]), body["path"])
            case "tag":
                self._accepted(
                    lambda: self._client.set_tag(self.run_id, body["key"], body["value"]), body["key"]
                )
            case "status":
                self._accepted(
                    lambda: self._client.set_terminated(self.run_id, body["value"], entry.time), "status"
                )

    def _send_file(self, path: str, folder: str) -> None:
        try:
            data = self._read_file(path)
        except (storage.MissingError, FileNotFoundError):
            logger.warning("%s is gone and cannot be sent to MLflow", path)
            return
        with tempfile.TemporaryDirectory(prefix="nvae-artifact-") as temporary:
            local = Path(temporary) / PurePosixPath(path).name
            local.write_bytes(data)
            self._client.log_artifact(self.run_id, str(local), folder or None)

    def _accepted(self, request: Callable[[], object], name: str | None) -> bool:
        """Whether MLflow took a request; False if it never will. Raises if it may later."""
        from mlflow.exceptions import MlflowException

        try:
            request()
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if name is not None and name not in self._refused:
                self._refused.add(name)
                logger.warning("MLflow refuses %s, it stays in the journal: %s", name, redact(str(error)))
            return False
        return True

    def _mark(self, at: int, names: Iterable[str]) -> None:
        known = self._delivered.get(at, frozenset()).union(names)
        self._delivered[at] = self._names.setdefault(known, known)
