"""Checkpoints: what a training continues from, in RUN/checkpoints/.

RUN/checkpoints/
  000000012800-003/     images seen, then the number of the attempt that wrote it
    model.safetensors  ema.safetensors  optimizer.safetensors
    manifest.json       format, record (configuration and all state that is no tensor),
                        length and SHA-256 of every file; written last
  attempt-003-1f2e3d4c  the claim of the third launch

A training step is delayed by one copy to host memory; one background thread writes and
uploads. Each launch claims the next attempt and writes directories of its own, so a writer
that was believed dead cannot overwrite what its successor wrote; as it looks for a higher
claim before every manifest and before every deletion, it cannot commit or delete either.
For the same reason a later attempt's checkpoint counts as newer whatever its progress: the
successor knew what it continued from.

Rejected: Ray's upload and retention (the same files must work without Ray), overwriting a
single checkpoint in place (a kill loses both), pickled optimizer state.
"""

import json
import logging
import math
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from pipeline import storage
from pipeline.artifacts import (
    MANIFEST,
    ArtifactError,
    Manifest,
    NewerFormatError,
    read_manifest,
    read_verified,
    tensors_from_bytes,
    tensors_to_bytes,
    write_directory,
)
from pipeline.errors import InputError

FORMAT = "nvae-checkpoint"
FORMAT_VERSION = 1
BEST_METRIC = "validation/bits_per_dim"
"""What is lowest at the best checkpoint."""

_DIRECTORY = re.compile(r"(?P<images>\d{12})-(?P<attempt>\d{3,9})")
_CLAIM = re.compile(r"attempt-(?P<attempt>\d{3,9})-[0-9a-f]{8}")
# The run's writer may commit one checkpoint and delete another while `newest` looks at them in
# turn, so it looks again until it finds the same twice.
_PASSES = 10

logger = logging.getLogger(__name__)


class CheckpointError(InputError):
    """A checkpoint that could not be written, or a run none of whose checkpoints is usable."""


class SupersededError(CheckpointError):
    """A later attempt at the same run has begun: this one may write nothing any more."""


# -- reading ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint whose manifest has been read; its files are checked when they are read."""

    manifest: Manifest
    images_seen: int
    attempt: int
    """Number of the launch that wrote it."""
    record: Mapping[str, Any]
    """What the training recorded beside its tensors: configuration, interventions."""
    metrics: Mapping[str, float | None]
    """Metrics at that moment; None for one that was not finite."""

    @property
    def url(self) -> str:
        return self.manifest.url

    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file ("model", "ema", "optimizer"), on the CPU.

        Raises ArtifactError if the file is not exactly what was written.
        """
        file_name = f"{name}.safetensors"
        return tensors_from_bytes(read_verified(self.manifest, file_name), storage.join(self.url, file_name))

    def verify(self) -> None:
        """Reads every file; raises ArtifactError naming the first that is not what was written."""
        for name in self.manifest.files:
            read_verified(self.manifest, name)


def open_checkpoint(url: str) -> Checkpoint:
    """The checkpoint in the directory `url`.

    Raises ArtifactError if there is none or its manifest is malformed, NewerFormatError if
    a later release wrote it.
    """
    manifest = read_manifest(url, format=FORMAT, version=FORMAT_VERSION)
    fields = manifest.fields
    images_seen, attempt = fields.get("images_seen"), fields.get("attempt")
    record, metrics = fields.get("record"), fields.get("metrics")
    if (
        type(images_seen) is not int
        or type(attempt) is not int
        or not isinstance(record, dict)
        or not isinstance(metrics, dict)
    ):
        raise ArtifactError(
            f"{storage.join(url, MANIFEST)}: images_seen, attempt, record or metrics is missing or of "
            "the wrong type; the manifest was not written by us."
        )
    return Checkpoint(manifest, images_seen, attempt, record, metrics)


def newest(run_url: str) -> Checkpoint | None:
    """The newest checkpoint of a run all of whose files are intact; None if it never had one.

    Broken and unfinished ones are passed over, each with a warning that names what is
    wrong. Raises CheckpointError if there are checkpoints and every one is broken: to
    begin again from noise must be the user's decision. Raises NewerFormatError rather than
    going back behind the checkpoint of a later release.
    """
    passed_over: dict[_Directory, str] = {}
    intact: dict[_Directory, Checkpoint] = {}
    found = None
    for _ in range(_PASSES):
        before, passed_over, found = passed_over, {}, None
        for directory in _directories(run_url):
            try:
                found = intact.get(directory) or _verified(directory.url)
            except NewerFormatError:
                raise
            except ArtifactError as error:
                passed_over[directory] = str(error)
            else:
                intact[directory] = found
                break
        if not passed_over or passed_over == before:
            break
    for reason in passed_over.values():
        logger.warning("checkpoint passed over: %s", reason)
    damaged = [d for d in passed_over if storage.exists(storage.join(d.url, MANIFEST))]
    if found is None and damaged:
        raise CheckpointError(
            f"{_folder(run_url)}: none of its {len(damaged)} checkpoints is intact (the log says what is "
            "wrong with each). Restore one of them, or delete them all to train from the beginning."
        )
    return found


def open_attempt(run_url: str, images_seen: int, attempt: int) -> Checkpoint:
    """The checkpoint that this attempt wrote at this point. Raises like `open_checkpoint`."""
    return open_checkpoint(storage.join(_folder(run_url), f"{images_seen:012d}-{attempt:03d}"))


def checkpoints(run_url: str) -> list[Checkpoint]:
    """The checkpoints of a run whose manifests are in order, newest first; files unread."""
    found = []
    for directory in _directories(run_url):
        try:
            found.append(open_checkpoint(directory.url))
        except ArtifactError:
            continue  # `newest` says what is wrong with it.
    return found


def images_saved(run_url: str) -> int:
    """Images seen at the newest checkpoint of a run; 0 without one."""
    return next((checkpoint.images_seen for checkpoint in checkpoints(run_url)), 0)


def best(run_url: str, metric: str = BEST_METRIC) -> Checkpoint | None:
    """The intact checkpoint with the lowest `metric`; the newest one where none was measured."""
    measured = [c for c in checkpoints(run_url) if c.metrics.get(metric) is not None]
    for checkpoint in sorted(measured, key=lambda c: c.metrics[metric] or 0.0):
        try:
            checkpoint.verify()
            return checkpoint
        except ArtifactError as error:
            logger.warning("checkpoint passed over: %s", error)
    return newest(run_url)


def _verified(url: str) -> Checkpoint:
    try:
        checkpoint = open_checkpoint(url)
        checkpoint.verify()
    except storage.MissingError as error:
        # Between the question whether it exists and the reading.
        raise ArtifactError(f"{url}: was deleted while it was being read.") from error
    return checkpoint


@dataclass(frozen=True, order=True)
class _Directory:
    """A directory that may hold a checkpoint; the greater is the newer."""

    attempt: int
    images_seen: int
    url: str


def _folder(run_url: str) -> str:
    return storage.join(run_url, "checkpoints")


def _directories(run_url: str) -> list[_Directory]:
    """The checkpoint directories of a run, whole or not, newest first."""
    folder = _folder(run_url)
    matches = [_DIRECTORY.fullmatch(name) for name in storage.list_dir(folder)]
    found = [
        _Directory(int(match["attempt"]), int(match["images"]), storage.join(folder, match.group()))
        for match in matches
        if match
    ]
    return sorted(found, reverse=True)


def _claims(run_url: str) -> list[int]:
    """Every attempt that is known to have begun."""
    names = storage.list_dir(_folder(run_url))
    matches = [_CLAIM.fullmatch(name) or _DIRECTORY.fullmatch(name) for name in names]
    return [int(match["attempt"]) for match in matches if match]


# -- writing ----------------------------------------------------------------------------


def claim_attempt(run_url: str) -> int:
    """Begins the next attempt at a run and returns its number, 1 for the first.

    From then on writers of earlier attempts neither commit nor delete. Numbers may be left
    out: whoever sees a second claim to its number, after writing its own, takes a later one.
    Of two that claimed the same, at least one sees the other, so they never share it.
    """
    owner = uuid.uuid4().hex[:8]
    while True:
        attempt = max(_claims(run_url), default=0) + 1
        storage.write_bytes(storage.join(_folder(run_url), f"attempt-{attempt:03d}-{owner}"), b"")
        if _claims(run_url).count(attempt) == 1:
            return attempt
        # Without chance two that keep step would see each other for ever.
        time.sleep(random.uniform(0, 0.1))


class CheckpointWriter:
    """Writes the checkpoints of one attempt, on one rank, in the background.

    Keeps the `keep` newest checkpoints and the one with the lowest `best_metric`, over all
    attempts up to its own.
    """

    def __init__(
        self,
        run_url: str,
        attempt: int,
        keep: int,
        *,
        best_metric: str = BEST_METRIC,
        before_commit: Callable[[], object] | None = None,
    ) -> None:
        """Reads the manifests of the checkpoints that are there.

        `before_commit` is called in the background before each manifest is written: what it
        makes durable is older than the checkpoint, so nothing that a resumed run will not
        compute again is lost.
        """
        self.wait_seconds = 0.0
        """Time that `save` has waited for the save before it."""
        self._run_url, self._attempt, self._keep = run_url, attempt, keep
        self._best_metric, self._before_commit = best_metric, before_commit
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        self._failure: Exception | None = None
        self._last_saved: int | None = None
        # Value of the best metric (None: not measured) of each whole checkpoint there is.
        self._values = _values(run_url, best_metric)

    @property
    def best_value(self) -> float:
        """Lowest value of the best metric among the checkpoints there are; inf without any."""
        return min((value for value in self._values.values() if value is not None), default=math.inf)

    def save(
        self,
        files: Mapping[str, Mapping[str, Tensor]],
        record: Mapping[str, Any],
        images_seen: int,
        metrics: Mapping[str, float],
    ) -> None:
        """Copies the tensors to host memory, then writes them in the background.

        `files` maps "model" and so on to tensors by name; `record` is JSON without NaN.
        Waits first for the save before, so that at most one copy is held. A second save at
        the same number of images is the same state and does nothing. A save that fails is
        a warning: the older checkpoints are still there.

        Raises CheckpointError if a later attempt has taken over the run.
        """
        if images_seen == self._last_saved:
            return
        self._join()
        if isinstance(self._failure, SupersededError):
            raise self._failure
        host = {
            f"{name}.safetensors": {key: _host_copy(tensor) for key, tensor in tensors.items()}
            for name, tensors in files.items()
        }
        fields = {
            "images_seen": images_seen,
            "attempt": self._attempt,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            # A copy: the training goes on and may append to it before it is written.
            "record": json.loads(json.dumps(record, allow_nan=False)),
            "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
        }
        self._last_saved = images_seen
        self._in_flight = self._executor.submit(self._write, host, fields)

    def wait(self) -> None:
        """Returns when the last save is in the store.

        Raises CheckpointError if it never got there.
        """
        self._join()
        if self._failure is not None:
            raise CheckpointError(
                f"{_folder(self._run_url)}: the last checkpoint could not be written "
                f"({self._failure}). Mend the cause and start the run again; it continues from the "
                "checkpoint before."
            ) from self._failure

    def _join(self) -> None:
        """Waits for the save in flight. Raises SupersededError if a later attempt took over."""
        if self._in_flight is not None:
            began = time.monotonic()
            self._in_flight.result()
            self._in_flight = None
            self.wait_seconds += time.monotonic() - began
        if isinstance(self._failure, SupersededError):
            raise self._failure

    def _write(self, host: dict[str, dict[str, Tensor]], fields: dict[str, Any]) -> None:
        images_seen = fields["images_seen"]
        name = f"{images_seen:012d}-{self._attempt:03d}"
        directory = _Directory(self._attempt, images_seen, storage.join(_folder(self._run_url), name))
        contents = self._contents(host)
        try:
            write_directory(directory.url, contents, format=FORMAT, version=FORMAT_VERSION, fields=fields)
        except Exception as error:
            # Whatever it is, it must not end a training whose older checkpoints are intact.
            self._failure = error
            self._last_saved = None
            logger.warning("checkpoint %s was not written, the older ones are kept: %s", name, error)
            return
        self._failure = None
        self._values[directory] = fields["metrics"].get(self._best_metric)
        try:
            self._prune()
        except Exception as error:
            logger.warning("old checkpoints could not be deleted, the next save tries again: %s", error)

    def _contents(self, host: dict[str, dict[str, Tensor]]) -> Iterator[tuple[str, bytes]]:
        """The serialized files; each one's tensors are released as soon as it is written."""
        for name in list(host):
            yield name, tensors_to_bytes(host.pop(name))
        # Here every file is in the store and no manifest vouches for them yet.
        if self._before_commit is not None:
            self._before_commit()
        self._check_not_superseded()

    def _check_not_superseded(self) -> None:
        latest = max(_claims(self._run_url), default=0)
        if latest > self._attempt:
            raise SupersededError(
                f"{self._run_url}: attempt {latest} has taken over this run; attempt {self._attempt} "
                "leaves its checkpoints alone and has to end."
            )

    def _prune(self) -> None:
        """Deletes what is not to be kept, and what earlier attempts left unfinished."""
        whole = sorted(self._values, reverse=True)
        kept = set(whole[: self._keep])
        kept.update(d for d in whole if self._values[d] is not None and self._values[d] == self.best_value)
        self._check_not_superseded()
        for directory in _directories(self._run_url):
            if directory.attempt > self._attempt or directory in kept:
                continue
            manifest = storage.join(directory.url, MANIFEST)
            if directory in self._values:
                # First, so that a deletion that is cut short leaves nothing that looks whole.
                storage.delete(manifest)
            elif storage.exists(manifest):
                continue  # Damaged, or of a later release: for the user to judge.
            storage.delete(directory.url, recursive=True)
            self._values.pop(directory, None)


def _values(run_url: str, metric: str) -> dict[_Directory, float | None]:
    """The metric of every checkpoint whose manifest is in order."""
    values = {}
    for directory in _directories(run_url):
        try:
            values[directory] = open_checkpoint(directory.url).metrics.get(metric)
        except ArtifactError:
            continue  # `newest` says what is wrong with it.
    return values


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory that shares nothing with `tensor`, contiguous."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
