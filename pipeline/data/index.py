"""What a data set consists of: `index.json`, and a sidecar for each shard.

A data set is a folder of plain WebDataset tars. WebDataset itself has no list of what should
be there, so a tar that was cut short only looks smaller; here the index says how many samples,
how many bytes and which SHA-256 each shard has. It is written last: a folder without an index
is an unfinished data set, never a small one.

The index keeps one row per shard and stays small for a hundred million samples. What is
known about a single sample (its bytes in the tar, their checksum, its key) is in the shard's
sidecar, a binary file that is fetched when the shard is opened and whose own SHA-256 is in the
index. Sidecars hold a CRC-32 of each sample, which is compared whenever the sample is read: that
guards against accidents (a cut, a swapped or a damaged shard), not against somebody who may write
to the store and gives other bytes the same CRC-32. Only `nvae shards verify`, which reads whole
shards, compares their SHA-256.

Names in an index are relative and cannot lead out of the data set's folder.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data.sidecar import Sidecar as Sidecar
from pipeline.data.sidecar import length_fits, parse_sidecar
from pipeline.errors import InputError

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
INDEX_NAME = "index.json"
FORMAT, FORMAT_VERSION = "nvae-shards", 2

# What no data set exceeds. An index or a sidecar that somebody made up is refused by these
# before its numbers turn into memory.
MAX_INDEX_BYTES = 2**26
"""About 200,000 shards."""
MAX_SHARD_BYTES = 2**44
MAX_SIDECAR_BYTES = 2**28
"""About five million samples in one shard."""
MAX_IMAGE_SIZE = 4096
LEAST_SAMPLE_BYTES = 1024
"""A tar header and one block of data."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*\.tar")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LONGEST_NAME = 1024


class ShardError(InputError):
    """A data set cannot be built, is incomplete, or holds something else than its index says."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of a split."""

    name: str
    """File name below the data set's folder."""
    samples: int
    bytes: int
    sha256: str
    """Of the whole tar, in hexadecimal."""
    sidecar_bytes: int
    sidecar_sha256: str

    def row(self) -> dict[str, str | int]:
        """It as it stands in an index."""
        return {name: getattr(self, name) for name in self.__slots__}

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
        """SHA-256 over the image format and the hashes of all shards and sidecars, in order.

        It does not depend on where the data set lies. Two data sets with the same hash deliver
        the same samples at the same positions; the same images in other shards are another one,
        and so are the same shards with a sidecar that leaves other samples out.
        """
        content = {
            split: [(shard.samples, shard.sha256, shard.sidecar_sha256) for shard in self.shards(split)]
            for split in SPLITS
        }
        text = json.dumps([self.image_size, self.channels, content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> bytes:
        """The content of `index.json`: a line for each fact, a line for each shard."""
        facts: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "content_hash": self.content_hash,
            "samples": {split: self.num_samples(split) for split in SPLITS},
            "image_size": self.image_size,
            "channels": self.channels,
            "source": self.source,
            "licence": self.licence,
            "arguments": dict(self.arguments),
            "rejected": self.rejected,
            "duplicates": self.duplicates,
        }
        lines = [f" {json.dumps(name)}: {json.dumps(fact)}" for name, fact in facts.items()]
        splits = []
        for split, shards in self.splits.items():
            rows = ",\n".join(f"   {json.dumps(shard.row())}" for shard in shards)
            splits.append(f"  {json.dumps(split)}: [\n{rows}\n  ]")
        lines.append(' "splits": {\n' + ",\n".join(splits) + "\n }")
        return _sealed(("{\n" + ",\n".join(lines)).encode())


_SEAL = b',\n "sha256": "'


def _sealed(text: bytes) -> bytes:
    """All but the last line of `index.json`, with its own SHA-256 as the last line.

    The content hash does not cover what is said for people, the names and the form; this does.
    """
    return text + _SEAL + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n'


def read_sidecar(index: Index, shard: Shard) -> Sidecar:
    """The sidecar of `shard`, checked against the index.

    Raises ShardError if it is not the one that the index was written with, StoreError if it
    cannot be read.
    """
    try:
        return check_sidecar(index, shard)
    except ShardError as error:
        raise ShardError(
            f"{error}; run `nvae shards verify {storage.shown(index.root)}` to find everything that is wrong."
        ) from error


def check_sidecar(index: Index, shard: Shard) -> Sidecar:
    """As `read_sidecar`, for a message that goes on to say what to do."""
    url = storage.join(index.root, shard.sidecar_name)
    data = storage.read_bytes(url, 0, shard.sidecar_bytes)
    found = hashlib.sha256(data).hexdigest()
    if found != shard.sidecar_sha256:
        raise ShardError(
            f"{storage.shown(url)}: SHA-256 is {found[:12]}, {INDEX_NAME} says {shard.sidecar_sha256[:12]}. "
            f"It was replaced or damaged"
        )
    try:
        sidecar = parse_sidecar(data, shard.bytes)
        if len(sidecar.keys) != shard.samples:
            raise ValueError(f"lists {len(sidecar.keys):,} samples, {INDEX_NAME} {shard.samples:,}")
    except ValueError as error:
        raise ShardError(f"{storage.shown(url)}: does not fit its shard ({error})") from error
    return sidecar


def load_index(root: str) -> Index:
    """The index of the data set at `root`, every field checked.

    Raises ShardError if there is no finished data set or the index makes no sense, StoreError if its
    store or bucket is not there.
    """
    root = storage.normalize(root)
    url = storage.join(root, INDEX_NAME)
    try:
        if storage.size(url) > MAX_INDEX_BYTES:
            raise ShardError(
                f"{storage.shown(url)}: has more than {MAX_INDEX_BYTES >> 20} MiB and is not read. "
                f"Make fewer, larger shards."
            )
        text = storage.read_text(url)
    except storage.MissingError as error:
        if storage.scheme(root) in ("s3", "gs"):
            # An object's answer does not tell whether its bucket is there; this raises if not.
            storage.exists(root)
        raise ShardError(
            f"{storage.shown(root)}: there is no data set ({INDEX_NAME} is missing). Build one with "
            f"`nvae shards build SOURCE {storage.shown(root)}`; after an interruption the same command "
            f"continues."
        ) from error
    try:
        index = _parse_index(root, json.loads(text))
        written = text.encode()
        if written != _sealed(written[: max(written.rfind(_SEAL), 0)]):
            raise ValueError("its bytes do not fit its own SHA-256: it was edited or damaged")
        return index
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(
            f"{storage.shown(url)}: is not an index of a data set "
            f"({type(error).__name__}: {_shortly(str(error), 300)}). Restore it, or build the data set again."
        ) from error


def _parse_index(root: str, fields: Mapping[str, Any]) -> Index:
    if fields.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    if fields["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"format version {fields['format_version']!r} is not {FORMAT_VERSION}, the one that is read: use "
            f"the nvae that wrote it, or build the data set again"
        )
    if fields["channels"] not in (1, 3):
        raise ValueError(f"channels is {_shortly(fields['channels'])}, neither 1 nor 3")
    unknown = set(fields["splits"]) - set(SPLITS)
    if unknown:
        raise ValueError(f"unknown splits {sorted(unknown)}")
    index = Index(
        root=root,
        image_size=_whole_number(fields, "image_size", 1, MAX_IMAGE_SIZE),
        channels=_whole_number(fields, "channels", 1, 3),
        source=printable(fields["source"]),
        licence=None if fields["licence"] is None else printable(fields["licence"]),
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
    check_shard_name(name)
    shard = Shard(
        name=name,
        samples=_whole_number(row, "samples", 0),
        bytes=_whole_number(row, "bytes", 0, MAX_SHARD_BYTES),
        sha256=_digest(row, "sha256"),
        sidecar_bytes=_whole_number(row, "sidecar_bytes", 0, MAX_SIDECAR_BYTES),
        sidecar_sha256=_digest(row, "sidecar_sha256"),
    )
    if shard.samples * LEAST_SAMPLE_BYTES > shard.bytes:
        raise ValueError(f"{name!r}: {shard.bytes:,} bytes cannot hold {shard.samples:,} samples")
    if not length_fits(shard.sidecar_bytes, shard.samples):
        raise ValueError(
            f"{name!r}: a sidecar of {shard.samples:,} samples cannot have {shard.sidecar_bytes:,} bytes"
        )
    return shard


def check_shard_name(name: str) -> None:
    """Raises ValueError unless `name` can be that of a shard in an index."""
    if _PLAIN_NAME.fullmatch(name) and len(name) <= _LONGEST_NAME:
        return
    storage.check_relative(name)
    if not name.endswith(".tar"):
        raise ValueError(f"{name!r}: only plain .tar files are read")
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise ValueError(f"{_shortly(name)}: is too long, or holds characters that cannot be shown")


def _whole_number(fields: Mapping[str, Any], name: str, least: int, most: int = 2**53) -> int:
    value = fields[name]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {_shortly(value)}, not a whole number from {least} to {most}")
    return value


def _digest(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"{name} is {_shortly(value)}, not a SHA-256")
    return value


def printable(text: str) -> str:
    """The text without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


def _shortly(value: object, longest: int = 80) -> str:
    """The value for a message, however long it is and whatever it holds."""
    text = printable(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= longest else text[:longest] + "..."
