"""What is known of a foreign tar once it was read, kept beside it until the index is written.

A record holds for the arguments and the state of its tar (its fingerprint): name, size and time of
the last change, which a bucket tells in whole seconds; for a training tar also those of the
validation tars, whose images it must not repeat. A copy that keeps size and time of what it
replaces is not noticed, so the record of a tar with samples that cannot be used is not trusted
either: it is what somebody may have mended. An interrupted `shards index` goes on with the others.

One file for each tar: threads need not wait for each other, and a hundred thousand tars cost a
hundred thousand small files, not as many rewritings of a long one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import storage
from pipeline.data.index import TRAIN, VALIDATION, Shard, parse_shard
from pipeline.data.rejections import Rejection
from pipeline.data.scanning import Scan
from pipeline.data.sidecar import make_sidecar
from pipeline.data.tar_listing import TarListing

SUFFIX = ".building"
_DELETED_AT_ONCE = 8


@dataclass(frozen=True)
class TarRecord:
    """One tar, read and with its sidecar written."""

    shard: Shard
    digests: bytes
    """`scanning.DIGEST_BYTES` for each sample."""
    rejected: tuple[Rejection, ...]
    """The first of what was left out."""
    left_out: int
    unusable: int
    formats: Mapping[str, int]


def record_name(tar: str) -> str:
    return tar.removesuffix(".tar") + SUFFIX


def fingerprints(
    listing: TarListing, image_size: int, channels: int, splits: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """One for each tar: it changes if the tar's record would have to be another one."""

    def digest(*facts: object) -> str:
        return hashlib.sha256(json.dumps([image_size, channels, *facts]).encode()).hexdigest()

    state = {name: [name, listing.size(name), listing.times.get(name)] for name in listing.tars}
    held_out = digest([state[name] for name in splits[VALIDATION]])
    return {name: digest(VALIDATION, state[name]) for name in splits[VALIDATION]} | {
        name: digest(TRAIN, state[name], held_out) for name in splits[TRAIN]
    }


def write_record(
    root: str, name: str, tar_bytes: int, sha256: str, scan: Scan, fingerprint: str
) -> TarRecord:
    """Write the sidecar of the tar `name` and then its record."""
    sidecar = make_sidecar(scan.rows).to_bytes()
    sidecar_sha256 = hashlib.sha256(sidecar).hexdigest()
    shard = Shard(name, len(scan.rows), tar_bytes, sha256, len(sidecar), sidecar_sha256)
    record = TarRecord(
        shard, bytes(scan.digests), tuple(scan.rejected), scan.left_out, scan.unusable, dict(scan.formats)
    )
    storage.write_bytes(storage.join(root, shard.sidecar_name), sidecar)
    fields: dict[str, Any] = asdict(record) | {"fingerprint": fingerprint, "digests": record.digests.hex()}
    storage.write_bytes(storage.join(root, record_name(name)), json.dumps(fields).encode())
    return record


def read_record(root: str, name: str, fingerprint: str, files: Mapping[str, int]) -> TarRecord | None:
    """The record of the tar `name` if there is one that is trusted; `files` are the sizes of all files."""
    if record_name(name) not in files:
        return None
    try:
        fields = json.loads(storage.read_text(storage.join(root, record_name(name))))
        if fields["fingerprint"] != fingerprint:
            return None
        shard = parse_shard(fields["shard"])
        record = TarRecord(
            shard=shard,
            digests=bytes.fromhex(fields["digests"]),
            rejected=tuple(Rejection(**row) for row in fields["rejected"]),
            left_out=fields["left_out"],
            unusable=fields["unusable"],
            formats=fields["formats"],
        )
    except (storage.MissingError, ValueError, KeyError, TypeError):
        # Nothing is lost but time: the tar is read again.
        return None
    if record.unusable:
        return None
    return record if files.get(shard.sidecar_name) == shard.sidecar_bytes else None


def delete_records(root: str, tars: Iterable[str]) -> None:
    with ThreadPoolExecutor(_DELETED_AT_ONCE, "delete") as pool:
        for _ in pool.map(lambda tar: storage.delete(storage.join(root, record_name(tar))), tars):
            pass
