"""`nvae runs`: what the store knows of training runs, as the command line shows it."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from pipeline import lease, run_folder, settings
from pipeline import store as stores
from pipeline.run_folder import RunRecord
from pipeline.search import ledger
from pipeline.training.checkpoint import BEST_METRIC, Checkpoint, checkpoints
from pipeline.training.interventions import Kind
from pipeline.training.latest import newest_line, trouble

logger = logging.getLogger(__name__)

_UNKNOWN = dict.fromkeys(
    ("images_seen", "total_images", "bits_per_dim", "skipped", "rollbacks", "model", "created")
)
"""What a listing does not say of a run whose record cannot be read."""


def listing(store: str | None) -> Iterator[dict[str, Any]]:
    """A row for each run, the newest first; at the end those whose record cannot be read."""
    located = stores.locate(store)
    records, damaged = run_folder.all_records(located)
    for record in records:
        url = run_folder.folder(located, record.name)
        saved = checkpoints(url)
        done = trouble(url, saved[0] if saved else None).counts
        yield {
            "name": record.name,
            "state": _state(located, record),
            "images_seen": saved[0].images_seen if saved else 0,
            "total_images": record.config["train"]["total_images"],
            "bits_per_dim": record.result.get("metrics", {}).get(BEST_METRIC, _best(saved)),
            "skipped": done[Kind.SKIP],
            "rollbacks": done[Kind.ROLL_BACK],
            "model": record.result.get("model"),
            "created": record.created,
        }
    for name, error in damaged.items():
        logger.warning("%s", error)
        yield {"name": name, "state": "damaged", **_UNKNOWN}


def describe(name: str, store: str | None) -> dict[str, Any]:
    """Everything about one run, for programs: its settings by their dotted paths, its newest numbers."""
    located = stores.locate(store)
    if name in ledger.names(located) and run_folder.read_record(run_folder.folder(located, name)) is None:
        raise run_folder.RunError(f"{name!r} is a search; `nvae report {name}` shows it.")
    record = run_folder.known_record(located, name)
    url = run_folder.folder(located, name)
    saved = checkpoints(url)
    line, done = newest_line(url), trouble(url, saved[0] if saved else None)
    result = {key: value for key, value in record.result.items() if key != "metrics"}
    return {
        "name": name,
        "url": url,
        "state": _state(located, record),
        "reason": record.reason or None,
        "created": record.created,
        "mlflow": f"{record.tracking_uri} run {record.mlflow_run_id}",
        "data_hash": record.data_hash,
        "parent": record.parent,
        "launches": [asdict(launch) for launch in record.launches],
        "checkpoints": [
            {"images_seen": each.images_seen, "created": _created(each).isoformat(), "url": each.url}
            for each in saved
        ],
        "newest_checkpoint_age_seconds": _age(_created(saved[0])) if saved else None,
        "best_bits_per_dim": _best(saved),
        "interventions": {str(kind): count for kind, count in done.counts.items()},
        "last_intervention": done.last or None,
        "logged": {
            "images_seen": line.images_seen,
            "age_seconds": _age(line.noted) if line.noted else None,
            "numbers": dict(line.numbers),
        },
        **result,
        **record.result.get("metrics", {}),
        **dict(settings.flatten(record.config)),
    }


def stop(name: str, store: str | None) -> str:
    """Ask a run, or a search with all its trials, to stop; returns what to tell the user."""
    located = stores.locate(store)
    is_search = name in ledger.names(located)
    if not is_search:
        run_folder.known_record(located, name)
    url = ledger.folder(located, name) if is_search else run_folder.folder(located, name)
    if lease.holder(url) is None:
        return f"Nobody is running {name}."
    run_folder.request_stop(url)
    if is_search:
        return f"The trials of {name} will write checkpoints, and the search stops within seconds."
    return f"{name} will write a checkpoint and stop within seconds."


def check_deletable(name: str, store: str | None) -> None:
    """Raises RunError if there is no such run, or if it is running."""
    located = stores.locate(store)
    run_folder.known_record(located, name)
    run_folder.check_deletable(run_folder.folder(located, name))


def delete(name: str, store: str | None) -> str:
    """Delete a run's folder; returns what to tell the user."""
    located = stores.locate(store)
    run_folder.known_record(located, name)
    run_folder.delete(run_folder.folder(located, name))
    return f"Deleted the run {name}. Its MLflow run and its registered models are kept."


def _state(store: str, record: RunRecord) -> str:
    """The recorded state; a run that was killed cannot have recorded that it ended."""
    if record.state == "running" and lease.holder(run_folder.folder(store, record.name)) is None:
        return "killed"
    return record.state


def _best(saved: Sequence[Checkpoint]) -> float | None:
    """The lowest bits/dim that was measured at a checkpoint; the best one is always kept."""
    measured = [value for each in saved if (value := each.metrics.get(BEST_METRIC)) is not None]
    return min(measured, default=None)


def _created(checkpoint: Checkpoint) -> datetime:
    return datetime.fromisoformat(checkpoint.manifest.fields["created"])


def _age(moment: datetime) -> float:
    """Seconds since then, by this machine's clock."""
    return max((datetime.now(UTC) - moment).total_seconds(), 0.0)
