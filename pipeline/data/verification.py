"""Comparing a data set with its index: a look before a run, and a thorough check.

`missing_shards` costs one listing and finds what a half copied data set lacks. `verify` reads
every byte of every shard instead of stopping at the first that is wrong, and names the first bad
samples of each, with their offsets. Shards are streamed, some at a time: the memory needed is
for each thread a piece of a shard, its largest sample and that sample's pixels.

What lies between samples that a sidecar left out is vouched for by the shard's SHA-256.
"""

import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.data.images import RejectedImageError, decode
from pipeline.data.index import SPLITS, Index, Shard, ShardError, check_sidecar, load_index
from pipeline.data.members import Tape
from pipeline.data.sidecar import Sidecar
from pipeline.data.streams import ShardStream
from pipeline.data.survey import Progress
from pipeline.data.tars import read_sample

_THREADS = 4
_ASKED_AT_ONCE = 16
_MOST_ASKED = 2000
_SAMPLES_SHOWN = 5
_PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class Problem:
    """Something in a shard that is not as the index says."""

    shard: str
    what: str


def verify(
    root: str,
    *,
    decode_images: bool = True,
    threads: int = _THREADS,
    progress: Progress = lambda what, done, total: None,
) -> list[Problem]:
    """Everything that is wrong with the data set at `root`; empty if it is whole.

    Of one shard the first five bad samples are named; a last problem counts the others.
    Raises ShardError if it has no valid index, StoreError if its store cannot be reached.
    """
    index = load_index(root)
    shards = [shard for split in SPLITS for shard in index.shards(split)]

    def check(shard: Shard) -> list[Problem]:
        return [Problem(shard.name, what) for what in _wrong_with(index, shard, decode_images)]

    problems: list[Problem] = []
    with ThreadPoolExecutor(threads, "verify") as pool:
        try:
            for number, found in enumerate(pool.map(check, shards)):
                problems += found
                progress("verifying", number + 1, len(shards))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return problems


def check_complete(index: Index, splits: Sequence[str] = SPLITS, *, cut_is_corrupt: bool = False) -> None:
    """Raises ShardError if a shard of `splits` is missing or cut short, before anybody waits for it.

    With `cut_is_corrupt` a shard that is there with another size is left to the policy on corrupt
    samples (data/corruption.py).
    """
    problems = missing_shards(index, splits, cut_too=not cut_is_corrupt)
    if problems:
        lines = [f"  {problem.shard} {problem.what}" for problem in problems[:_PROBLEMS_SHOWN]]
        if len(problems) > _PROBLEMS_SHOWN:
            lines.append(f"  and {len(problems) - _PROBLEMS_SHOWN:,} more")
        raise ShardError(
            f"{storage.shown(index.root)} is not the data set that its index describes:\n"
            + "\n".join(lines)
            + f"\nRestore these files; `nvae shards verify {storage.shown(index.root)}` checks every one."
        )


def missing_shards(index: Index, splits: Sequence[str] = SPLITS, *, cut_too: bool = True) -> list[Problem]:
    """Shards and sidecars that are not there or have another size, by a listing of each folder.

    Shards of another size only if `cut_too`.

    A web server cannot be listed: each file is asked for, many at once; of more than 2,000
    files that many, evenly spread.
    """
    expected = {}
    for split in splits:
        for shard in index.shards(split):
            expected[shard.name] = (shard.name, shard.bytes)
            expected[shard.sidecar_name] = (shard.name, shard.sidecar_bytes)
    web = storage.scheme(index.root) in ("http", "https")
    sizes = _asked_sizes(index.root, list(expected)) if web else _listed_sizes(index.root, list(expected))
    problems = []
    for name in sizes:
        shard_name, expected_bytes = expected[name]
        what, found = "" if name == shard_name else f"its sidecar {name} ", sizes[name]
        if found is None:
            problems.append(Problem(shard_name, f"{what}is missing"))
        elif found != expected_bytes and (cut_too or name != shard_name):
            problems.append(Problem(shard_name, f"{what}has {found:,} bytes instead of {expected_bytes:,}"))
    return problems


def _listed_sizes(root: str, names: list[str]) -> dict[str, int | None]:
    """Bytes of each file of `names`, None if it is not there."""
    folders = {name.rpartition("/")[0] for name in names}
    found: dict[str, int] = {}
    for folder in sorted(folders):
        listed = storage.list_sizes(storage.join(root, folder) if folder else root)
        found |= {f"{folder}/{name}" if folder else name: size for name, size in listed.items()}
    return {name: found.get(name) for name in names}


def _asked_sizes(root: str, names: list[str]) -> dict[str, int | None]:
    """As `_listed_sizes`, of at most `_MOST_ASKED` of the names."""

    def ask(name: str) -> int | None:
        try:
            return storage.size(storage.join(root, name))
        except storage.MissingError:
            return None

    asked = names[:: -(-len(names) // _MOST_ASKED)] if names else []
    with ThreadPoolExecutor(_ASKED_AT_ONCE, "ask") as pool:
        try:
            return dict(zip(asked, pool.map(ask, asked), strict=True))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def show(root: str) -> dict[str, Any]:
    """A summary of the data set at `root`, fit for JSON. Raises ShardError if there is none."""
    index = load_index(root)
    return {
        "root": storage.shown(index.root),
        "content_hash": index.content_hash,
        "image_size": index.image_size,
        "channels": index.channels,
        "source": index.source,
        "licence": index.licence,
        "rejected": index.rejected,
        "duplicates": index.duplicates,
        "splits": {
            split: {
                "samples": index.num_samples(split),
                "shards": len(index.shards(split)),
                "bytes": sum(shard.bytes for shard in index.shards(split)),
            }
            for split in SPLITS
        },
    }


def _wrong_with(index: Index, shard: Shard, decode_images: bool) -> Iterator[str]:
    try:
        stream = ShardStream(storage.join(index.root, shard.name))
    except storage.MissingError:
        yield "is missing"
        return
    if stream.bytes != shard.bytes:
        yield f"has {stream.bytes:,} bytes instead of {shard.bytes:,}"
    try:
        sidecar = check_sidecar(index, shard)
    except (ShardError, storage.StoreError) as error:
        yield f"its sidecar: {error}"
    else:
        number = 0
        for number, what in enumerate(_wrong_samples(stream, sidecar, index, shard, decode_images), 1):
            if number <= _SAMPLES_SHOWN:
                yield what
        if number > _SAMPLES_SHOWN:
            yield f"and {number - _SAMPLES_SHOWN:,} more of its {shard.samples:,} samples"
    if stream.sha256() != shard.sha256:
        yield "has another SHA-256 than the index says"


def _wrong_samples(
    stream: ShardStream, sidecar: Sidecar, index: Index, shard: Shard, decode_images: bool
) -> Iterator[str]:
    tape = Tape(stream.read)
    spans = zip(
        sidecar.keys, sidecar.offsets.tolist(), sidecar.sizes.tolist(), sidecar.checksums, strict=True
    )
    for key, offset, size, checksum in spans:
        span = tape.take(size) if tape.skip_to(offset) else b""
        if len(span) != size:
            yield f"sample {key!r} at byte {offset:,} is cut short, and all after it are missing"
            return
        if zlib.crc32(span) != checksum:
            yield f"sample {key!r} at byte {offset:,} is damaged"
            continue
        try:
            sample = read_sample(span, key, shard.name)
            if decode_images:
                decode(sample.image, index.image_size, index.channels)
        except RejectedImageError as error:
            yield f"sample {key!r} at byte {offset:,} {error}"
        except ValueError as error:
            yield f"sample {key!r} at byte {offset:,} cannot be read from its tar: {error}"
