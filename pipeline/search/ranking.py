"""Which trial is the best: at equal images seen, or at equal time of their devices.

Who came further ranks higher: those that a scheduler pruned were worse than others when they were
pruned, and a score from early in a training says less. Whatever failed ranks last, whatever its
score was before; the reason is told instead.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.search.ledger import FAILURES, Evaluation, Trial


@dataclass(frozen=True)
class Ranked:
    """A trial, and the score that it is compared by."""

    rank: int
    """From 1."""
    trial: Trial
    bits_per_dim: float | None
    """At `images_seen`; None if it has none that counts."""
    images_seen: int | None


def rank(trials: Sequence[Trial], compare: str) -> list[Ranked]:
    """All trials, the best first; of equals the one that was drawn first.

    With `compare` "device_seconds" finished trials are compared where the fastest of them ended, each by
    its last evaluation before.
    """
    limit = _common_seconds(trials) if compare == "device_seconds" else math.inf
    scored = [(trial, _score(trial, limit)) for trial in trials]

    def order(pair: tuple[Trial, Evaluation | None]) -> tuple[bool, bool, float, float, int]:
        trial, score = pair
        if score is None or score.bits_per_dim is None or trial.state in FAILURES:
            return True, trial.state == "infeasible", 0.0, 0.0, trial.number
        reached = float(score.images_seen)
        if compare == "device_seconds":
            assert trial.last is not None
            reached = min(trial.last.device_seconds, limit)
        return False, trial.state != "finished", -reached, score.score, trial.number

    return [
        Ranked(
            number,
            trial,
            score.bits_per_dim if score and trial.state not in FAILURES else None,
            score.images_seen if score else None,
        )
        for number, (trial, score) in enumerate(sorted(scored, key=order), start=1)
    ]


def best(trials: Sequence[Trial], compare: str) -> Ranked | None:
    """The best trial that finished; None if none did with a finite score."""
    for ranked in rank(trials, compare):
        if ranked.trial.state == "finished" and ranked.bits_per_dim is not None:
            return ranked
    return None


def _common_seconds(trials: Sequence[Trial]) -> float:
    """Device-seconds of the fastest finished trial."""
    finished = [trial.last.device_seconds for trial in trials if trial.state == "finished" and trial.last]
    return min(finished, default=math.inf)


def _score(trial: Trial, limit_seconds: float) -> Evaluation | None:
    """The last evaluation that was made within the limit."""
    within = [each for each in trial.evaluations if each.device_seconds <= limit_seconds]
    return within[-1] if within else None
