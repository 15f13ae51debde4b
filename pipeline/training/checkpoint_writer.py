"""Writing checkpoints: in the background, and only while the run is ours.

A training step is delayed by one copy to host memory (host_copy.py); one thread hashes and
uploads. Each launch claims the next attempt and writes directories of its own, so a writer that
was believed dead cannot overwrite what its successor wrote; as it looks for a higher claim before
every manifest and before every deletion, it cannot commit or delete either. So a launch that has
claimed its attempt can read what it continues from in peace.

Nothing outside a run needs its checkpoints for longer than it takes to read them: a registered
model is an export of its own, and a run that begins with another's weights copies them.
"""

import json
import logging
import math
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from pipeline import storage
from pipeline.artifacts import MANIFEST, write_directory
from pipeline.training.checkpoint import (
    BEST_METRIC,
    FORMAT,
    FORMAT_VERSION,
    Checkpoint,
    CheckpointError,
    Directory,
    Wanted,
    attempt_of,
    checkpoints,
    checkpoints_url,
    claims,
    directories,
)
from pipeline.training.host_copy import Files, HostCopy

NAMES = MappingProxyType(
    {
        "checkpoint/delay_seconds": "that saving held the training up in the interval, waiting and copying",
        "checkpoint/write_seconds": "that a save took in the background to reach the store; the longest of "
        "those that ended in the interval, successful or not",
        "checkpoint/left_out": "saves left out in the interval, because the one before was still going on",
        "checkpoint/failed": "saves of the interval that did not reach the store; the next one tries again",
        "checkpoint/images_since": "images seen since the newest save of this launch that did",
    }
)
"""Metrics of rank 0, which saves; what has not happened yet is left out."""

_NOTABLE_SECONDS = 1.0
"""A wait of the training that the log mentions."""

logger = logging.getLogger(__name__)


class SupersededError(CheckpointError):
    """A later attempt at the same run has begun: this one may write nothing any more."""


def claim_attempt(run_url: str) -> int:
    """Begins the next attempt at a run and returns its number, 1 for the first.

    From then on writers of earlier attempts neither commit nor delete. Numbers may be left
    out: whoever sees a second claim to its number, after writing its own, takes a later one.
    Of two that claimed the same, at least one sees the other, so they never share it.
    """
    owner = uuid.uuid4().hex[:8]
    while True:
        attempt = max(claims(run_url), default=0) + 1
        storage.write_bytes(storage.join(checkpoints_url(run_url), f"attempt-{attempt:03d}-{owner}"), b"")
        if claims(run_url).count(attempt) == 1:
            return attempt
        # Without chance two that keep step would see each other for ever.
        time.sleep(random.uniform(0, 0.1))


class CheckpointWriter:
    """Writes the checkpoints of one attempt, on one rank, in the background.

    Keeps the newest checkpoint, the `keep` newest that a rollback may go to and the one with the
    lowest `best_metric`, over all attempts up to its own.
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
        self.delay_seconds = 0.0
        """How long `save` has held up its caller, all in all, waiting and copying."""
        self.left_out = 0
        """Saves that were left out, because the one before took too long."""
        self.failed = 0
        """Saves that did not reach the store."""
        self._told = (0.0, 0, 0)
        """These three, when `metrics` was last asked for them."""
        self._write_seconds: list[float] = []
        """Of the saves that ended since then."""
        self._stored: int | None = None
        """Images seen at the newest checkpoint that this attempt has brought to the store."""
        self._run_url, self._attempt, self._keep = run_url, attempt, keep
        self._best_metric, self._before_commit = best_metric, before_commit
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        self._failure: Exception | None = None
        self._coming = math.inf
        """Value of the best metric of the newest save, unless that failed."""
        self._last_saved: int | None = None
        self._swept = False
        self._host = HostCopy()
        # Value of the best metric (None: not measured) of each whole checkpoint there is.
        self._values: dict[Directory, float | None] = {}
        # Those whose weights are of unknown health.
        self._unsound: set[Directory] = set()
        for checkpoint in checkpoints(run_url):
            directory = Directory(checkpoint.attempt, checkpoint.images_seen, checkpoint.url)
            self._note(directory, checkpoint.metrics, checkpoint.sound)

    @property
    def best_value(self) -> float:
        """Lowest value of the best metric of the checkpoints there are or being written; inf without any."""
        # The save that is under way may note another meanwhile: a copy.
        values = tuple(self._values.values())
        return min(self._coming, *(value for value in values if value is not None), math.inf)

    def continue_from(self, checkpoint: Checkpoint) -> None:
        """Says from which checkpoint this attempt goes on, before its first save.

        Those that are newer were found to be damaged: they count for nothing, and stay for the user
        to judge.
        """
        resumed = Directory(checkpoint.attempt, checkpoint.images_seen, checkpoint.url)
        for directory in [each for each in self._values if each > resumed]:
            del self._values[directory]

    def save(
        self,
        files: Files,
        record: Mapping[str, Any],
        images_seen: int,
        metrics: Mapping[str, float],
        *,
        sound: bool = True,
        left_behind: Sequence[range] = (),
        may_be_left_out: bool = False,
    ) -> None:
        """Copies the tensors to host memory, then writes them in the background.

        `files` maps "model" and so on to tensors by name; `record` is JSON without NaN; `sound`
        says whether the weights are known to be good, `left_behind` at which images seen are the
        checkpoints that rollbacks have given up. While the save before is still going on there is
        no memory for another copy: it is waited for, or this save is left out if it may be, both
        with a warning. A second save at the same number of images is the same state and does
        nothing. A save that fails is a warning: the older checkpoints are still there.

        Raises CheckpointError if a later attempt has taken over the run.
        """
        if images_seen == self._last_saved:
            return
        began = time.monotonic()
        if may_be_left_out and self._busy():
            self.left_out += 1
            logger.warning(
                "no checkpoint at %s images: the one before is still being written. The store is slower "
                "than cadence.checkpoint_images asks for",
                f"{images_seen:,}",
            )
            return
        self.settle()
        if isinstance(self._failure, SupersededError):
            raise self._failure
        self._host.take({f"{name}.safetensors": tensors for name, tensors in files.items()})
        fields = {
            "images_seen": images_seen,
            "attempt": self._attempt,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            # A copy: the training goes on and may append to it before it is written.
            "record": json.loads(json.dumps(record, allow_nan=False)),
            "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
            "sound": sound,
        }
        self._last_saved = images_seen
        value = fields["metrics"].get(self._best_metric)
        self._coming = math.inf if value is None else value
        self._in_flight = self._executor.submit(self._write, fields, Wanted(None, True, left_behind))
        self.delay_seconds += time.monotonic() - began

    def metrics(self, images_seen: int) -> dict[str, float]:
        """What saving has cost since the last call, by the names of NAMES."""
        now, before = (self.delay_seconds, self.left_out, self.failed), self._told
        ended, self._write_seconds, self._told = self._write_seconds, [], now
        delay_seconds, left_out, failed = (new - old for new, old in zip(now, before, strict=True))
        metrics = {
            "checkpoint/delay_seconds": delay_seconds,
            "checkpoint/left_out": float(left_out),
            "checkpoint/failed": float(failed),
        }
        if ended:
            metrics["checkpoint/write_seconds"] = max(ended)
        if self._stored is not None:
            metrics["checkpoint/images_since"] = float(images_seen - self._stored)
        return metrics

    def settle(self) -> None:
        """Returns when no save is under way, so that checkpoints neither come nor go meanwhile."""
        if self._in_flight is None:
            return
        began = time.monotonic()
        self._in_flight.result()
        self._in_flight = None
        waited = time.monotonic() - began
        if waited > _NOTABLE_SECONDS:
            logger.warning("the training waited %.1f s for a checkpoint to be written", waited)

    def wait(self) -> None:
        """Returns when the last save is in the store.

        Raises CheckpointError if it never got there.
        """
        if self._in_flight is not None:
            self._in_flight.result()
        if isinstance(self._failure, SupersededError):
            raise self._failure
        if self._failure is not None:
            raise CheckpointError(
                f"{checkpoints_url(self._run_url)}: the last checkpoint could not be written "
                f"({self._failure}). Mend the cause and start the run again; it continues from the "
                "checkpoint before."
            ) from self._failure

    def _busy(self) -> bool:
        return self._in_flight is not None and not self._in_flight.done()

    def _write(self, fields: dict[str, Any], for_rollbacks: Wanted) -> None:
        images_seen = fields["images_seen"]
        name = f"{images_seen:012d}-{self._attempt:03d}"
        directory = Directory(self._attempt, images_seen, storage.join(checkpoints_url(self._run_url), name))
        began = time.monotonic()
        try:
            write_directory(
                directory.url, self._contents(), format=FORMAT, version=FORMAT_VERSION, fields=fields
            )
        except Exception as error:
            # Whatever it is, it must not end a training whose older checkpoints are intact.
            self._failure = error
            self._coming = math.inf
            self._last_saved = None
            self.failed += 1
            logger.warning("checkpoint %s was not written, the older ones are kept: %s", name, error)
            if not isinstance(error, SupersededError):
                self._discard(directory)
            return
        finally:
            self._write_seconds.append(time.monotonic() - began)
        self._failure = None
        self._stored = images_seen
        self._note(directory, fields["metrics"], fields["sound"])
        try:
            self._prune(for_rollbacks)
        except Exception as error:
            logger.warning("old checkpoints could not be deleted, the next save tries again: %s", error)
        if not self._swept:
            self._sweep()

    def _sweep(self) -> None:
        """Gives up what earlier attempts had begun to upload when they died; once per attempt."""

        def is_of_an_earlier_attempt(path: str) -> bool:
            attempt = attempt_of(path.partition("/")[0])
            return attempt is not None and attempt < self._attempt

        self._swept = True
        try:
            storage.drop_uploads(checkpoints_url(self._run_url), is_of_an_earlier_attempt)
        except Exception as error:
            # A key may be allowed to write and not to list uploads; nothing but money depends on it.
            logger.warning("unfinished uploads of earlier launches could not be given up: %s", error)

    def _note(self, directory: Directory, metrics: Mapping[str, float | None], sound: bool) -> None:
        self._values[directory] = metrics.get(self._best_metric)
        if not sound:
            self._unsound.add(directory)

    def _contents(self) -> Iterator[tuple[str, memoryview]]:
        yield from self._host.contents()
        # Here every file is in the store and no manifest vouches for them yet.
        if self._before_commit is not None:
            self._before_commit()
        self._check_not_superseded()

    def _discard(self, directory: Directory) -> None:
        """Deletes what a save that failed has written: on a full disk the next one needs the room."""
        try:
            self._delete(directory)
        except Exception as error:
            logger.warning("%s is unfinished and could not be deleted: %s", directory.url, error)

    def _check_not_superseded(self) -> None:
        latest = max(claims(self._run_url), default=0)
        if latest > self._attempt:
            raise SupersededError(
                f"{self._run_url}: attempt {latest} has taken over this run; attempt {self._attempt} "
                "leaves its checkpoints alone and has to end."
            )

    def _prune(self, for_rollbacks: Wanted) -> None:
        """Deletes what is not to be kept, and what earlier attempts left unfinished."""
        whole = sorted(self._values, reverse=True)
        usable = [d for d in whole if for_rollbacks.takes(d.images_seen, sound=d not in self._unsound)]
        # The newest is where a resume goes on. What no rollback may go to pushes out none that one may.
        kept = {*whole[:1], *usable[: self._keep]}
        # Of equally good ones the newest, as in selection.candidates.
        kept.update([d for d in whole if self._values[d] == self.best_value][:1])
        for directory in directories(self._run_url):
            if directory.attempt > self._attempt or directory in kept:
                continue
            if directory not in self._values and storage.exists(storage.join(directory.url, MANIFEST)):
                continue  # Damaged, or of a later release: for the user to judge.
            self._delete(directory)
            self._values.pop(directory, None)

    def _delete(self, directory: Directory) -> None:
        self._check_not_superseded()
        # First, so that a deletion that is cut short leaves nothing that looks whole.
        storage.delete(storage.join(directory.url, MANIFEST))
        storage.delete(directory.url, recursive=True)
