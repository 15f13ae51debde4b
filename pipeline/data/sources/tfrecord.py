"""TFRecord files of tf.train.Example, as GLOW and StyleGAN published CelebA-HQ, ImageNet and FFHQ.

A record is its length, the length's checksum, its bytes and their checksum (CRC-32C, masked). An
Example maps names to lists of values. An image is either a file (`image/encoded`) or bare pixels
(`data`) with a `shape`, (H, W, C) as GLOW or (C, H, W) as StyleGAN writes it.

Data sets come in several resolutions, told apart by -r02 to -r10 in the files' names, whose power
of two it is: only that of --image-size is read.
"""

import os
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np

from pipeline.data.images import MAX_FILE_BYTES, Pixels, RejectedImageError
from pipeline.data.index import ShardError
from pipeline.data.sources.published_splits import published_splits
from pipeline.data.sources.source import Source, SourceImage

SUFFIXES = (".tfrecord", ".tfrecords")
_RESOLUTION = re.compile(r"-r(\d\d)(?!\d)")
_LENGTH = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_MASK = 0xA282EAD8
_ENCODED_NAMES = ("image/encoded", "image", "image_raw", "jpeg", "png")

Feature = list[bytes | int]


@contextmanager
def tfrecords(root: Path, paths: list[Path], image_size: int | None) -> Iterator[Source]:
    """The images of the files `paths` at or below `root`. Raises ShardError if one was cut."""
    chosen, size = _of_resolution(root, paths, image_size)
    names = {path.relative_to(root) if path != root else PurePath(path.name): path for path in chosen}
    splits, remarks = published_splits(str(root), names)
    if len(chosen) < len(paths):
        remarks.append(f"{len(paths) - len(chosen)} of other resolutions")
    images: list[SourceImage] = []
    with ExitStack() as files:
        for name, split in splits.items():
            file = files.enter_context(names[name].open("rb"))
            for number, (offset, length) in enumerate(_records(file, names[name])):
                read = partial(_image, file, offset, length)
                images.append(SourceImage(f"{name.with_suffix('')}/{number:06d}", read, split))
        yield Source(images, image_size=size, remarks=tuple(remarks))


def _of_resolution(root: Path, paths: list[Path], image_size: int | None) -> tuple[list[Path], int | None]:
    """The files of the wanted resolution, and the size that their names say."""
    by_size: dict[int | None, list[Path]] = {}
    for path in sorted(paths):
        match = _RESOLUTION.search(path.name)
        by_size.setdefault(2 ** int(match[1]) if match else None, []).append(path)
    if len(by_size) == 1:
        ((size, chosen),) = by_size.items()
        return chosen, size
    if image_size not in by_size:
        there = ", ".join(str(size) for size in sorted(size for size in by_size if size))
        raise ShardError(f"{root}: holds images of {there} pixels; choose one of them by --image-size.")
    return by_size[image_size], image_size


# --- records ----------------------------------------------------------------------------------


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[int, int]]:
    """Offset and length of the content of each record; it is not read."""
    end = os.fstat(file.fileno()).st_size
    place = 0
    while place < end:
        header = os.pread(file.fileno(), _LENGTH.size, place)
        if len(header) < _LENGTH.size:
            raise ShardError(f"{path}: was cut short at byte {end:,}. Fetch it again.")
        length, checksum = _LENGTH.unpack(header)
        if masked_crc32c(header[:8]) != checksum:
            raise ShardError(f"{path}: is no TFRecord file, or damaged at byte {place:,}. Fetch it again.")
        begin = place + _LENGTH.size
        place = begin + length + _CHECKSUM.size
        if place > end:
            raise ShardError(f"{path}: was cut short at byte {end:,}. Fetch it again.")
        yield begin, length


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, turned and shifted so that a checksum of checksums stays one."""
    try:
        import google_crc32c
    except ImportError as error:
        raise ShardError(
            "TFRecords are read with google-crc32c: pip install 'nvae-cluster[train]'"
        ) from error
    crc = int(google_crc32c.value(data))
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def _image(file: BinaryIO, offset: int, length: int) -> bytes | Pixels:
    if length > MAX_FILE_BYTES:
        raise RejectedImageError(f"is a record of more than {MAX_FILE_BYTES >> 20} MiB")
    content = os.pread(file.fileno(), length + _CHECKSUM.size, offset)
    data = content[:length]
    if (
        len(content) != length + _CHECKSUM.size
        or masked_crc32c(data) != _CHECKSUM.unpack(content[length:])[0]
    ):
        raise RejectedImageError("is a record whose checksum is wrong")
    try:
        features = parse_example(data)
    except (ValueError, IndexError) as error:
        raise RejectedImageError(f"is a record that is no Example ({error})") from error
    if "data" in features and "shape" in features:
        return _pixels(features["data"], features["shape"])
    for name in _ENCODED_NAMES:
        match features.get(name):
            case [bytes() as encoded]:
                return encoded
    raise RejectedImageError(
        f"is a record without an image: it has {', '.join(sorted(features)[:8]) or 'nothing'}"
    )


def _pixels(data: Feature, shape: Feature) -> Pixels:
    """(H, W, C) pixels."""
    match data, shape:
        case [bytes() as raw], [int() as first, int() as second, int() as third]:
            if min(first, second, third) < 1 or first * second * third != len(raw):
                raise RejectedImageError(f"has {len(raw):,} bytes for {first}x{second}x{third}")
            pixels = np.frombuffer(raw, np.uint8).reshape(first, second, third)
            channels_first = third not in (1, 3) and first in (1, 3)
            if channels_first:
                pixels = np.ascontiguousarray(pixels.transpose(1, 2, 0))
            if pixels.shape[2] not in (1, 3):
                raise RejectedImageError(f"has the shape {first}x{second}x{third}, no colours among it")
            return pixels[..., 0] if pixels.shape[2] == 1 else pixels
    raise RejectedImageError("has no plain data and shape")


# --- tf.train.Example, as protocol buffers write it -------------------------------------------


def parse_example(data: bytes) -> dict[str, Feature]:
    """The lists of bytes or whole numbers in an Example. Raises ValueError or IndexError if it is none.

    Example { Features features = 1 }; Features { map<string, Feature> feature = 1 };
    Feature { bytes_list = 1, float_list = 2, int64_list = 3 }, each with its values in field 1.
    """
    found: dict[str, Feature] = {}
    for features in _submessages(data, 1):
        for entry in _submessages(features, 1):
            names, values = list(_submessages(entry, 1)), list(_submessages(entry, 2))
            if len(names) != 1 or len(values) != 1:
                raise ValueError("an entry has not one name and one value")
            for kind, content in _fields(values[0]):
                if isinstance(content, bytes) and kind == 1:
                    found[names[0].decode()] = list(_submessages(content, 1))
                elif isinstance(content, bytes) and kind == 3:
                    found[names[0].decode()] = list(_integers(content))
    return found


def _submessages(data: bytes, number: int) -> Iterator[bytes]:
    return (content for field, content in _fields(data) if field == number and isinstance(content, bytes))


def _integers(data: bytes) -> Iterator[int]:
    for field, content in _fields(data):
        if field == 1 and isinstance(content, int):
            yield content
        elif field == 1 and isinstance(content, bytes):
            place = 0
            while place < len(content):
                value, place = _varint(content, place)
                yield value


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and content of each field of a message."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        length = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            length, place = _varint(data, place)
        if length is None or length > len(data) - place:
            raise ValueError("a field ends outside of its message")
        yield tag >> 3, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of at most 64 bits, seven in each byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number does not end")
