"""`nvae evaluate`: from what the user typed to figures, shown and recorded.

The version is looked up once, so that an alias that moves meanwhile cannot have the figures of one
version recorded at another. Without `--workers` all is done in this process, and Ray is not
imported.
"""

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.models import tracking_uri
from nvae.config import NVAEConfig
from pipeline import inception_weights, sharded_evaluation, storage
from pipeline import store as stores
from pipeline.models.evaluation_record import evaluation_tag
from pipeline.models.quality_record import quality_tag
from pipeline.models.registry import Registry, load
from pipeline.models.sampling import per_group
from pipeline.models.versions import Version
from pipeline.progress import say
from pipeline.training.worker import LocalWorker
from pipeline.width import Workers

ENTRY = "pipeline.sharded_evaluation:work"


@dataclass(frozen=True)
class Sampled:
    """How the samples are drawn and measured whose FID, precision and recall are wanted."""

    inception: str
    """File or URL of Inception's weights."""
    inception_sha256: str | None
    """Of that file, or the beginning; None if any will do."""
    count: int
    reference: str
    """The split that they are compared with."""
    temperature: tuple[float, ...]


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
    sampled: Sampled | None = None,
) -> dict[str, Any]:
    """The figures of a model on the validation split of `data`, by default its own data set.

    With an empty mapping as `scores` and state "stopped" if it was asked to leave. Those of its samples, too,
    if `sampled` says how.
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
        "quality": _quality(sampled, loaded.config.model, located, batch_size, seed) if sampled else None,
    }
    answer = _answered(arguments, workers, located)
    if answer["state"] == "finished" and record and registry and version:
        registry.note(version, dict(_tags(answer)))
    return answer | {"recorded_at": _recorded_at(answer, version if record else None)}


def _quality(sampled: Sampled, model: NVAEConfig, store: str, batch_size: int, seed: int) -> dict[str, Any]:
    """What sharded_quality.measure is asked; what is wrong with it is found before the first image."""
    per_group(sampled.temperature, model)
    weights = inception_weights.keep(
        sampled.inception, sampled.inception_sha256, storage.join(store, "inception")
    )
    found = weights.fields["source_sha256"]
    if sampled.inception_sha256 is None:
        say(f"Any file was taken for Inception's weights; to insist on this one: --inception-sha256 {found}")
    return {
        "inception": weights.url,
        "inception_manifest": weights.sha256,
        "inception_sha256": found,
        "features": storage.join(store, "features"),
        "count": sampled.count,
        "reference": sampled.reference,
        "temperature": list(sampled.temperature),
        # As papers measure it: the mean of each pixel is smoother than any image.
        "pixels": "sample",
        "seed": seed,
        "batch_size": batch_size,
    }


def _tags(answer: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield evaluation_tag(answer)
    if "sample_quality" in answer:
        yield quality_tag(answer["sample_quality"])


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
