"""`nvae track`: what MLflow has of the curves of runs, and delivering what it lacks."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import click

from cluster.options import json_option, show, store_option

logger = logging.getLogger(__name__)


@click.group()
def track() -> None:
    """Bring curves to an MLflow that was away, or that is another one."""


_tracking_option = click.option(
    "--tracking",
    metavar="URI",
    help="MLflow server or database. [MLFLOW_TRACKING_URI, else the one that the run was trained with]",
)


@track.command()
@click.argument("run")
@store_option
@_tracking_option
def replay(run: str, store: str | None, tracking: str | None) -> None:
    """Deliver the journal of RUN to MLflow: settings, curves, pictures, tags, how it ended.

    For what MLflow lacks because it was away, and for an MLflow that has never heard of the run.
    Nothing is stored twice, so this may be repeated, and may be done while the run is running.
    Exit code 1 if MLflow does not take everything.

    \b
      nvae track replay ffhq256
      nvae track replay ffhq256 --tracking https://other-mlflow:5000
    """
    click.echo(_replay(run, store, tracking))


@track.command()
@click.argument("run", required=False)
@json_option
@store_option
def status(run: str | None, as_json: bool, store: str | None) -> None:
    """What each MLflow lacks of RUN, or of all runs, by what was noted when it was delivered to."""
    columns = {
        "name": "NAME",
        "tracking": "MLFLOW",
        "mlflow_run_id": "ITS RUN",
        "points": "POINTS LACKING",
        "files": "FILES LACKING",
    }
    show(_lacking(run, store), columns, as_json)


def _replay(name: str, store: str | None, tracking: str | None) -> str:
    from pipeline import lease, run_folder, storage
    from pipeline import store as stores
    from pipeline.progress import say
    from pipeline.training import tracking as curves
    from pipeline.training.run_description import status_of

    located = stores.locate(store)
    record = run_folder.known_record(located, name)
    url = run_folder.folder(located, name)
    uri = tracking or os.environ.get("MLFLOW_TRACKING_URI") or record.tracking_uri
    running = lease.holder(url) is not None
    replayed = curves.replay(url, uri, "RUNNING" if running else status_of(record.state), say)
    return (
        f"MLflow at {storage.shown(uri)} has all {replayed.points:,} points of {name}"
        f"{' so far' if running else ''}, in its run {replayed.run_id}."
    )


def _lacking(name: str | None, store: str | None) -> Iterator[dict[str, Any]]:
    from pipeline import run_folder
    from pipeline import store as stores
    from pipeline.training.courier import Delivered, all_delivered, left
    from pipeline.training.journal import StoredJournal

    located = stores.locate(store)
    records, damaged = run_folder.all_records(located)
    for error in () if name else damaged.values():
        logger.warning("%s", error)
    for record in [run_folder.known_record(located, name)] if name else records:
        url = run_folder.folder(located, record.name)
        for delivered in all_delivered(url) or [Delivered(record.tracking_uri)]:
            lacking = left(StoredJournal(url), delivered)
            yield {
                "name": record.name,
                "tracking": delivered.tracking_uri,
                "mlflow_run_id": delivered.run_id or None,
                "points": lacking.points,
                "files": lacking.files,
            }
