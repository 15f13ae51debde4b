"""Who carries a journal to MLflow, remembers how far it came, and asks at the end whether all arrived.

RUN/journal/delivered-*.json    for each MLflow: its run, and how many bytes of each segment it has

A point is delivered in the order of the journal, so of one that was computed twice MLflow
has the first, whoever delivers. What the journal says was delivered is believed; where
that is in doubt (the journal is damaged, MLflow has points that nothing here knows of)
MLflow is asked for every point it has, as it is at the very end.
"""

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from pipeline import storage
from pipeline.training.delivery import Delivery
from pipeline.training.journal import Journal, StoredJournal, complete, decode
from pipeline.training.mlflow_client import OutOfTimeError, in_short, is_overload
from pipeline.training.pace import pause_seconds
from pipeline.training.run_description import redact

POLL_SECONDS = 1.0
REMEMBER_SECONDS = 5.0
"""How often the state of delivery is written; what is delivered twice for want of it is stored once."""

logger = logging.getLogger(__name__)


@dataclass
class Delivered:
    """What one MLflow has of a journal."""

    tracking_uri: str
    """Without secrets."""
    run_id: str = ""
    segments: dict[str, int] = field(default_factory=dict)
    """Bytes of each segment."""
    files: dict[str, str] = field(default_factory=dict)
    """Pictures and files in these bytes that it lacks: path below the run's folder -> folder in MLflow."""


def read_delivered(run_url: str, tracking_uri: str) -> Delivered:
    """What is known of an MLflow; nothing if it was never reached."""
    return _read(_url(run_url, tracking_uri)) or Delivered(redact(tracking_uri))


def all_delivered(run_url: str) -> list[Delivered]:
    """What is known of every MLflow to which the journal was delivered."""
    folder = storage.join(run_url, "journal")
    names = [name for name in storage.list_dir(folder) if re.fullmatch(r"delivered-\w+\.json", name)]
    return [known for name in sorted(names) if (known := _read(storage.join(folder, name)))]


def _read(url: str) -> Delivered | None:
    try:
        known = Delivered(**json.loads(storage.read_bytes(url)))
        known.segments = {str(name): int(length) for name, length in known.segments.items()}
        known.files = {str(path): str(folder) for path, folder in known.files.items()}
        return known
    except storage.MissingError:
        return None
    except (ValueError, TypeError, AttributeError):
        logger.warning("%s is damaged; MLflow is asked what it has", url)
        return None


def _url(run_url: str, tracking_uri: str) -> str:
    name = hashlib.sha256(redact(tracking_uri).encode()).hexdigest()[:12]
    return storage.join(run_url, "journal", f"delivered-{name}.json")


@dataclass(frozen=True)
class Left:
    """What an MLflow lacks of a journal."""

    points: int
    files: int

    def __bool__(self) -> bool:
        return bool(self.points or self.files)

    def __str__(self) -> str:
        return f"{self.points:,} points and {self.files:,} files"


def left(journal: StoredJournal, delivered: Delivered) -> Left:
    """How much is to be delivered yet. Points that were computed again count each time.

    Raises StoreError if the journal cannot be read.
    """
    points, files = 0, len(delivered.files)
    for segment in journal.segments():
        for entry in decode(journal.read(segment)[delivered.segments.get(segment, 0) :]):
            points += len(entry.body["values"]) if entry.kind == "metrics" else 0
            files += entry.kind == "artifact"
    return Left(points, files)


class Courier:
    """Carries a journal to one MLflow. Raises whatever MLflow raises, and can be called again."""

    def __init__(
        self, journal: StoredJournal, delivery: Delivery, tracking_uri: str, run_id: str = ""
    ) -> None:
        """Touches nothing yet. `run_id` is the MLflow run, if that is known already."""
        self._journal, self.delivery = journal, delivery
        self._tracking_uri, self._run_id = tracking_uri, run_id
        self.delivered = Delivered(redact(tracking_uri))
        self._begun = ""
        """The MLflow run for which this is so."""
        self._earlier: list[str] = []
        """Segments of earlier attempts that have still to be looked at."""
        self._remembered = ""

    def connect(self) -> None:
        """Finds or makes the MLflow run, where that has not been done.

        A run that is being noted in is running, whatever an earlier attempt at it said.
        """
        if self.delivery.run_id and self.delivery.run_id == self._begun:
            return
        known = read_delivered(self._journal.run_url, self._tracking_uri)
        self.delivery.connect([self._run_id, known.run_id])
        if isinstance(self._journal, Journal):
            self.delivery.set_status("RUNNING")
        self._begin(known)
        self._begun = self._run_id = self.delivery.run_id

    def deliver(self, progress: Callable[[int], None] = lambda segments: None) -> None:
        """Delivers what is durable and MLflow lacks; `progress` learns how many segments are to go."""
        self.connect()
        while self._earlier:
            progress(len(self._earlier))
            self._deliver_segment(self._earlier[0], own=False)
            self._earlier.pop(0)
        for segment, length in self._own().items():
            if self.delivered.segments.get(segment, 0) < length:
                self._deliver_segment(segment, own=True)
        for path, folder in list(self.delivered.files.items()):
            self.delivery.send_file(path, folder)
            del self.delivered.files[path]

    def _begin(self, known: Delivered) -> None:
        # In this order: what is begun in between is our own.
        segments = self._journal.segments()
        self._earlier = [name for name in segments if name not in self._own()]
        if known.run_id == self.delivery.run_id:
            self.delivered = known
        else:
            self.delivered = Delivered(redact(self._tracking_uri), self.delivery.run_id)
        # Points without a segment: the journal was lost, or is that of another address of this MLflow.
        if self.delivery.had_points and not known.segments.keys() & set(segments):
            self.delivery.ask()

    def _own(self) -> dict[str, int]:
        return self._journal.own_segments() if isinstance(self._journal, Journal) else {}

    def _deliver_segment(self, segment: str, own: bool) -> None:
        try:
            data = self._journal.read(segment)
        except storage.MissingError:
            logger.warning("the segment %s of the journal is gone, its points are lost", segment)
            return
        start, end = self.delivered.segments.get(segment, 0), complete(data)
        if not own:
            before = list(decode(data[:start]))
            self.delivery.skip(before)
            if len(before) < data[:start].count(b"\n") or len(data) < start:
                self.delivery.ask()  # The journal is damaged where MLflow has it whole.
        # That an earlier launch ended says nothing about the run any more.
        entries = [entry for entry in decode(data[start:]) if own or entry.kind != "status"]
        self.delivery.send(entries)
        for entry in entries:
            if entry.kind == "artifact":
                self.delivered.files[entry.body["path"]] = entry.body["folder"]
        self.delivered.segments[segment] = max(start, end)

    def check(self) -> int:
        """Asks MLflow what it has, and sends what of the journal's points it lacks; how many.

        Not every answer that says yes is MLflow's.
        """
        self.delivery.ask()
        had = self.delivery.points
        for segment in self._journal.segments():
            entries = decode(self._journal.read(segment))
            self.delivery.send(entry for entry in entries if entry.kind == "metrics")
        self.delivery.delete_strays()
        return self.delivery.points - had

    def remember(self) -> None:
        """Notes in the run's folder what was delivered. Raises StoreError if it cannot."""
        state = json.dumps(asdict(self.delivered), indent=2)
        if self.delivery.run_id and state != self._remembered:
            storage.write_bytes(_url(self._journal.run_url, self._tracking_uri), state.encode())
            self._remembered = state


class BackgroundCourier(threading.Thread):
    """A courier that delivers while a training goes on, with pauses while MLflow is away."""

    def __init__(self, courier: Courier, tracking_uri: str) -> None:
        super().__init__(name="tracking", daemon=True)
        self._courier, self._tracking_uri = courier, redact(tracking_uri)
        self._closing = threading.Event()
        self._remembered_at = 0.0
        self._failures, self._warned = 0, False
        self._all_delivered = False

    def finish(self, timeout_seconds: float) -> bool:
        """Waits until everything is delivered, at most that long; whether it is."""
        self._courier.delivery.client.until = time.monotonic() + timeout_seconds
        self._closing.set()
        self.join(timeout_seconds)
        return self._all_delivered

    def run(self) -> None:
        while True:
            # Before the delivery: what is noted after it began is delivered in the next round.
            closing = self._closing.is_set()
            try:
                self._courier.deliver()
                if closing:
                    self._all_delivered = True
                    self._end()
                    return
                wait = self._went_well()
            except OutOfTimeError:
                self._remember()
                return
            except Exception as error:
                # Whatever a server away, a proxy or a full database raises: the journal has it all.
                wait = self._went_wrong(error)
            if time.monotonic() - self._remembered_at > REMEMBER_SECONDS:
                self._remember()
            if closing:
                time.sleep(min(wait, 1.0))
            else:
                self._closing.wait(wait)

    def _end(self) -> None:
        try:
            missing = self._courier.check()
        except Exception as error:
            logger.warning(
                "MLflow took every point; whether it kept them could not be checked (%s). `nvae track "
                "replay` with the run's name checks, and sends what is missing.",
                in_short(error),
            )
        else:
            if missing:
                logger.warning("MLflow had lost %s points that it had taken; they were sent again", missing)
        self._remember()

    def _went_well(self) -> float:
        if self._warned:
            logger.warning("MLflow answers again; the curves are delivered")
        self._failures, self._warned = 0, False
        return POLL_SECONDS

    def _went_wrong(self, error: Exception) -> float:
        self._failures += 1
        # A single failure may be a connection that went stale.
        if self._failures > 1 and not self._warned:
            self._warned = True
            logger.warning(
                "The curves cannot be delivered to MLflow at %s (%s); the journal keeps them, and delivery "
                "is tried again until it succeeds",
                self._tracking_uri,
                in_short(error),
            )
        return pause_seconds(self._failures, is_overload(error))

    def _remember(self) -> None:
        try:
            self._courier.remember()
        except storage.StoreError as error:
            # Without it, points are sent again and stored once.
            logger.info("what was delivered cannot be noted now: %s", error)
        self._remembered_at = time.monotonic()
