"""LMDB databases of images, as the published NVAE implementation and LSUN write them.

A folder with `data.mdb` is one database; a folder of such folders (`train.lmdb`,
`validation.lmdb`) is one with splits. Each value is one image: an image file (CelebA 64, LSUN), or
the bare pixels of a square RGB image (CelebA-HQ, FFHQ, ImageNet), s x s from 3 s^2 bytes.

The files are read by the few rules of their format below, and not by LMDB's library: that one
trusts every number in a file, so a damaged one ends the process; and its version 1.0 no longer
opens the files of 0.9, which are the published ones. Only reading needs few rules: two meta pages, of
which the newer one names the root of a tree; branch pages; leaf pages; values longer than a
page on pages of their own.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path, PurePath
from typing import BinaryIO, NoReturn

import numpy as np

from pipeline.data.images import MAX_FILE_BYTES, Pixels, RejectedImageError
from pipeline.data.index import ShardError
from pipeline.data.sources.files import begins_like_an_image
from pipeline.data.sources.published_splits import published_splits
from pipeline.data.sources.source import Source, SourceImage

DATA_NAME = "data.mdb"
SUFFIXES = (".lmdb", ".mdb")
_PROBED = 16


@contextmanager
def lmdb(root: Path, databases: list[Path]) -> Iterator[Source]:
    """The images of all `databases`: files at or below `root`. Raises ShardError if one is damaged."""
    names = {_name_of(file, root): file for file in databases}
    splits, remarks = published_splits(str(root), names)
    images: list[SourceImage] = []
    sizes = set()
    with ExitStack() as files:
        for name, split in splits.items():
            path = names[name]
            database = Database(files.enter_context(path.open("rb")), str(path))
            values = sorted(database.values(), key=lambda value: (len(value.key), value.key))
            layout = _layout([database.read(value) for value in values[:_PROBED]], str(path))
            sizes.add(layout.side if layout else None)
            for value in values:
                key = value.key.decode("utf-8", "replace")
                read = partial(_image, database, value, layout)
                images.append(SourceImage(f"{name}/{key}" if len(splits) > 1 else key, read, split))
        yield Source(images, image_size=sizes.pop() if len(sizes) == 1 else None, remarks=tuple(remarks))


def _name_of(file: Path, root: Path) -> PurePath:
    folder = file.parent if file.name == DATA_NAME else file
    name = folder.relative_to(root) if folder != root else PurePath(root.name)
    return name.with_suffix("") if name.suffix in SUFFIXES else name


# --- what a value is --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """How bare pixels lie in a value."""

    side: int
    channels_first: bool


def _layout(probes: list[bytes], where: str) -> _Layout | None:
    """How the values are to be read, from the first of them; None if they are image files.

    Published scripts write pixels as (H, W, C). (C, H, W) is recognized by its neighbours: read in
    the wrong order, pixels side by side differ far more. Raises ShardError if they are neither.
    """
    if all(begins_like_an_image(value) for value in probes):
        return None
    side = isqrt(len(probes[0]) // 3)
    if not side or any(len(value) != 3 * side**2 for value in probes):
        raise ShardError(
            f"{where}: its values are neither image files nor square RGB images of one size "
            f"({len(probes[0]):,} bytes the first)."
        )
    flat = np.stack([np.frombuffer(value, np.uint8) for value in probes]).astype(np.int16)
    interleaved = _roughness(flat.reshape(-1, side, side, 3))
    planes = _roughness(flat.reshape(-1, 3, side, side).transpose(0, 2, 3, 1))
    return _Layout(side, channels_first=1.2 * planes < interleaved)


def _roughness(images: np.ndarray) -> float:
    """Mean difference of neighbouring pixels of (N, H, W, C) images."""
    if images.shape[1] < 2:
        return 0.0
    across, down = np.abs(np.diff(images, axis=2)).mean(), np.abs(np.diff(images, axis=1)).mean()
    return float(across + down)


def _image(database: "Database", value: "Value", layout: _Layout | None) -> bytes | Pixels:
    data = database.read(value)
    if layout is None:
        return data
    if len(data) != 3 * layout.side**2:
        raise RejectedImageError(f"has {len(data):,} bytes instead of {3 * layout.side**2:,}")
    pixels = np.frombuffer(data, np.uint8)
    if layout.channels_first:
        return np.ascontiguousarray(pixels.reshape(3, layout.side, layout.side).transpose(1, 2, 0))
    return pixels.reshape(layout.side, layout.side, 3)


# --- the file format of LMDB 0.9, little-endian, 64 bits --------------------------------------

# Number, padding, flags, lower and upper end of the free space.
_PAGE = struct.Struct("<QHHHH")
# Magic, version, address, size of the map; then for each of two trees: page size, flags, depth, branch,
# leaf and overflow pages, entries, root; then the last page and the transaction.
_META = struct.Struct("<IIQQ" + 2 * "IHHQQQQQ" + "QQ")
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW, _META_FLAG = 0x01, 0x02, 0x04, 0x08
_NODE = struct.Struct("<HHHH")
_BIG = 0x01
_NO_PAGE = 2**64 - 1
_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Value:
    """Where a value is."""

    key: bytes
    offset: int
    length: int


class Database:
    """One database file. Every number in it is checked before it is used."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        """Raises ShardError if it is no LMDB file of version 0.9, or was cut."""
        self._file = file
        self._where = where
        self._bytes = os.fstat(file.fileno()).st_size
        metas = [meta for meta in (self._meta(0), self._meta(None)) if meta]
        if not metas:
            raise ShardError(f"{where}: is no database of LMDB 0.9.")
        newest = max(metas, key=lambda meta: int(meta[-1]))
        self.page_bytes, self._depth, self.entries, self._root = (
            newest[4],
            newest[14],
            newest[18],
            newest[19],
        )
        self._last_page = newest[-2]
        if (self._last_page + 1) * self.page_bytes > self._bytes:
            raise ShardError(
                f"{where}: was cut short: it has {self._bytes:,} bytes instead of "
                f"{(self._last_page + 1) * self.page_bytes:,}. Fetch it again."
            )

    def values(self) -> Iterator[Value]:
        """Every value, in the order of the keys. Raises ShardError if the tree is damaged."""
        found = 0
        if self._root != _NO_PAGE:
            for value in self._below(self._root, 0, set()):
                found += 1
                yield value
        if found != self.entries:
            self._damaged(f"has {found:,} entries instead of {self.entries:,}")

    def read(self, value: Value) -> bytes:
        """The content of `value`; threads may read at the same time."""
        if value.length > MAX_FILE_BYTES:
            raise RejectedImageError(f"is a file of more than {MAX_FILE_BYTES >> 20} MiB")
        return os.pread(self._file.fileno(), value.length, value.offset)

    def _meta(self, place: int | None) -> tuple[int, ...] | None:
        """The meta page at the file's begin, or (None) the other one behind it, if it is one."""
        if place is None:
            first = self._meta(0)
            candidates = [first[4]] if first else [4096, 8192, 16384, 32768, 65536]
        else:
            candidates = [place]
        for offset in candidates:
            data = os.pread(self._file.fileno(), _PAGE.size + _META.size, offset)
            if len(data) < _PAGE.size + _META.size:
                continue
            meta = _META.unpack_from(data, _PAGE.size)
            page_bytes = meta[4]
            plausible = 256 <= page_bytes <= 2**16 and page_bytes & (page_bytes - 1) == 0
            if meta[:2] == (_MAGIC, _VERSION) and plausible and _PAGE.unpack_from(data)[2] & _META_FLAG:
                return meta
        return None

    def _below(self, number: int, depth: int, visited: set[int]) -> Iterator[Value]:
        if number in visited or depth > _MAX_DEPTH:
            self._damaged("has a tree that leads back to itself")
        visited.add(number)
        page = self._page(number)
        _, _, flags, lower, upper = _PAGE.unpack_from(page)
        if not _PAGE.size <= lower <= upper <= len(page) or (lower - _PAGE.size) % 2:
            self._damaged(f"has a broken page {number:,}")
        pointers = struct.unpack_from(f"<{(lower - _PAGE.size) // 2}H", page, _PAGE.size)
        for pointer in pointers:
            if pointer + _NODE.size > len(page):
                self._damaged(f"has a broken page {number:,}")
            low, high, node_flags, key_length = _NODE.unpack_from(page, pointer)
            begin = pointer + _NODE.size
            if flags & _BRANCH:
                yield from self._below(low | high << 16 | node_flags << 32, depth + 1, visited)
            elif flags & _LEAF and node_flags & ~_BIG == 0 and begin + key_length <= len(page):
                key = page[begin : begin + key_length]
                yield self._value(key, page, number, begin + key_length, low | high << 16, node_flags)
            else:
                self._damaged(f"has a page {number:,} of a kind that a plain database does not have")

    def _value(self, key: bytes, page: bytes, number: int, begin: int, length: int, flags: int) -> Value:
        if not flags & _BIG:
            if begin + length > len(page):
                self._damaged(f"has a broken page {number:,}")
            return Value(key, number * self.page_bytes + begin, length)
        if begin + 8 > len(page):
            self._damaged(f"has a broken page {number:,}")
        first = int.from_bytes(page[begin : begin + 8], "little")
        header = self._page(first)
        offset = first * self.page_bytes + _PAGE.size
        if not _PAGE.unpack_from(header)[2] & _OVERFLOW or offset + length > self._bytes:
            self._damaged(f"has a value of {length:,} bytes where there are fewer")
        return Value(key, offset, length)

    def _page(self, number: int) -> bytes:
        if not 2 <= number <= self._last_page:
            self._damaged(f"names a page {number:,} that it does not have")
        page = os.pread(self._file.fileno(), self.page_bytes, number * self.page_bytes)
        if len(page) < self.page_bytes or _PAGE.unpack_from(page)[0] != number:
            self._damaged(f"has a broken page {number:,}")
        return page

    def _damaged(self, what: str) -> NoReturn:
        raise ShardError(f"{self._where}: is damaged: it {what}. Fetch or convert it again.")
