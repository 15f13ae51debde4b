"""MNIST's idx files: a header of four numbers, then the grey images one after the other."""

import gzip
import re
import struct
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.data.images import Pixels
from pipeline.data.index import TRAIN, VALIDATION, ShardError
from pipeline.data.sources.source import Source, SourceImage

NAME = re.compile(r"(train|t10k)-images[-.]idx3-ubyte(\.gz)?")
_SPLITS = {"train": TRAIN, "t10k": VALIDATION}
_MAGIC = 0x00000803
_HEADER = struct.Struct(">4I")
# Ten times the 47 MB of MNIST's larger file.
_MAX_BYTES = 2**29


def idx(paths: list[Path]) -> Source:
    """The images of MNIST's files, t10k's for validation. Raises ShardError if one is damaged."""
    images: list[SourceImage] = []
    size = 0
    for path in paths:
        match = NAME.fullmatch(path.name)
        assert match is not None, "the caller chose by this name"
        pixels = _read(path)
        size = pixels.shape[1]
        split = _SPLITS[match[1]]
        for number, image in enumerate(pixels):
            images.append(SourceImage(f"{match[1]}-{number:05d}", partial(np.copy, image), split))
    return Source(images, image_size=size, channels=1)


def _read(path: Path) -> Pixels:
    """(N, H, W) images of one file."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        magic, count, height, width = _HEADER.unpack_from(data)
    except (OSError, EOFError, struct.error) as error:
        raise ShardError(f"{path}: is damaged ({error}). Fetch it again.") from error
    whole = len(data) == _HEADER.size + count * height * width <= _MAX_BYTES
    if magic != _MAGIC or not whole or height != width:
        raise ShardError(f"{path}: is not a whole idx file of square grey images. Fetch it again.")
    return np.frombuffer(data, np.uint8, offset=_HEADER.size).reshape(count, height, width)
