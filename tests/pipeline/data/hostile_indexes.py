"""Indexes and sidecars that somebody made to do harm.

Each payload alters a good data set of one shard; whatever hashes it takes to be believed are right.
It is refused, with a message that matches, before or while its samples are read.
"""

import hashlib
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.index import TRAIN, Index, Shard
from pipeline.data.sidecar import make_sidecar
from tests.pipeline.data.foreign_tars import image_file
from tests.pipeline.data.hostile_tars import END, FIRST, LAST, member, pax, with_field

Row = tuple[int, int, int, str]
GOOD_TAR = member("first.png", FIRST) + member("last.png", LAST) + END


@dataclass(frozen=True)
class IndexPayload:
    """A hostile data set, written by `write` into a folder."""

    name: str
    write: Callable[[Path], None]
    refusal: str


def write_data_set(
    folder: Path,
    tar: bytes = GOOD_TAR,
    rows: list[Row] | None = None,
    sidecar: bytes | None = None,
    **fields: Any,
) -> Index:
    """A data set of one shard whose index vouches for whatever is given."""
    if sidecar is None:
        sidecar = make_sidecar(rows or good_rows()).to_bytes()
    (folder / "0.tar").write_bytes(tar)
    (folder / "0.idx").write_bytes(sidecar)
    shard = Shard(
        name="0.tar",
        samples=struct.unpack_from("<I", sidecar, 12)[0],
        bytes=len(tar),
        sha256=hashlib.sha256(tar).hexdigest(),
        sidecar_bytes=len(sidecar),
        sidecar_sha256=hashlib.sha256(sidecar).hexdigest(),
    )
    index = Index(str(folder), 8, 3, "hostile", None, {}, 0, 0, {TRAIN: (replace(shard, **fields),)})
    (folder / "index.json").write_bytes(index.to_json())
    return index


def good_rows() -> list[Row]:
    return rows_of([("first", member("first.png", FIRST)), ("last", member("last.png", LAST))])


def rows_of(spans: list[tuple[str, bytes]]) -> list[Row]:
    rows, offset = [], 0
    for key, span in spans:
        rows.append((offset, len(span), zlib.crc32(span), key))
        offset += len(span)
    return rows


def row(**fields: Any) -> Callable[[Path], None]:
    """The first row of the index says something else, and the hash over all fits."""
    return lambda folder: write_data_set(folder, **fields) and None


def text(find: str, put: str) -> Callable[[Path], None]:
    """Another text in index.json."""

    def write(folder: Path) -> None:
        write_data_set(folder)
        path = folder / "index.json"
        assert find in path.read_text()
        path.write_text(path.read_text().replace(find, put))

    return write


def whole(content: bytes, bytes_: int | None = None) -> Callable[[Path], None]:
    """Another index.json, made longer by zeros that take no room."""

    def write(folder: Path) -> None:
        write_data_set(folder)
        with (folder / "index.json").open("wb") as file:
            file.write(content)
            file.truncate(bytes_ or len(content))

    return write


def sidecar_of(*columns: list[int], keys: bytes = b"firstlast", samples: int = 2) -> Callable[[Path], None]:
    """A sidecar with these columns: offsets, sizes, checksums, ends of keys."""
    header = struct.pack("<8sIIQ", b"NVAEIDX\0", 1, samples, len(keys))
    data = header + b"".join(np.array(column, "<i8").tobytes() for column in columns) + keys
    return lambda folder: write_data_set(folder, sidecar=data) and None


def span(content: bytes, key: str = "first") -> Callable[[Path], None]:
    """A tar of which `content` is vouched for as one sample."""
    rows = rows_of([(key, content)])
    return lambda folder: write_data_set(folder, content + END, rows) and None


def _huge_span(folder: Path) -> None:
    rows = [(0, 2**30, 0, "first")]
    write_data_set(folder, rows=rows, bytes=2**31)
    with (folder / "0.tar").open("r+b") as file:
        file.truncate(2**31)


def _twice(folder: Path) -> None:
    index = write_data_set(folder)
    shards = index.shards(TRAIN)
    (folder / "index.json").write_bytes(replace(index, splits={TRAIN: shards * 2}).to_json())


def _numbers(name: str, value: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_data_set(folder)
        fields = json.loads((folder / "index.json").read_text())
        fields["splits"]["train"][0][name] = value
        (folder / "index.json").write_text(json.dumps(fields))

    return write


_NAMES = [
    "../0.tar",
    "a/../../0.tar",
    "/etc/passwd.tar",
    "s3://other/0.tar",
    "file:///etc/0.tar",
    "pipe:touch marker.tar",
    "http://169.254.169.254/0.tar",
    "a\\..\\0.tar",
    "$(touch marker).tar",
    "`touch marker`.tar",
    "*.tar",
    "0.tar.gz",
    "\x1b[2J.tar",
    "\x9b2J.tar",
    "a\n.tar",
    "",
    ".",
    "n" * 2**20 + ".tar",
]
_FIRST = member("first.png", FIRST)
_SPAN = len(_FIRST)

_PAYLOADS = [
    *((f"shard {name[:40]!r}", row(name=name), r"index\.json") for name in _NAMES),
    # numbers
    ("five billion samples", row(samples=5 * 10**9), "cannot hold"),
    ("five billion samples in a large shard", row(samples=5 * 10**9, bytes=2**44), "cannot have"),
    ("shard of 2**60 bytes", row(bytes=2**60), "not a whole number"),
    ("sidecar of 2**60 bytes", row(sidecar_bytes=2**60), "not a whole number"),
    ("negative samples", _numbers("samples", -1), "not a whole number"),
    ("true samples", _numbers("samples", True), "not a whole number"),
    ("samples in words", _numbers("samples", "2"), "not a whole number"),
    ("samples that are no number", _numbers("samples", float("nan")), "not a whole number"),
    ("infinite samples", text('"samples": 2, "bytes"', '"samples": 1e999, "bytes"'), "not a whole number"),
    (
        "number of 10,000 digits",
        text('"samples": 2, "bytes"', f'"samples": {"9" * 10_000}, "bytes"'),
        "index",
    ),
    ("images of 10**9 pixels a side", text('"image_size": 8', f'"image_size": {10**9}'), "image_size"),
    ("two channels", text('"channels": 3', '"channels": 2'), "channels is 2"),
    ("one sample too many", row(samples=3), "cannot have|samples"),
    ("digest that is none", _numbers("sha256", "x" * 64), "not a SHA-256"),
    ("digest of a megabyte", _numbers("sha256", "a" * 2**20), "not a SHA-256"),
    # structure
    ("a shard listed twice", _twice, "listed twice"),
    ("rows that do not fit the hash", _numbers("samples", 1), "cannot have|content_hash"),
    ("a list of lists of lists", whole(b"[" * 100_000), r"index\.json"),
    ("objects within objects", whole(b'{"a":' * 100_000), r"index\.json"),
    ("a file of 100 MB", whole(b'{"format": "nvae-shards"', 10**8), "more than 64 MiB"),
    ("a file of 100 GB", whole(b"{}", 10**11), "more than 64 MiB"),
    ("splits that are a list", text('"splits": {', '"splits": [], "x": {'), r"index\.json"),
    ("rows that are words", text('"train": [', '"train": ["x", '), r"index\.json"),
    ("an unknown split", text('"train": [', '"test": ['), "unknown splits"),
    ("a version of the future", text('"format_version": 2', '"format_version": 99'), "99 is not 2"),
    ("the version before", text('"format_version": 2', '"format_version": 1'), "build the data set again"),
    ("a pickle", whole(b"\x80\x04cos\nsystem\n(S'touch marker'\ntR."), "UTF-8|index"),
    # sidecars that the index vouches for
    ("overlapping samples", sidecar_of([0, 512], [_SPAN, _SPAN], [0, 0], [5, 9]), "overlap"),
    ("samples out of order", sidecar_of([_SPAN, 0], [_SPAN, _SPAN], [0, 0], [5, 9]), "overlap or are"),
    ("sample beyond the shard", sidecar_of([0, 2**40], [_SPAN, 1024], [0, 0], [5, 9]), "outside"),
    ("offsets that overflow", sidecar_of([0, 2**63 - 1], [_SPAN, 2**63 - 1], [0, 0], [5, 9]), "outside"),
    ("negative offset", sidecar_of([-(2**62), 0], [_SPAN, _SPAN], [0, 0], [5, 9]), "outside"),
    ("sample of negative size", sidecar_of([0, _SPAN], [-1, _SPAN], [0, 0], [5, 9]), "outside"),
    ("sample of nothing", sidecar_of([0, 0], [0, _SPAN], [0, 0], [5, 9]), "outside"),
    ("key beyond the keys", sidecar_of([0, _SPAN], [_SPAN, _SPAN], [0, 0], [5, 2**62]), "keys are damaged"),
    ("keys backwards", sidecar_of([0, _SPAN], [_SPAN, _SPAN], [0, 0], [9, 5]), "keys are damaged"),
    ("empty key", sidecar_of([0, _SPAN], [_SPAN, _SPAN], [0, 0], [0, 9]), "a key does not have"),
    (
        "key of 2,000 letters",
        sidecar_of([0, _SPAN], [_SPAN, _SPAN], [0, 0], [5, 2005], keys=b"k" * 2005),
        "a key does",
    ),
    (
        "key that is no UTF-8",
        sidecar_of([0, _SPAN], [_SPAN, _SPAN], [0, 0], [5, 9], keys=b"\xff" * 9),
        "utf-8",
    ),
    (
        "key within a character",
        sidecar_of([0, _SPAN], [_SPAN, _SPAN], [0, 0], [1, 2], keys="é".encode()),
        "within a char",
    ),
    (
        "blob of keys of 10 MB",
        sidecar_of([0, _SPAN], [_SPAN, _SPAN], [0, 0], [5, 10**7], keys=b"k" * 10**7),
        "cannot have",
    ),
    (
        "sidecar of another version",
        lambda folder: (
            write_data_set(folder, sidecar=struct.pack("<8sIIQ", b"NVAEIDX\0", 9, 2, 2) + bytes(66)) and None
        ),
        "not a sidecar of version",
    ),
    ("sidecar with another hash", row(sidecar_sha256="0" * 64), "SHA-256"),
    ("sample of a gigabyte", _huge_span, "more than 64 MiB"),
    # spans that the sidecar vouches for
    ("span with two samples", span(_FIRST + member("other.png", LAST)), "other samples"),
    ("span with another sample", span(member("other.png", LAST)), "other samples"),
    ("span with two images", span(_FIRST + member("first.jpg", LAST)), "2 images"),
    (
        "span with a link",
        span(member("first.png", b"", tarfile.SYMTYPE, linkname="/etc/passwd")),
        "other samples",
    ),
    (
        "span with a sparse file of 10 GB",
        span(pax({"GNU.sparse.realsize": str(10**10)}) + member("first.png", FIRST)),
        "other samples",
    ),
    ("span with half a member", span(_FIRST[:700]), "ends within"),
    (
        "span with a broken header",
        span(with_field(_FIRST, 0, b"x")[:500] + bytes(524)),
        "no tar header|holds|other samples",
    ),
    ("span with a pickle", span(member("first.pkl", FIRST)), "has no image"),
    ("span with an image of another size", span(member("first.png", image_file(1, size=16))), "16x16"),
    ("span with a larger announced size", span(with_field(_FIRST, 124, b"77777777777\0")), "ends within"),
    ("span that is no tar", span(b"\x1f\x8b" + bytes(1022)), "gzip"),
]
INDEX_PAYLOADS = [IndexPayload(*payload) for payload in _PAYLOADS]
