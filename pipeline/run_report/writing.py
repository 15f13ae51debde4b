"""When the page of a run is written: at the end of each launch by whoever trains, and on request."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline import run_folder, storage
from pipeline.run_folder import RunError
from pipeline.run_report.page import NAME, report_url, run_page
from pipeline.training.tracking import Tracker

logger = logging.getLogger(__name__)


def report_on(tracker: Tracker, run_url: str, outcome: Mapping[str, Any]) -> None:
    """Leaves the page of a run that is ending in its folder and in MLflow.

    `outcome` is its state, reason and result, which its record does not have yet. The training is what
    matters: whatever goes wrong with the page is a warning.
    """
    try:
        tracker.sync()
        record = run_folder.read_record(run_url)
        if record is None:
            raise RunError(f"{run_url} holds no run")
        tracker.file(NAME, run_page(replace(record, **outcome), run_url))
    except Exception as error:
        logger.warning("there is no report of this run (%s: %s)", type(error).__name__, error)


def write_report(run_url: str, lineage: Sequence[str] = ()) -> str:
    """Writes the page of a run as it is now into its folder; its URL. Raises RunError, StoreError."""
    record = run_folder.read_record(run_url)
    if record is None:
        raise RunError(f"{storage.shown(run_url)} holds no run; it was deleted, or never was there.")
    url = report_url(run_url)
    storage.write_bytes(url, run_page(record, run_url, lineage))
    return url
