"""Which images a training really read: a tap between its batches and its updates.

Each rank of each launch appends a line to a file of its own before a batch is trained on:
first position, positions, keys. What counts is what leads to the final weights, so of each
launch only the positions below those at which the next one began.
"""

import json
import os
import signal
import tarfile
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import run
from pipeline.data.index import TRAIN, Index
from pipeline.data.loader import Batch
from pipeline.data.plan import Stream
from pipeline.training import train
from pipeline.training.checkpoint import images_saved
from pipeline.training.worker import Worker


def work(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """`run.work` with the tap. The last rank is killed in the midst of its work, if told so.

    That is: once it was handed `kill_after` images' worth of batches and a checkpoint newer than
    the launch has been written.
    """
    with recorded(Path(arguments["records"]), arguments["launch"], worker, arguments["kill_after"]):
        return run.work(arguments["spec"], worker)


@contextmanager
def recorded(folder: Path, launch: int, worker: Worker, kill_after: int | None = None) -> Iterator[None]:
    """Record the batches of every training in this process."""
    file = folder / f"{launch:03d}-{worker.world_size:02d}-{worker.rank:02d}.jsonl"
    batches_of = train.training_batches

    def tapped(config: Any, index: Index, **where: Any) -> Generator[Batch, None, None]:
        batches = batches_of(config, index, **where)
        first = where["start"]
        with file.open("a") as out:
            try:
                for batch in batches:
                    line = {"first": first, "positions": batch.positions.tolist(), "keys": batch.keys}
                    print(json.dumps(line), file=out, flush=True)
                    first += batch.global_size
                    if kill_after is not None and first - where["start"] >= kill_after:
                        _die(worker, folder, where["start"])
                    yield batch
            finally:
                batches.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "training_batches", tapped)
        yield


def _die(worker: Worker, folder: Path, start: int) -> None:
    """The end of the last rank's process, as soon as the launch has left something behind."""
    if worker.rank != worker.world_size - 1:
        return
    while images_saved((folder / "run").read_text()) <= start:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def launches(folder: Path) -> list[list[dict[str, Any]]]:
    """The lines of all ranks of each launch that handed out a batch."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found.setdefault(file.name.partition("-")[0], []).extend(lines)
    return [lines for lines in found.values() if lines]


def starts(folder: Path) -> list[int]:
    """Images seen at which each launch began."""
    return [min(line["first"] for line in lines) for lines in launches(folder)]


def learned(folder: Path) -> list[tuple[int, str]]:
    """(position, key) of everything that led to the final weights, in order of positions."""
    ends = [*starts(folder)[1:], float("inf")]
    return sorted(
        (position, key)
        for lines, end in zip(launches(folder), ends, strict=True)
        for line in lines
        if line["first"] < end
        for position, key in zip(line["positions"], line["keys"], strict=True)
    )


def planned(index: Index, *, lanes: int, window: int, seed: int, stop: int) -> list[tuple[int, str]]:
    """What an uninterrupted run learns from, by the plan and the names in the tars."""
    keys = []
    for shard in index.shards(TRAIN):
        with tarfile.open(Path(index.root, shard.name)) as tar:
            stems = (member.name.partition(".")[0] for member in tar if member.isfile())
            keys.append(list(dict.fromkeys(stems)))
    stream = Stream(index.samples_per_shard(TRAIN), lanes=lanes, window=window, seed=seed)
    places = stream.locate(np.arange(stop))
    return [
        (position, keys[shard][sample])
        for position, (shard, sample) in enumerate(zip(places.shards, places.samples, strict=True))
    ]


def check_history(folder: Path, index: Index, *, lanes: int, window: int, seed: int) -> None:
    """Each image once in each epoch, in the order of the plan, over all launches together."""
    found = learned(folder)
    assert found == planned(index, lanes=lanes, window=window, seed=seed, stop=len(found))
    count = index.num_samples(TRAIN)
    for first in range(0, len(found) - count + 1, count):
        assert len({key for _, key in found[first : first + count]}) == count
