"""Notes that a training takes: which images each update learned from, and when it was made.

Each rank of each launch writes a file of its own. Times are of the clock that all processes of a
machine share, so that whoever kills one from outside can say how long the training stood still.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import RunConfig
from pipeline.data.index import Index
from pipeline.data.loader import Batch
from pipeline.training import train
from pipeline.training.worker import Worker
from tests.recorded_batches import planned


@contextmanager
def noted(folder: Path, worker: Worker) -> Iterator[None]:
    """Note every update of every training in this process. Collective."""
    # Rank 0's time names the launch, and orders launches.
    launch = worker.all_reduce(torch.tensor(time.monotonic_ns() if worker.rank == 0 else 0))
    batches_of = train.training_batches

    def tapped(config: Any, index: Index, **where: Any) -> Generator[Batch, None, None]:
        batches = batches_of(config, index, **where)
        first = where["start"]
        note({"pid": os.getpid(), "world_size": worker.world_size, "start": first})
        try:
            for batch in batches:
                samples = list(zip(batch.positions.tolist(), batch.keys, strict=True))
                note({"first": first, "samples": samples})
                yield batch
                # Asked for the next batch: the update of this one has been made.
                note({"first": first, "made": time.monotonic()})
                first += batch.global_size
        finally:
            batches.close()

    # Unbuffered: what was noted before a SIGKILL is in the file.
    with (
        (folder / f"{int(launch):020d}-{worker.rank:02d}.jsonl").open("wb", buffering=0) as out,
        pytest.MonkeyPatch.context() as patch,
    ):

        def note(what: Mapping[str, Any]) -> None:
            out.write(json.dumps(what).encode() + b"\n")

        patch.setattr(train, "training_batches", tapped)
        yield


@dataclass
class Rank:
    """The notes of one process."""

    launch: int
    """The greater is the later."""
    rank: int
    pid: int = 0
    """0 until it has begun to train."""
    world_size: int = 0
    start: int = 0
    """Images seen when it began."""
    samples: list[tuple[int, list[tuple[int, str]]]] = field(default_factory=list)
    """(images seen before it, (position, key) of this rank's share) of each update that was begun."""
    made: list[tuple[int, float]] = field(default_factory=list)
    """(images seen before it, time) of each update that was made."""


class Notes:
    """The notes of all launches; `read` takes up what was added since."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranks: dict[str, Rank] = {}
        self._read: dict[str, int] = {}

    def read(self) -> "Notes":
        for file in sorted(self.folder.glob("*.jsonl")):
            launch, _, rank = file.stem.partition("-")
            notes = self.ranks.setdefault(file.name, Rank(int(launch), int(rank)))
            with file.open("rb") as lines:
                lines.seek(self._read.get(file.name, 0))
                for line in lines:
                    if not line.endswith(b"\n"):
                        break  # Being written, or cut off by a kill.
                    self._read[file.name] = self._read.get(file.name, 0) + len(line)
                    _take(notes, json.loads(line))
        return self

    def newest(self) -> list[Rank]:
        """The ranks of the newest launch that have begun to train."""
        begun = [rank for rank in self.ranks.values() if rank.pid]
        newest = max((rank.launch for rank in begun), default=0)
        return sorted((rank for rank in begun if rank.launch == newest), key=lambda rank: rank.rank)

    def images_seen(self) -> int:
        """How far the newest launch has come: the images of the updates it has made."""
        return max((first for rank in self.newest() for first, _ in rank.made), default=0)

    def first_update_after(self, moment: float, launch: int) -> float | None:
        """When a launch later than `launch` made its first update after the moment."""
        times = [at for rank in self.ranks.values() if rank.launch > launch for _, at in rank.made]
        return min((at for at in times if at > moment), default=None)

    def widths(self) -> list[int]:
        """Number of ranks of each launch that trained, in order."""
        return [rank.world_size for rank in self._by_launch() if rank.rank == 0]

    def starts(self) -> list[int]:
        """Images seen at which each launch began, in order."""
        return [rank.start for rank in self._by_launch() if rank.rank == 0]

    def _by_launch(self) -> list[Rank]:
        return sorted((r for r in self.ranks.values() if r.pid), key=lambda r: (r.launch, r.rank))

    def learned(self) -> list[tuple[int, str]]:
        """(position, key) of everything that led to the final weights.

        Of each launch that is what lies between its start and the start of the launch that went
        on from it: whatever it did later was lost with it.
        """
        found: list[tuple[int, str]] = []
        end: float = float("inf")
        for launch in sorted({rank.launch for rank in self.ranks.values() if rank.pid}, reverse=True):
            ranks = [rank for rank in self.ranks.values() if rank.launch == launch and rank.pid]
            for rank in ranks:
                found += [sample for first, share in rank.samples if first < end for sample in share]
            end = min(end, *(rank.start for rank in ranks))
        return sorted(found)


def _take(rank: Rank, line: dict[str, Any]) -> None:
    if "pid" in line:
        rank.pid, rank.world_size, rank.start = line["pid"], line["world_size"], line["start"]
    elif "samples" in line:
        rank.samples.append((line["first"], [(position, key) for position, key in line["samples"]]))
    else:
        rank.made.append((line["first"], line["made"]))


@dataclass(frozen=True)
class History:
    """How what led to the final weights compares with what the plan says."""

    lost: int
    repeated: int


def history(notes: Notes, config: RunConfig, index: Index, stopped_at: int | None = None) -> History:
    """Compare everything that led to the final weights with the plan of an uninterrupted run.

    `stopped_at` are the images seen by a run that was not trained to its end.
    """
    assert config.data.lanes is not None
    batch, total = config.train.batch_size, stopped_at or config.train.total_images
    plan = planned(
        index,
        lanes=config.data.lanes,
        window=config.data.shuffle_window,
        seed=config.train.seed,
        stop=-(-total // batch) * batch,
    )
    found = Counter(notes.learned())
    return History(
        lost=sum(1 for sample in plan if sample not in found),
        repeated=sum(found.values()) - sum(1 for sample in plan if sample in found),
    )
