"""Checkpoints: what a training continues from, in RUN/checkpoints/.

RUN/checkpoints/
  000000012800-003/     images seen, then the number of the attempt that wrote it
    model.safetensors  ema.safetensors  optimizer.safetensors
    manifest.json       format, record (configuration and all state that is no tensor),
                        length and SHA-256 of every file; written last
  attempt-003-1f2e3d4c  the claim of the third launch

A later attempt's checkpoint counts as newer whatever its progress: the successor knew what it
continued from. checkpoint_writer.py writes them.

Rejected: Ray's upload and retention (the same files must work without Ray), overwriting a
single checkpoint in place (a kill loses both), pickled optimizer state.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    sound: bool
    """Whether its weights were known to be good: it was not saved amid an episode of trouble, and a
    validation at that moment, if there was one, gave numbers."""
    _read: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    """Tensors of files that were read and not asked for since."""

    @property
    def url(self) -> str:
        return self.manifest.url

    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file ("model", "ema", "optimizer"), on the CPU.

        Raises ArtifactError if the file is not exactly what was written.
        """
        file_name = f"{name}.safetensors"
        if file_name in self._read:
            return self._read.pop(file_name)
        return self._tensors(file_name)

    def read(self) -> None:
        """Reads every file and keeps it until `load` asks for it.

        Raises ArtifactError naming the first that is not what was written.
        """
        for file_name in self.manifest.files:
            self._read[file_name] = self._tensors(file_name)

    def verify(self) -> None:
        """Like `read`, but keeps nothing."""
        for file_name in self.manifest.files:
            read_verified(self.manifest, file_name)

    def _tensors(self, file_name: str) -> dict[str, Tensor]:
        return tensors_from_bytes(read_verified(self.manifest, file_name), storage.join(self.url, file_name))


def open_checkpoint(url: str) -> Checkpoint:
    """The checkpoint in the directory `url`.

    Raises ArtifactError if there is none or its manifest is malformed, NewerFormatError if
    a later release wrote it.
    """
    manifest = read_manifest(url, format=FORMAT, version=FORMAT_VERSION)
    fields = manifest.fields
    images_seen, attempt = fields.get("images_seen"), fields.get("attempt")
    record, metrics = fields.get("record"), fields.get("metrics")
    sound = fields.get("sound", True)
    if (
        type(images_seen) is not int
        or type(attempt) is not int
        or not isinstance(record, dict)
        or not isinstance(metrics, dict)
        or not isinstance(sound, bool)
    ):
        raise ArtifactError(
            f"{storage.join(url, MANIFEST)}: images_seen, attempt, record, metrics or sound is missing or of "
            "the wrong type; the manifest was not written by us."
        )
    name = _DIRECTORY.fullmatch(url.rstrip("/").rpartition("/")[2])
    if name and (int(name["images"]), int(name["attempt"])) != (images_seen, attempt):
        raise ArtifactError(
            f"{url}: holds the checkpoint of attempt {attempt} at {images_seen:,} images; somebody "
            "renamed or copied it."
        )
    return Checkpoint(manifest, images_seen, attempt, record, metrics, sound)


@dataclass(frozen=True)
class Wanted:
    """What a checkpoint has to be like to be chosen; by default any will do."""

    at_most: int | None = None
    """Images it may have seen."""
    sound: bool = False
    """Whether it has to be sound."""
    left_behind: Sequence[range] = ()
    """Images seen at those that rollbacks have given up."""

    def may_be_at(self, images_seen: int) -> bool:
        """Whether one that has seen so many images could do."""
        return (self.at_most is None or images_seen <= self.at_most) and not any(
            images_seen in images for images in self.left_behind
        )

    def takes(self, images_seen: int, *, sound: bool) -> bool:
        """Whether a checkpoint will do. Retention asks as well: it deletes none that rollbacks need."""
        return self.may_be_at(images_seen) and (sound or not self.sound)


ANY = Wanted()


def newest(run_url: str, wanted: Wanted = ANY) -> Checkpoint | None:
    """The newest wanted checkpoint of a run all of whose files are intact; None if it has none.

    Its files have been read and wait for `load`: they are read once, and who deletes them now
    does no harm. Broken and unfinished ones are passed over, each with a warning that names what
    is wrong. Raises CheckpointError if none is intact and some that may have been wanted are
    broken: to go on from earlier weights, or from noise, must be the user's decision. Raises
    NewerFormatError rather than going back behind the checkpoint of a later release.
    """
    passed_over: dict[Directory, str] = {}
    found: tuple[Directory, Checkpoint] | None = None
    for _ in range(_PASSES):
        before, passed_over = passed_over, {}
        for directory in directories(run_url):
            if not wanted.may_be_at(directory.images_seen):
                continue
            if found and found[0] == directory:
                break
            try:
                checkpoint = open_checkpoint(directory.url)
                if not wanted.takes(checkpoint.images_seen, sound=checkpoint.sound):
                    continue
                checkpoint.read()
                found = directory, checkpoint
                break
            except NewerFormatError:
                raise
            except ArtifactError as error:
                passed_over[directory] = str(error)
        if not passed_over or passed_over == before:
            break
    for reason in passed_over.values():
        logger.warning("checkpoint passed over: %s", reason)
    damaged = [d for d in passed_over if storage.exists(storage.join(d.url, MANIFEST))]
    if found is None and damaged:
        names = ", ".join(directory.url.rpartition("/")[2] for directory in damaged)
        which = "its checkpoints" if wanted == ANY else "the checkpoints that a rollback could go to"
        raise CheckpointError(
            f"{checkpoints_url(run_url)}: none of {which} is intact. Damaged: {names} "
            "(the log says what is wrong with each). Restore one of them from a copy and repeat "
            "the command, or train under another name."
        )
    return found[1] if found else None


def open_attempt(run_url: str, images_seen: int, attempt: int) -> Checkpoint:
    """The checkpoint that this attempt wrote at this point. Raises like `open_checkpoint`."""
    return open_checkpoint(storage.join(checkpoints_url(run_url), f"{images_seen:012d}-{attempt:03d}"))


def checkpoints(run_url: str) -> list[Checkpoint]:
    """The checkpoints of a run whose manifests are in order, newest first; files unread."""
    found = []
    for directory in directories(run_url):
        try:
            found.append(open_checkpoint(directory.url))
        except ArtifactError:
            continue  # `newest` says what is wrong with it.
    return found


def images_saved(run_url: str) -> int:
    """Images seen at the newest checkpoint of a run; 0 without one."""
    return next((checkpoint.images_seen for checkpoint in checkpoints(run_url)), 0)


@dataclass(frozen=True, order=True)
class Directory:
    """A directory that may hold a checkpoint; the greater is the newer."""

    attempt: int
    images_seen: int
    url: str


def checkpoints_url(run_url: str) -> str:
    """The folder of a run's checkpoints and claims."""
    return storage.join(run_url, "checkpoints")


def directories(run_url: str) -> list[Directory]:
    """The checkpoint directories of a run, whole or not, newest first."""
    folder = checkpoints_url(run_url)
    matches = [_DIRECTORY.fullmatch(name) for name in storage.list_dir(folder)]
    found = [
        Directory(int(match["attempt"]), int(match["images"]), storage.join(folder, match.group()))
        for match in matches
        if match
    ]
    return sorted(found, reverse=True)


def attempt_of(directory: str) -> int | None:
    """The attempt that writes a directory of this name; None if it is not a checkpoint's."""
    match = _DIRECTORY.fullmatch(directory)
    return int(match["attempt"]) if match else None


def claims(run_url: str) -> list[int]:
    """Every attempt that is known to have begun."""
    names = storage.list_dir(checkpoints_url(run_url))
    matches = [_CLAIM.fullmatch(name) or _DIRECTORY.fullmatch(name) for name in names]
    return [int(match["attempt"]) for match in matches if match]
