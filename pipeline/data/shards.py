"""Building a data set of shards from images.

A build looks at the whole source first and gives each image its split and its place (survey.py).
Then it decodes, crops and scales the images and writes one shard after the other.

What is finished is recorded in `building.json` after each shard, and a build that was
interrupted goes on there. `index.json` is written last: a data set without it is unfinished,
and nothing reads it. The same images and arguments give the same shards on every machine; only
the source's path, which `index.json` notes, may differ.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import local_files, storage
from pipeline.data import images
from pipeline.data.ahead import in_order
from pipeline.data.images import Format, RejectedImageError, StoredImage
from pipeline.data.index import INDEX_NAME, TRAIN, VALIDATION, Index, ShardError, load_index
from pipeline.data.rejections import (
    DEFAULT_MAX_REJECTED,
    REPORT_NAME,
    Rejection,
    Tolerance,
    read_report,
    reasons,
    write_report,
)
from pipeline.data.sources import Source, normalize_source, open_source
from pipeline.data.splits import read_choice
from pipeline.data.survey import Entry, Progress, Survey, survey_source
from pipeline.data.tars import TarBuilder
from pipeline.data.unfinished import PROGRESS_NAME, Unfinished, begin
from pipeline.data.verification import Problem, missing_shards, show, verify

__all__ = [
    "DEFAULT_MAX_REJECTED",
    "REPORT_NAME",
    "BuildReport",
    "Index",
    "Problem",
    "Progress",
    "Rejection",
    "ShardError",
    "build",
    "load_index",
    "missing_shards",
    "reasons",
    "show",
    "verify",
]

DEFAULT_SHARD_BYTES = 32 * 2**20


@dataclass(frozen=True)
class BuildReport:
    """What a build did."""

    index: Index
    rejected: tuple[Rejection, ...]
    remarks: tuple[str, ...] = ()
    """What of the source was not read, and where the splits come from: sentences for people."""
    already_there: bool = False
    """The data set was complete before; nothing was written."""


def build(
    source: str,
    target: str,
    *,
    image_size: int | None = None,
    validation_fraction: float | None = None,
    validation_count: int | None = None,
    validation_list: str | None = None,
    crop: str = "none",
    channels: int | None = None,
    form: Format = "original",
    bits: int = 8,
    licence: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    max_rejected: float = DEFAULT_MAX_REJECTED,
    if_missing: bool = False,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> BuildReport:
    """Write the images of `source` as a data set to the folder `target`.

    `image_size` and `channels` default to the source's own. The validation split is the source's
    own (published splits, folders train/ and validation/), a fraction, a number or the images
    that a file lists; without any of these, one tenth. `crop` is `none`, `center` or
    LEFT,TOP,RIGHT,BOTTOM. `form` and `bits` say how images are stored (images.py). `threads` defaults
    to the cores of this machine. With `if_missing` a finished data set with these arguments is
    taken as it is, without a look at the source.

    Raises ShardError if an argument makes no sense, the source is empty, wholly rejected or by more
    than `max_rejected` of its images, or another data set is in the way; StoreError if
    `target` cannot be written.
    """
    source, target = normalize_source(source), storage.normalize(target)
    choice = read_choice(validation_fraction, validation_count, validation_list)
    arguments = {
        "source": storage.shown(source),
        "image_size": image_size,
        **choice.arguments(),
        "crop": crop,
        "channels": channels,
        "format": form,
        "bits": bits,
        "licence": licence,
        "shard_bytes": shard_bytes,
    }
    _check_arguments(arguments)
    threads = threads or os.cpu_count() or 1
    finished = _finished(target, arguments)
    if finished and if_missing:
        return BuildReport(finished, read_report(target), already_there=True)
    with open_source(source, image_size) as opened:
        prepare = _preparation(opened, arguments)
        if not finished and storage.is_local(target):
            # Reading the source can take hours; a bucket has answered to the look at its index.
            local_files.check_writable(Path(target))
        survey = survey_source(opened, choice, threads, progress)
        if finished:
            return _confirmed(finished, survey)
        tolerance = Tolerance(storage.shown(source), max_rejected, survey.images)
        state = _write_shards(target, arguments, survey, prepare, tolerance, threads, progress)
    remarks = [f"Not read: {remark}." for remark in opened.remarks]
    index = _index(target, arguments, survey, prepare, state)
    return _finish(index, tuple(survey.rejected + state.rejected), (*remarks, survey.origin))


# --- before anything is written ---------------------------------------------------------------


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    size, channels, bits, form = (arguments[name] for name in ("image_size", "channels", "bits", "format"))
    problems = []
    if size is not None and not 4 <= size <= 4096:
        problems.append(f"image size {size} is not between 4 and 4096")
    if channels not in (None, 1, 3):
        problems.append(f"channels {channels} is neither 1 nor 3")
    if form not in images.FORMATS:
        problems.append(f"format {form} is none of {', '.join(images.FORMATS)}")
    if not 1 <= bits <= 8:
        problems.append(f"{bits} bits are not between 1 and 8")
    if arguments["shard_bytes"] < 1:
        problems.append("a shard needs at least one byte")
    try:
        images.parse_crop(arguments["crop"])
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ShardError("; ".join(problems) + ".")


def _preparation(source: Source, arguments: Mapping[str, Any]) -> "_Preparation":
    """How images become those of the data set. Raises ShardError if that is not said or cannot be."""
    size = arguments["image_size"] or source.image_size
    channels = arguments["channels"] or source.channels
    if size is None:
        raise ShardError(f"{arguments['source']}: say how large the images shall be: --image-size 256.")
    if arguments["format"] == "webp" and channels == 1:
        raise ShardError("WebP has no grey images: give --format png or raw, or --channels 3.")
    crop = images.parse_crop(arguments["crop"])
    return _Preparation(size, channels, crop, arguments["format"], arguments["bits"])


def _finished(target: str, arguments: Mapping[str, Any]) -> Index | None:
    """The data set that `target` already holds, if it was built with these arguments."""
    if not storage.exists(storage.join(target, INDEX_NAME)):
        return None
    index = load_index(target)
    there = {name: index.arguments.get(name) for name in arguments}
    differing = [name for name in arguments if there[name] != arguments[name]]
    if differing:
        listed = ", ".join(f"{name} {there[name]!r} instead of {arguments[name]!r}" for name in differing)
        raise ShardError(
            f"{storage.shown(target)}: holds another data set ({listed}). Choose another target, or delete "
            f"that folder first."
        )
    return index


def _confirmed(index: Index, survey: Survey) -> BuildReport:
    if index.arguments.get("fingerprint") != survey.fingerprint:
        raise ShardError(
            f"{storage.shown(index.root)}: was built from {index.source} when that held other images. "
            f"Choose another target, or delete that folder first."
        )
    return BuildReport(index, read_report(index.root), already_there=True)


# --- writing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Preparation:
    image_size: int
    channels: int
    crop: images.Crop
    form: Format
    bits: int

    def __call__(self, entry: Entry) -> StoredImage | Rejection:
        try:
            content = entry.image.read()
            return images.prepare(content, self.image_size, self.channels, self.crop, self.form, self.bits)
        except RejectedImageError as error:
            return Rejection(entry.image.name, str(error))


@dataclass
class _Writer:
    """Writes a data set's shards, one after the other."""

    target: str
    state: Unfinished
    prepare: _Preparation
    shard_bytes: int
    threads: int
    tolerance: Tolerance
    progress: Progress

    def __post_init__(self) -> None:
        self.tolerance.add(self.state.rejected)
        self.tolerance.check()

    def write(self, split: str, entries: Sequence[Entry]) -> None:
        """What of `entries` is not written yet. Raises ShardError if too many of them cannot be used."""
        begun = self.state.consumed[split]
        tar = TarBuilder()
        rejected: list[Rejection] = []
        results = in_order(self.prepare, entries[begun:], self.threads)
        for number, (entry, result) in enumerate(results, start=begun + 1):
            if isinstance(result, Rejection):
                rejected.append(result)
                self.tolerance.add([result])
            else:
                tar.add(entry.key, result.extension, result.data)
            stopping = self.tolerance.is_exceeded and not len(tar)
            if stopping or tar.size >= self.shard_bytes or number == len(entries):
                self._write_shard(split, tar, number, rejected)
                tar, rejected = TarBuilder(), []
            self.tolerance.check()
            self.progress(f"writing {split}", number, len(entries))

    def _write_shard(self, split: str, tar: TarBuilder, consumed: int, rejected: list[Rejection]) -> None:
        if len(tar):
            finished = tar.finish(f"{split}-{len(self.state.shards[split]):06d}.tar")
            storage.write_bytes(storage.join(self.target, finished.shard.name), finished.data)
            storage.write_bytes(storage.join(self.target, finished.shard.sidecar_name), finished.sidecar)
            self.state.shards[split].append(finished.shard)
        self.state.consumed[split] = consumed
        self.state.rejected += rejected
        self.state.save(self.target)


def _write_shards(
    target: str,
    arguments: Mapping[str, Any],
    survey: Survey,
    prepare: _Preparation,
    tolerance: Tolerance,
    threads: int,
    progress: Progress,
) -> Unfinished:
    """All shards of both splits, after those that an earlier attempt has written."""
    tolerance.add(survey.rejected)
    tolerance.check()
    state = begin(target, arguments, survey.fingerprint)
    writer = _Writer(target, state, prepare, arguments["shard_bytes"], threads, tolerance, progress)
    for split in (TRAIN, VALIDATION):
        writer.write(split, survey.entries[split])
    return state


def _index(
    target: str, arguments: Mapping[str, Any], survey: Survey, prepare: _Preparation, state: Unfinished
) -> Index:
    """What the finished data set says of itself."""
    return Index(
        root=target,
        image_size=prepare.image_size,
        channels=prepare.channels,
        source=arguments["source"],
        licence=arguments["licence"],
        arguments={**arguments, "fingerprint": survey.fingerprint},
        rejected=len(survey.rejected) + len(state.rejected),
        duplicates=survey.duplicates,
        splits={split: tuple(rows) for split, rows in state.shards.items()},
    )


def _finish(index: Index, rejected: tuple[Rejection, ...], remarks: tuple[str, ...]) -> BuildReport:
    if not index.num_samples(TRAIN):
        listed = "; ".join(reasons(rejected)) or "all are for validation"
        storage.delete(storage.join(index.root, PROGRESS_NAME))
        raise ShardError(f"{index.source}: not one image can be used ({listed}).")
    write_report(index.root, rejected)
    storage.write_bytes(storage.join(index.root, INDEX_NAME), index.to_json())
    storage.delete(storage.join(index.root, PROGRESS_NAME))
    return BuildReport(index, rejected, remarks)
