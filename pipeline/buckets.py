"""The door to buckets: this process's fsspec file system for each kind of store.

A file system made by fsspec may neither be pickled nor be carried through a fork, so each
process asks for its own, here, and keeps it to itself. Its own retries are off: they would
multiply with ours (patience.py), and they do not know of deadlines. fsspec's caches of
listings are off too: another worker may have written meanwhile.

botocore refreshes credentials whose source names an expiry (a credential_process, the
metadata service, web identity). Those that expire unannounced are looked up anew with a new
file system, for which the whole chain of sources is asked again.
"""

import os
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from pipeline.limits import count, limits
from pipeline.urls import WEB_SCHEMES, StoreError, scheme, shown

CONNECTIONS = 32
_BETWEEN_RENEWALS_SECONDS = 1.0

_Key = tuple[object, ...]
_systems: dict[_Key, Any] = {}
_made: dict[_Key, float] = {}
_lock = threading.Lock()
_inherited: list[Any] = []


def _begin_anew_in_child() -> None:
    """Forget the parent's file systems, but keep them: collected, they would use the parent's loop."""
    global _lock
    # Another thread may hold the lock at the moment of the fork; nobody would release it.
    _lock = threading.Lock()
    _inherited.extend(_systems.values())
    _systems.clear()


os.register_at_fork(after_in_child=_begin_anew_in_child)


def environment(url: str) -> _Key:
    """What decides which store `url` means and who asks: scheme, host, credentials, endpoint."""
    if scheme(url) in WEB_SCHEMES:
        return (scheme(url), urlsplit(url).netloc)
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    return (scheme(url), hash(tuple(settings)))


def _key(url: str) -> _Key:
    now = limits()
    return (*environment(url), now.connect_timeout_seconds, now.read_timeout_seconds)


def system(url: str) -> Any:
    """This process's fsspec file system for `url`; safe to use from any of its threads.

    Raises StoreError if the package for this kind of store is not installed.
    """
    key = _key(url)
    with _lock:
        if key not in _systems:
            _systems[key] = make_system(url)
            _made[key] = time.monotonic()
        return _systems[key]


def renew(url: str) -> bool:
    """Look the credentials for `url` up anew; False if that was done a moment ago."""
    key = _key(url)
    with _lock:
        if key in _systems:
            if time.monotonic() - _made[key] < _BETWEEN_RENEWALS_SECONDS:
                return False
            # Requests of other threads that are under way keep the old one until they end.
            del _systems[key]
            count(renewals=1)
    return True


def make_system(url: str) -> Any:
    """A new file system for `url`, shared with nobody. Raises like `system`."""
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme(url) == "s3":
        # The region stays out of client_kwargs: s3fs would send it along as a bucket's location.
        # Checksums beyond the protocol's own break older and smaller S3 servers.
        options["config_kwargs"] = {
            "connect_timeout": limits().connect_timeout_seconds,
            "read_timeout": limits().read_timeout_seconds,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "max_pool_connections": CONNECTIONS,
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    try:
        made = fsspec.url_to_fs(url, **options)[0]
    except ImportError as error:
        package = {"gs": "gcsfs", "s3": "s3fs"}[scheme(url)]
        raise StoreError(
            f"{shown(url)}: {scheme(url)}:// needs the package {package}: pip install {package}"
        ) from error
    if scheme(url) == "s3":
        made.retries = 1
    return made
