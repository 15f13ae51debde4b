"""Which image becomes part of a data set, in which split, at which place.

The SHA-256 of each image's content decides: the smallest hashes are the validation split, and
within a split images are in ascending order. (If the source brings its own split, that one holds,
and training images that its validation split repeats are left out.) So the outcome depends on the
images alone, not on their names or their order; equal images are never on both sides of a split;
and neighbours in a shard are a random draw of the data, whatever folders they came from. The
number of validation images is exact up to equal and rejected images. The price is to read the
source twice; splitting by the hash of the name would need one pass, but lets copies of a training
image into validation.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.data.images import RejectedImageError
from pipeline.data.index import TRAIN, VALIDATION, ShardError
from pipeline.data.sources import Source, SourceImage, unique_keys

DEFAULT_VALIDATION_FRACTION = 0.1

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Rejection:
    """An image of the source that was left out."""

    name: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """An image that has its place in the data set."""

    key: str
    image: SourceImage
    digest: bytes


@dataclass(frozen=True)
class Survey:
    """The whole source, in the order in which it is to be written."""

    entries: Mapping[str, list[Entry]]
    rejected: list[Rejection]
    duplicates: int

    @property
    def fingerprint(self) -> str:
        """Changes if an image is added, removed or altered."""
        lines = [f"{entry.key} {entry.digest.hex()}" for split in self.entries.values() for entry in split]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def survey_source(source: Source, fraction: float | None, progress: Progress) -> Survey:
    """Read every image once; decide on splits and order."""
    own_splits = any(image.split for image in source.images)
    if own_splits and fraction is not None:
        raise ShardError("The source comes with a validation split of its own; leave the fraction out.")
    entries: list[Entry] = []
    rejected: list[Rejection] = []
    keys = unique_keys([image.name for image in source.images])
    for number, (key, image) in enumerate(zip(keys, source.images, strict=True)):
        try:
            entries.append(Entry(key, image, image.digest()))
        except RejectedImageError as error:
            rejected.append(Rejection(image.name, str(error)))
        progress("looking at", number + 1, len(keys))
    entries.sort(key=lambda entry: (entry.digest, entry.key))
    duplicates = len(entries) - len({entry.digest for entry in entries})
    if own_splits:
        return _with_own_splits(entries, rejected, duplicates)
    count = _validation_count(len(entries), DEFAULT_VALIDATION_FRACTION if fraction is None else fraction)
    while 0 < count < len(entries) and entries[count].digest == entries[count - 1].digest:
        count += 1  # Equal images stay together.
    return Survey({TRAIN: entries[count:], VALIDATION: entries[:count]}, rejected, duplicates)


def _validation_count(total: int, fraction: float) -> int:
    """The nearest whole number of images, and at least one if any are wanted."""
    wanted = max(round(fraction * total), 1) if fraction else 0
    return min(wanted, max(total - 1, 0))


def _with_own_splits(entries: list[Entry], rejected: list[Rejection], duplicates: int) -> Survey:
    validation = [entry for entry in entries if entry.image.split == VALIDATION]
    held_out = {entry.digest for entry in validation}
    train = []
    for entry in entries:
        if entry.image.split != VALIDATION and entry.digest in held_out:
            rejected.append(Rejection(entry.image.name, "is in the validation split, too"))
        elif entry.image.split != VALIDATION:
            train.append(entry)
    return Survey({TRAIN: train, VALIDATION: validation}, rejected, duplicates)
