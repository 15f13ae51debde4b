"""Making a data set of tars that were written by others.

The tars stay as they are and where they are: each is read once, front to back, and gets a sidecar
beside it; `index.json` is written last. An index that lies elsewhere and names the place of its
tars was not taken: whoever may write an index could then make a training read any place that
its credentials reach. Tars that may not be written beside have to be copied, which a data set
for training is anyway.

All samples of a tar are in one split. Validation tars are read first; a training image whose
file equals one of theirs byte by byte is left out. What is left out is a gap in the sidecar,
listed in `rejected.json`; if it is more than a given share, there will be no index.

After each tar its result is recorded in a `.building` file beside it, and a command that was
interrupted goes on with those that have none, have changed, or hold what cannot be used
(tar_records.py). An index that is there is taken for that of its tars if their sizes are those
it names and none is newer; what was replaced and kept both is found by `nvae shards verify`
alone, as a look that reads nothing cannot do better. Memory: for each thread `streams.PIECE_BYTES`, the
largest image file (64 MiB at most), its pixels and about 300 bytes per sample of its tar; for
the whole data set 16 bytes per image, and about 100 per validation image.
"""

import threading
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pipeline import local_files, storage
from pipeline.data.index import (
    INDEX_NAME,
    SPLITS,
    TRAIN,
    VALIDATION,
    Index,
    ShardError,
    load_index,
    printable,
)
from pipeline.data.members import Tape
from pipeline.data.rejections import (
    DEFAULT_MAX_REJECTED,
    Rejection,
    read_report,
    reasons,
    write_report,
)
from pipeline.data.scanning import DIGEST_BYTES, ImageFormat, Scanner, first_formats
from pipeline.data.sidecar import is_sidecar
from pipeline.data.streams import ShardStream
from pipeline.data.survey import Progress
from pipeline.data.tar_listing import TarListing, list_tars, split_tars
from pipeline.data.tar_records import (
    TarRecord,
    delete_records,
    fingerprints,
    read_record,
    record_name,
    write_record,
)
from pipeline.errors import InputError

_CHANNELS = {"L": 1, "RGB": 3}
_LOOKED_AT_FIRST = 100
_FORMATS_SHOWN = 5
_PROGRESS_SECONDS = 1.0


@dataclass(frozen=True)
class IndexingReport:
    """What became of the tars."""

    index: Index
    rejected: tuple[Rejection, ...]
    """What was left out; of one tar the first thousand."""
    already_there: bool
    """The index was complete before; nothing was written."""


@dataclass
class _Job:
    """The tars of one call, and how far they are."""

    listing: TarListing
    image_size: int
    channels: int
    fingerprints: Mapping[str, str]
    max_rejected: float
    progress: Progress
    streams: dict[str, ShardStream] = field(default_factory=dict)
    stopped: threading.Event = field(default_factory=threading.Event)

    def report(self) -> None:
        read = sum(stream.fetched for stream in list(self.streams.values()))
        total = sum(self.listing.size(name) for name in self.listing.tars)
        self.progress("indexing, MiB", read >> 20, total >> 20)


def index_tars(
    urls: Sequence[str],
    *,
    image_size: int | None = None,
    channels: int | None = None,
    validation_fraction: float | None = None,
    validation: Sequence[str] = (),
    licence: str | None = None,
    max_rejected: float = DEFAULT_MAX_REJECTED,
    threads: int = 4,
    progress: Progress = lambda what, done, total: None,
) -> IndexingReport:
    """Write an index and sidecars beside the tars that `urls` name, so that they are a data set.

    `urls` is one folder, or tars below one; see tar_listing.py for them and for the splits.
    `image_size` and `channels` default to those of the first images.

    Raises ShardError if that is no data set: images of several sizes, a damaged tar, more than
    the share `max_rejected` unusable; StoreError if the folder cannot be written to.
    """
    listing = list_tars(urls)
    splits = split_tars(listing, validation_fraction, validation)
    arguments: dict[str, Any] = {
        "command": "index",
        "image_size": image_size,
        "channels": channels,
        "licence": licence,
        VALIDATION: list(splits[VALIDATION]),
    }
    if INDEX_NAME in listing.files or storage.exists(storage.join(listing.root, INDEX_NAME)):
        index = _confirmed(listing, splits, arguments)
        leftovers = [name for name in listing.tars if record_name(name) in listing.files]
        delete_records(listing.root, leftovers)
        return IndexingReport(index, read_report(index.root), already_there=True)
    _check_writable(listing)
    size, colours = _image_format(listing, image_size, channels)
    job = _Job(listing, size, colours, fingerprints(listing, size, colours, splits), max_rejected, progress)
    records = _scan(job, splits[VALIDATION], frozenset(), threads)
    held_out = set(_digests(records.values()))
    records |= _scan(job, splits[TRAIN], held_out, threads)
    _check_share(job, records.values())
    index = Index(
        root=listing.root,
        image_size=size,
        channels=colours,
        source=f"{len(listing.tars)} tars in {storage.shown(listing.root)}",
        licence=licence,
        arguments=arguments,
        rejected=sum(record.left_out for record in records.values()),
        duplicates=_count_duplicates(records.values()),
        splits={split: tuple(records[name].shard for name in splits[split]) for split in SPLITS},
    )
    return _finish(index, listing, splits, records)


# --- before a tar is read ---------------------------------------------------------------------


def _confirmed(
    listing: TarListing, splits: Mapping[str, Sequence[str]], arguments: Mapping[str, Any]
) -> Index:
    """The index that is already there, if it is the one that is asked for."""
    index = load_index(listing.root)
    expected = {split: [(name, listing.size(name)) for name in splits[split]] for split in SPLITS}
    found = {split: [(shard.name, shard.bytes) for shard in index.shards(split)] for split in SPLITS}
    differing = [name for name in arguments if index.arguments.get(name) != arguments[name]]
    if found != expected or differing:
        what = f"other {', '.join(differing)}" if differing else "other tars, or tars of other sizes"
        raise ShardError(
            f"{storage.shown(listing.root)}: has an index already, made of {what}. Delete its "
            f"{INDEX_NAME} (the tars can stay) to make another one."
        )
    written = storage.list_times(listing.root).get(INDEX_NAME, 0)
    newer = [name for name in listing.tars if listing.times.get(name, 0) > written]
    if newer:
        root = storage.shown(listing.root)
        raise ShardError(
            f"{root}: has an index already, and {len(newer):,} of its {len(listing.tars):,} tars are newer, "
            f"for instance {newer[0]}. `nvae shards verify {root}` says whether they are still those of the "
            f"index: then there is nothing to do. Otherwise delete its {INDEX_NAME} (the tars can stay) and "
            f"repeat this command."
        )
    return index


def _check_writable(listing: TarListing) -> None:
    """Raises StoreError or ShardError if no sidecar can be written beside the tars."""
    if storage.is_local(listing.root):
        local_files.check_writable(Path(listing.root))
    else:
        probe = storage.join(listing.root, record_name("write-check.tar"))
        storage.write_bytes(probe, b"")
        storage.delete(probe)
    for name in listing.tars:
        sidecar = name.removesuffix(".tar") + ".idx"
        if sidecar in listing.files and not _is_ours(listing, sidecar):
            raise ShardError(
                f"{storage.shown(listing.root)}: {sidecar} was written by another program (NVIDIA DALI uses "
                f"this name); move it away, the sidecar of {name} will take its place."
            )


def _is_ours(listing: TarListing, sidecar: str) -> bool:
    beginning = min(listing.size(sidecar), 8)
    return is_sidecar(storage.read_bytes(storage.join(listing.root, sidecar), 0, beginning))


def _image_format(listing: TarListing, image_size: int | None, channels: int | None) -> tuple[int, int]:
    """Height (and width) and channels of the images: as asked for, else those of the first ones."""
    if image_size is not None and channels is not None:
        return image_size, channels
    for name in listing.tars:
        with _named_errors(listing.root, name):
            tape = Tape(ShardStream(storage.join(listing.root, name)).read)
            counts = first_formats(tape, _LOOKED_AT_FIRST)
        if not counts:
            continue
        most = counts.most_common(1)[0][0]
        colours = channels or _CHANNELS.get(most.mode)
        if (image_size is None and not _is_square(most)) or colours is None:
            raise ShardError(
                f"{storage.shown(listing.root)}/{name}: its images are {_listed(counts)}. Square ones of "
                f"4x4 to 4096x4096 pixels, RGB or L, can be indexed. {_ADVICE}"
            )
        return image_size or most.width, colours
    raise ShardError(f"{storage.shown(listing.root)}: not one image was found in {len(listing.tars):,} tars.")


_ADVICE = "`nvae shards build SOURCE.tar TARGET --image-size N` makes images of one size of them."


def _is_square(image: ImageFormat) -> bool:
    return image.width == image.height and 4 <= image.width <= 4096


def _listed(formats: Mapping[Any, int]) -> str:
    ordered = sorted(formats.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{count:,} x {name}" for name, count in ordered[:_FORMATS_SHOWN])
    return listed + (
        f" and {len(ordered) - _FORMATS_SHOWN:,} others" if len(ordered) > _FORMATS_SHOWN else ""
    )


# --- reading the tars -------------------------------------------------------------------------


def _scan(job: _Job, names: Sequence[str], held_out: Container[bytes], threads: int) -> dict[str, TarRecord]:
    """The records of the tars `names`; those that are not there yet are made, some at a time."""
    with ThreadPoolExecutor(threads, "index") as pool:
        try:
            futures = {name: pool.submit(_record, job, name, held_out) for name in names}
            waiting: set[Future[TarRecord]] = set(futures.values())
            while waiting:
                done, waiting = wait(waiting, timeout=_PROGRESS_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                job.report()
        except BaseException:
            job.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: future.result() for name, future in futures.items()}


def _record(job: _Job, name: str, held_out: Container[bytes]) -> TarRecord:
    """What is in the tar `name`, which has its sidecar then."""
    root, fingerprint = job.listing.root, job.fingerprints[name]
    there = read_record(root, name, fingerprint, job.listing.files)
    if there is not None:
        return there
    with _named_errors(root, name):
        stream = job.streams[name] = ShardStream(storage.join(root, name))

        def read(count: int) -> bytes:
            if job.stopped.is_set():
                raise CancelledError
            return stream.read(count)

        scan = Scanner(job.image_size, job.channels, held_out).run(Tape(read))
        sha256 = stream.sha256()
    if not scan.rows and scan.unusable == scan.left_out > 0 and job.max_rejected < 1:
        _refuse(job.listing, scan.unusable, scan.unusable, scan.rejected, scan.formats, job.max_rejected)
    return write_record(root, name, stream.bytes, sha256, scan, fingerprint)


@contextmanager
def _named_errors(root: str, name: str) -> Iterator[None]:
    """Gives what is wrong with a tar its name."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise ShardError(
            f"{storage.shown(storage.join(root, name))}: {printable(str(error))}. No index was made. Fetch "
            f"the tar again, or leave it out by naming the others; the same command goes on."
        ) from error


# --- after the last one -----------------------------------------------------------------------


def _check_share(job: _Job, records: Collection[TarRecord]) -> None:
    """Raises ShardError if too much cannot be used."""
    unusable = sum(record.unusable for record in records)
    images = unusable + sum(record.shard.samples for record in records)
    if unusable > job.max_rejected * images:
        formats = sum((Counter(record.formats) for record in records), Counter[str]())
        rejected = [rejection for record in records for rejection in record.rejected]
        _refuse(job.listing, unusable, images, rejected, formats, job.max_rejected)


def _refuse(
    listing: TarListing,
    unusable: int,
    images: int,
    rejected: Iterable[Rejection],
    formats: Mapping[str, int],
    max_rejected: float,
) -> NoReturn:
    why = "; ".join(reasons(rejection for rejection in rejected if not rejection.by_rule))
    several = f" Images have several formats: {_listed(formats)}. {_ADVICE}" if len(formats) > 1 else ""
    raise ShardError(
        f"{storage.shown(listing.root)}: {unusable:,} of {images:,} samples cannot be used, which is more "
        f"than --max-rejected {max_rejected:g} allows: {why}. No index was made.{several} To leave them out, "
        f"repeat the command with --max-rejected 1; tars of which everything can be used are not read again."
    )


def _finish(
    index: Index, listing: TarListing, splits: Mapping[str, Sequence[str]], records: Mapping[str, TarRecord]
) -> IndexingReport:
    """Write the index, then forget what was known tar by tar. Raises ShardError without training images."""
    if not index.num_samples(TRAIN):
        delete_records(listing.root, records)
        why = "; ".join(reasons(each for name in splits[TRAIN] for each in records[name].rejected))
        raise ShardError(
            f"{storage.shown(listing.root)}: not one training image can be used: "
            f"{why or 'no training tar holds an image'}. No index was made. Mend that, or choose other tars "
            f"for validation."
        )
    rejected = tuple(rejection for name in listing.tars for rejection in records[name].rejected)
    write_report(index.root, rejected)
    storage.write_bytes(storage.join(index.root, INDEX_NAME), index.to_json())
    delete_records(listing.root, records)
    return IndexingReport(index, rejected, already_there=False)


def _digests(records: Iterable[TarRecord]) -> Iterator[bytes]:
    for record in records:
        for start in range(0, len(record.digests), DIGEST_BYTES):
            yield record.digests[start : start + DIGEST_BYTES]


def _count_duplicates(records: Iterable[TarRecord]) -> int:
    """Images whose file is that of another image, byte by byte."""
    # S strips zeros at the end; digests of one length stay different without them.
    digests = np.frombuffer(b"".join(record.digests for record in records), f"S{DIGEST_BYTES}")
    return len(digests) - len(np.unique(digests))
