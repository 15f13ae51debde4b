"""What is settled and checked on the driver before a run starts. Nothing is written here.

A mistake that would show after an hour of waiting for machines, or in the words of a
worker, shows here: another run of that name, a data set that lacks a shard or does not fit
the model, a batch that the workers cannot share, weights of another shape.
"""

from dataclasses import dataclass

import torch

from nvae.model import NVAE
from pipeline import config_file, run_folder, storage, store
from pipeline.config import RunConfig
from pipeline.data.index import Index, load_index
from pipeline.data.loader import check_fits, default_lanes
from pipeline.data.verification import check_complete
from pipeline.models.registry import Registry, load
from pipeline.run_folder import RunError, RunRecord
from pipeline.training.checkpoint import checkpoints
from pipeline.training.run_description import check_tracking_uri
from pipeline.width import Workers


@dataclass(frozen=True)
class Prepared:
    """A run that can start: nothing was found to be wrong with it."""

    name: str
    store: str
    url: str
    """The run's folder."""
    config: RunConfig
    """With its open ends closed."""
    widths: tuple[int, ...]
    """Numbers of workers that it may be trained on, fewest first."""
    data: Index
    tracking_uri: str
    record: RunRecord | None
    """What the store knows of the run; None for a new one."""
    parent: str | None
    """Model to begin with, as it was asked for; of an existing run, when it began."""
    initial_model: str | None
    """The same, pinned to one version."""


def prepare(
    config: RunConfig,
    *,
    name: str,
    store_url: str,
    tracking_uri: str,
    workers: Workers,
    parent: str | None = None,
) -> Prepared:
    """Check everything that can be checked before a worker starts.

    Raises RunError if the run exists with another identity, if the batch cannot be shared by
    `workers`, or if `parent` is a model of another shape; ShardError if shards are missing or the
    data set does not fit the model; TrackingError if `tracking_uri` is no address of MLflow.
    """
    check_tracking_uri(tracking_uri)
    storage.configure(config.storage)
    url = run_folder.folder(store_url, name)
    record = run_folder.read_record(url)
    widths = widths_of(config, workers)
    config = settle(config, store_url, record)
    if workers.is_range:
        config = with_bounded_memory(config, widths[-1])
    data = load_index(config.data.root)
    check_fits(config, data)
    check_complete(data, cut_is_corrupt=config.data.on_corrupt == "skip")
    if record is not None:
        _check_identity(config, data, record, url, parent)
        parent, initial = record.parent, record.initial_model
    else:
        initial = _pinned(parent, tracking_uri) if parent else None
        if initial is not None:
            _check_weights_fit(initial, tracking_uri, config)
    return Prepared(name, store_url, url, config, widths, data, tracking_uri, record, parent, initial)


def settle(config: RunConfig, store_url: str, record: RunRecord | None = None) -> RunConfig:
    """The configuration with its open ends closed: where the data lie, how many lanes.

    A run keeps the lanes that it began with, whatever its batch size is now.
    """
    lanes = config.data.lanes
    if lanes is None and record is not None:
        lanes = record.config["data"]["lanes"]
    settled = config_file.to_mapping(config)
    settled["data"]["root"] = store.data_url(config.data.root, store_url)
    settled["data"]["lanes"] = lanes or default_lanes(config.train.batch_size)
    return config_file.from_mapping(settled, "settled for this run")


def registered_name(run_name: str, config: RunConfig) -> str:
    """The registered model that receives the run's weights."""
    return config.registry.name or f"nvae-{run_name}"


def widths_of(config: RunConfig, workers: Workers) -> tuple[int, ...]:
    """The numbers of workers that the run may be trained on, fewest first.

    Raises RunError if not one of them can share a batch equally.
    """
    batch_size = config.train.batch_size
    widths = workers.widths(batch_size)
    if not widths:
        nearest = workers.maximum * max(1, batch_size // workers.maximum)
        raise RunError(
            f"train.batch_size {batch_size} cannot be shared equally by {workers} workers; use --workers "
            f"with one of its divisors, or train.batch_size={nearest}."
        )
    return widths


def with_bounded_memory(config: RunConfig, widest: int) -> RunConfig:
    """The configuration with the share of a worker at the widest as its micro-batch.

    So no worker needs more memory when there are fewer. A micro-batch that was asked for stays.
    """
    bounded = config_file.to_mapping(config)
    bounded["train"]["micro_batch_size"] = config.train.micro_batch_size or config.train.batch_size // widest
    return config_file.from_mapping(bounded, "settled for this run")


def _check_identity(config: RunConfig, data: Index, record: RunRecord, url: str, parent: str | None) -> None:
    """Raises RunError if this is not the run that the record describes."""
    recorded = config_file.from_mapping(record.config, f"the record of the run {record.name}")
    differing = config_file.identity_changes(recorded, config)
    changes = [f"  {path}: {was!r} -> {now!r}" for path, was, now in differing]
    if data.content_hash != record.data_hash:
        changes.append(f"  the data set: content {record.data_hash[:12]} -> {data.content_hash[:12]}")
    if parent not in (None, record.parent, record.initial_model):
        changes.append(f"  --from: {record.parent!r} -> {parent!r}")
    if changes:
        same_shape = not any(path.startswith("model.") for path, _, _ in differing)
        raise RunError(
            f"The run {record.name!r} exists and these settings, which make it the run it is, differ:\n"
            + "\n".join(changes)
            + "\nContinue it with its own settings, or give the new run another --name."
            + (_advice_to_begin_with(record, url) if same_shape else "")
        )


def _advice_to_begin_with(record: RunRecord, url: str) -> str:
    """How another run can begin with what this one has learned, if it has saved anything yet."""
    saved = checkpoints(url)
    if not saved:
        return ""
    model = record.result.get("model") or saved[0].url
    return f" To begin with this run's weights:\n  nvae train ... --from {model} --name NEW-NAME"


def _pinned(model: str, tracking_uri: str) -> str:
    """A reference that means the same for ever: an alias moves, a relative path depends on where one is."""
    if model.startswith("models:"):
        return Registry(tracking_uri).find(model).ref
    return storage.normalize(model)


def _check_weights_fit(model: str, tracking_uri: str, config: RunConfig) -> None:
    """Raises RunError if the weights of `model` cannot be those of the configured model."""
    loaded = load(model, tracking_uri)
    with torch.device("meta"):
        wanted = NVAE(config.model)
    shapes, given = (
        {name: tensor.shape for name, tensor in each.state_dict().items()} for each in (wanted, loaded.model)
    )
    if shapes != given:
        changes = [
            f"  {path}: {was!r} in its weights, {now!r} here"
            for path, was, now in config_file.changed(loaded.config, config)
            if path.startswith("model.")
        ]
        raise RunError(
            f"A run cannot begin with the weights of {model}, whose model has another shape:\n"
            + "\n".join(changes)
            + "\nGive these settings its values."
        )
