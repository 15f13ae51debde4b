"""The history of a model's aliases, and what it means: an append-only line of attempts, replayed.

An entry is an attempt and not a verdict. What became of it is a pure function of the entries before
it, so whoever reads the line comes to the same holder, and nobody has to hold a lock between looking
and writing: two attempts at the same moment get two numbers (promotion.py says from whom), and the second
is judged against the holder that the first one left. Rejected: verdicts that are written down. They need
a lock around reading and writing, and a lock needs somebody to find out that its holder was killed.

An entry has a checksum, and the name of its model is part of it. So an edited or misplaced one is
noticed; it counts for nothing and is listed. This is no protection from somebody who wants to deceive:
who may write tags may move the alias, too.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipeline.models.names import RegistryError, quoted
from pipeline.models.registry import BEST

PROMOTION, ROLLBACK = "promotion", "rollback"
ACCEPTED, REFUSED, OVERTAKEN = "accepted", "refused", "overtaken"
REASON_CHARACTERS = 1000
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_CHECKSUM = "checksum"


@dataclass(frozen=True)
class Basis:
    """What a score was measured on: scores of one basis can be compared."""

    criterion: str
    data_hash: str
    images: int
    """The first so many of the validation split."""
    draws: int
    seed: int
    pixels: str
    """Size, channels, depth and likelihood of the model."""
    trained_on: str = ""
    """Content hash of the data set of its training; empty where somebody named one to judge all by."""


@dataclass(frozen=True)
class Entry:
    """One attempt to move an alias, as it was recorded."""

    id: str
    """Made anew for each attempt: a request that had to be repeated counts once."""
    kind: str
    alias: str
    version: str
    """To which version."""
    holder: str | None
    """From which, as the writer saw it."""
    who: str
    when: str
    """ISO 8601, UTC, by the writer's clock; the order is that of the numbers."""
    code_version: str
    reason: str = ""
    forced: bool = False
    problem: str = ""
    """Why the version must not have the alias whoever wants it: damaged files, weights not finite."""
    basis: Basis | None = None
    score: float | None = None
    """Lower is better."""
    holder_score: float | None = None
    """Of the holder, on the same basis."""
    incomparable: str = ""
    """Why there is none."""


@dataclass(frozen=True)
class Step:
    """A version that holds or held an alias, with the score that it came with."""

    version: str
    basis: Basis | None = None
    score: float | None = None


@dataclass(frozen=True)
class Line:
    """An entry in its place, and what became of it."""

    number: int
    entry: Entry | None
    """None if it cannot be read."""
    outcome: str
    why: str


def check_alias(alias: str) -> str:
    """`alias`, if it can be one that is promoted to; raises RegistryError."""
    if alias == BEST:
        raise RegistryError(
            "`best` is no alias to promote to: it belongs to the version with the lowest bits/dim of its own "
            "training, and every registration judges it anew. Take another, such as champion."
        )
    if not _ALIAS.fullmatch(alias) or alias.lower() == "latest" or re.fullmatch(r"[vV]?[0-9]+", alias):
        raise RegistryError(
            f"{quoted(alias)} cannot be an alias; use up to 100 letters, digits, '.', '_' and '-', beginning "
            "with a letter or digit, and neither `latest` nor a version's number."
        )
    return alias


def written(model: str, entry: Entry) -> str:
    """An entry of this model's history as text."""
    record = {"model": model, **asdict(entry)}
    return json.dumps(record | {_CHECKSUM: _checksum(record)}, allow_nan=False)


def read(model: str, text: str) -> Entry | None:
    """The entry that `written` made of it; None if it is not as it was written."""
    try:
        record = json.loads(text)
        checksum = record.pop(_CHECKSUM)
        if checksum != _checksum(record) or record.pop("model") != model:
            return None
        basis = record.pop("basis")
        known = {field.name for field in fields(Entry)}
        if not record.keys() <= known:
            return None  # A later release wrote it.
        return Entry(**record, basis=None if basis is None else Basis(**basis))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


class History:
    """Entries by number, replayed."""

    def __init__(self, entries: Iterable[tuple[int, Entry | None]]) -> None:
        """`entries` in any order; None stands for one that cannot be read."""
        self._steps: dict[str, list[Step]] = {}
        self._seen: set[str] = set()
        self.lines = list(self._replayed(dict(entries)))

    def steps(self, alias: str) -> tuple[Step, ...]:
        """Who held the alias, up to the holder; what was rolled back is gone. Empty if it is unknown here."""
        return tuple(self._steps.get(alias, ()))

    def line(self, entry_id: str) -> Line | None:
        """What became of an entry; None if it is not there."""
        found = (line for line in self.lines if line.entry is not None and line.entry.id == entry_id)
        return next(found, None)

    def _replayed(self, entries: Mapping[int, Entry | None]) -> Iterator[Line]:
        for number in range(1, max(entries, default=0) + 1):
            entry = entries.get(number)
            if entry is None:
                yield Line(
                    number, None, REFUSED, "it was edited or deleted in MLflow, and counts for nothing"
                )
            elif entry.id in self._seen:
                yield Line(number, None, REFUSED, "a request that arrived twice, and counts once")
            else:
                self._seen.add(entry.id)
                yield Line(number, entry, *self._judged(entry))

    def _judged(self, entry: Entry) -> tuple[str, str]:
        """Outcome and reason of the next entry; if accepted, its version is the holder from now on."""
        steps = self._steps.get(entry.alias, [])
        if not steps and entry.holder is not None:
            # Somebody gave the alias away before there was a history.
            steps = [Step(entry.holder, entry.basis, entry.holder_score)]
        after, outcome, why = (_rolled_back if entry.kind == ROLLBACK else _promoted)(entry, steps)
        if outcome == ACCEPTED:
            self._steps[entry.alias] = after
        return outcome, why


def _rolled_back(entry: Entry, steps: list[Step]) -> tuple[list[Step], str, str]:
    if not steps or steps[-1].version != entry.holder:
        return steps, OVERTAKEN, "the alias was moved by somebody else at the same moment"
    for last in range(len(steps) - 2, -1, -1):
        if steps[last].version == entry.version:
            return steps[: last + 1], ACCEPTED, f"back from version {entry.holder}"
    return steps, REFUSED, f"version {entry.version} did not hold it before"


def _promoted(entry: Entry, steps: list[Step]) -> tuple[list[Step], str, str]:
    holder = steps[-1] if steps else None
    after = [*steps, Step(entry.version, entry.basis, entry.score)]
    if entry.problem:
        return steps, REFUSED, entry.problem
    if entry.score is None or not math.isfinite(entry.score):
        return steps, REFUSED, "its score is not a finite number"
    if holder is None:
        return after, ACCEPTED, f"nobody had the alias; it scores {entry.score:.6g}"
    if holder.version == entry.version:
        return steps, REFUSED, "it holds the alias already"
    theirs, same_holder = holder.score, entry.holder == holder.version
    if holder.basis != entry.basis or theirs is None:
        if not same_holder:
            return steps, OVERTAKEN, f"version {holder.version} took the alias at the same moment"
        theirs = entry.holder_score
    if theirs is not None and entry.score < theirs:
        return after, ACCEPTED, f"{entry.score:.6g} is below the {theirs:.6g} of version {holder.version}"
    if theirs is None:
        why = entry.incomparable or f"version {holder.version} has no score to compare with"
    else:
        why = f"{entry.score:.6g} is not below the {theirs:.6g} of version {holder.version}"
    if entry.forced and same_holder:
        return after, ACCEPTED, f"forced: {why}"
    return steps, REFUSED, why
