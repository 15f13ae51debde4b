"""`nvae report`: which page is meant, and where it was written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import registry, run_folder, storage
from pipeline import store as stores
from pipeline.errors import InputError
from pipeline.models.ancestry import drawn
from pipeline.run_report.writing import write_report
from pipeline.search import ledger as ledgers


@dataclass(frozen=True)
class Written:
    """A page that was written."""

    url: str
    output: str | None
    """The copy that was asked for."""
    rows: Sequence[Mapping[str, Any]] | None = None
    """The trials, of a search."""
    columns: Mapping[str, str] = field(default_factory=dict)


def report(
    name: str, output: Path | None, store: str | None, tracking: str | None, *, is_run: bool, facts: bool
) -> Written:
    """The page of a run, of a search, or of the run that trained a model.

    Raises RunError if there is none of that name, InputError if there are two, or it cannot be written.
    """
    located = stores.locate(store)
    rows: Sequence[Mapping[str, Any]] | None = None
    columns: Mapping[str, str] = {}
    if name.startswith("models:"):
        url = _of_model(name, store, tracking)
    elif not is_run and _is_search(located, name):
        # It brings Ray and Tune along, which take seconds.
        from cluster import search_lookup

        rows, columns, url = search_lookup.report(name, store, facts=facts)
    else:
        run_folder.known_record(located, name)
        url = write_report(run_folder.folder(located, name))
    if output is not None:
        try:
            output.write_bytes(storage.read_bytes(url))
        except OSError as error:
            raise InputError(f"{output}: cannot be written: {error.strerror or error}.") from error
    return Written(url, str(output) if output else None, rows, columns)


def _is_search(located: str, name: str) -> bool:
    """Raises InputError if a run has the name as well."""
    search = ledgers.read_search(ledgers.folder(located, name)) is not None
    if search and run_folder.read_record(run_folder.folder(located, name)) is not None:
        raise InputError(
            f"{name!r} is a search and a run in {storage.shown(located)}: add --run for the run, or name "
            f"one of the search's trials, such as {ledgers.run_name(name, 1)}."
        )
    return search


def _of_model(ref: str, store: str | None, tracking: str | None) -> str:
    version = registry.version(ref, tracking=tracking, store=store)
    if not version.journal:
        raise InputError(
            f"{ref} was not trained by this project, so there are no curves; "
            "`nvae registry show` says what is known of it."
        )
    run_url = version.journal.rpartition("/")[0]
    if run_folder.read_record(run_url) is None:
        raise InputError(
            f"{ref} was trained by the run {version.run_name!r}, which is no longer at {run_url}. Its report "
            f"is still an artifact of its MLflow run {version.run_id}."
        )
    lineage = drawn(registry.lineage(version.ref, tracking=tracking, store=store))
    return write_report(run_url, list(lineage))
