"""A search while it runs: Ray, Tune's experiment, the table on the terminal, and what ends it early."""

import itertools
import logging
import os
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from ray import tune

from cluster.conductor import (
    Conductor,
    Ending,
    Fits,
    LedgerCallback,
    LedgerScheduler,
    LedgerSearcher,
)
from cluster.nodes import check_holds, kind_of_places, places, ray_connection
from cluster.trial import Shared, trainable
from cluster.trial_table import COLUMNS, row
from pipeline import estimate, run_folder
from pipeline.progress import LiveTable, counted
from pipeline.search import ledger as ledgers
from pipeline.search import ranking
from pipeline.search.definition import Definition
from pipeline.search.ledger import UNFINISHED, Ledger, SearchRecord, Trial
from pipeline.training.machine import total_memory
from pipeline.training.tracking import RunTracker
from pipeline.training.worker import Poll, StopSignals

# Read by Tune when a search starts: it writes no logs of its own, and a trial that is asked to leave
# has the time that a checkpoint may take.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_FORCE_TRIAL_CLEANUP_S", "600")
# The table is ours, and what became of a trial is in it.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)

DEFAULT_TRIALS = 20
_MOST_LISTED = 100_000
"""Combinations of a space that are counted."""
GIB = 2**30
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Plan:
    """A search that was asked for, with everything resolved and nothing started."""

    definition: Definition
    name: str
    store: str
    tracking: str
    trials: int | None
    """None: as many as the search had, or DEFAULT_TRIALS."""
    concurrent: int | None
    """Trials at a time; None: as many as the cluster has places for."""
    workers: int
    """Of each trial."""
    resources: Mapping[str, float]
    """What the process of a trial reserves; empty: a GPU, or a CPU where there are none."""
    entry: str = "pipeline.run:work"
    """What each worker of a trial executes, as `launch` takes it."""

    @property
    def url(self) -> str:
        return ledgers.folder(self.store, self.name)


def wanted(plan: Plan, before: int | None = None) -> int:
    """Trials in all: as asked, or as before, or all of a grid, or 20; never more than there could be."""
    space = plan.definition.space
    there = sum(1 for _ in itertools.islice(space.combinations(), _MOST_LISTED)) if space.is_listed else None
    if there is not None and plan.definition.search.searcher == "grid":
        before = before or there
    asked = plan.trials or before or DEFAULT_TRIALS
    return asked if there in (None, _MOST_LISTED) else min(asked, there)


def search(plan: Plan, record: SearchRecord, tracker: RunTracker) -> dict[str, Any]:
    """Run the trials that are left; how that ended."""
    shared = Shared(
        plan.name,
        plan.url,
        plan.store,
        plan.tracking,
        plan.definition,
        plan.workers,
        record.mlflow_run_id,
        plan.entry,
    )
    asked_for = (plan.concurrent or 1) * plan.workers
    with (
        StopSignals() as signals,
        Poll(partial(run_folder.stop_requested, plan.url)) as asked,
        LiveTable(COLUMNS) as table,
        ray_connection(asked_for),
    ):
        kind = kind_of_places()
        check_holds(plan.resources)
        concurrent = plan.concurrent or max(places(kind).total // plan.workers, 1)
        conductor = Conductor(
            plan.definition,
            Ledger(plan.url),
            store=plan.store,
            name=plan.name,
            wanted=record.trials,
            workers=plan.workers,
            fits=fits(plan, kind, concurrent),
            changed=lambda trial: _note(tracker, conductor, trial),
            asked_to_stop=lambda: signals.received or asked(),
        )
        there = len(conductor.ledger.trials)
        table.say(
            f"Search {plan.name}: {counted(conductor.left, 'trial')} to run"
            + (f" ({there} there already)" if there else "")
            + f", {concurrent} at a time, each on {_reserved(plan, kind)}."
        )
        if conductor.left and not conductor.reason_to_end():
            _run_tune(plan, shared, conductor, concurrent, kind, table)
        reason = conductor.reason_to_end()
        unfinished = [trial for trial in conductor.ledger.trials if trial.state in UNFINISHED]
        complete = not unfinished and (conductor.exhausted or len(conductor.ledger.trials) >= record.trials)
    return {"state": "finished" if complete else "stopped", "reason": "" if complete else reason}


def _run_tune(
    plan: Plan,
    shared: Shared,
    conductor: Conductor,
    concurrent: int,
    kind: str,
    table: LiveTable,
) -> None:
    """One experiment of Tune's, watched from the main thread, where signals arrive."""
    errors: list[BaseException] = []
    with tempfile.TemporaryDirectory(prefix="nvae-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(trainable(shared), _placement(plan, kind)),
            tune_config=tune.TuneConfig(
                search_alg=LedgerSearcher(conductor),
                scheduler=LedgerScheduler(conductor),
                num_samples=conductor.left,
                max_concurrent_trials=concurrent,
                reuse_actors=plan.workers == 1,
            ),
            run_config=tune.RunConfig(
                name=plan.name,
                storage_path=folder,
                stop=Ending(conductor),
                failure_config=tune.FailureConfig(max_failures=plan.definition.search.max_restarts),
                callbacks=[LedgerCallback(conductor)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )

        def fit() -> None:
            try:
                tuner.fit()
            except BaseException as error:  # raised below, in the main thread
                errors.append(error)

        thread = threading.Thread(target=fit, name="tune", daemon=True)
        thread.start()
        while thread.is_alive():
            # Those that run last: where they are more than a terminal holds, these are what it shows.
            table.show(map(row, sorted(conductor.ledger.trials, key=lambda trial: trial.state in UNFINISHED)))
            thread.join(_LOOK_SECONDS)
        ranked = ranking.rank(conductor.ledger.trials, plan.definition.search.compare)
        table.show((row(each.trial) for each in ranked), whole=True)
    if errors:
        raise errors[0]


def _reserved(plan: Plan, kind: str) -> str:
    amounts = plan.resources or {kind: plan.workers}
    return ", ".join(f"{amount:g} {name}{'s' if amount != 1 else ''}" for name, amount in amounts.items())


def _placement(plan: Plan, kind: str) -> Any:
    """What Tune reserves for a trial. One of several workers takes their places by itself."""
    if plan.workers > 1:
        # A byte: an empty bundle is refused, and a part of a CPU would leave one place fewer.
        return tune.PlacementGroupFactory([{"memory": 1}])
    return tune.PlacementGroupFactory([dict(plan.resources) or {kind: 1}])


def fits(plan: Plan, kind: str, concurrent: int) -> Fits:
    """Why settings would not fit a worker's device, by an estimate; "" where they do."""
    limit = device_memory(plan, kind, concurrent)

    def misfit(definition: Definition, settings: dict[str, Any]) -> str:
        config = definition.with_settings(settings)
        if limit is None:
            return ""
        needed = estimate.estimate(config, plan.workers).memory_bytes
        if needed <= limit:
            return ""
        return f"needs about {needed / GIB:.1f} GiB on a device of {limit / GIB:.1f}"

    return misfit


def device_memory(plan: Plan, kind: str, concurrent: int) -> float | None:
    """Bytes that a worker's device has; None if nobody knows: GPUs that are all on other machines."""
    if plan.definition.search.device_memory_gib is not None:
        return plan.definition.search.device_memory_gib * GIB
    if kind == "CPU":
        return total_memory() / (concurrent * plan.workers)
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return None


def _note(tracker: RunTracker, conductor: Conductor, trial: Trial) -> None:
    """The search's own curves, over the number of trials that have ended."""
    if trial.state in UNFINISHED:
        return
    trials = conductor.ledger.trials
    numbers = {
        "search/images_seen": float(sum(each.last.images_seen for each in trials if each.last)),
        "search/device_hours": conductor.spent_device_seconds / 3600,
    }
    best = ranking.best(trials, conductor.definition.search.compare)
    if best is not None and best.bits_per_dim is not None:
        numbers["search/best_bits_per_dim"] = best.bits_per_dim
    tracker.log(numbers, at=sum(each.state not in UNFINISHED for each in trials))
