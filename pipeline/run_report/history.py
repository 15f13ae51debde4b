"""A run's journal read back: curves over the images seen, what happened, and when.

An attempt that continues from a checkpoint computes some points again; the newer ones count. Only
what the journal has is told: it is in the store, with MLflow or without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.models.chart import Point
from pipeline.training.interventions import Kind
from pipeline.training.journal import Entry, StoredJournal, decode


@dataclass(frozen=True)
class Attempt:
    """What one start of the workers noted."""

    number: int
    began: int
    """Milliseconds since the epoch, as `ended`."""
    ended: int
    first: int | None
    """Images seen at its first point; None if it came to none."""
    last: int | None


@dataclass(frozen=True)
class Event:
    """Something that was done against divergence."""

    images_seen: int
    words: str
    rolled_back: bool
    """Whether weights of a checkpoint came back."""


@dataclass(frozen=True)
class History:
    """All that a journal tells of a run."""

    curves: Mapping[str, Sequence[Point]]
    """By the names of metrics.NAMES and of the evaluations: (images seen, value), by the images."""
    attempts: Sequence[Attempt]
    events: Sequence[Event]
    pictures: Mapping[str, Sequence[tuple[int, str]]]
    """Of each kind, (images seen, path below the run's folder), by the images."""

    @property
    def images_seen(self) -> int:
        return int(max((points[-1][0] for points in self.curves.values()), default=0))

    def curve(self, name: str) -> Sequence[Point]:
        return self.curves.get(name, ())

    def last(self, name: str) -> float | None:
        points = self.curve(name)
        return points[-1][1] if points else None

    def groups(self, name: str) -> list[str]:
        """The names of a metric's groups, the coarsest first."""
        return sorted(each for each in self.curves if each.startswith(f"{name}/group_"))


def read_history(journal: StoredJournal) -> History:
    """Everything in a run's journal. Raises StoreError; damaged lines are left out with a warning."""
    values: dict[str, dict[int, float]] = {}
    attempts: dict[int, list[Entry]] = {}
    events: dict[int, Event] = {}
    pictures: dict[str, dict[int, str]] = {}
    rollbacks = 0.0
    for segment in journal.segments():
        number = int(segment.partition("-")[0])
        moment = 0
        for entry in decode(journal.read(segment)):
            attempts.setdefault(number, []).append(entry)
            if entry.kind == "metrics":
                moment = entry.body["at"]
                for name, value in entry.body["values"].items():
                    values.setdefault(name, {})[moment] = value
            elif entry.kind == "tag" and entry.body["key"] == "stability.last":
                # `recovery.tell` notes the numbers at that moment just before.
                count = values.get(f"stability/{Kind.ROLL_BACK}", {}).get(moment, rollbacks)
                events[moment] = Event(moment, entry.body["value"], count > rollbacks)
                rollbacks = count
            elif entry.kind == "artifact" and entry.body["folder"] == "pictures":
                kind, _, at = entry.body["path"].rpartition("/")[2].removesuffix(".png").rpartition("-")
                if at.isdecimal():
                    pictures.setdefault(kind, {})[int(at)] = entry.body["path"]
    return History(
        {name: sorted(points.items()) for name, points in values.items()},
        [_attempt(number, entries) for number, entries in sorted(attempts.items())],
        [event for _, event in sorted(events.items())],
        {kind: sorted(found.items()) for kind, found in pictures.items()},
    )


def _attempt(number: int, entries: Sequence[Entry]) -> Attempt:
    times = [entry.time for entry in entries]
    lines = [each.body["at"] for each in entries if each.kind == "metrics"]
    return Attempt(number, min(times), max(times), min(lines, default=None), max(lines, default=None))
