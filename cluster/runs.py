"""`nvae runs`: what the store knows of training runs, as the command line shows it."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from pipeline import lease, run_folder, settings
from pipeline import store as stores
from pipeline.run_folder import RunRecord
from pipeline.training.checkpoint import checkpoints, images_saved


def listing(store: str | None) -> Iterator[dict[str, Any]]:
    """A row for each run, the newest first."""
    located = stores.locate(store)
    for record in run_folder.all_records(located):
        yield {
            "name": record.name,
            "state": _state(located, record),
            "images_seen": images_saved(run_folder.folder(located, record.name)),
            "total_images": record.config["train"]["total_images"],
            "bits_per_dim": record.result.get("metrics", {}).get("validation/bits_per_dim"),
            "model": record.result.get("model"),
            "created": record.created,
        }


def describe(name: str, store: str | None) -> dict[str, Any]:
    """One run by name, its settings by their dotted paths."""
    located = stores.locate(store)
    record = run_folder.known_record(located, name)
    url = run_folder.folder(located, name)
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
        "checkpoints": [{"images_seen": saved.images_seen, "url": saved.url} for saved in checkpoints(url)],
        **result,
        **record.result.get("metrics", {}),
        **dict(settings.flatten(record.config)),
    }


def stop(name: str, store: str | None) -> str:
    """Ask a run to stop; returns what to tell the user."""
    located = stores.locate(store)
    run_folder.known_record(located, name)
    url = run_folder.folder(located, name)
    if lease.holder(url) is None:
        return f"Nobody is running {name}."
    run_folder.request_stop(url)
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
