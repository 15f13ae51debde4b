"""A search before it starts and as it is now: the draws of a dry run, and its report."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cluster.conductor import Fits
from cluster.searching import GIB, Plan, fits, wanted
from cluster.trial_table import COLUMNS, in_short, ranked_facts, ranked_rows
from pipeline import config_file, estimate, progress
from pipeline import store as stores
from pipeline.progress import counted, duration, say
from pipeline.search import ledger as ledgers
from pipeline.search.definition import Definition
from pipeline.search.ledger import Trial
from pipeline.search.proposing import propose
from pipeline.search.report import write_report

RANKED_COLUMNS = {"rank": "RANK", **COLUMNS}


def report(name: str, store: str | None, *, facts: bool) -> tuple[list[dict[str, Any]], dict[str, str], str]:
    """The trials of a search, the best first, their columns, and where the report was written.

    They are rows of a table, or all that is known of them (`facts`).
    """
    located = stores.locate(store)
    record = ledgers.known_search(located, name)
    definition = Definition.from_plain(record.definition)
    trials = ledgers.read_trials(ledgers.folder(located, name))
    rows = (ranked_facts if facts else ranked_rows)(trials, definition.search.compare)
    return rows, RANKED_COLUMNS, write_report(located, name)


SHOWN_DRAWS = 10
"""Of a dry run."""


def show_draws(plan: Plan) -> None:
    """Print trials as they would be drawn, with what each would need.

    The time of a trial is that on this machine's device, by a few updates of the run's own model and
    the operations that each trial's model takes.
    """
    definition = plan.definition
    for warning in definition.warnings():
        say(f"Warning: {warning}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = "GPU" if device.type == "cuda" else "CPU"
    concurrent = plan.concurrent or max((os.cpu_count() or 1) // plan.workers, 1)
    misfit = fits(plan, kind, concurrent)
    say(f"Measuring the run's own model on this machine's {kind} ...")
    speed = estimate.achieved_flops(definition.base, device)
    drawn: list[Trial] = []
    for number in range(1, min(wanted(plan), SHOWN_DRAWS) + 1):
        draw = propose(definition, drawn, number)
        if draw is None:
            break
        drawn.append(Trial(number, draw, definition.space.settings(draw)))
    rows = [_draw_row(plan, trial, misfit, speed) for trial in drawn]
    shown = [{**row, "time": duration(row["seconds"])} for row in rows]
    progress.table(shown, DRAW_COLUMNS)
    _say_in_all(plan, rows, concurrent)


def _say_in_all(plan: Plan, rows: Sequence[Mapping[str, Any]], concurrent: int) -> None:
    """What the whole search would take if nothing of it were pruned."""
    times = [row["seconds"] for row in rows if row["problem"] is None]
    if not times:
        return
    trials, search = wanted(plan), plan.definition.search
    seconds = sum(times) / len(times) * trials
    said = f"{counted(trials, 'trial')} like these to their last image: {duration(seconds)}"
    if concurrent > 1:
        said += f", or {duration(seconds / concurrent)} with {concurrent} at a time"
    say(f"{said}. (Measured now, beside whatever else runs here.)")
    if search.searcher == "tpe" and len(rows) > search.random_trials:
        say(f"From trial {search.random_trials + 1} on, a real search draws by the scores before.")


DRAW_COLUMNS = {
    "trial": "TRIAL",
    "settings": "SETTINGS",
    "parameters": "PARAMETERS",
    "memory_gib": "MEMORY (GIB)",
    "time": "TIME",
    "problem": "PROBLEM",
}


def _draw_row(plan: Plan, trial: Trial, misfit: Fits, speed: float) -> dict[str, Any]:
    try:
        config = plan.definition.with_settings(trial.settings)
    except config_file.ConfigError as error:
        return {
            "trial": trial.number,
            "settings": in_short(trial.settings),
            "seconds": None,
            "problem": str(error),
        }
    needs = estimate.estimate(config, plan.workers)
    return {
        "trial": trial.number,
        "settings": in_short(trial.settings),
        "parameters": f"{needs.parameters:,}",
        "memory_gib": f"{needs.memory_bytes / GIB:.2f}",
        "seconds": estimate.training_seconds(needs, config, speed, plan.workers),
        "problem": misfit(plan.definition, dict(trial.settings)) or None,
    }
