"""Hostile and damaged checkpoints through `nvae import`: how many were tried, how many refused.

    make faults-import
    python -m tests.faults.importing --only code,sizes --seed 7 --short

Each is a real import, in real processes. Refused means: one message in one printable line, nothing run
(no marker), nothing exported, no process left, this process no more than 256 MiB larger. A flipped bit
may lie where it means nothing; then the weights must be those that were saved. Of `hole` the reader is
left out: Python's own unpickler, which runs code, reads the same pickles within the confinement.
It ends with 1 if any line has refused less than was tried, and says what was not.
"""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipeline import importing
from pipeline.config_file import ConfigError
from pipeline.errors import InputError
from pipeline.untrusted.published import MOST_BYTES
from tests.faults import hostile_checkpoints as hostile
from tests.faults.campaign import command
from tests.faults.hostile_checkpoints import MARKER
from tests.faults.hostile_weights import weight_payloads
from tests.faults.injection import Row, Tally, grown_mib

MOST_GROWN_MIB = 256
MOST_SECONDS = 60
DAMAGED = 40
"""Cuts of each format; twice as many bits are flipped."""
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Place:
    """Where a row works."""

    folder: Path
    """Empty, of the row's own, and the working directory."""
    seed: int
    short: bool

    def some(self, payloads: hostile.Payloads) -> hostile.Payloads:
        return dict(list(payloads.items())[::10]) if self.short else payloads


def imported(source: str) -> importing.Imported:
    return importing.take_in(source, None, ["sampling.count=1"], None, 1, 4)


def refuse(source: str, folder: Path) -> None:
    """Import `source`, and see that it is refused as is promised."""
    before, began = set(folder.iterdir()), time.monotonic()
    with grown_mib() as grown, pytest.raises(InputError) as caught:
        imported(source)
    message = str(caught.value)
    # Only of settings that differ there are several lines.
    assert message.isprintable() or isinstance(caught.value, ConfigError), repr(message)
    assert len(message) < 2000
    assert_nothing_happened(folder, before, grown[0])
    assert time.monotonic() - began < MOST_SECONDS


def assert_nothing_happened(folder: Path, before: set[Path], grown: float) -> None:
    assert set(folder.iterdir()) == before, "something was made"
    assert not any(Path(place, MARKER).exists() for place in (folder.parent, "/tmp", "/"))
    assert grown < MOST_GROWN_MIB, f"grew by {grown:.0f} MiB"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def refused(place: Place, payloads: hostile.Payloads, id: str, fault: str) -> Row:
    tally, path = Tally(), place.folder / "checkpoint.pt"
    for what, payload in place.some(payloads).items():
        with tally.attempt(what):
            path.write_bytes(hostile.content(payload))
            refuse(str(path), place.folder)
    return tally.row(id, fault, f"largest process that opened one: {largest_mib():.0f} MiB")


def largest_mib() -> float:
    """Of all processes that this one started and that have ended; torch alone takes some 200 MiB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def code(place: Place) -> Row:
    return refused(
        place, hostile.code_payloads(), "code", "calls in pickles, in zips and bare, by every opcode"
    )


def archives(place: Place) -> Row:
    return refused(
        place,
        hostile.archive_payloads(),
        "archives",
        "zips whose entries lead out, overlap, are links, doubled, compressed, bombs",
    )


def sizes(place: Place) -> Row:
    return refused(
        place,
        hostile.size_payloads(),
        "sizes",
        "shapes, storages, lengths and arguments that promise more than there is; nesting",
    )


def models(place: Place) -> Row:
    return refused(
        place,
        hostile.model_payloads(),
        "models",
        "what is no model: NaN, types, shapes, arguments, other files",
    )


def weights(place: Place) -> Row:
    return refused(
        place, dict(weight_payloads(Path(MARKER))), "weights", "what is hostile as an export's weights (S2)"
    )


def damage(place: Place) -> Row:
    """Cut files are refused; a flipped bit is, too, or changes nothing."""
    tally, path, saved = Tally(), place.folder / "checkpoint.pt", hostile.good()["state_dict"]
    unnoticed = 0
    for what, data, cut in hostile.damage_payloads(3 if place.short else DAMAGED, place.seed):
        with tally.attempt(what):
            path.write_bytes(data)
            try:
                refuse(str(path), place.folder)
            except pytest.fail.Exception:
                assert not cut, "a cut file was taken"
                assert_same_weights(imported(str(path)), saved)
                unnoticed += 1
    return tally.row(
        "damage",
        "files cut, of both formats, and bits flipped in zips (the old format has no checksums)",
        f"{unnoticed} flipped bits meant nothing, all others were refused",
    )


def assert_same_weights(found: importing.Imported, saved: dict[str, torch.Tensor]) -> None:
    from nvae.published import published_names

    state = found.model.state_dict()
    for ours, published in published_names(found.model).items():
        assert torch.equal(state[ours], saved[published]), f"{published} changed"


def places(place: Place) -> Row:
    """What is named is no file, or no longer, or too large."""
    tally, folder = Tally(), place.folder
    os.mkfifo(folder / "pipe")
    (folder / "nowhere").symlink_to("gone.pt")
    (folder / "circle").symlink_to("circle")
    (folder / "device").symlink_to("/dev/zero")
    for name, size in (("sparse", 8 << 30), ("larger than allowed", MOST_BYTES + 1)):
        with (folder / name).open("wb") as file:
            file.truncate(size)
    sources = ["pipe", "nowhere", "circle", "device", "sparse", "larger than allowed", ".", "x" * 300, "a\0b"]
    elsewhere = [
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        "pipe:touch marker",
        "s3://bucket/$(touch marker)",
    ]
    for source in [*sources, *elsewhere, "http://169.254.169.254/latest", "file:///etc/passwd", ""]:
        with tally.attempt(repr(source)):
            refuse(str(folder / source) if source in sources else source, folder)
    return tally.row(
        "places", "pipes, devices, links, sparse files, places of other kinds", "refused at once"
    )


HOLE = """
import builtins, ctypes, os, pathlib, pickle, runpy, shutil, socket, subprocess, sys
from pipeline.untrusted import system_calls
from pipeline.untrusted.confinement import Limits, confine
stream = sys.stdin.buffer.read()
if sys.argv[1] == "calls":
    assert system_calls.restrict()
elif sys.argv[1] == "all":
    confine(Limits(1 << 28, 10, 0))
try:
    pickle.loads(stream)
except BaseException as error:
    pass
os._exit(0)
"""


MADE = "os.system", "os.mkdir", "subprocess.Popen", "builtins.eval", "builtins.open", "shutil.copy"
"""Calls that are let do what they do, unconfined, to see that they would."""


def hole(place: Place) -> Row:
    """If the reader had a hole: the unpickler that runs code, in all layers, and in the last one alone."""
    tally, folder = Tally(), place.folder

    def unpickle(asked: tuple[str, str, tuple[object, ...]], layers: str) -> None:
        subprocess.run(
            [sys.executable, "-c", HOLE, layers],
            input=b"\x80\x02" + hostile.call(*asked) + b".",
            cwd=folder,
            env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
            capture_output=True,
            timeout=MOST_SECONDS,
        )

    for what in MADE:
        unpickle(hostile.CALLS[what], "none")
        made, until = folder / MARKER, time.monotonic() + 5
        while not made.exists() and time.monotonic() < until:
            time.sleep(0.01)
        made.rmdir() if made.is_dir() else made.unlink()
    for what, asked in place.some(hostile.CALLS).items():
        for layers in ("all", "calls"):
            with tally.attempt(f"{what} within {layers}"):
                unpickle(asked, layers)
                assert_nothing_happened(folder, set(), 0)
    return tally.row("hole", "the same calls by an unpickler that makes them, confined", "nothing was made")


def honest(place: Place) -> Row:
    """What is good is taken, so that refusing everything is no success."""
    tally, path, state = Tally(), place.folder / "checkpoint.pt", hostile.good()
    for what, data in (("zip", hostile.content(state)), ("old format", hostile.old_format(state))):
        with tally.attempt(what):
            path.write_bytes(data)
            (place.folder / "link.pt").unlink(missing_ok=True)
            (place.folder / "link.pt").symlink_to(path)
            for source in ("checkpoint.pt", "link.pt"):
                assert_same_weights(imported(str(place.folder / source)), state["state_dict"])
    return tally.row("honest", "good checkpoints of both formats", "taken, not refused")


ROWS: dict[str, Callable[[Place], Row]] = {
    row.__name__: row for row in (honest, code, archives, sizes, models, weights, damage, places, hole)
}


def run(names: Sequence[str], seed: int, short: bool) -> list[Row]:
    """Try the rows `names`; print each as soon as it is there."""
    rows = []
    print(f"{'':9} {'tried':>6} {'refused':>8} {'seconds':>7}  what: measured", flush=True)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="nvae-faults-") as outer:
            folder = Path(outer) / "work"
            folder.mkdir()
            began = time.monotonic()
            with (
                Path(os.devnull).open("w") as nobody,
                contextlib.chdir(folder),
                contextlib.redirect_stderr(nobody),
            ):
                row = ROWS[name](Place(folder, seed, short))
        print(
            f"{row.id:9} {row.tried:6,} {row.survived:8,} {time.monotonic() - began:7.1f}  "
            f"{row.fault}: {row.measured}",
            flush=True,
        )
        for what in row.broken:
            print(f"     NOT REFUSED: {what}", flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(command("tests.faults.importing", __doc__, ROWS, run, sys.argv[1:]))
