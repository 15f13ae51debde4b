"""Which tars an index is to be made of, and which of them are for validation.

A split takes whole tars: their samples are not touched, and a tar that is copied from one
place to another stays in its split. Which tars, says the user, or the folders `train/` and
`validation/` below the one that was given, or the SHA-256 of the names: the smallest are for
validation, so that a further tar does not move the others.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.data.index import TRAIN, VALIDATION, ShardError, check_shard_name

DEFAULT_VALIDATION_FRACTION = 0.1
MOST_TARS = 200_000
_SPLIT_FOLDERS = {"train": TRAIN, "validation": VALIDATION, "val": VALIDATION}
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")


@dataclass(frozen=True)
class TarListing:
    """Tars below one folder."""

    root: str
    files: Mapping[str, int]
    """Bytes of every file in the folders of the tars, by name below `root`."""
    times: Mapping[str, int]
    """When each was last written, in nanoseconds since 1970: no later than its content was read."""
    tars: tuple[str, ...]

    def size(self, name: str) -> int:
        return self.files[name]


def list_tars(urls: Sequence[str]) -> TarListing:
    """The tars that `urls` mean: one folder, or tars below a common one; `{000..069}` counts.

    Raises ShardError if there are none, one is missing, or they cannot have an index beside them.
    """
    given = [storage.normalize(url) for url in expanded(urls)]
    for url in given:
        if storage.scheme(url) in ("http", "https"):
            raise ShardError(
                f"{storage.shown(url)}: the index lies beside the tars, and a web server can only be read. "
                f"Run `nvae shards index` on the folder that it serves; then it can be read over https."
            )
    folders = [url for url in given if not url.endswith(".tar")]
    if folders and len(given) > 1:
        raise ShardError("Give one folder with tars, or tars (and nothing but tars) below one folder.")
    if folders:
        return _checked(_in_folder(folders[0]))
    root = _common_folder(given)
    names = [url[len(root) + 1 :] for url in given]
    files, times = _files(root, sorted({name.rpartition("/")[0] for name in names}))
    missing = [name for name in names if name not in files]
    if missing:
        raise ShardError(
            f"{storage.shown(root)}: {len(missing):,} of {len(names):,} tars are not there: "
            f"{', '.join(map(repr, missing[:5]))}{', ...' if len(missing) > 5 else ''}"
        )
    if len(set(names)) < len(names):
        raise ShardError("A tar is given twice.")
    return _checked(TarListing(root, files, times, tuple(names)))


def split_tars(
    listing: TarListing, fraction: float | None, validation: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The tars of each split, in their order; `validation` names them, or `fraction` says how many.

    Raises ShardError if that is not possible with whole tars.
    """
    names = listing.tars
    chosen = _named(listing, validation) if validation else _of_folders(names)
    if chosen and fraction is not None:
        raise ShardError("The validation tars are given by name or by folder; leave the fraction out.")
    if not chosen and fraction != 0:
        chosen = _drawn(listing, DEFAULT_VALIDATION_FRACTION if fraction is None else fraction)
    train = tuple(name for name in names if name not in chosen)
    if not train:
        raise ShardError(f"{storage.shown(listing.root)}: all tars are for validation, none for training.")
    return {TRAIN: train, VALIDATION: tuple(name for name in names if name in chosen)}


def expanded(urls: Sequence[str]) -> list[str]:
    """The URLs that WebDataset's `{000..069}` stands for. Raises ShardError if they are too many."""
    found: list[str] = []
    waiting = list(reversed(urls))
    while waiting:
        url = waiting.pop()
        match = _RANGE.search(url)
        if match is None:
            found.append(url)
            continue
        first, last = int(match[1]), int(match[2])
        if last - first + len(waiting) + len(found) >= MOST_TARS:
            raise ShardError(f"{storage.shown(url)}: means more than {MOST_TARS:,} tars.")
        width = len(match[1])
        waiting += [
            f"{url[: match.start()]}{number:0{width}}{url[match.end() :]}"
            for number in range(last, first - 1, -1)
        ]
    return found


def _checked(listing: TarListing) -> TarListing:
    if not listing.tars:
        raise ShardError(
            f"{storage.shown(listing.root)}: there is no .tar in it, nor in train/ and validation/ below it."
        )
    for name in listing.tars:
        try:
            check_shard_name(name)
        except ValueError as error:
            raise ShardError(f"{name!r} cannot be the name of a shard; rename it. ({error})") from error
    return listing


def _in_folder(folder: str) -> TarListing:
    files, times = _files(folder, [""])
    tars = sorted(name for name in files if name.endswith(".tar"))
    if not tars:
        files, times = _files(folder, sorted(set(_SPLIT_FOLDERS) & set(storage.list_dir(folder))))
        tars = sorted(name for name in files if name.endswith(".tar"))
    return TarListing(folder, files, times, tuple(tars))


def _files(root: str, folders: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Size and time of every file in these folders below `root`."""
    sizes: dict[str, int] = {}
    times: dict[str, int] = {}
    for folder in folders:
        place, prefix = (storage.join(root, folder), f"{folder}/") if folder else (root, "")
        times |= {prefix + name: time for name, time in storage.list_times(place).items()}
        sizes |= {prefix + name: size for name, size in storage.list_sizes(place).items()}
    return sizes, times


def _common_folder(urls: Sequence[str]) -> str:
    parents = [url.split("/")[:-1] for url in urls]
    depth = 0
    while all(depth < len(parent) and parent[depth] == parents[0][depth] for parent in parents):
        depth += 1
    # An absolute path begins with one empty piece, a URL with scheme, empty piece and bucket.
    if depth < (2 if storage.is_local(urls[0]) else 3):
        raise ShardError("These tars have no common folder in which their index could lie.")
    return "/".join(parents[0][:depth])


def _named(listing: TarListing, validation: Sequence[str]) -> set[str]:
    prefix = listing.root + "/"
    chosen = {name.removeprefix(prefix) for name in expanded(validation)}
    unknown = sorted(chosen - set(listing.tars))
    if unknown:
        raise ShardError(
            f"--validation {unknown[0]!r} is none of the {len(listing.tars):,} tars; name them as they lie "
            f"below {storage.shown(listing.root)}, for instance {listing.tars[0]!r}."
        )
    return chosen


def _of_folders(names: Sequence[str]) -> set[str]:
    """Those in `validation/`, if all lie in folders that name a split."""
    splits = {name: _SPLIT_FOLDERS.get(name.partition("/")[0]) for name in names if "/" in name}
    if len(splits) < len(names) or set(splits.values()) != {TRAIN, VALIDATION}:
        return set()
    return {name for name, split in splits.items() if split == VALIDATION}


def _drawn(listing: TarListing, fraction: float) -> set[str]:
    names = listing.tars
    if len(names) < 2:
        raise ShardError(
            f"{storage.shown(listing.root)}: a split takes whole tars, and there is only one. Give "
            f"--validation-fraction 0 to train on all of it, or split its images by `nvae shards build`."
        )
    count = min(max(round(fraction * len(names)), 1), len(names) - 1)
    return set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])
