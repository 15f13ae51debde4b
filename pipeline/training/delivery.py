"""MLflow as a training sees it: one run that is found or made, and entries brought into it.

Everything here may raise whatever MLflow raises while its server is away, and everything
may be called again: a run is found by a key that it carries, a parameter or tag that is
there is left, a point that was delivered is not sent twice, and one whose delivery is in
doubt is sent again with the same time, which MLflow stores once. A run that was deleted
there, or that went with its database, is made anew.
"""

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline import storage
from pipeline.training.journal import Entry
from pipeline.training.mlflow_client import MISSING, REFUSED, THERE, Client, code
from pipeline.training.run_description import RunDescription, Status, redact

KEY_TAG = "nvae.run_key"
"""Tag by which a run is found again, whatever happened while it was made."""

_PER_REQUEST = 100
"""Parameters, or tags; more MLflow does not take at once."""

logger = logging.getLogger(__name__)


class UnusableAnswerError(RuntimeError):
    """What answers is not MLflow, or the run or experiment was deleted there."""


class Delivery:
    """Brings the entries of a journal into one MLflow run, in order, each point once."""

    def __init__(
        self, client: Client, description: RunDescription, read_file: Callable[[str], bytes]
    ) -> None:
        """Touches nothing yet. `read_file` gives the pictures that entries name."""
        self.run_id = ""
        """The MLflow run; "" while it is neither found nor made."""
        self.had_points = False
        """Whether the run had points when it was found."""
        self.sent = 0
        """Points and files that MLflow took from here."""
        self.client = client
        self._description, self._read_file = description, read_file
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
        self.client.open()
        with self.client.alone():
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
                if code(error) not in (MISSING, REFUSED):
                    raise
                continue  # Another server's, or of a database that is gone.
            if run.info.lifecycle_stage == "active":
                return run
        return None

    def _run(self, run_id: str) -> Any:
        run = self.client.ask(lambda mlflow: mlflow.get_run(run_id))
        if run.info.run_id != run_id:
            raise UnusableAnswerError("what answers is not MLflow")
        return run

    def _with_key(self) -> list[Any]:
        """Active runs that carry the key, the oldest first: more than one if an answer was lost."""
        experiment = self.client.ask(
            lambda mlflow: mlflow.get_experiment_by_name(self._description.experiment)
        )
        if experiment is None:
            return []
        condition = f"tags.`{KEY_TAG}` = '{self._description.key}'"
        found = self.client.ask(
            lambda mlflow: mlflow.search_runs(
                [experiment.experiment_id], condition, order_by=["attributes.start_time ASC"]
            )
        )
        return [run for run in found if run.data.tags.get(KEY_TAG) == self._description.key]

    def _find(self) -> Any:
        return max(self._with_key(), key=lambda run: len(run.data.metrics), default=None)

    def _make(self) -> Any:
        tags, name, experiment_id = self._tags(), self._description.run_name, self._experiment()
        run = self.client.ask(lambda mlflow: mlflow.create_run(experiment_id, tags=tags, run_name=name))
        if not run.info.run_id:
            raise UnusableAnswerError("what answers is not MLflow")
        return run

    def _tags(self) -> dict[str, str]:
        return {**self._description.tags, KEY_TAG: self._description.key}

    def _experiment(self) -> str:
        """The experiment's id; one that is made on SQLite has its artifacts beside the database."""
        name, database = self._description.experiment, self.client.database
        root = None if database is None else (database.parent / "mlartifacts").as_uri()
        experiment = self.client.ask(lambda mlflow: mlflow.get_experiment_by_name(name))
        if experiment is None:
            try:
                return str(
                    self.client.ask(lambda mlflow: mlflow.create_experiment(name, artifact_location=root))
                )
            except Exception as error:
                if code(error) != THERE:
                    raise
                # Somebody else was faster.
                experiment = self.client.ask(lambda mlflow: mlflow.get_experiment_by_name(name))
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
                lambda mlflow, part=part: mlflow.log_batch(run_id, params=part),  # type: ignore[misc]
                "parameters",
            )
        tags = [RunTag(k, v) for k, v in self._tags().items() if has.tags.get(k) != v]
        for part in _parts(tags, _PER_REQUEST):
            self._accepted(
                lambda mlflow, part=part: mlflow.log_batch(run_id, tags=part),  # type: ignore[misc]
                "tags",
            )

    def set_status(self, status: Status) -> None:
        """Makes the run say how it is, if it says something else."""
        if self._run(self.run_id).info.status == status:
            return
        if status == "RUNNING":
            self.client.ask(lambda mlflow: mlflow.update_run(self.run_id, status=status))
        else:
            self.client.ask(lambda mlflow: mlflow.set_terminated(self.run_id, status))

    def delete_strays(self) -> None:
        """Deletes empty runs of the same key: MLflow made them, but its answer was lost."""
        for run in self._with_key():
            if run.info.run_id != self.run_id and not run.data.metrics:
                self.client.ask(lambda mlflow, run=run: mlflow.delete_run(run.info.run_id))  # type: ignore[misc]

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
            history = self.client.ask(lambda mlflow, name=name: mlflow.get_metric_history(self.run_id, name))  # type: ignore[misc]
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
            if entry.kind != "metrics" or len(batch) >= self.client.pace.points:
                self._send_points(batch)
                batch = {}
            self._send_other(entry)
        self._send_points(batch)

    def _send_points(self, batch: Mapping[tuple[int, str], Any]) -> None:
        for part in _parts(list(batch.items()), self.client.pace.points):
            if not self._accepted(lambda mlflow, part=part: self._log(mlflow, part), None):  # type: ignore[misc]
                for name in sorted({name for (_, name), _ in part}):
                    own = [item for item in part if item[0][1] == name]
                    self._accepted(lambda mlflow, own=own: self._log(mlflow, own), name)  # type: ignore[misc]
            for (at, name), _ in part:
                self._mark(at, (name,))
            self.sent += len(part)

    def _log(self, mlflow: Any, points: Sequence[tuple[tuple[int, str], Any]]) -> None:
        mlflow.log_batch(self.run_id, metrics=[metric for _, metric in points])

    def _send_other(self, entry: Entry) -> None:
        body = entry.body
        if entry.kind == "tag":
            key, value = body["key"], body["value"]
            self._accepted(lambda mlflow: mlflow.set_tag(self.run_id, key, value), key)
        elif entry.kind == "status":
            self._accepted(
                lambda mlflow: mlflow.set_terminated(self.run_id, body["value"], entry.time), "status"
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
            self._accepted(lambda mlflow: mlflow.log_artifact(self.run_id, str(local), folder or None), path)
        self.sent += 1

    def _mark(self, at: int, names: Iterable[str]) -> None:
        known = self._delivered.get(at, frozenset()).union(names)
        self._delivered[at] = self._names.setdefault(known, known)

    # -- requests -------------------------------------------------------------------------

    def _accepted(self, request: Callable[[Any], object], name: str | None) -> bool:
        """Whether MLflow took a request; False if it never will. Raises if it may later."""
        try:
            self.client.ask(request)
        except Exception as error:
            why = code(error)
            if self.run_id and why in (MISSING, REFUSED) and self._is_gone():
                self.run_id = ""
                raise UnusableAnswerError("the MLflow run was deleted; another one is made") from error
            if why != REFUSED:
                raise
            if name is not None and name not in self._refused:
                self._refused.add(name)
                logger.warning("MLflow refuses %s, it stays in the journal: %s", name, redact(str(error)))
            return False
        return True

    def _is_gone(self) -> bool:
        return self._known([self.run_id]) is None


def _parts(items: Sequence[Any], length: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), length):
        yield items[first : first + length]
