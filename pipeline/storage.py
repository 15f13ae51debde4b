"""Bytes in and out of any store: a local folder, an S3 bucket, Google Cloud Storage, a web server.

Functions on URLs, no objects: a file system made by fsspec may neither be pickled nor be
carried through a fork, so each process asks for its own, here, and keeps it to itself.
Credentials, region, endpoint and certificate authority come from the environment that every
S3 client understands (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION,
AWS_ENDPOINT_URL_S3, AWS_CA_BUNDLE) and never from our configuration.

A file is either there as a whole or not there: local files are written beside their place,
synced and renamed; S3 shows an object only when it is complete. Every answer of a network is
waited for with a limit, and what failed on the way is tried again with growing, jittered
pauses. An endpoint that has answered before gets a minute to come back; one that never
answered is probably misspelt, and the user learns that within seconds.

Local files go through the standard library, not fsspec, which cannot write atomically and
sync. fsspec's caches of listings are off: another worker may have written meanwhile.
"""

import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline import local_files, web
from pipeline.storage_errors import explain, is_final
from pipeline.urls import BUCKET_SCHEMES, WEB_SCHEMES, MissingError, StoreError
from pipeline.urls import check_relative as check_relative
from pipeline.urls import is_local as is_local
from pipeline.urls import join as join
from pipeline.urls import normalize as normalize
from pipeline.urls import scheme as scheme
from pipeline.urls import shown as shown

__all__ = [
    "MissingError",
    "StoreError",
    "check_relative",
    "delete",
    "download_file",
    "exists",
    "is_local",
    "join",
    "list_dir",
    "list_sizes",
    "normalize",
    "read_bytes",
    "read_text",
    "scheme",
    "shown",
    "size",
    "upload_file",
    "write_bytes",
]

_Result = TypeVar("_Result")

CONNECT_TIMEOUT_SECONDS = 5.0
READ_TIMEOUT_SECONDS = 15.0
OUTAGE_SECONDS = 60.0
"""How long an endpoint that has answered before may be out of reach."""
FIRST_CONTACT_SECONDS = 4.0
"""How long an endpoint that has never answered is tried."""
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 8.0


# --- reading ----------------------------------------------------------------------------------


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """The whole of a file, or its bytes [start, end).

    Raises MissingError if it is not there, StoreError if it cannot be read or ends before
    `end`.
    """
    place = normalize(url)
    wanted = None if end is None else max(end - (start or 0), 0)
    if wanted == 0:
        return b""

    def read() -> bytes:
        if is_local(place):
            data = local_files.read(Path(place), start, end)
        elif scheme(place) in WEB_SCHEMES:
            data = web.read(place, start, end, READ_TIMEOUT_SECONDS)
        else:
            data = _read_object(place, start, end)
        if wanted is not None and len(data) != wanted:
            _refuse_short_file(place, (start or 0) + wanted)
            raise ConnectionError(f"only {len(data)} of {wanted} bytes arrived")
        return data

    return _patiently(read, place)


def _refuse_short_file(place: str, end: int) -> None:
    """Tells a file that ends too early from a transfer that did."""
    found = size(place)
    if found < end:
        raise StoreError(
            f"{shown(place)}: has {found} bytes, {end} at least were expected. It was cut short or replaced; "
            f"write it again."
        )


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
    try:
        if scheme(place) in WEB_SCHEMES:
            _patiently(lambda: web.size(place, READ_TIMEOUT_SECONDS), place)
        else:
            _patiently(lambda: _bucket_system(place).info(place), place)
    except MissingError:
        return False
    return True


def size(url: str) -> int:
    """Bytes of the file at `url`. Raises MissingError if there is no such file."""
    place = normalize(url)

    def ask() -> int:
        if is_local(place):
            if not Path(place).is_file():
                raise FileNotFoundError(place)
            return Path(place).stat().st_size
        if scheme(place) in WEB_SCHEMES:
            return web.size(place, READ_TIMEOUT_SECONDS)
        info = _bucket_system(place).info(place)
        if info["type"] != "file":
            raise FileNotFoundError(place)
        return int(info["size"])

    return _patiently(ask, place)


def list_dir(url: str) -> list[str]:
    """Names of the files and folders directly in `url`, sorted; none if it is not there."""
    return sorted(_entries(url))


def list_sizes(url: str) -> dict[str, int]:
    """Bytes of each file directly in `url`, by name; one request per thousand files."""
    return {name: bytes_ for name, bytes_ in sorted(_entries(url).items()) if bytes_ is not None}


def download_file(url: str, local: str | Path) -> None:
    """Copy a file to `local`, which appears only when complete. Raises like `read_bytes`."""
    place = normalize(url)
    with local_files.written_atomically(Path(local)) as temporary:
        if is_local(place):
            _patiently(lambda: shutil.copyfile(place, temporary), place)
        elif scheme(place) in WEB_SCHEMES:
            temporary.write_bytes(read_bytes(place))
        else:
            _patiently(lambda: _bucket_system(place).get_file(place, str(temporary)), place)
            if temporary.stat().st_size != size(place):
                raise StoreError(f"{shown(url)}: changed while it was downloaded; try again.")


def _entries(url: str) -> dict[str, int | None]:
    """Size of each file directly in `url` by name; None for folders."""
    place = normalize(url)
    if scheme(place) in WEB_SCHEMES:
        raise StoreError(f"{shown(url)}: a web server cannot be listed; give the URL of a file.")
    if is_local(place):
        return local_files.entries(Path(place))
    return _patiently(lambda: _list_objects(place), place)


# --- writing ----------------------------------------------------------------------------------


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file; readers see the old one or the new one, never a part.

    Raises StoreError if it cannot be written: no such bucket, no permission, no space.
    """
    place = _writable(url)
    if is_local(place):
        with local_files.written_atomically(Path(place)) as temporary:
            temporary.write_bytes(data)
    else:
        _patiently(lambda: _bucket_system(place).pipe_file(place, data), place)


def upload_file(local: str | Path, url: str) -> None:
    """Copy a local file to `url`, as `write_bytes` does; large files in parallel parts."""
    place = _writable(url)
    if is_local(place):
        with local_files.written_atomically(Path(place)) as temporary:
            shutil.copyfile(local, temporary)
    else:
        _patiently(lambda: _bucket_system(place).put_file(str(local), place), place)


def delete(url: str, recursive: bool = False) -> None:
    """Delete a file, or with `recursive` a folder and all below it. Nothing there: no error.

    Raises StoreError for a whole bucket or file system, and if something could not be deleted.
    """
    place = _writable(url)
    if is_local(place):
        local_files.delete(Path(place), recursive)
        return
    _patiently(lambda: _bucket_system(place).rm_file(place), place)
    if recursive:
        _delete_below(place)


def _writable(url: str) -> str:
    place = normalize(url)
    if scheme(place) in WEB_SCHEMES:
        raise StoreError(f"{shown(url)}: a web server can only be read; give a path or s3://bucket/folder.")
    if place == "/" or (scheme(place) in BUCKET_SCHEMES and "/" not in place.split("://", 1)[1]):
        raise StoreError(f"{shown(url)}: is a whole store, not a file or folder in it.")
    return place


# --- buckets ----------------------------------------------------------------------------------

_systems: dict[tuple[object, ...], Any] = {}
_systems_lock = threading.Lock()
_answered: set[tuple[object, ...]] = set()


def _renew_lock() -> None:
    global _systems_lock
    _systems_lock = threading.Lock()


# Another thread may hold the lock at the moment of a fork; nobody in the child would release it.
os.register_at_fork(after_in_child=_renew_lock)


def _environment(url: str) -> tuple[object, ...]:
    """What decides which file system object serves `url`: process, scheme, credentials, endpoint."""
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    return (os.getpid(), scheme(url), hash(tuple(settings)))


def _bucket_system(url: str) -> Any:
    """This process's fsspec file system for `url`; safe to use from any of its threads."""
    key = _environment(url)
    with _systems_lock:
        if key not in _systems:
            _systems[key] = _make_system(url)
        return _systems[key]


def _make_system(url: str) -> Any:
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme(url) == "s3":
        # The region stays out of client_kwargs: s3fs would send it along as a bucket's location.
        # Checksums beyond the protocol's own break older and smaller S3 servers.
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "read_timeout": READ_TIMEOUT_SECONDS,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "max_pool_connections": 32,
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    try:
        return fsspec.url_to_fs(url, **options)[0]
    except ImportError as error:
        package = {"gs": "gcsfs", "s3": "s3fs"}[scheme(url)]
        raise StoreError(
            f"{shown(url)}: {scheme(url)}:// needs the package {package}: pip install {package}"
        ) from error


def _read_object(url: str, start: int | None, end: int | None) -> bytes:
    # One request for a whole object; by default s3fs asks for its size first.
    whole = {"max_concurrency": 1} if scheme(url) == "s3" else {}
    data: bytes = _bucket_system(url).cat_file(url, start=start, end=end, **whole)
    return data


def _list_objects(url: str) -> dict[str, int | None]:
    folder = url.split("://", 1)[1] + "/"
    try:
        listed = _bucket_system(url).ls(url, detail=True, refresh=True)
    except FileNotFoundError as error:
        if "NoSuchBucket" in repr(error.__cause__):
            raise
        return {}
    found: dict[str, int | None] = {}
    for entry in listed:
        name = entry["name"].removeprefix(folder).rstrip("/")
        if entry["name"].startswith(folder) and name:
            found[name] = int(entry["size"]) if entry["type"] == "file" else None
    return found


def _delete_below(url: str) -> None:
    for _ in range(3):
        names = _patiently(lambda: list(_bucket_system(url).find(url)), url)
        if not names:
            return
        _patiently(lambda names=names: _bucket_system(url).rm(names), url)  # type: ignore[misc]
    raise StoreError(f"{shown(url)}: {len(names)} files could not be deleted; do you have the permission?")


def for_ray(url: str) -> dict[str, Any]:
    """Where Ray may keep its own files: `storage_path` and `storage_filesystem` of its RunConfig.

    Through pyarrow's view of fsspec, so that Ray needs no S3 settings of its own.
    """
    place = normalize(url)
    if is_local(place):
        return {"storage_path": place}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    handler = FSSpecHandler(_make_system(place))
    return {"storage_path": place.split("://", 1)[1], "storage_filesystem": PyFileSystem(handler)}


# --- patience ---------------------------------------------------------------------------------


def _patiently(action: Callable[[], _Result], url: str) -> _Result:
    """`action()`, again after a pause while a network is at fault; errors explained."""
    remote = not is_local(url)
    endpoint = _environment(url) if remote else ()
    started, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
    while True:
        try:
            result = action()
        except StoreError:
            raise
        except Exception as error:
            if not remote or is_final(error):
                _answered.add(endpoint)
                raise explain(error, url) from error
            allowed = OUTAGE_SECONDS if endpoint in _answered else FIRST_CONTACT_SECONDS
            if time.monotonic() - started + pause > allowed:
                raise explain(error, url) from error
        else:
            _answered.add(endpoint)
            return result
        # Jitter keeps workers that failed together from coming back together.
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
