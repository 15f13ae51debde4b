"""A checkpoint or weights in torch's format, from whomever, without opening the file in this process.

It is opened in a process of its own (reading.py), which has no network, no other open file and none of our
environment, so no password either, and which hands over weights as safetensors and arguments as
JSON. These, too, are believed only as far as they were checked: that process may have been taken.
"""

import hashlib
import json
import os
import signal
import site
import stat
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pipeline.artifacts import ArtifactError, tensors_from_bytes
from pipeline.errors import InputError
from pipeline.training.private_folder import PrivateFolder

MOST_BYTES = 32 << 30
"""The largest published checkpoint has 4 GB."""
PREFIX = "nvae-import-"
"""Of folders of temporary files."""
_REPORT_BYTES = 4 << 20
_START_SECONDS = 120
_SECONDS_PER_GIB = 120
_ROOT = Path(__file__).parents[2]


class UntrustedError(InputError):
    """A checkpoint that was refused; nothing of it was used."""


@dataclass(frozen=True)
class Received:
    """What was in a published checkpoint."""

    arguments: Mapping[str, Any]
    """The published command line, where its values are plain."""
    weights: Mapping[str, Tensor]
    """By their published names; may fit the arguments or not."""
    epoch: int | None
    global_step: int | None
    sha256: str
    """Of the file."""
    layers: tuple[str, ...]
    """What the process that opened it was confined by, in the words of confinement.py."""


def receive(path: Path, kind: Literal["checkpoint", "weights"] = "checkpoint", source: str = "") -> Received:
    """What the file at `path` holds: a checkpoint of the published implementation, or weights alone.

    Messages call it `source`, if it came from elsewhere. Raises UntrustedError if it cannot be had.
    """
    named = source or str(path)
    try:
        # Not blocking: a pipe of this name would keep us waiting.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UntrustedError(f"{named}: cannot be read: {why}. Check the name.") from error
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise UntrustedError(f"{named}: is no file. Name the checkpoint itself.")
        if found.st_size > MOST_BYTES:
            raise UntrustedError(
                f"{named}: has {found.st_size:,} bytes, more than any checkpoint of a published model."
            )
        private = PrivateFolder(PREFIX)
        try:
            return _received(named, file, found.st_size, private.path, kind)
        finally:
            private.leave(keep=False)
    except OSError as error:
        raise UntrustedError(f"{named}: cannot be read: {error.strerror or error}.") from error
    finally:
        os.close(file)


def _received(named: str, file: int, size: int, folder: Path, kind: str) -> Received:
    weights, report = folder / "weights", folder / "report"
    with weights.open("xb") as weights_file, report.open("xb") as report_file:
        command = [
            sys.executable,
            "-P",
            "-m",
            "pipeline.untrusted.reading",
            str(report_file.fileno()),
            str(size),
            kind,
        ]
        process = subprocess.Popen(
            command,
            stdin=file,
            stdout=weights_file,
            stderr=subprocess.DEVNULL,
            pass_fds=[report_file.fileno()],
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        ended = _ended(process, _START_SECONDS + _SECONDS_PER_GIB * (size / 2**30))
    if report.stat().st_size > _REPORT_BYTES or not report.stat().st_size:
        raise UntrustedError(f"{named}: {_how_it_ended(ended)} Nothing of it was used.")
    return _believed(named, file, report.read_bytes(), weights)


def _environment(folder: Path) -> dict[str, str]:
    """What Python needs to find this code, and one thread; no password."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    kept = {
        name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ
    }
    places = {"HOME": str(folder), "TMPDIR": str(folder), "PYTHONPATH": str(_ROOT)}
    # Where packages may be that were installed for this user alone.
    places["PYTHONUSERBASE"] = site.getuserbase()
    return kept | threads | places | {"PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit status; None if it had to be killed. No child of it is left in any case."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _how_it_ended(ended: int | None) -> str:
    if ended is None:
        return "took far too long to be opened, and was given up."
    if ended == -signal.SIGXCPU or ended == -signal.SIGKILL:
        return "used more processor time or memory to be opened than a checkpoint of its size may."
    if ended < 0:
        return f"ended the process that opened it ({signal.Signals(-ended).name}): it is damaged, or made to."
    return f"could not be opened: the process for it ended with status {ended}."


def _believed(named: str, file: int, report: bytes, weights: Path) -> Received:
    """The answer, of the types that it must have."""
    try:
        answer = json.loads(report)
        layers = tuple(str(each) for each in answer["layers"])
        if "refused" in answer:
            raise UntrustedError(f"{named}: {_printable(answer['refused'])}.")
        arguments = answer["arguments"]
        if not isinstance(arguments, dict):
            raise TypeError
        tensors = tensors_from_bytes(weights.read_bytes(), named)
        epoch, step = _count(answer["epoch"]), _count(answer["global_step"])
        return Received(arguments, tensors, epoch, step, _sha256(file), layers)
    except (ValueError, KeyError, TypeError, RecursionError, ArtifactError) as error:
        if isinstance(error, UntrustedError):
            raise
        raise UntrustedError(f"{named}: the process that opened it did not say what it holds.") from error


def _sha256(file: int) -> str:
    # That process has read from the same place on.
    os.lseek(file, 0, os.SEEK_SET)
    with os.fdopen(file, "rb", closefd=False) as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()


def _printable(text: object) -> str:
    """Words that come from the file may hold whatever a terminal obeys."""
    return "".join(each if each.isprintable() else "?" for each in str(text))[:1000].rstrip(".")


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None
