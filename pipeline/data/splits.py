"""Which images are for validation.

Either the source says so itself (published splits; folders train/ and validation/), or the
user does: a share or a number, drawn by the images' content, or a list of names. Without a word
of either, a tenth is drawn.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.data.index import TRAIN, VALIDATION, ShardError
from pipeline.data.sources import Source, SourceImage
from pipeline.data.sources.files import is_named_like_an_image

DEFAULT_FRACTION = 0.1
_FOLDERS = {"train": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION}
_SHOWN = 10


@dataclass(frozen=True)
class ValidationChoice:
    """What the user said; at most one of the three."""

    fraction: float | None = None
    count: int | None = None
    names: tuple[str, ...] | None = None

    @property
    def is_explicit(self) -> bool:
        return (self.fraction, self.count, self.names) != (None, None, None)

    def arguments(self) -> Mapping[str, object]:
        """As `index.json` records it; of a list its hash, since a list may change."""
        listed = None
        if self.names is not None:
            digest = hashlib.sha256("\n".join(sorted(set(self.names))).encode()).hexdigest()
            listed = f"{len(set(self.names))} names, SHA-256 {digest}"
        return {
            "validation_fraction": self.fraction,
            "validation_count": self.count,
            "validation_list": listed,
        }

    def number(self, images: int) -> int:
        """How many of `images` are to be drawn. Raises ShardError if there are not as many."""
        if self.count is not None:
            if self.count >= images:
                raise ShardError(f"{self.count:,} validation images of {images:,} leave none to train on.")
            return self.count
        fraction = DEFAULT_FRACTION if self.fraction is None else self.fraction
        # The nearest whole number of images, and at least one if any are wanted.
        wanted = max(round(fraction * images), 1) if fraction else 0
        return min(wanted, max(images - 1, 0))


def read_choice(fraction: float | None, count: int | None, list_file: str | None) -> ValidationChoice:
    """The choice that the arguments mean; `list_file` has a name in each line.

    Raises ShardError if they contradict each other or make no sense, StoreError if the file cannot be read.
    """
    if sum(given is not None for given in (fraction, count, list_file)) > 1:
        raise ShardError("Give one of --validation-fraction, --validation-count and --validation-list.")
    if fraction is not None and not 0 <= fraction < 1:
        raise ShardError(f"validation fraction {fraction} is not in [0, 1).")
    if count is not None and count < 0:
        raise ShardError(f"validation count {count} is negative.")
    if list_file is None:
        return ValidationChoice(fraction, count)
    text = storage.read_text(storage.normalize(list_file))
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise ShardError(f"{storage.shown(list_file)}: names no image.")
    return ValidationChoice(names=names)


def with_splits(source: Source, choice: ValidationChoice) -> list[SourceImage]:
    """The images of `source` with the splits that its folders, its format or the user's list give them.

    None of them has a split if it is to be drawn. Raises ShardError if the two contradict each other,
    or if an image lies where it belongs to no split.
    """
    images = _by_folder(source.images) if source.holds_any_files else source.images
    if not choice.is_explicit:
        return images
    if any(image.split for image in images):
        raise ShardError(
            "The source comes with a validation split of its own; leave --validation-fraction, "
            "--validation-count and --validation-list out."
        )
    return images if choice.names is None else _by_list(images, choice.names)


def _by_folder(images: list[SourceImage]) -> list[SourceImage]:
    """Each image in the split that its top folder names, if there are folders for both."""
    splits = [_FOLDERS.get(_top_folder(image.name)) for image in images]
    meant = [split for image, split in zip(images, splits, strict=True) if is_named_like_an_image(image.name)]
    if {TRAIN, VALIDATION} - set(meant):
        return images
    placed = [replace(image, split=split) for image, split in zip(images, splits, strict=True)]
    refuse_strays([image.name for image in placed if not image.split and is_named_like_an_image(image.name)])
    return placed


def refuse_strays(names: Sequence[str]) -> None:
    """Raises ShardError if there are images that belong to neither split."""
    if names:
        raise ShardError(
            f"Beside the folders of the train and validation splits there are {len(names):,} other images: "
            f"{_listed(names)}. Move each into one of the two, or out of the source."
        )


def _top_folder(name: str) -> str:
    top, slash, _ = name.partition("/")
    return top if slash else ""


def _by_list(images: list[SourceImage], names: Sequence[str]) -> list[SourceImage]:
    """The listed images for validation, all others for training.

    A line is an image's name in the source, or (if only one image has it) the name without folders
    or extension.
    """
    exact: dict[str, set[int]] = defaultdict(set)
    meanings: dict[str, set[int]] = defaultdict(set)
    for number, image in enumerate(images):
        exact[image.name].add(number)
        path = PurePosixPath(image.name)
        for short in (path.name, path.stem, (path.parent / path.stem).as_posix()):
            meanings[short].add(number)
    chosen: set[int] = set()
    unknown: list[str] = []
    ambiguous: list[str] = []
    for name in dict.fromkeys(name.removeprefix("./") for name in names):
        found = exact.get(name) or meanings.get(name, set())
        if len(found) == 1:
            chosen |= found
        else:
            (ambiguous if found else unknown).append(name)
    problems = []
    if unknown:
        problems.append(f"{len(unknown):,} names are of no image: {_listed(unknown)}")
    if ambiguous:
        problems.append(f"{len(ambiguous):,} names are of several images: {_listed(ambiguous)}")
    if problems:
        raise ShardError(f"The list of validation images does not fit the source: {'; '.join(problems)}.")
    return [
        replace(image, split=VALIDATION if number in chosen else TRAIN) for number, image in enumerate(images)
    ]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
