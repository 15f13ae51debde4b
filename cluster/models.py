"""`nvae sample` and `registry`: trained models, as the command line shows them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pipeline import storage
from pipeline import store as stores
from pipeline.errors import InputError
from pipeline.models import sampling
from pipeline.models.export import RegistryError
from pipeline.models.registry import MissingDatabaseError, Registry, load
from pipeline.training.tracking import default_tracking_uri
from pipeline.training.worker import LocalWorker


class OutputError(InputError):
    """A file that cannot be written where the user wants it."""


def tracking_uri(store: str | None, tracking: str | None) -> str:
    """The MLflow to ask: the flag, else MLFLOW_TRACKING_URI, else the store's own."""
    return _named_tracking(tracking) or default_tracking_uri(stores.locate(store))


def _named_tracking(tracking: str | None) -> str | None:
    return tracking or os.environ.get("MLFLOW_TRACKING_URI")


def sample(
    model: str,
    output: Path,
    count: int,
    temperature: float,
    seed: int,
    batch_size: int,
    pixels: Literal["mean", "sample"],
    recalibrate: bool,
    store: str | None,
    tracking: str | None,
) -> str:
    """Write a grid of prior samples to `output`; returns what to tell the user.

    Raises OutputError before anything is loaded if `output` is no PNG or cannot be written.
    """
    if output.suffix.lower() != ".png":
        raise OutputError(f"{output} cannot be written: pictures are PNG files; let its name end in .png.")
    _check_writable(output)
    loaded = load(model, tracking_uri(store, tracking))
    network = loaded.model.to(LocalWorker().device)
    if recalibrate and not sampling.recalibrate_batch_norm(network, temperature, seed):
        raise RegistryError(
            f"{model}: batch norm statistics at temperature {temperature} are not finite; "
            "sample without --recalibrate."
        )
    images = sampling.sample_images(network, count, temperature, seed, batch_size=batch_size, pixels=pixels)
    storage.write_bytes(str(output), sampling.png(sampling.grid(images)))
    return f"{count} images of {model} at temperature {temperature}, seed {seed}: {output}"


def _check_writable(output: Path) -> None:
    folder = output.absolute().parent
    if not folder.is_dir():
        raise OutputError(
            f"{output} cannot be written: there is no folder {folder}. Make it, or name another."
        )
    if not os.access(output if output.exists() else folder, os.W_OK):
        raise OutputError(f"{output} cannot be written: you lack the permission. Name another place.")


def versions(name: str | None, store: str | None, tracking: str | None) -> Iterator[dict[str, Any]]:
    """A row for each registered version; none before the first training.

    Raises RegistryError if there is no model `name`, or no MLflow where the user says.
    """
    try:
        registry = Registry(tracking_uri(store, tracking))
    except MissingDatabaseError:
        # An address that somebody wrote may be misspelt; the store's own database comes in time.
        if name or _named_tracking(tracking):
            raise
        return
    for model in [name] if name else registry.names():
        for version in registry.versions(model):
            yield {
                "model": version.ref,
                "aliases": list(version.aliases),
                "bits_per_dim": version.score,
                "images_seen": version.images_seen,
                "run_ended": version.run_ended,
                "data": version.data_root,
                "created": version.created,
            }


def describe(model: str, store: str | None, tracking: str | None) -> dict[str, Any]:
    """Everything that is recorded of one version, by name."""
    version = Registry(tracking_uri(store, tracking)).find(model)
    fields = {key: value for key, value in vars(version).items() if key != "metrics"}
    return {**fields, "aliases": list(version.aliases), "parent": version.parent or None, **version.metrics}
