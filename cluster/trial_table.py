"""Trials as rows of a table: while a search runs, and ranked."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.progress import duration
from pipeline.search import ranking
from pipeline.search.ledger import Trial
from pipeline.search.space import GROUPS

COLUMNS = {
    "trial": "TRIAL",
    "state": "STATE",
    "settings": "SETTINGS",
    "images_seen": "IMAGES SEEN",
    "bits_per_dim": "BITS/DIM",
    "time": "TIME",
    "reason": "REASON",
}


def row(trial: Trial) -> dict[str, Any]:
    """A trial in the table."""
    last = trial.last
    return {
        "trial": trial.number,
        "state": trial.state.replace("_", " "),
        "settings": in_short(trial.settings),
        "images_seen": last.images_seen if last else None,
        "bits_per_dim": last.bits_per_dim if last else None,
        "time": duration(trial.spent_device_seconds) if trial.spent_device_seconds else None,
        "reason": trial.reason or None,
    }


def in_short(settings: Mapping[str, Any]) -> str:
    """Settings without their sections, the structure first: `[1, 2, 3] spectral_coefficient 0.01`."""
    parts = [str(settings[GROUPS])] if GROUPS in settings else []
    parts += [
        f"{path.rpartition('.')[2]} {f'{value:.3g}' if isinstance(value, float) else value}"
        for path, value in settings.items()
        if path != GROUPS
    ]
    return "  ".join(parts)


def ranked_facts(trials: Sequence[Trial], compare: str) -> list[dict[str, Any]]:
    """Everything of each trial under the ledger's names, the best first, for programs."""
    found = []
    for each in ranking.rank(trials, compare):
        facts = asdict(each.trial)
        scored = {"rank": each.rank, "trial": facts.pop("number"), "bits_per_dim": each.bits_per_dim}
        found.append({**scored, **facts})
    return found


def ranked_rows(trials: Sequence[Trial], compare: str) -> list[dict[str, Any]]:
    """The table with the best trial first, each with its rank."""
    return [
        {**row(each.trial), "rank": each.rank, "bits_per_dim": each.bits_per_dim}
        for each in ranking.rank(trials, compare)
    ]
