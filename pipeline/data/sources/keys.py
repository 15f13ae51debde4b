"""From the names of a source's images to the keys of a data set's samples."""

import re
from hashlib import sha256

_LONGEST_KEY = 90


def unique_keys(names: list[str]) -> list[str]:
    """A key for each name, all different, which no reader of tars can misunderstand.

    WebDataset takes what precedes the first dot of a file name for the key. Keys keep the
    folders and the name without its extension; where that is not possible or not unique, a
    few digits of the whole name's hash are appended.
    """
    taken: set[str] = set()
    keys = []
    for name in names:
        plain = key = _plain_key(name)
        copies = 0
        while key in taken:
            key = _hashed_key(plain, f"{name}#{copies}" if copies else name)
            copies += 1
        taken.add(key)
        keys.append(key)
    return keys


def _plain_key(name: str) -> str:
    folder, _, file = name.replace("\\", "/").rpartition("/")
    stem = file.rpartition(".")[0] or file
    parts = [part for part in [*folder.split("/"), stem] if part not in ("", ".", "..")]
    key = re.sub(r"[^\w/-]", "_", "/".join(parts))
    # WebDataset skips names that begin with two underscores.
    plain = key and key == "/".join([*filter(None, [folder]), stem]) and not key.startswith("_")
    return key if plain and len(key.encode()) <= _LONGEST_KEY else _hashed_key(key, name)


def _hashed_key(key: str, name: str) -> str:
    short = key.strip("_/").encode()[: _LONGEST_KEY - 20].decode(errors="ignore")
    return f"{short or 'image'}-{sha256(name.encode(errors='replace')).hexdigest()[:12]}"
