"""What a data set consists of: `index.json`, and a sidecar for each shard.

A data set is a folder of plain WebDataset tars. WebDataset itself has no list of what should
be there, so a tar that was cut short only looks smaller; here the index says how many samples,
how many bytes and which SHA-256 each shard has. It is written last: a folder without an index
is an unfinished data set, never a small one.

The index keeps one row per shard and stays small for a hundred million samples. What is
known about a single sample (its bytes in the tar, their checksum, its key) is in the shard's
sidecar, a binary file that is fetched when the shard is opened and whose own SHA-256 is in the
index. So every byte that reaches a batch is vouched for by the index.

Names in an index are relative and cannot lead out of the data set's folder.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.errors import InputError

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
INDEX_NAME = "index.json"
FORMAT, FORMAT_VERSION = "nvae-shards", 1

_SIDECAR_HEADER = struct.Struct("<8sIIQ")
_SIDECAR_MAGIC = b"NVAEIDX\0"
_SIDECAR_VERSION = 1


class ShardError(InputError):
    """A data set cannot be built, is incomplete, or holds something else than its index says."""


@dataclass(frozen=True)
class Shard:
    """One tar of a split."""

    name: str
    """File name below the data set's folder."""
    samples: int
    bytes: int
    sha256: str
    """Of the whole tar, in hexadecimal."""
    sidecar_sha256: str

    @property
    def sidecar_name(self) -> str:
        return self.name.removesuffix(".tar") + ".idx"


@dataclass(frozen=True)
class Index:
    """A complete data set. Shards are in the order in which their samples are numbered."""

    root: str
    """Where it was loaded from."""
    image_size: int
    """Height and width of every image, in pixels."""
    channels: int
    """Colour planes of every image: 3, or 1 for grey."""
    source: str
    """What it was built from, for people."""
    licence: str | None
    arguments: Mapping[str, Any]
    """What `shards build` was asked for."""
    rejected: int
    """Images of the source that were left out."""
    duplicates: int
    """Images that another image of the data set repeats byte by byte; both are kept, in one split."""
    splits: Mapping[str, tuple[Shard, ...]]

    def shards(self, split: str) -> tuple[Shard, ...]:
        return self.splits.get(split, ())

    def num_samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.shards(split))

    def samples_per_shard(self, split: str) -> NDArray[np.int64]:
        """(S,) samples of each shard of `split`."""
        return np.array([shard.samples for shard in self.shards(split)], dtype=np.int64)

    @property
    def content_hash(self) -> str:
        """SHA-256 over the image format and all shards' hashes, in order.

        It does not depend on where the data set lies. Two data sets with the same hash deliver
        the same samples at the same positions; the same images in other shards are another one.
        """
        content = {split: [(shard.samples, shard.sha256) for shard in self.shards(split)] for split in SPLITS}
        text = json.dumps([self.image_size, self.channels, content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> bytes:
        """The content of `index.json`."""
        fields = asdict(self)
        del fields["root"]
        samples = {split: self.num_samples(split) for split in SPLITS}
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "content_hash": self.content_hash}
        return json.dumps(head | {"samples": samples} | fields, indent=1).encode()


@dataclass(frozen=True)
class Sidecar:
    """Where each sample of one shard is, and how to know that it arrived whole."""

    offsets: NDArray[np.int64]
    """(N,) first byte of the sample's first tar header."""
    sizes: NDArray[np.int64]
    """(N,) bytes of the sample: headers, data and padding of its members."""
    checksums: NDArray[np.int64]
    """(N,) CRC-32 of these bytes."""
    keys: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """The content of the sidecar file; little-endian whatever the machine."""
        encoded = [key.encode() for key in self.keys]
        ends = np.cumsum([len(key) for key in encoded], dtype=np.int64)
        blob = b"".join(encoded)
        header = _SIDECAR_HEADER.pack(_SIDECAR_MAGIC, _SIDECAR_VERSION, len(encoded), len(blob))
        columns = (self.offsets, self.sizes, self.checksums, ends)
        return header + b"".join(column.astype("<i8").tobytes() for column in columns) + blob


def parse_sidecar(data: bytes) -> Sidecar:
    """The sidecar stored in `data`. Raises ValueError if it is none."""
    if len(data) < _SIDECAR_HEADER.size:
        raise ValueError("too short for a sidecar")
    magic, version, samples, key_bytes = _SIDECAR_HEADER.unpack_from(data)
    if magic != _SIDECAR_MAGIC or version != _SIDECAR_VERSION:
        raise ValueError(f"not a sidecar of version {_SIDECAR_VERSION}")
    if len(data) != _SIDECAR_HEADER.size + 4 * 8 * samples + key_bytes:
        raise ValueError("cut short")
    columns = np.frombuffer(data, "<i8", 4 * samples, _SIDECAR_HEADER.size).reshape(4, samples)
    offsets, sizes, checksums, ends = columns.astype(np.int64)
    blob = data[len(data) - key_bytes :]
    starts = np.concatenate([[0], ends[:-1]]) if samples else ends
    keys = tuple(blob[start:end].decode() for start, end in zip(starts, ends, strict=True))
    return Sidecar(offsets, sizes, checksums, keys)


def read_sidecar(index: Index, shard: Shard) -> Sidecar:
    """The sidecar of `shard`, checked against the index.

    Raises ShardError if it is not the one that the index was written with, StoreError if it
    cannot be read.
    """
    url = storage.join(index.root, shard.sidecar_name)
    data = storage.read_bytes(url)
    found = hashlib.sha256(data).hexdigest()
    if found != shard.sidecar_sha256:
        raise ShardError(
            f"{storage.shown(url)}: SHA-256 is {found[:12]}, {INDEX_NAME} says {shard.sidecar_sha256[:12]}. "
            f"It was replaced or damaged; {_remedy(index.root)}"
        )
    try:
        sidecar = parse_sidecar(data)
    except ValueError as error:
        raise ShardError(f"{storage.shown(url)}: {error}; {_remedy(index.root)}") from error
    ends = sidecar.offsets + sidecar.sizes
    ordered = bool(np.all(sidecar.offsets[1:] >= ends[:-1])) and bool(np.all(sidecar.sizes > 0))
    if len(sidecar.keys) != shard.samples or not ordered or (ends[-1:] > shard.bytes).any():
        raise ShardError(f"{storage.shown(url)}: does not fit its shard; {_remedy(index.root)}")
    return sidecar


def load_index(root: str) -> Index:
    """The index of the data set at `root`, every field checked.

    Raises ShardError if there is no finished data set or the index makes no sense.
    """
    root = storage.normalize(root)
    url = storage.join(root, INDEX_NAME)
    try:
        text = storage.read_text(url)
    except storage.MissingError as error:
        raise ShardError(
            f"{storage.shown(root)}: there is no data set ({INDEX_NAME} is missing). Build one with "
            f"`nvae shards build SOURCE {storage.shown(root)}`; after an interruption the same command "
            f"continues."
        ) from error
    try:
        return _parse_index(root, json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"{storage.shown(url)}: is not an index of a data set "
            f"({type(error).__name__}: {error}). {_remedy(root)}"
        ) from error


def _parse_index(root: str, fields: Mapping[str, Any]) -> Index:
    if fields.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    if fields["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {fields['format_version']} is not {FORMAT_VERSION}: update nvae")
    unknown = set(fields["splits"]) - set(SPLITS)
    if unknown:
        raise ValueError(f"unknown splits {sorted(unknown)}")
    index = Index(
        root=root,
        image_size=_whole_number(fields, "image_size", 1),
        channels=_whole_number(fields, "channels", 1),
        source=str(fields["source"]),
        licence=fields["licence"],
        arguments=dict(fields["arguments"]),
        rejected=_whole_number(fields, "rejected", 0),
        duplicates=_whole_number(fields, "duplicates", 0),
        splits={split: _parse_shards(rows) for split, rows in fields["splits"].items()},
    )
    names = [shard.name for split in index.splits.values() for shard in split]
    if len(set(names)) != len(names):
        raise ValueError("a shard is listed twice")
    if index.content_hash != fields["content_hash"]:
        raise ValueError("its rows do not fit its content_hash: it was edited or damaged")
    return index


def _parse_shards(rows: Sequence[Mapping[str, Any]]) -> tuple[Shard, ...]:
    return tuple(parse_shard(row) for row in rows)


def parse_shard(row: Mapping[str, Any]) -> Shard:
    """One row of an index. Raises ValueError, KeyError or TypeError if it makes no sense."""
    name = row["name"]
    storage.check_relative(name)
    if not name.endswith(".tar"):
        raise ValueError(f"{name}: only plain .tar files are read")
    return Shard(
        name=name,
        samples=_whole_number(row, "samples", 0),
        bytes=_whole_number(row, "bytes", 0),
        sha256=_digest(row, "sha256"),
        sidecar_sha256=_digest(row, "sidecar_sha256"),
    )


def _whole_number(fields: Mapping[str, Any], name: str, least: int) -> int:
    value = fields[name]
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r}, not a whole number from {least}")
    return value


def _digest(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"{name} is {value!r}, not a SHA-256")
    return value


def _remedy(root: str) -> str:
    return f"run `nvae shards verify {storage.shown(root)}` to list everything that is wrong."
