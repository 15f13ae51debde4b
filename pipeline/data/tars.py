"""Writing and reading the tars of a data set.

Tars are written by hand, header by header, rather than by webdataset's ShardWriter: without
owner, time or padding they have the same bytes whenever and wherever they are built, and the
place and checksum of each sample are known as it is written. What a member is, is read within
limits (members.py); which members are a sample is decided by webdataset's own rules.
"""

import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.data.index import Shard
from pipeline.data.members import FILE, Tape, members
from pipeline.data.sidecar import make_sidecar

# One file of each sample is an image, with one of these extensions; other files are not opened.
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "ppm", "pgm")


@dataclass(frozen=True)
class FinishedTar:
    """A tar with its sidecar, ready to be stored."""

    shard: Shard
    data: bytes
    sidecar: bytes


class TarBuilder:
    """Collects the samples of one shard in memory."""

    def __init__(self) -> None:
        self._file = io.BytesIO()
        self._rows: list[tuple[int, int, int, str]] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._file.tell()

    def add(self, key: str, extension: str, data: bytes) -> None:
        header = tarfile.TarInfo(f"{key}.{extension}")
        header.size = len(data)
        padding = bytes(-len(data) % tarfile.BLOCKSIZE)
        member = header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict") + data + padding
        self._rows.append((self._file.tell(), len(member), zlib.crc32(member), key))
        self._file.write(member)

    def finish(self, name: str) -> FinishedTar:
        """The tar under the name that it will have in its data set."""
        data = self._file.getvalue() + bytes(2 * tarfile.BLOCKSIZE)
        sidecar = make_sidecar(self._rows).to_bytes()
        shard = Shard(
            name=name,
            samples=len(self),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            sidecar_bytes=len(sidecar),
            sidecar_sha256=hashlib.sha256(sidecar).hexdigest(),
        )
        return FinishedTar(shard, data, sidecar)


@dataclass(frozen=True)
class Sample:
    """One sample out of a tar."""

    key: str
    image: bytes
    """The content of its image file."""


def read_samples(data: bytes, name: str) -> Iterator[Sample]:
    """The samples in `data`: a plain tar, or a part of one that begins and ends between members.

    Raises ValueError if it is no plain tar, or if a sample has no image or several.
    """
    from webdataset.tariterators import group_by_keys

    tape = Tape(io.BytesIO(data).read)
    files = (
        {"fname": member.name, "data": tape.take(member.data_bytes), "__url__": name}
        for member in members(tape, whole=False)
        if member.kind == FILE and not is_meta(member.name)
    )
    for fields in group_by_keys(files):
        yield Sample(fields["__key__"], _image_in(fields))


def read_sample(span: bytes, key: str, name: str) -> Sample:
    """The one sample in `span`, the bytes that a sidecar gives it in the shard `name`.

    Raises ValueError if it is another one or not exactly one; else like `read_samples`.
    """
    samples = list(read_samples(span, name))
    if [sample.key for sample in samples] != [key]:
        raise ValueError("the tar holds other samples")
    return samples[0]


def key_and_extension(name: str) -> tuple[str, str] | None:
    """What WebDataset makes of a member's name; None if it passes it over.

    The extension is all behind the first dot of the file name, in lower case.
    """
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    return None if key is None or is_meta(name) else (key, extension.lower())


def is_meta(name: str) -> bool:
    """Whether WebDataset takes the name for one of its own remarks in a tar."""
    return re.match(r"__[^/]*__($|/)", name) is not None


def image_rank(extension: str) -> int:
    """0 for an image; 1 for one with further parts in its extension, such as `mask.png`; 2 for no image.

    The image of a sample is the only file of rank 0; if there is none, the only one of rank 1.
    """
    if extension in IMAGE_EXTENSIONS:
        return 0
    return 1 if extension.rpartition(".")[2] in IMAGE_EXTENSIONS else 2


def _image_in(fields: Mapping[str, Any]) -> bytes:
    for rank in (0, 1):
        found = [extension for extension in fields if image_rank(extension) == rank]
        if len(found) == 1:
            image: bytes = fields[found[0]]
            return image
        if found:
            raise ValueError(f"sample {fields['__key__']!r} has {len(found)} images, not one")
    raise ValueError(f"sample {fields['__key__']!r} has no image")
