"""Taking away from this process, for good, whatever opening a file does not need.

Four layers, of which each holds alone what it is for, and which are put up in this order:

network     a network namespace of its own, in which there is no interface. Needs Linux and a
            kernel that lets a user make one; within many containers it does not.
limits      (rlimits) on memory, processor time, size of files written, number of open files and, for
            other users than root, on new processes; no core dump. Memory is not limited on macOS, which
            ignores that.
audit       Python's audit hook refuses what Python code would do harm by: files, sockets, processes,
            foreign functions, new code, Python's own unpickler. It stops no native code, but it
            is on every system, and what it refuses has a name.
calls       the filter of system_calls.py, which native code meets, too. Linux on x86-64 and ARM.

The reader, which makes nothing but tensors and plain values, comes before all of them; they are there for
what nobody knows of it yet. What could be put up is told to the user.
"""

import ctypes
import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pipeline.untrusted import system_calls

_PARENT_DEATH_SIGNAL = 1
_NEW_USER_AND_NETWORK = 0x10000000 | 0x40000000
_OPEN_FILES = 64
_REFUSED = (
    *("open", "exec", "compile", "import", "cpython.run_", "code.", "function.", "marshal.", "pickle."),
    *("os.", "posix.", "pathlib.", "shutil.", "tempfile.", "glob.", "fcntl.", "mmap.", "resource."),
    *("socket.", "http.", "urllib.", "ftplib.", "smtplib.", "subprocess.", "pty.", "signal.", "ctypes."),
    *("sys.set", "webbrowser.", "sqlite3.", "syslog."),
)
"""Beginnings of the names of audit events that end in an error."""


class ConfinedError(RuntimeError):
    """Something was tried that this process may no longer do."""


@dataclass(frozen=True)
class Limits:
    """How much a process may use from now on."""

    memory_bytes: int
    """Beyond what it has."""
    processor_seconds: int
    """Beyond what it has used."""
    written_bytes: int
    """Of any one file."""


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends, by whatever. On Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def leave_network() -> bool:
    """Move to a network without interfaces; whether that was possible.

    For a process of one thread: the kernel refuses others.
    """
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None, use_errno=True).unshare(_NEW_USER_AND_NETWORK) == 0)


def confine(limits: Limits) -> list[str]:
    """Put up the other layers; the names of those that stand.

    Afterwards only what is open can be read and written, and no module imported.
    """
    found = []
    if _limit(limits):
        found.append("limits")
    calls = system_calls.restrict()
    sys.addaudithook(_refuse)
    found.append("audit")
    if calls:
        found.append("calls")
    return found


def _limit(limits: Limits) -> bool:
    """Whether memory is limited, too."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + limits.processor_seconds)
    _lower(resource.RLIMIT_FSIZE, limits.written_bytes)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _lower(resource.RLIMIT_NPROC, 0)
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return False
    mapped = int(statistics.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return _lower(resource.RLIMIT_AS, mapped + limits.memory_bytes)


def _lower(what: int, limit: int) -> bool:
    _, highest = resource.getrlimit(what)
    if highest != resource.RLIM_INFINITY:
        limit = min(limit, highest)
    try:
        resource.setrlimit(what, (limit, limit))
    except (OSError, ValueError):
        return False
    return True


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(_REFUSED):
        _stop(event)


def _stop(event: str) -> NoReturn:
    raise ConfinedError(f"{event} is refused in this process")
