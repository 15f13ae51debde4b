"""Which image becomes part of a data set, in which split, at which place.

The SHA-256 of each image's content decides: the smallest hashes are the validation split, and
within a split images are in ascending order. (If the source or the user says which images are for
validation, that holds, and training images that the validation split repeats are left out.) So the
outcome depends on the images alone, not on their names or their order; equal images are never on
both sides of a split; and neighbours in a shard are a random draw of the data, whatever folders
they came from. The number of drawn validation images is exact up to equal and rejected images. The
price is to read the source twice; splitting by the hash of the name would need one pass, but lets
copies of a training image into validation.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from pipeline.data.ahead import in_order
from pipeline.data.images import RejectedImageError
from pipeline.data.index import TRAIN, VALIDATION
from pipeline.data.rejections import Rejection
from pipeline.data.sources import Source, SourceImage, unique_keys
from pipeline.data.sources.files import begins_like_an_image, is_hidden, is_named_like_an_image
from pipeline.data.sources.source import digest
from pipeline.data.splits import ValidationChoice, refuse_strays, with_splits

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
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
    origin: str
    """Where the splits come from, as a sentence."""

    @property
    def images(self) -> int:
        """Images that the source offers, the unusable ones among them."""
        unusable = sum(not rejection.by_rule for rejection in self.rejected)
        return unusable + sum(map(len, self.entries.values()))

    @property
    def fingerprint(self) -> str:
        """Changes if an image is added, removed or altered."""
        lines = [f"{entry.key} {entry.digest.hex()}" for split in self.entries.values() for entry in split]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def survey_source(source: Source, choice: ValidationChoice, threads: int, progress: Progress) -> Survey:
    """Read every image once; decide on splits and order.

    Raises ShardError if `choice` does not fit the source.
    """
    images = with_splits(source, choice)
    own_splits = any(image.split for image in images)
    keys = unique_keys([image.name for image in images])
    entries: list[Entry] = []
    rejected: list[Rejection] = []
    look = partial(_look, any_files=source.holds_any_files)
    for number, (image, found) in enumerate(in_order(look, images, threads)):
        if isinstance(found, Rejection):
            rejected.append(found)
        else:
            entries.append(Entry(keys[number], image, found))
        progress("looking at", number + 1, len(keys))
    entries.sort(key=lambda entry: (entry.digest, entry.key))
    duplicates = len(entries) - len({entry.digest for entry in entries})
    if own_splits:
        return _with_own_splits(entries, rejected, duplicates, choice)
    count = choice.number(len(entries))
    while 0 < count < len(entries) and entries[count].digest == entries[count - 1].digest:
        count += 1  # Equal images stay together.
    origin = "The validation split was drawn at random, by the images' content."
    return Survey({TRAIN: entries[count:], VALIDATION: entries[:count]}, rejected, duplicates, origin)


def _look(image: SourceImage, any_files: bool) -> bytes | Rejection:
    """The digest of an image's content, or why it is left out."""
    no_image = Rejection(image.name, "is no image file", by_rule=True)
    if any_files and is_hidden(image.name):
        return no_image
    if image.identity is not None:
        return digest(image.identity)
    meant = not any_files or is_named_like_an_image(image.name)
    try:
        content = image.read()
    except RejectedImageError as error:
        return Rejection(image.name, str(error)) if meant else no_image
    if meant or not isinstance(content, bytes) or begins_like_an_image(content):
        return digest(content)
    return no_image


def _with_own_splits(
    entries: list[Entry], rejected: list[Rejection], duplicates: int, choice: ValidationChoice
) -> Survey:
    refuse_strays([entry.image.name for entry in entries if entry.image.split is None])
    validation = [entry for entry in entries if entry.image.split == VALIDATION]
    held_out = {entry.digest for entry in validation}
    train = []
    for entry in entries:
        if entry.image.split != VALIDATION and entry.digest in held_out:
            rejected.append(Rejection(entry.image.name, "is in the validation split, too", by_rule=True))
        elif entry.image.split != VALIDATION:
            train.append(entry)
    origin = f"The validation split is the {'list' if choice.names else 'source'}'s own."
    return Survey({TRAIN: train, VALIDATION: validation}, rejected, duplicates, origin)
