"""Which split a file of a published data set belongs to, by its name and its folders'."""

import re
from collections.abc import Iterable
from pathlib import PurePath

from pipeline.data.index import TRAIN, VALIDATION, ShardError

_TEST = "test"
_WORDS = {
    "train": TRAIN,
    "training": TRAIN,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "test": _TEST,
}


def published_splits(where: str, files: Iterable[PurePath]) -> tuple[dict[PurePath, str | None], list[str]]:
    """The split of each of `files` (relative names), and what is to be said of those left out.

    `train-00000-of-00002.parquet`, `validation/r08.tfrecords` and `valid.lmdb` say it. A test
    split serves as validation if there is no other, and is left out if there is one.
    Raises ShardError if only some files name a split.
    """
    found = {file: _split_in(file) for file in files}
    named = set(found.values()) - {None}
    silent = [str(file) for file, split in found.items() if split is None]
    if not {VALIDATION, _TEST} & named:
        return dict.fromkeys(found), []
    if silent:
        raise ShardError(
            f"{where}: some files name their split, these do not: {', '.join(silent[:5])}. Name them "
            f"train-... or validation-..., or move them out."
        )
    if VALIDATION not in named:
        return {file: TRAIN if split == TRAIN else VALIDATION for file, split in found.items()}, []
    kept = {file: split for file, split in found.items() if split != _TEST}
    left_out = len(found) - len(kept)
    return kept, [f"{left_out} of the test split, beside a validation split"] if left_out else []


def _split_in(file: PurePath) -> str | None:
    """The split that `file` names: in its own name first, then in its folders from the innermost."""
    for part in reversed(file.parts):
        words = {_WORDS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _WORDS}
        if len(words) == 1:
            return words.pop()
    return None
