"""What `nvae import` and `nvae export` do, and what they answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cluster.models import tracking_uri
from pipeline import importing, storage
from pipeline import store as stores
from pipeline.models.export import hand_out
from pipeline.models.folders import check_free
from pipeline.models.names import check_name
from pipeline.models.registry import load


def import_checkpoint(
    checkpoint: str,
    preset: str | None,
    overrides: Sequence[str],
    name: str | None,
    output: str | None,
    data: str | None,
    samples: int,
    batch_size: int,
    store: str | None,
    tracking: str | None,
) -> dict[str, Any]:
    """Import a published checkpoint; what there is to know of it. What can be wrong is found first."""
    if (name is None) == (output is None):
        raise click.UsageError("Say what becomes of it: --register NAME, or --output FOLDER.")
    if samples > 1 and data is None:
        raise click.UsageError("--samples is for measuring: name a data set with --data.")
    if name is not None:
        check_name(name)
    if output is not None:
        check_free(output)
    located = stores.locate(store)
    root = None if data is None else stores.data_url(data, located)
    imported = importing.take_in(checkpoint, preset, overrides, root, samples, batch_size)
    answer = importing.facts(imported)
    if output is not None:
        return {"folder": importing.write(imported, output), **answer}
    assert name is not None
    registration = importing.register(imported, name, located, tracking_uri(store, tracking))
    version = registration.version
    return {"model": version.ref, "folder": version.url, "verdict": registration.verdict, **answer}


def export_model(
    model: str, folder: str, pyfunc: bool, store: str | None, tracking: str | None
) -> dict[str, Any]:
    """Write a model to a folder; what was written."""
    loaded = load(model, tracking_uri(store, tracking))
    if not pyfunc:
        manifest = hand_out(loaded, folder).manifest
        sizes = {name: entry.bytes for name, entry in manifest.files.items()}
        return {"folder": manifest.url, "format": "nvae", "files": sizes, "manifest_sha256": manifest.sha256}
    if not storage.is_local(storage.normalize(folder)):
        raise click.UsageError("MLflow writes its models to a disk: name a folder on this machine.")
    from pipeline.models.pyfunc import write_pyfunc

    write_pyfunc(loaded, Path(folder))
    return {"folder": str(Path(folder).absolute()), "format": "pyfunc"}
