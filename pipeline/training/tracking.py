"""The curves of a run: noted in its journal at once, brought to MLflow when it can be reached.

Training never waits for a tracking server and never fails for one. Each call appends a line
to the journal (journal.py); one daemon thread delivers what is durable (delivery.py), with
growing pauses while the server is away, and remembers how far it came beside the journal.
A later launch delivers what an earlier one could not, on whatever machine, and points that
it computes again are dropped.

RUN/journal/mlflow.json      what the MLflow run is made from, should it not exist yet
RUN/journal/delivered.json   how many bytes of each segment the server has

Only rank 0 tracks; the other ranks have a NullTracker.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from pipeline import storage, store
from pipeline.training.delivery import (
    Delivery,
    RunDescription,
    TrackingError,
    as_parameter,
    as_tag,
    check_tracking_uri,
    find_or_make,
    redact,
)
from pipeline.training.journal import Journal, StoredJournal, complete, decode, json_number

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended, in MLflow's words; KILLED is one that was stopped and may be continued."""

POLL_SECONDS = 1.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
REMEMBER_SECONDS = 5.0
"""How often the state of delivery is written; what is delivered twice for want of it is stored once."""

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where a training says how it goes. Nothing here raises for an outage, or waits for one."""

    @property
    def run_id(self) -> str:
        """The MLflow run that points are delivered to; "" while MLflow was never reached."""

    def log(self, metrics: Mapping[str, float], at: int) -> None:
        """One point of each named curve, at that many images seen. Not finite is allowed."""

    def picture(self, name: str, png: bytes, at: int) -> str:
        """A PNG that belongs to this moment; returns its path below the run's folder."""

    def file(self, name: str, data: bytes) -> None:
        """A small file; `name` may have folders."""

    def tag(self, key: str, value: str) -> None:
        """A fact about the run; a later one of the same key replaces it."""

    def status(self, value: Status) -> None:
        """How this launch ended."""

    def sync(self) -> bool:
        """Makes everything so far durable in the store; whether it is. This may take a while."""


class NullTracker:
    """The tracker of the ranks that do not track."""

    run_id = ""

    def log(self, metrics: Mapping[str, float], at: int) -> None:
        """Nothing is noted."""

    def picture(self, name: str, png: bytes, at: int) -> str:
        """Nothing is noted."""
        return ""

    def file(self, name: str, data: bytes) -> None:
        """Nothing is noted."""

    def tag(self, key: str, value: str) -> None:
        """Nothing is noted."""

    def status(self, value: Status) -> None:
        """Nothing is noted."""

    def sync(self) -> bool:
        return True


def default_tracking_uri(store_url: str) -> str:
    """SQLite beside a local store; beside the default local store where the store is remote."""
    folder = store_url if storage.is_local(store_url) else store.DEFAULT
    return f"sqlite:///{storage.normalize(folder)}/mlflow.db"


def create_run(
    tracking_uri: str,
    *,
    run_url: str,
    experiment: str,
    run_name: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
) -> str:
    """The id of the MLflow run of the run at `run_url`, or "" while MLflow cannot be reached.

    The driver calls this once per launch. What the run is made from is noted in the run's
    folder first, so that the tracker makes it as soon as it can, and a repeated call finds
    it. Parameters are text or are stored as JSON; passwords in URLs are left out.

    Raises TrackingError if the address is none, StoreError if the store refuses.
    """
    check_tracking_uri(tracking_uri)
    known = _read_description(run_url)
    description = RunDescription(
        key=known.key if known else uuid.uuid4().hex,
        experiment=experiment,
        run_name=run_name,
        parameters={name: as_parameter(value) for name, value in parameters.items()},
        tags={name: as_tag(value) for name, value in tags.items()},
    )
    storage.write_bytes(storage.join(run_url, "journal", "mlflow.json"), description.to_json())
    try:
        return find_or_make(tracking_uri, description)
    except TrackingError:
        raise
    except Exception as error:
        logger.warning(
            "MLflow at %s cannot be used now (%s). Training goes on; the curves are in %s and are "
            "delivered as soon as MLflow answers.",
            redact(tracking_uri),
            _in_short(error),
            storage.join(run_url, "journal"),
        )
        return ""


def replay(run_url: str, tracking_uri: str) -> int:
    """Delivers the whole journal of a run; what is there already is not stored again.

    Also to a server that has never heard of the run. Returns the number of points. Raises
    TrackingError if there is nothing to deliver or MLflow does not take it.
    """
    check_tracking_uri(tracking_uri)
    description = _read_description(run_url)
    if description is None:
        raise TrackingError(f"{run_url} has no journal with an mlflow.json; is it the folder of a run?")
    journal = StoredJournal(run_url)
    delivery = Delivery(tracking_uri, description, "", journal.read_file)
    try:
        delivery.connect()
        for segment in journal.segments():
            delivery.send(decode(journal.read(segment)))
    except (storage.StoreError, TrackingError):
        raise
    except Exception as error:
        raise TrackingError(
            f"MLflow at {redact(tracking_uri)} did not take the journal of {run_url}: {_in_short(error)}. "
            "Repeat this when it answers; nothing is stored twice."
        ) from error
    return delivery.points


class RunTracker:
    """Rank 0's tracker. A context manager: leaving it closes it."""

    def __init__(self, run_url: str, attempt: int, tracking_uri: str, run_id: str = "") -> None:
        """`run_id` as `create_run` returned it; "" if the run has still to be found or made.

        Raises StoreError if the run's folder cannot be read, TrackingError if nothing says
        what the MLflow run is.
        """
        description = _read_description(run_url)
        if description is None:
            raise TrackingError(f"{run_url}/journal/mlflow.json is missing; create_run writes it.")
        self._journal = Journal(run_url, attempt)
        delivery = Delivery(tracking_uri, description, run_id, self._journal.read_file)
        self._courier = _Courier(self._journal, delivery, tracking_uri)
        self._delivered: bool | None = None
        self._courier.start()

    @property
    def run_id(self) -> str:
        return self._courier.run_id

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, metrics: Mapping[str, float], at: int) -> None:
        values = {name: json_number(float(value)) for name, value in metrics.items()}
        self._journal.note("metrics", at=at, values=values)

    def picture(self, name: str, png: bytes, at: int) -> str:
        path = f"pictures/{name}-{at:012d}.png"
        if self._journal.attach(path, png):
            self._journal.note("artifact", path=path, folder="pictures")
        return path

    def file(self, name: str, data: bytes) -> None:
        path = f"files/{name}"
        if self._journal.attach(path, data):
            self._journal.note("artifact", path=path, folder=name.rpartition("/")[0])

    def tag(self, key: str, value: str) -> None:
        self._journal.note("tag", key=key, value=as_tag(value))

    def status(self, value: Status) -> None:
        self._journal.note("status", value=value)

    def sync(self) -> bool:
        return self._journal.sync()

    def close(self, timeout_seconds: float = 30.0) -> bool:
        """Makes the journal durable and delivers what is left, for at most that long.

        Returns whether MLflow has everything. What it has not is in the journal. A second
        call does nothing but return the same.
        """
        if self._delivered is not None:
            return self._delivered
        # Only durable lines are delivered: without the copy some would be missing.
        durable = self._journal.sync()
        self._delivered = self._courier.finish(timeout_seconds) and durable
        self._journal.close()
        if not self._delivered:
            logger.warning(
                "MLflow does not have the whole curves of %s; they are in its journal, and are delivered "
                "when the run goes on or is replayed.",
                self._journal.run_url,
            )
        return self._delivered


class _Courier(threading.Thread):
    """Delivers what the journal holds, from what earlier attempts left to the last own line."""

    def __init__(self, journal: Journal, delivery: Delivery, tracking_uri: str) -> None:
        super().__init__(name="tracking", daemon=True)
        self._journal, self._delivery, self._tracking_uri = journal, delivery, redact(tracking_uri)
        self._wake = threading.Event()
        self._deadline: float | None = None
        self._backlog: list[str] | None = None
        """Segments of earlier attempts that have still to be looked at; None: not yet listed."""
        self._positions: dict[str, int] = {}
        """Bytes of each segment that MLflow has."""
        self._remembered: dict[str, int] = {}
        self._remembered_at = 0.0
        self._all_delivered = False

    @property
    def run_id(self) -> str:
        return self._delivery.run_id

    def finish(self, timeout_seconds: float) -> bool:
        """Waits until everything is delivered, at most that long; whether it is."""
        self._deadline = time.monotonic() + timeout_seconds
        self._wake.set()
        self.join(timeout_seconds)
        return self._all_delivered

    def run(self) -> None:
        pause, troubled = FIRST_PAUSE_SECONDS, False
        while True:
            try:
                closing = self._deadline is not None
                self._deliver()
                if closing:
                    self._remember()
                    self._all_delivered = True
                    return
                if time.monotonic() - self._remembered_at > REMEMBER_SECONDS:
                    self._remember()
                if troubled:
                    logger.warning("MLflow answers again; the curves are delivered")
                wait, pause, troubled = POLL_SECONDS, FIRST_PAUSE_SECONDS, False
            except Exception as error:
                # Whatever a server away, a proxy or a full database raises: the journal has it all.
                if not troubled:
                    troubled = True
                    logger.warning(
                        "MLflow at %s does not take the curves (%s); the journal keeps them, and delivery "
                        "is tried again until it succeeds",
                        self._tracking_uri,
                        _in_short(error),
                    )
                wait, pause = pause, min(2 * pause, LONGEST_PAUSE_SECONDS)
            if self._deadline is not None:
                if time.monotonic() > self._deadline:
                    return
                wait = min(wait, 1.0)
                time.sleep(wait)
            else:
                self._wake.wait(wait)

    def _deliver(self) -> None:
        self._delivery.connect()
        if self._backlog is None:
            segments = self._journal.segments()
            own = self._journal.own_segments()
            self._positions = self._recall()
            self._backlog = [name for name in segments if name not in own]
        while self._backlog:
            self._deliver_segment(self._backlog[0], own=False)
            self._backlog.pop(0)
        for segment, length in self._journal.own_segments().items():
            if self._positions.get(segment, 0) < length:
                self._deliver_segment(segment, own=True)

    def _deliver_segment(self, segment: str, own: bool) -> None:
        data = self._journal.read(segment)
        start, end = self._positions.get(segment, 0), complete(data)
        entries = list(decode(data[start:end]))
        if not own:
            self._delivery.skip(decode(data[:start]))
            # That an earlier launch ended says nothing about the run any more.
            entries = [entry for entry in entries if entry.kind != "status"]
        self._delivery.send(entries)
        self._positions[segment] = end

    def _state_url(self) -> str:
        return storage.join(self._journal.run_url, "journal", "delivered.json")

    def _recall(self) -> dict[str, int]:
        """How far an earlier attempt came with this very MLflow run."""
        if not storage.exists(self._state_url()):
            return {}
        try:
            state = json.loads(storage.read_bytes(self._state_url()))
            known = (state["tracking_uri"], state["run_id"]) == (self._tracking_uri, self._delivery.run_id)
            return {str(name): int(length) for name, length in state["segments"].items()} if known else {}
        except (ValueError, KeyError, TypeError, AttributeError):
            logger.warning("%s is damaged; the journal is delivered from its beginning", self._state_url())
            return {}

    def _remember(self) -> None:
        if self._positions == self._remembered:
            return
        state = {
            "tracking_uri": self._tracking_uri,
            "run_id": self._delivery.run_id,
            "segments": self._positions,
        }
        storage.write_bytes(self._state_url(), json.dumps(state).encode())
        self._remembered, self._remembered_at = dict(self._positions), time.monotonic()


def _read_description(run_url: str) -> RunDescription | None:
    url = storage.join(run_url, "journal", "mlflow.json")
    try:
        return RunDescription.from_json(storage.read_bytes(url))
    except storage.MissingError:
        return None
    except (ValueError, TypeError) as error:
        raise TrackingError(
            f"{url} is damaged ({error}); restore it, or delete it to begin a new MLflow run."
        ) from error


def _in_short(error: Exception) -> str:
    """What is at the bottom of an error, in one line without secrets; MLflow's own go on for pages."""
    root: BaseException = error
    while root.__cause__ or root.__context__:
        root = root.__cause__ or root.__context__ or root
    text = " ".join(str(root).split())
    return redact(f"{type(root).__name__}: {text[:200]}")
