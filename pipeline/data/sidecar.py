"""Where each sample of one shard is, and how to know that it arrived whole.

A sidecar is a binary file of columns, so that a shard of a million samples is opened by reading
arrays; keys stay bytes until one is asked for. It may leave gaps: bytes of its shard between
two samples that belong to none.

What is parsed here may have been written by anybody: every number is checked before it is used.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

MAX_SAMPLE_BYTES = 2**26
"""Bytes of a sample in its tar. An uncompressed image of 4096x4096 pixels takes 48 MiB."""
MAX_KEY_BYTES = 1024

_HEADER = struct.Struct("<8sIIQ")
_MAGIC = b"NVAEIDX\0"
_VERSION = 1
_COLUMNS = 4


class Keys(Sequence[str]):
    """The names of a shard's samples, decoded one by one when they are asked for."""

    def __init__(self, ends: NDArray[np.int64], text: bytes) -> None:
        """`ends` (N,) is where each key ends in `text`, which holds them one after the other."""
        self._ends, self._text = ends, text

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[str]: ...
    def __getitem__(self, number: int | slice) -> str | Sequence[str]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        start = self._ends[number - 1] if number else 0
        return self._text[start : self._ends[number]].decode()

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))


@dataclass(frozen=True)
class Sidecar:
    """The samples of one shard, in the order in which they lie there. N samples."""

    offsets: NDArray[np.int64]
    """(N,) first byte of the sample's first tar header."""
    sizes: NDArray[np.int64]
    """(N,) bytes of the sample: headers, data and padding of its members."""
    checksums: NDArray[np.int64]
    """(N,) CRC-32 of these bytes."""
    keys: Keys

    def to_bytes(self) -> bytes:
        """The content of the sidecar file; little-endian whatever the machine."""
        encoded = [key.encode() for key in self.keys]
        ends = np.cumsum([len(key) for key in encoded], dtype=np.int64)
        text = b"".join(encoded)
        header = _HEADER.pack(_MAGIC, _VERSION, len(encoded), len(text))
        columns = (self.offsets, self.sizes, self.checksums, ends)
        return header + b"".join(column.astype("<i8").tobytes() for column in columns) + text

    @property
    def ends(self) -> NDArray[np.int64]:
        """(N,) first byte behind each sample."""
        ends: NDArray[np.int64] = self.offsets + self.sizes
        return ends


def make_sidecar(rows: Iterable[tuple[int, int, int, str]]) -> Sidecar:
    """A sidecar from (offset, size, checksum, key) of each sample."""
    listed = list(rows)
    columns = np.array([row[:3] for row in listed], np.int64).reshape(-1, 3).T
    encoded = [row[3].encode() for row in listed]
    keys = Keys(np.cumsum([len(key) for key in encoded], dtype=np.int64), b"".join(encoded))
    return Sidecar(columns[0], columns[1], columns[2], keys)


def is_sidecar(data: bytes) -> bool:
    """Whether `data`, the beginning of a file, is that of a sidecar."""
    return data.startswith(_MAGIC)


def length_fits(sidecar_bytes: int, samples: int) -> bool:
    """Whether a sidecar of `samples` samples can have so many bytes."""
    least = _HEADER.size + 8 * _COLUMNS * samples
    return least <= sidecar_bytes <= least + MAX_KEY_BYTES * samples


def parse_sidecar(data: bytes, shard_bytes: int) -> Sidecar:
    """The sidecar stored in `data`, of a shard of `shard_bytes` bytes.

    Raises ValueError if it is none, or speaks of samples that such a shard cannot hold.
    """
    if len(data) < _HEADER.size:
        raise ValueError("too short for a sidecar")
    magic, version, samples, text_bytes = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION:
        raise ValueError(f"not a sidecar of version {_VERSION}")
    columns_end = _HEADER.size + 8 * _COLUMNS * samples
    if len(data) != columns_end + text_bytes:
        raise ValueError("cut short")
    columns = np.frombuffer(data, "<i8", _COLUMNS * samples, _HEADER.size).reshape(_COLUMNS, samples)
    offsets, sizes, checksums, ends = columns.astype(np.int64, copy=False)
    _check_spans(offsets, sizes, shard_bytes)
    text = data[columns_end:]
    _check_keys(ends, text)
    return Sidecar(offsets, sizes, checksums, Keys(ends, text))


def _check_spans(offsets: NDArray[np.int64], sizes: NDArray[np.int64], shard_bytes: int) -> None:
    inside = (offsets >= 0) & (offsets <= shard_bytes) & (sizes > 0) & (sizes <= shard_bytes)
    # Both are small enough now for their sum not to overflow.
    if not np.all(inside) or np.any(offsets + sizes > shard_bytes):
        raise ValueError("a sample lies outside of its shard")
    if np.any(offsets[1:] < (offsets + sizes)[:-1]):
        raise ValueError("samples overlap or are out of order")
    if np.any(sizes > MAX_SAMPLE_BYTES):
        raise ValueError(f"a sample has more than {MAX_SAMPLE_BYTES >> 20} MiB")


def _check_keys(ends: NDArray[np.int64], text: bytes) -> None:
    lengths = np.diff(ends, prepend=0)
    if np.any(ends < 0) or np.any(ends > len(text)) or (int(ends[-1]) if len(ends) else 0) != len(text):
        raise ValueError("its keys are damaged")
    if np.any(lengths < 1) or np.any(lengths > MAX_KEY_BYTES):
        raise ValueError(f"a key does not have 1 to {MAX_KEY_BYTES} bytes")
    text.decode()  # Raises UnicodeDecodeError, a ValueError.
    starts = ends - lengths
    if np.any(np.frombuffer(text, np.uint8)[starts] & 0xC0 == 0x80):
        raise ValueError("a key begins within a character")
