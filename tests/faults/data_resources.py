"""D8, D10: a cache on disks that refuse, and processes that start while the store is in use."""

import contextlib
import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.data.index import SPLITS, Index
from tests.faults.injection import Place, Row, Tally, assert_exact, noise, plan_of, read
from tests.pipeline.data.data_set import config

ROOT = Path(__file__).parents[2]
# Entries of the cache of D8, in which the data set has six.
NONE, SOME, ALL = range(1), range(1, 6), range(6, 7)
KINDS_OF_START = ("os.fork", "fork", "forkserver", "spawn")


def cache_disks(place: Place) -> Row:
    """D8: a cache on a disk that is full, gets full, is read-only or has a quota; a kill in a write."""
    tally = Tally()
    local = noise(place.folder, 96, 32, 2**16)
    settings = config(batch_size=24, lanes=24, shuffle_window=4, model={"image_size": 32})
    remote, planned = place.uploaded(local, "set"), plan_of(local, settings)
    clean, disk = read(settings, remote), place.folder / "disk"
    disk.mkdir()
    cached = config(
        batch_size=24, lanes=24, shuffle_window=4, model={"image_size": 32}, cache_folder=f"{disk}/cache"
    )
    kept = []

    def attempt(what: str, entries: Container[int]) -> None:
        """`entries`: how many of them such a disk takes. Another number, and it is not such a disk."""
        for _ in range(2):
            with tally.attempt(what):
                assert_exact(read(cached, remote), clean, planned)
                kept.append(check_entries(disk / "cache", local))
                assert kept[-1] in entries, f"{kept[-1]} entries"

    why_not = why_no_mounts(place.folder)
    if not why_not:
        _on_small_disks(disk, local, attempt)
    with limited_files(20_000):
        attempt("a quota on the size of files", NONE)
    (disk / "cache").rename(place.folder / "before")
    (disk / "cache").write_bytes(b"")
    with tally.attempt("a file in the cache's place"):
        assert_exact(read(cached, remote), clean, planned)
    (disk / "cache").unlink()
    for number in range(3 if place.short else 20):
        killed_writer(disk / "cache", 0.05 + 0.002 * number)
        attempt(f"after kill {number} of a writer", ALL)
    untried = f"; NOT TRIED: {', '.join(ON_SMALL_DISKS)} ({why_not})" if why_not else ""
    return tally.row(
        "D8",
        "cache on a disk that is full, read-only, without inodes, under a quota; writers killed",
        f"batches exact, {sum(kept):,} entries looked at, none corrupt{untried}",
    )


ON_SMALL_DISKS = (
    "a disk that gets full",
    "a full disk",
    "room for all",
    "a full cache on a read-only disk",
    "a read-only disk",
    "a disk without inodes",
)


def _on_small_disks(disk: Path, index: Index, attempt: Callable[[str, Container[int]], None]) -> None:
    """What only somebody who may mount disks can try, by its names above."""
    gets_full, full, room, full_cache, read_only, no_inodes = ON_SMALL_DISKS
    whole = sum(shard.bytes for split in SPLITS for shard in index.shards(split))
    with mounted(disk, whole // 4):
        attempt(gets_full, SOME)
    with mounted(disk, whole // 4):
        (disk / "others").write_bytes(bytes(free_bytes(disk)))
        attempt(full, NONE)
    with mounted(disk, 2 * whole):
        attempt(room, ALL)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        attempt(full_cache, ALL)
    with mounted(disk, 2 * whole, "ro"):
        attempt(read_only, NONE)
    with mounted(disk, 2 * whole, "nr_inodes=6"):
        attempt(no_inodes, SOME)


def why_no_mounts(folder: Path) -> str:
    """Why this process cannot mount a small disk of its own, tried in `folder`; "" if it can."""
    trial = folder / "trial"
    trial.mkdir()
    try:
        with mounted(trial, 4096):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().partition("\n")[0]
        return f"only root, outside of most containers, may mount a disk: {said}"
    finally:
        trial.rmdir()


@contextlib.contextmanager
def mounted(folder: Path, size: int, option: str = "rw") -> Iterator[None]:
    """A small disk of its own at `folder`."""
    options = f"size={-(-size // 4096) * 4096},{option}"
    command = ["mount", "-t", "tmpfs", "-o", options, "faults", str(folder)]
    subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def free_bytes(folder: Path) -> int:
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


@contextlib.contextmanager
def limited_files(most: int) -> Iterator[None]:
    """No file of this process can be larger than `most` bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def check_entries(folder: Path, index: Index) -> int:
    """How many pieces are in the cache; each has to be the bytes that its name says."""
    tars = {
        shard.sha256: (Path(index.root) / shard.name).read_bytes()
        for split in SPLITS
        for shard in index.shards(split)
    }
    names = [path for path in folder.glob("nvae-pieces/*") if "-" in path.name]
    for path in names:
        if path.name.endswith(".partial"):
            continue
        digest, start, end = path.name.split("-")
        assert path.read_bytes() == tars[digest][int(start) : int(end)], f"{path.name} is corrupt"
    return len(names)


def killed_writer(folder: Path, seconds: float) -> None:
    """A process that fills the cache with pieces of its own and is killed in the midst of it."""
    command = [sys.executable, "-m", "tests.faults.cache_writer", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.read(1) == b"x"
        time.sleep(seconds)
        assert writer.poll() is None, "the writer ended by itself"
        writer.kill()
    for path in folder.glob("nvae-pieces/*"):
        if path.name.startswith("foreign") and not path.name.endswith(".partial"):
            content = path.read_bytes()
            assert hashlib.sha256(content).hexdigest() == path.name.split("_")[1], path
            path.unlink()


def starts(place: Place) -> Row:
    """D10: processes of each kind that start while threads use the store."""
    tally, count = Tally(), 2 if place.short else 50

    def start(how: str) -> tuple[subprocess.CompletedProcess[str], float]:
        url, begun = f"{place.bucket}/{place.folder.name}/{how}", time.monotonic()
        command = [sys.executable, "-m", "tests.storage_starts", url, how, str(count)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
        return ended, (time.monotonic() - begun) / count

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(KINDS_OF_START, pool.map(start, KINDS_OF_START), strict=True))
    for how, (ended, _) in results.items():
        with tally.attempt(how, lambda: count):
            assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    took = ", ".join(f"{how} {seconds:.2f} s" for how, (_, seconds) in results.items())
    return tally.row("D10", "processes that start while the store is in use", f"no hang; a start: {took}")
