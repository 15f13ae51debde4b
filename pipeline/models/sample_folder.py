"""Many samples as one PNG each, in a folder that is filled in any number of attempts.

FOLDER/
  samples.json   of which weights, by which settings: written first
  000000.png     image number 0 of the seed

Each file is written atomically and its name says which picture it is, so an attempt that was
interrupted is continued by drawing what is missing; several processes that fill one folder
cost time and harm nothing. samples.json refuses other weights or settings: a folder of
50,000 samples that are half another model's would give an FID that nobody can explain.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from nvae.model import NVAE
from pipeline import record_file, storage
from pipeline.errors import InputError
from pipeline.models.sampling import Drawing, grid, png, samples

RECORD = "samples.json"

# How Pillow reports a PNG that was cut or changed.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error)


class SampleFolderError(InputError):
    """A folder that holds something else than the samples that are to go there."""


@dataclass(frozen=True)
class Contents:
    """What the pictures of a folder are drawn from; its record."""

    weights_sha256: str
    temperature: list[float]
    seed: int
    pixels: str
    pixel_temperature: float
    recalibrated: bool
    """Whether batch norm's statistics were estimated anew for them."""


def contents(weights_sha256: str, drawing: Drawing, recalibrated: bool) -> Contents:
    given = drawing.temperature
    temperature = [float(given)] if isinstance(given, int | float) else [float(each) for each in given]
    return Contents(
        weights_sha256, temperature, drawing.seed, drawing.pixels, drawing.pixel_temperature, recalibrated
    )


def claim(folder: Path, wanted: Contents) -> None:
    """Makes `folder` one of `wanted`, if it is new, empty, or was one already.

    Raises SampleFolderError if it has other files or another record, StoreError if it cannot be written.
    """
    url = str(folder / RECORD)
    found = record_file.read(url, lambda values: Contents(**values))
    if found is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SampleFolderError(
                f"{folder}: is there already, and was not begun by this command (it has no {RECORD}). "
                "Name a folder that is new or empty."
            )
        record_file.write(url, wanted)
        return
    differing = [
        f"{name} is {value!r} there and {asdict(wanted)[name]!r} here"
        for name, value in asdict(found).items()
        if value != asdict(wanted)[name]
    ]
    if differing:
        raise SampleFolderError(
            f"{folder}: holds other samples: {'; '.join(differing)}. Name another folder, or delete this one."
        )


def path_of(folder: Path, index: int) -> Path:
    """Where image number `index` lies."""
    return folder / f"{index:06d}.png"


def missing(folder: Path, count: int, size: int) -> list[int]:
    """The numbers below `count` whose file is not there, or not whole: its checksums are read."""
    return [index for index in range(count) if not _is_whole(path_of(folder, index), size)]


def _is_whole(path: Path, size: int) -> bool:
    if not path.exists():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
            return image.size == (size, size)
    except _DAMAGE:
        return False


def fill(
    folder: Path, model: NVAE, drawing: Drawing, indices: Sequence[int], batch_size: int
) -> Iterator[int]:
    """Draws the images with these numbers into `folder`; yields each number once its file is there.

    Raises StoreError if a file cannot be written; what was written stays.
    """
    for batch, images in samples(model, indices, drawing, batch_size):
        for index, image in zip(batch, images, strict=True):
            storage.write_bytes(str(path_of(folder, index)), png(grid(image[None])))
            yield index
