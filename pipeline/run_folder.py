"""A run's folder in the store: its record and its stop request.

STORE/runs/NAME/
  run.json       the record: configuration, data set, MLflow run, every launch and its end
  leases/        who is running it now (lease.py)
  stop           present when somebody asked the run to stop
  initial/       the weights that the run began with, if it was given any
  checkpoints/   written by training/checkpoint_writer.py
  journal/, pictures/, files/    written by training/tracking.py
  ray/           Ray's own files while it runs the run
"""

import logging
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from pipeline import lease, record_file, storage
from pipeline.errors import InputError
from pipeline.record_file import RecordError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")

logger = logging.getLogger(__name__)

State = Literal["created", "running", "stopped", "finished", "failed", "diverged"]


class RunError(InputError):
    """A run that cannot be started, continued or changed as asked."""


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Launch:
    """One time that the run's workers were started."""

    started: str
    host: str
    workers: int


@dataclass(frozen=True)
class RunRecord:
    """What run.json says: everything about a run but its tensors and its curves."""

    name: str
    created: str
    config: Mapping[str, Any]
    """The resolved RunConfig as a nested mapping."""
    data_hash: str
    """Content hash of the data set; part of the run's identity."""
    tracking_uri: str
    mlflow_run_id: str
    parent: str | None = None
    """Model whose weights the run began with, as it was asked for (`--from`)."""
    initial_model: str | None = None
    """The same, pinned: an alias may have moved on since."""
    state: State = "created"
    reason: str = ""
    """Why a run failed or stopped; empty otherwise."""
    launches: tuple[Launch, ...] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
    """Final metrics, registered version and pictures, once there are any."""


def folder(store: str, name: str) -> str:
    """URL of a run's folder. Raises RunError on a name that is no plain name."""
    if not _NAME.fullmatch(name):
        raise RunError(
            f"{name!r} is no name for a run; use up to 100 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit."
        )
    return storage.join(store, "runs", name)


def read_record(url: str) -> RunRecord | None:
    """The record in a run's folder; None where there is no run. Raises RecordError, StoreError."""
    return record_file.read(storage.join(url, "run.json"), _made)


def _made(values: dict[str, Any]) -> RunRecord:
    return RunRecord(**{**values, "launches": launches_of(values)})


def launches_of(values: Mapping[str, Any]) -> tuple[Launch, ...]:
    """Those in the fields of a record as it was read."""
    return tuple(Launch(**launch) for launch in values["launches"])


def write_record(url: str, record: RunRecord) -> None:
    record_file.write(storage.join(url, "run.json"), record)


def update_record(url: str, **changes: Any) -> RunRecord:
    """Replace fields of an existing record."""
    record = read_record(url)
    if record is None:
        raise RunError(f"{url} holds no run; it was deleted while something still wrote to it.")
    record = replace(record, **changes)
    write_record(url, record)
    return record


def note_launch(url: str, workers: int) -> None:
    """Add to the record that the run is started now, by this machine, on so many workers."""
    record = read_record(url)
    launches = record.launches if record else ()
    update_record(url, launches=(*launches, Launch(now(), platform.node(), workers)))


def all_records(store: str) -> tuple[list[RunRecord], dict[str, RecordError]]:
    """The records of all runs of a store, newest first; by its name, what is wrong with any other."""
    records, damaged = [], {}
    for name in storage.list_dir(storage.join(store, "runs")):
        try:
            record = read_record(storage.join(store, "runs", name))
        except RecordError as error:
            damaged[name] = error
        else:
            records += [] if record is None else [record]
    return sorted(records, key=lambda record: record.created, reverse=True), damaged


def known_record(store: str, name: str) -> RunRecord:
    """The record of a run that has to exist. Raises RunError naming the runs there are."""
    record = read_record(folder(store, name))
    if record is None:
        records, damaged = all_records(store)
        known = ", ".join(sorted([*damaged, *(each.name for each in records)])) or "none"
        raise RunError(f"There is no run {name!r} in {store}. Runs there: {known}.")
    return record


# -- stop request -----------------------------------------------------------------------


def request_stop(url: str) -> None:
    """Ask whoever runs this run to write a checkpoint and leave."""
    storage.write_bytes(storage.join(url, "stop"), now().encode())


def stop_requested(url: str) -> bool:
    """Whether somebody asked; not, as long as the store does not answer."""
    try:
        return storage.exists(storage.join(url, "stop"))
    except storage.StoreError as error:
        # An outage of the store must not end the training; the next question may be answered.
        logger.warning("whether %s was asked to stop is not known now: %s", url, error)
        return False


def clear_stop(url: str) -> None:
    storage.delete(storage.join(url, "stop"))


def check_deletable(url: str) -> None:
    """Raises RunError while the run is running."""
    holder = lease.holder(url)
    if holder is not None:
        raise RunError(f"{url} is being run by {holder}; stop it first with `nvae runs stop`.")


def delete(url: str) -> None:
    """Remove a run's folder, its record last. Raises RunError while it is running."""
    check_deletable(url)
    for name in storage.list_dir(url):
        if name != "run.json":
            storage.delete(storage.join(url, name), recursive=True)
    storage.delete(url, recursive=True)
