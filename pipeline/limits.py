"""How long this process waits for a store, and what its waiting has cost so far.

Process-wide, because a store is used from many threads and places and has one network in
front of it. Whoever begins its work with a configuration applies it; before that the
defaults of `storage.*` hold (pipeline/config.py).
"""

import os
import threading
from dataclasses import dataclass, replace

from pipeline.config import StorageConfig


@dataclass(frozen=True)
class Statistics:
    """What faults have cost this process since it began; differences of two say it of a span."""

    retries: int = 0
    """Requests that were made again."""
    reread_bytes: int = 0
    """Bytes that arrived and were thrown away: unasked for, or of a file that was replaced."""
    renewals: int = 0
    """Times that credentials were looked up anew."""
    paused_seconds: float = 0.0
    """Time slept between tries, summed over threads."""


_limits = StorageConfig()
_statistics = Statistics()
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


# Another thread may hold the lock at the moment of a fork; nobody in the child would release it.
os.register_at_fork(after_in_child=_renew_lock)


def limits() -> StorageConfig:
    """The settings that hold now."""
    return _limits


def set_limits(limits: StorageConfig) -> None:
    """Let other settings hold from the next request on."""
    global _limits
    _limits = limits


def statistics() -> Statistics:
    """What faults have cost this process until now."""
    return _statistics


def count(retries: int = 0, reread_bytes: int = 0, renewals: int = 0, paused_seconds: float = 0.0) -> None:
    """Add to the statistics; from any thread."""
    global _statistics
    with _lock:
        now = _statistics
        _statistics = replace(
            now,
            retries=now.retries + retries,
            reread_bytes=now.reread_bytes + reread_bytes,
            renewals=now.renewals + renewals,
            paused_seconds=now.paused_seconds + paused_seconds,
        )
