"""Faults of checkpoints: flipped bits, cut, missing and mixed files; processes killed in a save.

    python -m tests.faults.checkpoint_faults --seed 7

Survived is a fault after which the newest intact checkpoint is found and is, bit by bit, what was
saved: the one before where the newest was damaged, the new one if and only if its manifest was
there when its writer was killed. What a killed writer left behind is gone after the next save.

A writer is killed before any one of the operations on files that a launch makes from its claim
to the last deletion, and in the middle of writing each file, by a limit on the size of files.
"""

import argparse
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.training.checkpoint import Checkpoint, newest
from pipeline.training.checkpoint_writer import CheckpointWriter, claim_attempt
from tests.faults.injection import environment_of_child

BEFORE, AFTER, LATER = 64, 128, 192
"""Images seen at the checkpoint that is there, at the one that is being saved, at the next."""
# Each larger than the one before, so that a limit on the size of files picks one.
FLOATS = {"model": 1_000, "ema": 4_000, "optimizer": 16_000}
RECORD = {"text": "x" * 200_000}
LIMITS = {"model": 2_000, "ema": 8_000, "optimizer": 32_000, "manifest": 120_000}
"""Bytes at which a save dies in the middle of a file."""
FILES = (*(f"{name}.safetensors" for name in FLOATS), "manifest.json")
# What Python tells its audit hooks of changes to files.
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


@dataclass
class Counts:
    """What became of one kind of fault."""

    name: str
    tried: int = 0
    survived: int = 0
    broken: list[str] = field(default_factory=list)

    def add(self, what: str, problem: str) -> None:
        self.tried += 1
        self.survived += not problem
        if problem:
            self.broken.append(f"{what}: {problem}")


def run(seed: int, flips: int, kills: int) -> list[Counts]:
    """At least so many flipped bits and cuts, and so many kills or as many as there are places."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        return [
            damage(chance, Path(folder, "flips"), flips),
            mixtures(Path(folder, "mixtures")),
            deaths(chance, Path(folder, "kills"), kills),
        ]


def state(images: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(images)
    return {name: {"w": torch.randn(size, generator=generator)} for name, size in FLOATS.items()}


def save(url: str, attempt: int, *images: int, keep: int = 2) -> None:
    writer = CheckpointWriter(url, attempt, keep)
    for count in images:
        writer.save(state(count), RECORD, count, {})
        writer.wait()


def problem_of(found: Checkpoint | None, expected: Sequence[int]) -> str:
    """What is wrong with the checkpoint that was found; empty if nothing is."""
    if found is None or found.images_seen not in expected:
        return f"found {found and found.images_seen}, not {' or '.join(map(str, expected))}"
    for name, tensors in state(found.images_seen).items():
        if not torch.equal(found.load(name)["w"], tensors["w"]):
            return f"{name} is not what was saved"
    return ""


def found_in(url: str, expected: Sequence[int]) -> str:
    try:
        return problem_of(newest(url), expected)
    except InputError as error:
        return str(error)


# --- damage -----------------------------------------------------------------------------------


def damage(chance: random.Random, run_folder: Path, times: int) -> Counts:
    """One bit flipped, or the end cut off, at random places of all files by turns."""
    counts = Counts("flips and cuts")
    save(str(run_folder), 1, BEFORE, AFTER)
    folder = run_folder / "checkpoints" / f"{AFTER:012d}-001"
    for number, name in zip(range(times), itertools.cycle(FILES), strict=False):
        whole = (folder / name).read_bytes()
        place, bit = chance.randrange(len(whole)), chance.randrange(8)
        damaged = bytearray(whole)
        if number // len(FILES) % 2:
            damaged[place] ^= 1 << bit
        else:
            del damaged[place:]
        (folder / name).write_bytes(damaged)
        counts.add(f"{name}, place {place}, bit {bit}", found_in(str(run_folder), [BEFORE]))
        (folder / name).write_bytes(whole)
    return counts


def mixtures(run_folder: Path) -> Counts:
    """Each file gone, exchanged with that of the other checkpoint, and all of them exchanged."""
    counts = Counts("missing and mixed")
    for number, (names, exchanged) in enumerate(
        [*(((name,), both) for name in FILES for both in (False, True)), (FILES, True)]
    ):
        url = run_folder / str(number)
        save(str(url), 1, 32, BEFORE, AFTER, keep=3)
        older, newer = (url / "checkpoints" / f"{images:012d}-001" for images in (BEFORE, AFTER))
        for name in names:
            (newer / name).rename(url / name)
            if exchanged:
                (older / name).rename(newer / name)
                (url / name).rename(older / name)
        what = f"{', '.join(names)} {'exchanged' if exchanged else 'gone'}"
        counts.add(what, found_in(str(url), [32] if exchanged else [BEFORE]))
    return counts


# --- death ------------------------------------------------------------------------------------


def deaths(chance: random.Random, folder: Path, times: int) -> Counts:
    """A process killed at different places of a launch that saves one checkpoint and deletes one."""
    counts = Counts("kills in a save")
    for place, url, status in killed_saves(chance, folder, times):
        if status not in (signal.SIGKILL, signal.SIGXFSZ):
            counts.add(place, f"was to be killed, and ended with {status}")
            continue
        manifest = Path(url, "checkpoints", f"{AFTER:012d}-002", "manifest.json")
        problem = found_in(url, [AFTER if manifest.exists() else BEFORE])
        attempt = claim_attempt(url)
        save(url, attempt, LATER, keep=1)
        problem = problem or found_in(url, [LATER])
        left = [path for path in Path(url, "checkpoints").glob("*/*") if path.parent.name[:12].isdigit()]
        if not problem and {path.parent.name for path in left} != {f"{LATER:012d}-{attempt:03d}"}:
            problem = f"left behind: {sorted(map(str, left))}"
        counts.add(place, problem)
    return counts


def killed_saves(chance: random.Random, folder: Path, times: int) -> Iterator[tuple[str, str, int]]:
    """Place, run and what ended the process of each save that was to be killed."""
    template = folder / "template"
    save(str(template), claim_attempt(str(template)), BEFORE)
    places = [f"limit {name}" for name in LIMITS]
    operations = [f"operation {number}" for number in range(1, count_operations(folder, template) + 1)]
    chance.shuffle(operations)
    places += sorted(operations[: max(0, times - len(places))])
    urls = {place: folder / place.replace(" ", "-") for place in places}
    for url in urls.values():
        shutil.copytree(template, url)
    for line in children([f"{place} {url}" for place, url in urls.items()]).splitlines():
        kind, which, status = line.split()
        place = f"{kind} {which}"
        yield place, str(urls[place]), int(status)


def count_operations(folder: Path, template: Path) -> int:
    shutil.copytree(template, folder / "counted")
    return int(children([f"count - {folder / 'counted'}"]).split()[2])


def children(orders: Sequence[str]) -> str:
    """Runs `child` for each order in a process of its own; one import of torch serves them all."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.checkpoint_faults", "--children"],
        input="\n".join(orders),
        capture_output=True,
        text=True,
        timeout=60 + 10 * len(orders),
        check=True,
        env=environment_of_child(),
    )
    return done.stdout


def serve_children() -> None:
    for order in sys.stdin.read().splitlines():
        kind, which, url = order.split()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, str(launch(kind, which, url)).encode())
            os._exit(0)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        seen = os.read(reader, 100).decode()
        os.close(reader)
        print(kind, which, seen or os.WTERMSIG(status), flush=True)


def launch(kind: str, which: str, url: str) -> int:
    """A launch that claims its attempt and saves a checkpoint, and is to die at a place of that.

    Returns how many operations on files it took, if it lives.
    """
    done = 0

    def count_or_die(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event in OPERATIONS and str(arguments[0]).startswith(url):
            done += 1
            if kind == "operation" and done == int(which):
                os.kill(os.getpid(), signal.SIGKILL)

    if kind == "limit":
        # Python ignores this signal, and would see an error instead.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMITS[which], LIMITS[which]))
    sys.addaudithook(count_or_die)
    save(url, claim_attempt(url), AFTER, keep=1)
    return done


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.checkpoint_faults", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flips", type=int, default=1_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--children", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if asked.children:
        serve_children()
        return 0
    results = run(asked.seed, asked.flips, asked.kills)
    for counts in results:
        print(f"{counts.name:20} {counts.tried:6,} {counts.survived:6,}")
        for what in counts.broken:
            print(f"     NOT SURVIVED: {what}")
    return int(any(counts.survived < counts.tried for counts in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
