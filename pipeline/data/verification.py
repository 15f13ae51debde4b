"""Comparing a data set with its index: a look before a run, and a thorough check.

`missing_shards` costs one listing and finds what a half copied data set lacks. `verify` reads
every byte and reports everything that is wrong, with the shard, the sample and its offset,
instead of stopping at the first; it needs no more memory than the largest shard.
"""

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.data.images import RejectedImageError, decode
from pipeline.data.index import SPLITS, Index, Shard, ShardError, Sidecar, load_index, read_sidecar
from pipeline.data.survey import Progress
from pipeline.data.tars import read_samples


@dataclass(frozen=True)
class Problem:
    """Something in a shard that is not as the index says."""

    shard: str
    what: str


def verify(
    root: str, *, decode_images: bool = True, progress: Progress = lambda what, done, total: None
) -> list[Problem]:
    """Everything that is wrong with the data set at `root`; empty if it is whole.

    Raises ShardError if it has no valid index.
    """
    index = load_index(root)
    shards = [shard for split in SPLITS for shard in index.shards(split)]
    problems = []
    for number, shard in enumerate(shards):
        problems += [Problem(shard.name, what) for what in _wrong_with(index, shard, decode_images)]
        progress("verifying", number + 1, len(shards))
    return problems


def missing_shards(index: Index) -> list[Problem]:
    """Shards and sidecars that are not there or have another size, by one listing.

    A web server cannot be listed; there the reader finds out.
    """
    if storage.scheme(index.root) in ("http", "https"):
        return []
    sizes = storage.list_sizes(index.root)
    problems = []
    for split in SPLITS:
        for shard in index.shards(split):
            size = sizes.get(shard.name)
            if size is None:
                problems.append(Problem(shard.name, "is missing"))
            elif size != shard.bytes:
                problems.append(Problem(shard.name, f"has {size:,} bytes instead of {shard.bytes:,}"))
            if shard.sidecar_name not in sizes:
                problems.append(Problem(shard.name, f"its sidecar {shard.sidecar_name} is missing"))
    return problems


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
        data = storage.read_bytes(storage.join(index.root, shard.name))
    except storage.MissingError:
        yield "is missing"
        return
    if len(data) != shard.bytes:
        yield f"has {len(data):,} bytes instead of {shard.bytes:,}"
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        yield "has another SHA-256 than the index says"
    try:
        sidecar = read_sidecar(index, shard)
    except (ShardError, storage.StoreError) as error:
        yield f"its sidecar: {error}"
        return
    damaged = list(_damaged_samples(data, sidecar))
    yield from damaged
    if not damaged:
        yield from _unreadable_samples(data, sidecar, index, shard, decode_images)


def _damaged_samples(data: bytes, sidecar: Sidecar) -> Iterator[str]:
    spans = zip(sidecar.keys, sidecar.offsets, sidecar.sizes, sidecar.checksums, strict=True)
    for key, offset, size, checksum in spans:
        span = data[offset : offset + size]
        if len(span) != size:
            yield f"sample {key!r} at byte {offset:,} is cut short, and all after it are missing"
            return
        if zlib.crc32(span) != checksum:
            yield f"sample {key!r} at byte {offset:,} is damaged"


def _unreadable_samples(
    data: bytes, sidecar: Sidecar, index: Index, shard: Shard, decode_images: bool
) -> Iterator[str]:
    found = []
    try:
        for sample in read_samples(data, shard.name):
            found.append(sample.key)
            if decode_images:
                decode(sample.image, index.image_size, index.channels)
    except RejectedImageError as error:
        yield f"sample {found[-1]!r} {error}"
    except Exception as error:
        # webdataset and tarfile report a broken tar by many unrelated exceptions.
        yield f"cannot be read as a tar after {len(found)} samples ({type(error).__name__}: {error})"
    else:
        if tuple(found) != sidecar.keys:
            yield f"a tar reader finds {len(found)} samples; the sidecar lists {len(sidecar.keys)} or others"
