"""Building a data set of shards from images.

A build looks at the whole source first and gives each image its split and its place (survey.py).
Then it decodes, crops and scales the images and writes one shard after the other.

What is finished is recorded in `building.json` after each shard, and a build that was
interrupted goes on there. `index.json` is written last: a data set without it is unfinished,
and nothing reads it. The same images and arguments give the same shards on every machine; only
the source's path, which `index.json` notes, may differ.
"""

import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline import local_files, storage
from pipeline.data import images
from pipeline.data.images import RejectedImageError, StoredImage
from pipeline.data.index import (
    INDEX_NAME,
    TRAIN,
    VALIDATION,
    Index,
    Shard,
    ShardError,
    load_index,
    parse_shard,
)
from pipeline.data.sources import SourceImage, normalize_source, open_source
from pipeline.data.survey import Entry, Progress, Rejection, Survey, survey_source
from pipeline.data.tars import TarBuilder
from pipeline.data.verification import Problem, missing_shards, show, verify

__all__ = [
    "BuildReport",
    "Index",
    "Problem",
    "Progress",
    "Rejection",
    "ShardError",
    "build",
    "load_index",
    "missing_shards",
    "show",
    "verify",
]

PROGRESS_NAME = "building.json"
REPORT_NAME = "rejected.json"
DEFAULT_SHARD_BYTES = 32 * 2**20
_AHEAD_PER_THREAD = 4


@dataclass(frozen=True)
class BuildReport:
    """What a build did."""

    index: Index
    rejected: tuple[Rejection, ...]
    already_there: bool
    """The data set was complete before; nothing was written."""


@dataclass
class _State:
    """What an interrupted build has to remember."""

    arguments: Mapping[str, Any]
    fingerprint: str
    shards: dict[str, list[Shard]] = field(default_factory=lambda: {TRAIN: [], VALIDATION: []})
    consumed: dict[str, int] = field(default_factory=lambda: {TRAIN: 0, VALIDATION: 0})
    """Entries of each split that are in a finished shard or were rejected before its end."""
    rejected: list[Rejection] = field(default_factory=list)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def build(
    source: str,
    target: str,
    *,
    image_size: int | None = None,
    validation_fraction: float | None = None,
    crop: str = "none",
    channels: int | None = None,
    licence: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    if_missing: bool = False,
    threads: int = 2,
    progress: Progress = lambda what, done, total: None,
) -> BuildReport:
    """Write the images of `source` as a data set to the folder `target`.

    `image_size` and `channels` default to the source's own; `validation_fraction` to the
    source's own split (MNIST's files, `train/` and `validation/` in a folder), or one tenth.
    `crop` is `none`, `center` or LEFT,TOP,RIGHT,BOTTOM.
    With `if_missing` a finished data set with these arguments is taken as it is, without a
    look at the source.

    Raises ShardError if an argument makes no sense, the source is empty or wholly rejected,
    or another data set is in the way; StoreError if `target` cannot be written.
    """
    source, target = normalize_source(source), storage.normalize(target)
    arguments = {
        "source": storage.shown(source),
        "image_size": image_size,
        "validation_fraction": validation_fraction,
        "crop": crop,
        "channels": channels,
        "licence": licence,
        "shard_bytes": shard_bytes,
    }
    _check_arguments(arguments)
    finished = _finished(target, arguments)
    if finished and if_missing:
        return BuildReport(finished, _read_rejections(target), already_there=True)
    with open_source(source, image_size) as opened:
        size = image_size or opened.image_size
        if size is None:
            raise ShardError(f"{storage.shown(source)}: say how large the images shall be: --image-size 256.")
        if not finished and storage.is_local(target):
            # Reading the source can take hours; a bucket has answered to the look at its index.
            local_files.check_writable(Path(target))
        survey = survey_source(opened, validation_fraction, progress)
        if finished:
            return _confirmed(finished, survey)
        state = _begin(target, arguments, survey)
        colours = channels or opened.channels
        prepare = _Preparation(size, colours, images.parse_crop(crop))
        for split in (TRAIN, VALIDATION):
            _write_split(target, split, survey, state, prepare, shard_bytes, threads, progress)
    index = Index(
        root=target,
        image_size=size,
        channels=colours,
        source=storage.shown(source),
        licence=licence,
        arguments=arguments | {"fingerprint": survey.fingerprint},
        rejected=len(survey.rejected) + len(state.rejected),
        duplicates=survey.duplicates,
        splits={split: tuple(rows) for split, rows in state.shards.items()},
    )
    return _finish(index, tuple(survey.rejected + state.rejected))


# --- before anything is written ---------------------------------------------------------------


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    size, fraction, channels = (arguments[name] for name in ("image_size", "validation_fraction", "channels"))
    problems = []
    if size is not None and not 4 <= size <= 4096:
        problems.append(f"image size {size} is not between 4 and 4096")
    if fraction is not None and not 0 <= fraction < 1:
        problems.append(f"validation fraction {fraction} is not in [0, 1)")
    if channels not in (None, 1, 3):
        problems.append(f"channels {channels} is neither 1 nor 3")
    if arguments["shard_bytes"] < 1:
        problems.append("a shard needs at least one byte")
    try:
        images.parse_crop(arguments["crop"])
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ShardError("; ".join(problems) + ".")


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
    return BuildReport(index, _read_rejections(index.root), already_there=True)


def _begin(target: str, arguments: Mapping[str, Any], survey: Survey) -> _State:
    """The state that an interrupted build left, or a new one."""
    url = storage.join(target, PROGRESS_NAME)
    state = _State(arguments, survey.fingerprint)
    if not storage.exists(url):
        storage.write_bytes(url, state.to_json())
        return state
    try:
        left = json.loads(storage.read_text(url))
        same = left["arguments"] == arguments and left["fingerprint"] == survey.fingerprint
        left_shards = {split: [parse_shard(row) for row in rows] for split, rows in left["shards"].items()}
        left_rejected = [Rejection(**row) for row in left["rejected"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{storage.shown(url)}: is damaged; delete that folder and build again.") from error
    if not same:
        raise ShardError(
            f"{storage.shown(target)}: holds an unfinished build with other arguments or of other images. "
            f"Choose another target, or delete that folder first."
        )
    sizes = storage.list_sizes(target)
    for shard in [*left_shards[TRAIN], *left_shards[VALIDATION]]:
        if sizes.get(shard.name) != shard.bytes or shard.sidecar_name not in sizes:
            return state  # Someone tidied up; the recorded shards are built again.
    return _State(arguments, survey.fingerprint, left_shards, dict(left["consumed"]), left_rejected)


# --- writing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Preparation:
    image_size: int
    channels: int
    crop: images.Crop

    def __call__(self, image: SourceImage) -> StoredImage | Rejection:
        try:
            return images.prepare(image.read(), self.image_size, self.channels, self.crop)
        except RejectedImageError as error:
            return Rejection(image.name, str(error))


def _write_split(
    target: str,
    split: str,
    survey: Survey,
    state: _State,
    prepare: _Preparation,
    shard_bytes: int,
    threads: int,
    progress: Progress,
) -> None:
    entries = survey.entries[split]
    tar = TarBuilder()
    rejected: list[Rejection] = []
    remaining = entries[state.consumed[split] :]
    for number, (entry, result) in enumerate(
        _prepared(remaining, prepare, threads), start=state.consumed[split] + 1
    ):
        if isinstance(result, Rejection):
            rejected.append(result)
        else:
            tar.add(entry.key, result.extension, result.data)
        if tar.size >= shard_bytes or number == len(entries):
            _write_shard(target, split, tar, state, number, rejected)
            tar, rejected = TarBuilder(), []
        progress(f"writing {split}", number, len(entries))


def _prepared(
    entries: Sequence[Entry], prepare: _Preparation, threads: int
) -> Iterator[tuple[Entry, StoredImage | Rejection]]:
    """The entries with their images, in order, prepared a little ahead in threads."""
    waiting: deque[tuple[Entry, Future[StoredImage | Rejection]]] = deque()
    with ThreadPoolExecutor(threads, "prepare") as pool:
        for entry in entries:
            waiting.append((entry, pool.submit(prepare, entry.image)))
            if len(waiting) >= threads * _AHEAD_PER_THREAD:
                ready, future = waiting.popleft()
                yield ready, future.result()
        for ready, future in waiting:
            yield ready, future.result()


def _write_shard(
    target: str, split: str, tar: TarBuilder, state: _State, consumed: int, rejected: list[Rejection]
) -> None:
    if len(tar):
        finished = tar.finish(f"{split}-{len(state.shards[split]):06d}.tar")
        storage.write_bytes(storage.join(target, finished.shard.name), finished.data)
        storage.write_bytes(storage.join(target, finished.shard.sidecar_name), finished.sidecar)
        state.shards[split].append(finished.shard)
    state.consumed[split] = consumed
    state.rejected += rejected
    storage.write_bytes(storage.join(target, PROGRESS_NAME), state.to_json())


def _finish(index: Index, rejected: tuple[Rejection, ...]) -> BuildReport:
    if not index.num_samples(TRAIN):
        reasons = Counter(rejection.reason for rejection in rejected).most_common(3)
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        storage.delete(storage.join(index.root, PROGRESS_NAME))
        raise ShardError(f"{index.source}: not one image can be used ({listed or 'all are for validation'}).")
    report = json.dumps([asdict(rejection) for rejection in rejected], indent=1).encode()
    storage.write_bytes(storage.join(index.root, REPORT_NAME), report)
    storage.write_bytes(storage.join(index.root, INDEX_NAME), index.to_json())
    storage.delete(storage.join(index.root, PROGRESS_NAME))
    return BuildReport(index, rejected, already_there=False)


def _read_rejections(target: str) -> tuple[Rejection, ...]:
    try:
        rows = json.loads(storage.read_text(storage.join(target, REPORT_NAME)))
        return tuple(Rejection(row["name"], row["reason"]) for row in rows)
    except storage.MissingError:
        return ()
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{storage.shown(target)}/{REPORT_NAME}: is damaged; delete it.") from error
