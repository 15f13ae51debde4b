"""Builds the C of this package, once per machine, and loads it.

A few of an NVAE's operations are served badly by torch on a CPU and are written in C beside the
Python that calls them. Any C compiler does; it takes a second, and what it made is kept in
`~/.cache/nvae/native`, by the hash of the source, the compiler and the processor it is for. Where
there is no compiler, or it fails, a warning says so and the caller computes by torch.

Rejected: torch.utils.cpp_extension (half a minute, headers and ninja), torch.compile for these
operations (3 to 4 s of imports in every process; 10 instead of 40 GFLOP/s on the largest), wheels with
binaries (one for each platform, and none for the processor at hand).
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

_SECONDS = 120
"""After which a compiler is given up."""


@cache
def load(name: str) -> ctypes.CDLL | None:
    """The library made of `nvae/NAME.c`; None, after a warning, if there is none to be had."""
    source = Path(__file__).with_name(f"{name}.c")
    compiler = _compiler()
    if compiler is None:
        _warn(name, "there is no C compiler; install gcc or clang")
        return None
    for options in (["-fopenmp"], []):  # A compiler may lack OpenMP: then there is one thread.
        command = [*compiler, "-O3", f"-m{_ARCHITECTURE}=native", *options, "-shared", "-fPIC"]
        try:
            return _library(source, command)
        except (OSError, subprocess.SubprocessError) as error:
            found = str(getattr(error, "stderr", "") or error).strip()
    _warn(name, f"{shlex.join(command)} failed: {found}")
    return None


_ARCHITECTURE = "cpu" if platform.machine() in ("aarch64", "arm64") else "arch"


def _warn(name: str, reason: str) -> None:
    warnings.warn(f"nvae/{name}.c is not used, and torch, which is slower, is: {reason}", stacklevel=4)


def _compiler() -> list[str] | None:
    """CC of the environment, or what this machine has."""
    if command := shlex.split(os.environ.get("CC", "")):
        return command
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return None if found is None else [found]


def _library(source: Path, command: list[str]) -> ctypes.CDLL:
    # What the compiler predefines tells its version, its options and the processor.
    about = _output([*command, "-dM", "-E", "-x", "c", os.devnull])
    key = hashlib.sha256(source.read_bytes() + " ".join(command).encode() + about).hexdigest()[:16]
    with tempfile.TemporaryDirectory() as mine:
        folder = _cache() or Path(mine)
        library = folder / f"{source.stem}-{key}.so"
        if not library.exists():
            built = Path(mine) / "built.so"
            _output([*command, str(source), "-o", str(built)])
            # Under its name at once or not at all: other processes may be about the same.
            partly = folder / f".{library.name}.{os.getpid()}"
            shutil.copyfile(built, partly)
            partly.replace(library)
        return ctypes.CDLL(str(library))


def _output(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, check=True, timeout=_SECONDS).stdout
    except subprocess.CalledProcessError as error:
        error.stderr = error.stderr.decode(errors="replace")[-2000:]
        raise


def _cache() -> Path | None:
    """A folder that nobody else can write to: what lies there is run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "nvae" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except (OSError, RuntimeError):
        return None
    private = about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if private and os.access(folder, os.W_OK) else None
