"""`nvae registry`: trained models, as the command line shows them."""

import os
from collections.abc import Iterator
from typing import Any

from pipeline import store as stores
from pipeline.models.connection import MissingDatabaseError
from pipeline.models.registry import Registry
from pipeline.training.tracking import default_tracking_uri


def tracking_uri(store: str | None, tracking: str | None) -> str:
    """The MLflow to ask: the flag, else MLFLOW_TRACKING_URI, else the store's own."""
    return _named_tracking(tracking) or default_tracking_uri(stores.locate(store))


def _named_tracking(tracking: str | None) -> str | None:
    return tracking or os.environ.get("MLFLOW_TRACKING_URI")


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
