"""`nvae tune`: a search from what the user typed to its report.

Ray Tune moves trials over the cluster; what is tried, what came of it and what is to be done next is
in the search's folder in the store (pipeline/search/ledger.py), so that the same command continues
a search, on this machine or another, after whatever happened to it.

Population-based training is left out: Tune gives a trial's weights to another by Tune's own
checkpoints, which trials here do not have, and what it would perturb in the midst of a run is part
of the run's identity; cloning runs would make trials that cannot be repeated by their settings.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any

from cluster.models import tracking_uri
from cluster.searching import Plan, search, wanted
from pipeline import lease, run_folder, storage
from pipeline import store as stores
from pipeline.data.index import VALIDATION, load_index
from pipeline.data.loader import check_fits
from pipeline.data.verification import check_complete
from pipeline.models.names import RegistryError
from pipeline.models.registry import Registry
from pipeline.preparation import settle, widths_of
from pipeline.progress import counted, say
from pipeline.run import EXPERIMENT, recorded
from pipeline.run_folder import Launch, RunError
from pipeline.search import ledger as ledgers
from pipeline.search import ranking, reading
from pipeline.search.definition import Definition, changes
from pipeline.search.findings import registered_weights
from pipeline.search.ledger import SearchRecord, Trial
from pipeline.search.report import write_report
from pipeline.settings import flatten
from pipeline.training.tracking import RunTracker, create_run, nest
from pipeline.width import Workers


def plan(
    config: str,
    overrides: Sequence[str],
    name: str | None,
    trials: int | None,
    concurrent: int | None,
    workers: int,
    resources: str,
    store: str | None,
    tracking: str | None,
) -> Plan:
    """Resolve the definition and all defaults. Raises InputError if that is not possible."""
    located = stores.locate(store)
    chosen_name = PurePosixPath(config).stem if name is None else name
    ledgers.folder(located, chosen_name)  # refuses what is no name
    if resources and workers > 1:
        raise RunError("--resources is for trials of one worker; leave it out, or --workers-per-trial.")
    return Plan(
        definition=reading.load(config, overrides),
        name=chosen_name,
        store=located,
        tracking=tracking_uri(store, tracking),
        trials=trials,
        concurrent=concurrent,
        workers=workers,
        resources=parse_resources(resources),
    )


def parse_resources(text: str) -> dict[str, float]:
    """`CPU=4,GPU=0.5` as Ray's names and amounts. Raises RunError."""
    found = {}
    for part in filter(None, text.split(",")):
        name, _, amount = part.partition("=")
        try:
            found[name.strip()] = float(amount)
        except ValueError:
            found[""] = 0.0
    if not all(name and 0 < amount < math.inf for name, amount in found.items()):
        raise RunError(f"--resources {text!r}: write NAME=AMOUNT with amounts above 0, as in CPU=4,GPU=1.")
    return found


def execute(plan: Plan) -> int:
    """Search, and report; returns the exit code."""
    for library in ("matplotlib", "optuna", "sklearn"):
        if find_spec(library) is None:  # a report would lack it, hours from now
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
    data_hash = _check_data(plan)
    record = ledgers.read_search(plan.url)
    if record is not None:
        _check_same(plan, record, data_hash)
    for warning in plan.definition.warnings():
        say(f"Warning: {warning}")
    with lease.held(plan.url, say):
        record = _begin(plan, record, data_hash)
        update = partial(ledgers.update_search, plan.url)
        with (
            recorded(update, plan.url, plan.tracking, record.mlflow_run_id) as end,
            RunTracker(plan.url, len(record.launches), plan.tracking, record.mlflow_run_id) as tracker,
        ):
            end.update(search(plan, record, tracker))
            update(**end)  # which the report says
            end["result"] = _conclude(plan, tracker)
        _nest_trials(plan)
    say(farewell(plan, end))
    return 0 if end["result"].get("best") or end["state"] == "stopped" else 1


# -- before anything starts -------------------------------------------------------------------


def _check_data(plan: Plan) -> str:
    """The data set's content hash. Raises InputError if the trials could not be trained on it."""
    base = plan.definition.base
    storage.configure(base.storage)
    widths_of(base, Workers(plan.workers, plan.workers))
    config = settle(base, plan.store)
    data = load_index(config.data.root)
    check_fits(config, data)
    check_complete(data, cut_is_corrupt=config.data.on_corrupt == "skip")
    if not data.num_samples(VALIDATION):
        raise RunError(
            f"{storage.shown(config.data.root)} has no validation split, by which trials are compared. Build "
            "it with --validation-fraction."
        )
    return data.content_hash


def _check_same(plan: Plan, record: SearchRecord, data_hash: str) -> None:
    """Raises RunError if this is not the search that the record describes."""
    differing = changes(Definition.from_plain(record.definition), plan.definition)
    lines = [f"  {path}: {was!r} -> {now!r}" for path, was, now in differing]
    if data_hash != record.data_hash:
        lines.append(f"  the data set: content {record.data_hash[:12]} -> {data_hash[:12]}")
    if lines:
        raise RunError(
            f"The search {record.name!r} exists and this, which makes it the search it is, differs:\n"
            + "\n".join(lines)
            + "\nContinue it as it was, or give the new search another --name."
        )


def _begin(plan: Plan, record: SearchRecord | None, data_hash: str) -> SearchRecord:
    """Note the search, or this launch of it, in the store and in MLflow."""
    run_folder.clear_stop(plan.url)
    plain = plan.definition.as_plain()
    run_id = create_run(
        plan.tracking,
        run_url=plan.url,
        experiment=EXPERIMENT,
        run_name=plan.name,
        parameters=dict(flatten({"search": plain["search"], **plain["run"]}))
        | {f"space.{each.name}": str(each) for each in plan.definition.space.parameters},
        tags={"search": plan.name, "data.hash": data_hash, "run.url": storage.shown(plan.url)},
    )
    launch = Launch(run_folder.now(), platform.node(), plan.workers)
    record = SearchRecord(
        name=plan.name,
        created=record.created if record else run_folder.now(),
        definition=plain,
        data_hash=data_hash,
        tracking_uri=storage.shown(plan.tracking),
        mlflow_run_id=run_id,
        trials=wanted(plan, record.trials if record else None),
        workers=plan.workers,
        launches=(*(record.launches if record else ()), launch),
        result=record.result if record else {},
    )
    ledgers.write_search(plan.url, record)
    return record


# -- afterwards -------------------------------------------------------------------------------


def _conclude(plan: Plan, tracker: RunTracker) -> dict[str, Any]:
    """Name the best trial, and write the report, to MLflow as well."""
    trials = ledgers.read_trials(plan.url)
    best = ranking.best(trials, plan.definition.search.compare)
    report = write_report(plan.store, plan.name)
    tracker.file("report.html", storage.read_bytes(report))
    result: dict[str, Any] = {"best": None, "report": report}
    if best is not None:
        result |= {
            "best": best.trial.number,
            "bits_per_dim": best.bits_per_dim,
            "settings": dict(best.trial.settings),
            "model": best.trial.model,
            "alias": _name_best(plan, best.trial),
        }
    return result


def _nest_trials(plan: Plan) -> None:
    """Put the MLflow runs of trials below the search's, where that was not known when they began."""
    record = ledgers.read_search(plan.url)
    if record is None or not record.mlflow_run_id:
        return
    for trial in ledgers.read_trials(plan.url):
        url = run_folder.folder(plan.store, ledgers.run_name(plan.name, trial.number))
        nest(url, plan.tracking, record.mlflow_run_id)


def _name_best(plan: Plan, trial: Trial) -> str | None:
    """Give the best trial's model the alias `best-of-NAME`; None if MLflow does not take it now."""
    if trial.model is None:
        return None
    alias = f"best-of-{plan.name}"
    try:
        Registry(plan.tracking).point(alias, trial.model)
    except RegistryError as error:
        say(f"The alias {alias} is not set: {error} The same command sets it.")
        return None
    return f"{trial.model.rpartition('/')[0]}@{alias}"


def farewell(plan: Plan, end: Mapping[str, Any]) -> str:
    """What came out of the search, where it is, and what to try next."""
    trials, result = ledgers.read_trials(plan.url), end["result"]
    how = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in ledgers.counts(trials).items())
    reason = f" ({end['reason']})" if end["reason"] else ""
    lines = ["", f"{end['state'].capitalize()}{reason}: {counted(len(trials), 'trial')}, {how}."]
    if end["state"] == "stopped":
        lines.append("The same command continues the search.")
    if result["best"] is None:
        lines.append("No trial finished with a score.")
    else:
        lines += [
            f"Best: trial {result['best']}, {result['bits_per_dim']:.4f} bits/dim",
            *(f"  {path} {value}" for path, value in result["settings"].items()),
            f"  model  {result['alias'] or result['model'] or 'not registered: MLflow was away'}"
            + registered_weights(plan.store, plan.name, result["best"]),
        ]
    lines += [f"Report: {result['report']}"]
    if result["best"] is not None:
        lines += ["", "Train it in full:", f"  nvae train --from-trial {plan.name}/{result['best']}"]
    return "\n".join(lines)
