"""`nvae evaluate`: from what the user typed to figures, shown and recorded.

The version is looked up once, so that an alias that moves meanwhile cannot have the figures of one
version recorded at another. Without `--workers` all is done in this process, and Ray is not
imported.
"""

import uuid
from collections.abc import Mapping
from typing import Any

from cluster.models import tracking_uri
from pipeline import sharded_evaluation, storage
from pipeline import store as stores
from pipeline.models.evaluation_record import evaluation_tag
from pipeline.models.registry import Registry, load
from pipeline.models.versions import Version
from pipeline.progress import say
from pipeline.training.worker import LocalWorker
from pipeline.width import Workers

ENTRY = "pipeline.sharded_evaluation:work"


def evaluate(
    model: str,
    data: str | None,
    samples: int,
    limit: int | None,
    batch_size: int,
    seed: int,
    workers: Workers | None,
    record: bool,
    store: str | None,
    tracking: str | None,
) -> dict[str, Any]:
    """The figures of a model on the validation split of `data`, by default its own data set.

    With an empty mapping as `scores` and state "stopped" if it was asked to leave.
    """
    uri, located = tracking_uri(store, tracking), stores.locate(store)
    registry = Registry(uri) if model.startswith("models:") else None
    version = registry.find(model) if registry else None
    # Loaded here too: only MLflow's tags can vouch for the manifest, and workers do not ask it.
    loaded = load(version.ref if version else model, uri)
    storage.configure(loaded.config.storage)
    root = stores.data_url(data or loaded.config.data.root, located)
    arguments = {
        "model": loaded.manifest.url,
        "manifest": loaded.manifest.sha256,
        "data": root,
        "draws": samples,
        "limit": limit,
        "batch_size": batch_size,
        "seed": seed,
    }
    answer = _answered(arguments, workers, located)
    if answer["state"] == "finished" and record and registry and version:
        registry.note(version, dict([evaluation_tag(answer)]))
    return answer | {"recorded_at": _recorded_at(answer, version if record else None)}


def facts(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The answer as it is shown: the figures first, then what they are of."""
    rest = {key: value for key, value in answer.items() if key not in ("scores", "state")}
    return {**answer.get("scores", {}), **rest}


def _recorded_at(answer: Mapping[str, Any], version: Version | None) -> str | None:
    return version.ref if version and answer["state"] == "finished" else None


def _answered(arguments: dict[str, Any], workers: Workers | None, store: str) -> dict[str, Any]:
    if workers is None:
        return sharded_evaluation.work(arguments, LocalWorker())
    from cluster.launch import launch

    folder = storage.join(store, "evaluations", uuid.uuid4().hex[:12])
    widths = range(workers.minimum, workers.maximum + 1)
    try:
        return launch(ENTRY, arguments, widths=widths, run_url=folder, say=say)
    finally:
        storage.delete(folder, recursive=True)
