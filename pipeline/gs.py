"""Requests to Google Cloud Storage through gcsfs, which is used only if it is installed.

gcsfs gives no stream of an answer, so that a read is a row of requests of moderate size;
what breaks is at most one of them. The generation of the object is asked for after each,
so that bytes of two versions are never joined.
"""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from pipeline.buckets import system
from pipeline.patience import patiently
from pipeline.storage_errors import AnswerError
from pipeline.transfer import Answer

_BLOCK_BYTES = 8 << 20


def open_object(url: str, start: int, end: int | None) -> Answer:
    """Ask for the bytes [start, end) of an object, or for all from `start` on."""
    about = _about(url)
    total = int(about["size"])
    stop = total if end is None else min(end, total)
    version = _version(about)

    def blocks() -> Iterator[bytes]:
        for begin in range(start, stop, _BLOCK_BYTES):
            data: bytes = system(url).cat_file(url, start=begin, end=min(begin + _BLOCK_BYTES, stop))
            if _version(_about(url)) != version:
                raise AnswerError("the object was replaced")
            yield data

    return Answer(start, stop, total, version, blocks(), close=lambda: None)


def _version(about: dict[str, Any]) -> str:
    return str(about.get("generation") or about.get("etag") or about.get("created"))


def _about(url: str) -> dict[str, Any]:
    about: dict[str, Any] = system(url).info(url)
    if about["type"] != "file":
        raise FileNotFoundError(url)
    return about


def size(url: str) -> int:
    """Bytes of an object. Raises FileNotFoundError, also for a folder."""
    return int(_about(url)["size"])


def exists(url: str) -> bool:
    """Whether there is an object `url`, or one below it."""
    return bool(system(url).exists(url))


def entries(url: str) -> dict[str, int | None]:
    """Size of each object directly in the folder `url` by name; None for folders."""
    listed = _listed(url).items()
    return {name: int(about["size"]) if about["type"] == "file" else None for name, about in listed}


def times(url: str) -> dict[str, int]:
    """When each object directly in the folder `url` was written, in nanoseconds since 1970, by name."""
    files = {name: about for name, about in _listed(url).items() if about["type"] == "file"}
    return {
        name: int(datetime.fromisoformat(about["updated"]).timestamp()) * 10**9
        for name, about in files.items()
    }


def _listed(url: str) -> dict[str, dict[str, Any]]:
    folder = url.split("://", 1)[1] + "/"
    try:
        listed = system(url).ls(url, detail=True, refresh=True)
    except FileNotFoundError:
        return {}
    named = {entry["name"].removeprefix(folder).rstrip("/"): entry for entry in listed}
    return {name: entry for name, entry in named.items() if name and entry["name"].startswith(folder)}


def write(url: str, data: bytes | memoryview) -> None:
    """Put an object of these bytes, under our patience."""
    # What gcsfs does with a memoryview is not documented.
    patiently(lambda: system(url).pipe_file(url, bytes(data)), url)


def delete(url: str) -> None:
    """Delete one object. Nothing there: no error."""

    def remove() -> None:
        try:
            system(url).rm_file(url)
        except FileNotFoundError:
            return

    patiently(remove, url)


def delete_below(url: str) -> int:
    """Delete the objects below a folder; returns how many are still there."""
    names = patiently(lambda: list(system(url).find(url)), url)
    if names:
        patiently(lambda: system(url).rm(names), url)
    return len(patiently(lambda: list(system(url).find(url)), url))
