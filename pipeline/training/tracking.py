"""The curves of a run: noted in its journal at once, brought to MLflow when it can be reached.

Training never waits for a tracking server and never fails for one. Each call appends a line
to the journal (journal.py); one daemon thread delivers what is durable (courier.py, to MLflow
by delivery.py), with growing pauses while the server is away and growing time limits while
it is slow, and remembers how far it came beside the journal. A later launch, or `replay`,
delivers what an earlier one could not, on whatever machine, and points that it computes
again are dropped.

Only rank 0 tracks; the other ranks have a NullTracker. How a run ended is told by the
driver, too (`conclude`): rank 0 may have had no time to.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self

from pipeline import storage, store
from pipeline.errors import FailedError
from pipeline.training.courier import BackgroundCourier, Courier, Left, left, read_delivered
from pipeline.training.delivery import Delivery
from pipeline.training.journal import Journal, StoredJournal, json_number
from pipeline.training.mlflow_client import Client, in_short, is_overload
from pipeline.training.pace import pause_seconds
from pipeline.training.run_description import (
    PARENT_TAG,
    RunDescription,
    Status,
    TrackingError,
    as_tag,
    check_tracking_uri,
    describe,
    read_description,
    redact,
    write_description,
)

START_SECONDS = 15.0
"""How long the driver waits for MLflow before it leaves everything to the tracker."""
CLOSE_SECONDS = 20.0
"""How long the end of a launch is delayed by deliveries."""
CONCLUDE_SECONDS = 10.0
REPLAY_FAILURES = 6
"""After so many in a row a replay gives up: a quarter of a minute, for a server that is not there."""

logger = logging.getLogger(__name__)


class DeliveryError(FailedError):
    """MLflow did not take a journal."""


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
    describe(run_url, experiment, run_name, parameters, tags)
    courier = _courier(StoredJournal(run_url), tracking_uri)
    courier.delivery.client.until = time.monotonic() + START_SECONDS
    try:
        courier.connect()
        courier.delivery.set_status("RUNNING")
    except Exception as error:
        logger.warning(
            "MLflow at %s cannot be used now (%s). Training goes on; the curves are in %s and are "
            "delivered as soon as MLflow answers.",
            redact(tracking_uri),
            in_short(error),
            storage.join(run_url, "journal"),
        )
        return ""
    return courier.delivery.run_id


def _courier(journal: StoredJournal, tracking_uri: str, run_id: str = "") -> Courier:
    delivery = Delivery(Client(tracking_uri), _described(journal.run_url), journal.read_file)
    return Courier(journal, delivery, tracking_uri, run_id)


def _described(run_url: str) -> RunDescription:
    description = read_description(run_url)
    if description is None:
        raise TrackingError(f"{run_url} has no whole journal/mlflow.json; is it the folder of a run?")
    return description


def conclude(run_url: str, tracking_uri: str, status: Status) -> str:
    """Tells MLflow how a run ended, and what its journal still has. Never raises, never waits long.

    For the driver, when no worker is left: rank 0 may have been killed before it could.
    Returns the id of the MLflow run, or "" while MLflow cannot be reached.
    """
    try:
        courier = _courier(StoredJournal(run_url), tracking_uri)
        courier.delivery.client.until = time.monotonic() + CONCLUDE_SECONDS
        courier.deliver()
        courier.delivery.set_status(status)
        courier.remember()
    except Exception as error:
        logger.warning(
            "MLflow at %s does not know yet how %s ended (%s); `nvae track replay %s` tells it",
            redact(tracking_uri),
            run_url,
            in_short(error),
            run_url.rpartition("/")[2],
        )
        return ""
    return courier.delivery.run_id


def nest(run_url: str, tracking_uri: str, parent_run_id: str) -> None:
    """Put a run below another in MLflow, if it is not yet. Never raises for an outage, never waits long.

    For runs that were begun while the MLflow run above them was not known.
    """
    description = read_description(run_url)
    if description is None or description.tags.get(PARENT_TAG) == parent_run_id:
        return
    nested = replace(description, tags={**description.tags, PARENT_TAG: parent_run_id})
    journal, client = StoredJournal(run_url), Client(tracking_uri)
    client.until = time.monotonic() + CONCLUDE_SECONDS
    try:
        Courier(journal, Delivery(client, nested, journal.read_file), tracking_uri).connect()
        write_description(run_url, nested)
    except Exception as error:
        logger.warning(
            "MLflow at %s does not know yet below which run %s stands (%s)",
            redact(tracking_uri),
            run_url,
            in_short(error),
        )


@dataclass(frozen=True)
class Replayed:
    """What became of a replay."""

    run_id: str
    points: int
    """Different (metric, images seen) that MLflow has now."""


def replay(
    run_url: str,
    tracking_uri: str,
    status: Status,
    say: Callable[[str], None] = lambda line: None,
) -> Replayed:
    """Delivers the whole journal of a run; what is there already is not stored again.

    Also to a server that has never heard of the run, and beside a launch that delivers it.
    The run is left with `status`. `say` is told how it goes.

    Raises TrackingError if the address is none or there is nothing to deliver, DeliveryError
    if MLflow does not take it, StoreError if the journal cannot be read.
    """
    check_tracking_uri(tracking_uri)
    journal = StoredJournal(run_url)
    courier = _courier(journal, tracking_uri)
    failures = 0
    while True:
        sent = courier.delivery.sent
        try:
            courier.deliver(lambda segments: say(f"{segments:,} segments of the journal to go"))
            if missing := courier.check():
                say(f"{missing:,} points were missing there")
            courier.delivery.set_status(status)
            break
        except storage.StoreError:
            raise
        except Exception as error:
            failures = 1 if courier.delivery.sent > sent else failures + 1
            if failures == REPLAY_FAILURES:
                raise DeliveryError(
                    f"MLflow at {redact(tracking_uri)} does not take the journal of {run_url}: "
                    f"{in_short(error)}. It lacks {left(journal, courier.delivered)}. Repeat this when it "
                    "answers; nothing is stored twice."
                ) from None  # MLflow's own errors quote the address, with a password in it.
            pause = pause_seconds(failures, is_overload(error))
            say(f"MLflow does not answer as it should ({in_short(error)}); trying again in {pause:.0f} s")
            time.sleep(pause)
    try:
        courier.remember()
    except storage.StoreError as error:
        logger.warning("what was delivered cannot be noted, a repetition looks at it again: %s", error)
    return Replayed(courier.delivery.run_id, courier.delivery.points)


def undelivered(run_url: str, tracking_uri: str) -> Left:
    """What an MLflow lacks of a run's journal, by what is noted there. Raises StoreError."""
    return left(StoredJournal(run_url), read_delivered(run_url, tracking_uri))


class RunTracker:
    """Rank 0's tracker. A context manager: leaving it closes it."""

    def __init__(self, run_url: str, attempt: int, tracking_uri: str, run_id: str = "") -> None:
        """`run_id` as `create_run` returned it; "" if the run has still to be found or made.

        Raises StoreError if the run's folder cannot be read, TrackingError if nothing says
        what the MLflow run is.
        """
        _described(run_url)  # Before anything is begun.
        self._journal = Journal(run_url, attempt)
        self._tracking_uri = tracking_uri
        self._courier = _courier(self._journal, tracking_uri, run_id)
        self._thread = BackgroundCourier(self._courier, tracking_uri)
        self._delivered: bool | None = None
        self._thread.start()

    @property
    def run_id(self) -> str:
        return self._courier.delivery.run_id

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

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> bool:
        """Makes the journal durable and delivers what is left, for at most that long.

        Returns whether MLflow has everything. What it has not is in the journal. A second
        call does nothing but return the same.
        """
        if self._delivered is not None:
            return self._delivered
        # Only durable lines are delivered: without the copy some would be missing.
        durable = self._journal.sync()
        self._delivered = self._thread.finish(timeout_seconds) and durable
        self._journal.close()
        if not self._delivered:
            self._say_what_is_left()
        return self._delivered

    def _say_what_is_left(self) -> None:
        run_url = self._journal.run_url
        try:
            lacking = f"lacks {undelivered(run_url, self._tracking_uri)}"
        except storage.StoreError as error:
            lacking = f"does not have the whole curves ({error})"
        logger.warning(
            "MLflow at %s %s of %s. They are in its journal: the next launch delivers them, and so does "
            "`nvae track replay %s`.",
            redact(self._tracking_uri),
            lacking,
            run_url,
            run_url.rpartition("/")[2],
        )
