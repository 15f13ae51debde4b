"""Pieces of a shard: which bytes are fetched together, whether they are whole, what is in them."""

import itertools
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.index import Shard, Sidecar
from pipeline.data.tars import IMAGE_EXTENSIONS, read_sample

PIECE_BYTES = 4 * 2**20
# Bytes between two samples that are rather fetched than asked around by another request.
_WIDEST_GAP = 2**18


@dataclass(frozen=True, slots=True)
class Piece:
    """Samples [first, end) of a shard."""

    shard: int
    first: int
    end: int


def grid_piece(number: int, shard: Shard, sample: int) -> Piece:
    """The piece of about PIECE_BYTES with `sample` in it, if shard `number` is cut into such pieces."""
    length = _samples_per_piece(shard)
    begin = sample // length * length
    return Piece(number, begin, min(begin + length, shard.samples))


def part(whole: Piece, shard: Shard, sample: int) -> Piece:
    """The part with `sample` in it, if `whole` is cut into as few equal parts of PIECE_BYTES as possible."""
    count = whole.end - whole.first
    length = -(-count // -(-count // _samples_per_piece(shard)))
    begin = whole.first + (sample - whole.first) // length * length
    return Piece(whole.shard, begin, min(begin + length, whole.end))


def _samples_per_piece(shard: Shard) -> int:
    return max(PIECE_BYTES * shard.samples // max(shard.bytes, 1), 1)


def runs(piece: Piece, sidecar: Sidecar) -> Iterator[Piece]:
    """Parts of `piece` between which there is nothing large that belongs to no sample."""
    offsets, sizes = sidecar.offsets[piece.first : piece.end], sidecar.sizes[piece.first : piece.end]
    wide = np.flatnonzero(offsets[1:] - (offsets + sizes)[:-1] > _WIDEST_GAP)
    bounds = [piece.first, *(wide + piece.first + 1).tolist(), piece.end]
    for first, end in itertools.pairwise(bounds):
        yield Piece(piece.shard, first, end)


def byte_range(piece: Piece, sidecar: Sidecar) -> tuple[int, int]:
    """The bytes [start, end) of the shard that hold all samples of `piece`."""
    last = piece.end - 1
    return int(sidecar.offsets[piece.first]), int(sidecar.offsets[last] + sidecar.sizes[last])


def spans(data: bytes, piece: Piece, sidecar: Sidecar) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each sample in `data`, the byte range of `piece` or the beginning of it."""
    view = memoryview(data)
    offsets = (sidecar.offsets[piece.first : piece.end] - sidecar.offsets[piece.first]).tolist()
    sizes = sidecar.sizes[piece.first : piece.end].tolist()
    for number, offset, size in zip(range(piece.first, piece.end), offsets, sizes, strict=True):
        yield number, view[offset : offset + size]


def damage(data: bytes, piece: Piece, sidecar: Sidecar) -> dict[int, str]:
    """What is wrong with each damaged sample of `piece`, by number, if `data` are its bytes."""
    checksums = sidecar.checksums[piece.first : piece.end].tolist()
    found = {}
    for (number, span), checksum in zip(spans(data, piece, sidecar), checksums, strict=True):
        if len(span) != sidecar.sizes[number]:
            found[number] = "the shard ends before its end"
        elif zlib.crc32(span) != checksum:
            found[number] = "its checksum is wrong, fetched twice"
    return found


def image_in(span: bytes, key: str, shard: Shard) -> bytes:
    """The content of the image file in `span`, the verified bytes of the sample `key`.

    Raises whatever webdataset and tarfile report a broken or unexpected tar by, ValueError above
    all. They are not asked about a sample that is a single plain file, as `shards build` writes
    them: their 70 microseconds are as much as the decoding of an uncompressed image.
    """
    plain = _single_file(span, key)
    return read_sample(span, key, shard.name).image if plain is None else plain


def _single_file(span: bytes, key: str) -> bytes | None:
    """The content of the only member of `span`; None if it is not beyond doubt KEY.EXTENSION alone."""
    name, _, rest = span[:100].partition(b"\0")
    begins_plainly = span[156:157] == b"0" and span[257:265] == b"ustar\x0000" and not rest.strip(b"\0")
    if not begins_plainly or span[345:500].strip(b"\0"):
        return None
    stem, _, extension = name.decode("ascii", "replace").rpartition(".")
    # webdataset ends a key at the first dot, and keeps some names with underscores for itself.
    file_name = key.rpartition("/")[2]
    is_plain_key = stem == key and file_name and "." not in file_name and not key.startswith("__")
    if not is_plain_key or extension not in IMAGE_EXTENSIONS:
        return None
    size, checksum = _octal(span[124:136]), _octal(span[148:156])
    end = tarfile.BLOCKSIZE + size
    if size < 0 or len(span) != end + -size % tarfile.BLOCKSIZE or checksum != _header_sum(span):
        return None
    return span[tarfile.BLOCKSIZE : end]


def _header_sum(span: bytes) -> int:
    """A tar header's checksum: its bytes added up, those of the checksum itself as spaces."""
    return sum(span[:148]) + 8 * 32 + sum(span[156 : tarfile.BLOCKSIZE])


def _octal(field: bytes) -> int:
    """A number of a tar header, -1 if it is not written as plain octal digits."""
    digits = field.rstrip(b"\0 ")
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else -1
