"""What is known of a foreign tar once it was read, kept beside it until the index is written.

A record holds for one set of arguments and tars (its fingerprint); an interrupted `shards index`
goes on with the tars that have none. One file for each tar: threads need not wait for each other,
and a hundred thousand tars cost a hundred thousand small files, not as many rewritings of a long one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import storage
from pipeline.data.index import Shard, parse_shard
from pipeline.data.rejections import Rejection
from pipeline.data.scanning import Scan
from pipeline.data.sidecar import make_sidecar

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
    """The record of the tar `name` if there is one that holds; `files` are the sizes of all files."""
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
    return record if files.get(shard.sidecar_name) == shard.sidecar_bytes else None


def delete_records(root: str, tars: Iterable[str]) -> None:
    with ThreadPoolExecutor(_DELETED_AT_ONCE, "delete") as pool:
        for _ in pool.map(lambda tar: storage.delete(storage.join(root, record_name(tar))), tars):
            pass
