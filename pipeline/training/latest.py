"""How a run was at last, by its folder alone: the newest log line, and what was done against divergence.

Nothing here asks MLflow, which may be away, and a long journal is not read to its beginning:
segments are read from the newest back, to the log line before the newest checkpoint at most,
whose record holds every intervention up to there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pipeline.training.checkpoint import Checkpoint
from pipeline.training.interventions import Kind, from_record, in_numbers
from pipeline.training.journal import Entry, StoredJournal, decode
from pipeline.training.recovery import in_words

_OF_A_LOG_LINE = "train/bits_per_dim"
"""A metric that every log line has, and no other point."""


@dataclass(frozen=True)
class LogLine:
    """The numbers of one log interval."""

    images_seen: int = 0
    """0 before the first."""
    noted: datetime | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    """By the names of metrics.NAMES."""


@dataclass(frozen=True)
class Trouble:
    """What was done against divergence since the first image; not what a crash has undone."""

    counts: Mapping[Kind, int]
    """The numbers of interventions.NAMES."""
    last: str = ""
    """The last one, in the words in which the user was told; "" if there was none."""


def newest_line(run_url: str) -> LogLine:
    """The newest log line, of whatever attempt. Raises StoreError."""
    for entry in _backwards(run_url):
        if _is_log_line(entry):
            noted = datetime.fromtimestamp(entry.time / 1000, UTC)
            return LogLine(entry.body["at"], noted, entry.body["values"])
    return LogLine()


def trouble(run_url: str, newest: Checkpoint | None) -> Trouble:
    """What the newest attempt noted after `newest`, the run's newest checkpoint, or what that recorded.

    Raises StoreError.
    """
    return _noted_since(run_url, newest.images_seen if newest else -1) or _recorded(newest)


def _noted_since(run_url: str, saved: int) -> Trouble | None:
    last = ""
    for entry in _backwards(run_url, newest_attempt=True):
        if entry.kind == "tag" and entry.body["key"] == "stability.last":
            last = last or entry.body["value"]
        if _is_log_line(entry) and entry.body["at"] <= saved:
            return None
        if entry.kind == "metrics" and f"stability/{Kind.SKIP}" in entry.body["values"]:
            return Trouble(_counts(entry.body["values"]), last)
    return None


def _recorded(checkpoint: Checkpoint | None) -> Trouble:
    done = from_record(checkpoint.record["interventions"]) if checkpoint else []
    recorded = checkpoint.record["intervention_counts"] if checkpoint else {}
    numbers = in_numbers({Kind(kind): count for kind, count in recorded.items()})
    last = f"At {done[-1].images_seen:,} images: {in_words(done[-1])}" if done else ""
    return Trouble(_counts(numbers), last)


def _counts(numbers: Mapping[str, float]) -> dict[Kind, int]:
    return {kind: int(numbers[f"stability/{kind}"]) for kind in Kind}


def _is_log_line(entry: Entry) -> bool:
    return entry.kind == "metrics" and _OF_A_LOG_LINE in entry.body["values"]


def _backwards(run_url: str, *, newest_attempt: bool = False) -> Iterator[Entry]:
    """The entries of a run's journal, or of its newest attempt's, the newest first."""
    journal = StoredJournal(run_url)
    segments = journal.segments()[::-1]
    for segment in segments:
        if newest_attempt and segment.partition("-")[0] != segments[0].partition("-")[0]:
            return
        yield from reversed(list(decode(journal.read(segment))))
