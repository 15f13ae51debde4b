"""Writing and reading the tars of a data set.

Tars are written by hand, header by header, rather than by webdataset's ShardWriter: without
owner, time or padding they have the same bytes whenever and wherever they are built, and the
place and checksum of each sample are known as it is written. They are read by webdataset's
own stages, on bytes whose checksums have been compared: any reader of WebDataset reads them.
"""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.index import Shard, Sidecar

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
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._checksums: list[int] = []
        self._keys: list[str] = []

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._file.tell()

    def add(self, key: str, extension: str, data: bytes) -> None:
        header = tarfile.TarInfo(f"{key}.{extension}")
        header.size = len(data)
        padding = bytes(-len(data) % tarfile.BLOCKSIZE)
        member = header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict") + data + padding
        self._offsets.append(self._file.tell())
        self._sizes.append(len(member))
        self._checksums.append(zlib.crc32(member))
        self._keys.append(key)
        self._file.write(member)

    def finish(self, name: str) -> FinishedTar:
        """The tar under the name that it will have in its data set."""
        data = self._file.getvalue() + bytes(2 * tarfile.BLOCKSIZE)
        sidecar = Sidecar(
            np.array(self._offsets, np.int64),
            np.array(self._sizes, np.int64),
            np.array(self._checksums, np.int64),
            tuple(self._keys),
        ).to_bytes()
        shard = Shard(
            name=name,
            samples=len(self),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
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

    Raises ValueError if it is no plain tar, if a sample has no image, and for whatever
    webdataset finds wrong. An end that comes too early goes unnoticed: compare the keys.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    if not _is_plain_tar(data):
        raise ValueError("not a plain tar")
    source = [{"url": name, "stream": io.BytesIO(data)}]
    for fields in group_by_keys(tar_file_expander(source)):
        yield Sample(fields["__key__"], _image_in(fields))


def read_sample(span: bytes, key: str, name: str) -> Sample:
    """The one sample in `span`, the bytes that a sidecar gives it in the shard `name`.

    Raises ValueError if it is another one or not exactly one; else like `read_samples`.
    """
    samples = list(read_samples(span, name))
    if [sample.key for sample in samples] != [key]:
        raise ValueError("the tar holds other samples")
    return samples[0]


def _image_in(fields: dict[str, Any]) -> bytes:
    found = [fields[extension] for extension in IMAGE_EXTENSIONS if extension in fields]
    if len(found) != 1:
        raise ValueError(f"sample {fields['__key__']!r} has {len(found)} images, not one")
    image: bytes = found[0]
    return image


def _is_plain_tar(data: bytes) -> bool:
    """Whether `data` begins with a tar header; a compressed tar would be unpacked unasked."""
    return data[257:262] == b"ustar" or not data.strip(b"\0")
