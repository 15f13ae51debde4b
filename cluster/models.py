"""`nvae registry`: trained models, as the command line shows them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import registry, storage
from pipeline.errors import InputError
from pipeline.models.ancestry import drawn, plain
from pipeline.models.fields import Field, field
from pipeline.models.finding import BEST_FIRST
from pipeline.models.names import MissingDatabaseError, check_name
from pipeline.models.query import parse
from pipeline.models.versions import CRITERION, Version
from pipeline.progress import say

COLUMNS = {
    "model": "MODEL",
    "aliases": "ALIASES",
    "bits_per_dim": "BITS/DIM",
    "images_seen": "IMAGES SEEN",
    "run_ended": "ITS RUN",
    "data": "DATA",
    "created": "CREATED",
}


def tracking_uri(store: str | None, tracking: str | None) -> str:
    """The MLflow to ask: the flag, else MLFLOW_TRACKING_URI, else the store's own."""
    return registry.tracking_uri(tracking, store)


def versions(
    name: str | None, limit: int | None, refresh: bool, store: str | None, tracking: str | None
) -> list[dict[str, Any]]:
    """A row for each registered version, the newest first; none before the first training.

    Raises RegistryError if there is no model `name`, or no MLflow where the user says.
    """
    query = f"model = '{check_name(name)}'" if name else ""
    try:
        found = registry.find(
            query,
            sort="created",
            descending=True,
            limit=limit,
            refresh=refresh,
            store=store,
            tracking=tracking,
        )
    except MissingDatabaseError as error:
        # An address that somebody wrote may be misspelt; the store's own database comes in time.
        if name or registry.named_tracking(tracking):
            raise
        say(str(error))
        return []
    if name and not found:
        # Whoever knows all models says what there is instead.
        from pipeline.models.registry import Registry

        Registry(tracking_uri(store, tracking)).versions(name)
    return [_row(version) for version in found]


def found(
    query: str,
    sort: str,
    descending: bool,
    limit: int | None,
    refresh: bool,
    store: str | None,
    tracking: str | None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of the versions that fulfil a query, and the columns of a table of them.

    What was asked for has columns of its own.
    """
    asked = [field(sort), *parse(query).fields()]
    more = {each.name: each for each in asked if each.name not in _SHOWN}
    versions = registry.find(
        query,
        sort=sort,
        descending=descending,
        limit=limit,
        refresh=refresh,
        store=store,
        tracking=tracking,
    )
    rows = [{**_row(version), **_values(more, version)} for version in versions]
    return rows, {**COLUMNS, **{name: name.upper() for name in more}}


_SHOWN = {"model", "version", "alias", BEST_FIRST, "images_seen", "ended", "data", "created"}
"""Fields that every table has."""


def _values(fields: dict[str, Field], version: Version) -> dict[str, Any]:
    return {name: each.value(version) for name, each in fields.items()}


def _row(version: Version) -> dict[str, Any]:
    return {
        "model": version.ref,
        "aliases": list(version.aliases),
        "bits_per_dim": version.metrics.get(CRITERION),
        "images_seen": version.images_seen,
        "run_ended": version.run_ended,
        "data": version.data_root,
        "created": version.created,
    }


def describe(model: str, store: str | None, tracking: str | None) -> dict[str, Any]:
    """Everything that is recorded of one version, by name."""
    version = registry.version(model, tracking=tracking, store=store)
    fields = dict(vars(version))
    metrics, settings = fields.pop("metrics"), fields.pop("settings")
    evaluations, qualities = fields.pop("evaluations"), fields.pop("sample_quality")
    return {
        **{name: None if value == "" else value for name, value in fields.items()},
        "aliases": list(version.aliases),
        **metrics,
        "files": dict(version.files),
        "evaluations": [{**vars(each), "metrics": dict(each.metrics)} for each in evaluations],
        "sample_quality": [vars(each) for each in qualities],
        "settings": dict(settings),
    }


def card(model: str, store: str | None, tracking: str | None) -> str:
    """The model card of one version, verified."""
    from pipeline.models.export import CARD, registered_file

    version = registry.version(model, tracking=tracking, store=store)
    return registered_file(version.url, version.manifest_sha256, CARD).decode()


def compared(first: str, second: str, store: str | None, tracking: str | None) -> tuple[Any, list[str]]:
    """Rows of a comparison, and the reasons why figures of the two do not compare."""
    from pipeline.models.comparison import rows

    comparison = registry.compare(first, second, tracking=tracking, store=store)
    return list(rows(comparison)), list(comparison.warnings)


def compare_page(first: str, second: str, output: Path, store: str | None, tracking: str | None) -> str:
    """Writes a comparison with pictures as one page of HTML, and says where it is."""
    from pipeline.models.comparison import write_page
    from pipeline.models.export import SAMPLES, registered_file

    comparison = registry.compare(first, second, tracking=tracking, store=store)
    samples: dict[str, bytes | str] = {}
    for version in (comparison.first, comparison.second):
        try:
            samples[version.ref] = registered_file(version.url, version.manifest_sha256, SAMPLES)
        except InputError as error:
            samples[version.ref] = str(error)
    storage.write_bytes(storage.normalize(str(output)), write_page(comparison, samples))
    return f"The comparison is in {output}"


def lineage(model: str, store: str | None, tracking: str | None) -> tuple[dict[str, Any], Iterator[str]]:
    """A version's line, for programs and as a drawn tree."""
    line = registry.lineage(model, tracking=tracking, store=store)
    return plain(line), drawn(line)


def downloaded(model: str, folder: Path, store: str | None, tracking: str | None) -> str:
    """Copies a model's files, and says where they are."""
    place = registry.download(model, folder, tracking=tracking, store=store)
    return f"{model} is in {place}, every file verified; every command takes that folder as MODEL."
