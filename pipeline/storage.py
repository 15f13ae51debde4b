"""Bytes in and out of any store: a local folder, an S3 bucket, Google Cloud Storage, a web server.

Functions on URLs, no objects: what holds connections belongs to one process (buckets.py).
Credentials, region, endpoint and certificate authority come from the environment that every
S3 client understands (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION,
AWS_ENDPOINT_URL_S3, AWS_CA_BUNDLE) and never from our configuration.

A file is either there as a whole or not there: local files are written beside their place,
synced and renamed; S3 shows an object only when it is complete. Every answer of a network is
waited for with a limit, what failed on the way is tried again (patience.py), and a read goes
on from its last good byte (transfer.py). `configure` says how patient this process is.

Local files go through the standard library, not fsspec, which cannot write atomically and
sync.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pipeline import buckets, gs, limits, local_files, patience, s3, transfer, web
from pipeline.config import StorageConfig
from pipeline.limits import Statistics as Statistics
from pipeline.limits import statistics as statistics
from pipeline.patience import give_up_when as give_up_when
from pipeline.patience import patiently
from pipeline.storage_errors import CUT_REMEDY, explain
from pipeline.urls import BUCKET_SCHEMES, WEB_SCHEMES, CutError, MissingError, StoreError
from pipeline.urls import check_relative as check_relative
from pipeline.urls import is_local as is_local
from pipeline.urls import join as join
from pipeline.urls import normalize as normalize
from pipeline.urls import scheme as scheme
from pipeline.urls import shown as shown

__all__ = [
    "CutError",
    "MissingError",
    "Statistics",
    "StoreError",
    "check_relative",
    "configure",
    "delete",
    "drop_uploads",
    "exists",
    "for_ray",
    "give_up_when",
    "is_local",
    "join",
    "list_dir",
    "list_sizes",
    "list_times",
    "normalize",
    "read_bytes",
    "read_text",
    "scheme",
    "shown",
    "size",
    "statistics",
    "write_bytes",
]


def configure(settings: StorageConfig, reached: Iterable[str] = ()) -> None:
    """Let `settings` hold for this process from its next request on.

    `reached` are places whose store somebody else has reached for the same work, so that it
    is known to be there: if it does not answer, it is down and not misspelt.
    """
    limits.set_limits(settings)
    for url in reached:
        patience.expect(normalize(url))


class _Bucket(Protocol):
    """What s3.py and gs.py can do."""

    def open_object(self, url: str, start: int, end: int | None) -> transfer.Answer: ...
    def size(self, url: str) -> int: ...
    def exists(self, url: str) -> bool: ...
    def entries(self, url: str) -> dict[str, int | None]: ...
    def times(self, url: str) -> dict[str, int]: ...
    def write(self, url: str, data: bytes | memoryview) -> None: ...
    def delete(self, url: str) -> None: ...
    def delete_below(self, url: str) -> int: ...


_BUCKETS: dict[str, _Bucket] = {"s3": s3, "gs": gs}


# --- reading ----------------------------------------------------------------------------------


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """The whole of a file, or its bytes [start, end).

    Raises MissingError if it is not there, CutError if it ends before `end`, StoreError if it
    cannot be read.
    """
    place, begin = normalize(url), start or 0
    if end is not None and end <= begin:
        return b""
    if not is_local(place):
        return transfer.read(place, _opener(place), begin, end)
    try:
        data = local_files.read(Path(place), start, end)
    except OSError as error:
        raise explain(error, place) from error
    if end is not None and len(data) != end - begin:
        raise CutError(f"{shown(place)}: has {size(place)} bytes, {end} at least were expected. {CUT_REMEDY}")
    return data


def _opener(place: str) -> transfer.Open:
    if scheme(place) in WEB_SCHEMES:
        return partial(web.open_file, place)
    return partial(_BUCKETS[scheme(place)].open_object, place)


def read_text(url: str) -> str:
    """The whole of a UTF-8 text file. Raises like `read_bytes`."""
    try:
        return read_bytes(url).decode()
    except UnicodeDecodeError as error:
        raise StoreError(f"{shown(url)}: is not a UTF-8 text file.") from error


def exists(url: str) -> bool:
    """Whether there is a file at `url`, or a folder with something in it."""
    place = normalize(url)
    if is_local(place):
        return Path(place).exists()
    if scheme(place) not in WEB_SCHEMES:
        return patiently(lambda: _BUCKETS[scheme(place)].exists(place), place)
    try:
        size(place)
    except MissingError:
        return False
    return True


def size(url: str) -> int:
    """Bytes of the file at `url`. Raises MissingError if there is no such file."""
    place = normalize(url)
    if is_local(place):
        return local_files.size(Path(place))
    if scheme(place) in WEB_SCHEMES:
        return patiently(lambda: web.size(place), place)
    return patiently(lambda: _BUCKETS[scheme(place)].size(place), place)


def list_dir(url: str) -> list[str]:
    """Names of the files and folders directly in `url`, sorted; none if it is not there."""
    return sorted(_entries(url))


def list_sizes(url: str) -> dict[str, int]:
    """Bytes of each file directly in `url`, by name; one request per thousand files."""
    return {name: bytes_ for name, bytes_ in sorted(_entries(url).items()) if bytes_ is not None}


def list_times(url: str) -> dict[str, int]:
    """When each file directly in `url` was last written, in nanoseconds since 1970, by name.

    By the clock of the store, and in a bucket in whole seconds.
    """
    place = _listable(url)
    if is_local(place):
        return local_files.times(Path(place))
    return patiently(lambda: _BUCKETS[scheme(place)].times(place), place)


def _entries(url: str) -> dict[str, int | None]:
    """Size of each file directly in `url` by name; None for folders."""
    place = _listable(url)
    if is_local(place):
        return local_files.entries(Path(place))
    return patiently(lambda: _BUCKETS[scheme(place)].entries(place), place)


def _listable(url: str) -> str:
    place = normalize(url)
    if scheme(place) in WEB_SCHEMES:
        raise StoreError(f"{shown(url)}: a web server cannot be listed; give the URL of a file.")
    return place


# --- writing ----------------------------------------------------------------------------------


def write_bytes(url: str, data: bytes | memoryview) -> None:
    """Write a whole file; readers see the old one or the new one, never a part.

    It takes no second copy of large data, which must not change meanwhile.

    Raises StoreError if it cannot be written: no such bucket, no permission, no space.
    """
    place = _writable(url)
    if is_local(place):
        with local_files.written_atomically(Path(place)) as temporary:
            temporary.write_bytes(data)
    else:
        _BUCKETS[scheme(place)].write(place, data)


def delete(url: str, recursive: bool = False) -> None:
    """Delete a file, or with `recursive` a folder and all below it. Nothing there: no error.

    Raises StoreError for a whole bucket or file system, and if something could not be deleted.
    """
    place = _writable(url)
    if is_local(place):
        local_files.delete(Path(place), recursive)
        return
    bucket = _BUCKETS[scheme(place)]
    bucket.delete(place)
    if recursive and (left := bucket.delete_below(place)):
        raise StoreError(f"{shown(url)}: {left} files could not be deleted; do you have the permission?")


def drop_uploads(url: str, of: Callable[[str], bool]) -> int:
    """Give up what dead processes began to upload below the folder `url` and never ended; how many files.

    Of large files a bucket keeps the parts that arrived, unseen and at the price of files. `of`
    is told the path below the folder and says whose upload is to be given up: a living one
    would fail. Only S3 has such parts: a local write leaves a file that the next one sweeps,
    Google's expires after a week.

    Raises StoreError if the store refuses.
    """
    place = _writable(url)
    return s3.drop_uploads(place, of) if scheme(place) == "s3" else 0


def _writable(url: str) -> str:
    place = normalize(url)
    if scheme(place) in WEB_SCHEMES:
        raise StoreError(f"{shown(url)}: a web server can only be read; give a path or s3://bucket/folder.")
    if place == "/" or (scheme(place) in BUCKET_SCHEMES and "/" not in place.split("://", 1)[1]):
        raise StoreError(f"{shown(url)}: is a whole store, not a file or folder in it.")
    return place


def for_ray(url: str) -> dict[str, Any]:
    """Where Ray may keep its own files: `storage_path` and `storage_filesystem` of its RunConfig.

    Through pyarrow's view of fsspec, so that Ray needs no S3 settings of its own.
    """
    place = normalize(url)
    if is_local(place):
        return {"storage_path": place}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    handler = FSSpecHandler(buckets.make_system(place))
    return {"storage_path": place.split("://", 1)[1], "storage_filesystem": PyFileSystem(handler)}
