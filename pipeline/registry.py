"""The registry for notebooks and programs; `nvae registry` says the same in a terminal.

    from pipeline.registry import find, load

    best, *others = find("data=ffhq256 and validation.bits_per_dim < 0.75")
    model = load(best.ref).model

These names and their arguments stay. MLflow is the one of `tracking`, else of MLFLOW_TRACKING_URI, else
the database in the store (`store`, NVAE_STORE or ./nvae-store). What is wrong with a question is a
RegistryError, QueryError or FieldError, all of them ValueError; that MLflow cannot be reached is an
UnreachableError, a RegistryError.

torch and mlflow are imported only where they are needed: listing ten thousand versions from the cache
needs neither.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import store as stores
from pipeline.models import finding
from pipeline.models.ancestry import Ancestry, ancestry
from pipeline.models.catalogue import Catalogue
from pipeline.models.finding import BEST_FIRST
from pipeline.models.names import parse_reference
from pipeline.models.versions import Version
from pipeline.training.tracking import default_tracking_uri

if TYPE_CHECKING:
    from pipeline.models.comparison import Comparison
    from pipeline.models.export import LoadedModel

__all__ = ["Version", "compare", "download", "find", "lineage", "load", "tracking_uri", "version"]


def tracking_uri(tracking: str | None = None, store: str | None = None) -> str:
    """The address of the MLflow that is asked."""
    return named_tracking(tracking) or default_tracking_uri(stores.locate(store))


def named_tracking(tracking: str | None = None) -> str | None:
    """The address that somebody gave, and not the store's own."""
    return tracking or os.environ.get("MLFLOW_TRACKING_URI")


def find(
    query: str = "",
    *,
    sort: str = BEST_FIRST,
    descending: bool = False,
    limit: int | None = 20,
    refresh: bool = False,
    tracking: str | None = None,
    store: str | None = None,
) -> list[Version]:
    """The registered versions that fulfil `query`, the best first, at most `limit`.

    pipeline/models/query.py has the language, pipeline/models/fields.py the names. `refresh` reads all from
    MLflow anew, instead of what has changed.
    """
    catalogue = Catalogue(tracking_uri(tracking, store))
    return finding.find(catalogue, query, sort=sort, descending=descending, limit=limit, refresh=refresh)


def version(ref: str, *, tracking: str | None = None, store: str | None = None) -> Version:
    """What is known of the version models:/NAME@ALIAS or models:/NAME/VERSION."""
    return _resolved(Catalogue(tracking_uri(tracking, store)), ref, tracking_uri(tracking, store))


def load(ref: str, *, tracking: str | None = None, store: str | None = None) -> "LoadedModel":
    """The model itself, in eval mode on the CPU, every file verified.

    `ref` may also be the path or URL of an export or of a training checkpoint.
    """
    from pipeline.models.registry import load

    return load(ref, tracking_uri(tracking, store))


def compare(
    first: str, second: str, *, tracking: str | None = None, store: str | None = None
) -> "Comparison":
    """What distinguishes two versions: settings, metrics, KL per group."""
    from pipeline.models.comparison import compare

    uri = tracking_uri(tracking, store)
    catalogue = Catalogue(uri)
    return compare(_resolved(catalogue, first, uri), _resolved(catalogue, second, uri))


def lineage(ref: str, *, tracking: str | None = None, store: str | None = None) -> Ancestry:
    """What a version comes from, and what was made of it."""
    uri = tracking_uri(tracking, store)
    catalogue = Catalogue(uri)
    return ancestry(_resolved(catalogue, ref, uri), catalogue.versions())


def download(ref: str, folder: str | Path, *, tracking: str | None = None, store: str | None = None) -> Path:
    """A copy of a model's files in a new local folder that is its user's alone; all verified."""
    from pipeline.models.download import download

    return download(ref, Path(folder), tracking_uri(tracking, store))


def _resolved(catalogue: Catalogue, ref: str, uri: str) -> Version:
    asked = parse_reference(ref)
    for each in catalogue.versions():
        if each.name == asked.name and (each.version == asked.version or asked.alias in each.aliases):
            (now,) = catalogue.confirmed([each])
            if now is not None:
                return now
    # Not there, or not known here: whoever knows all says what there is instead.
    from pipeline.models.registry import Registry

    return Registry(uri).find(ref)
