"""A training that takes notes: which images each update learned from, and when it was made.

`python -m tests.faults.training_entry RECORDS train ...` is `nvae train ...`; nothing is changed
but that each rank of each launch writes a file of its own into the folder RECORDS. Times are of
the clock that all processes of a machine share.
"""

import json
import os
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import cli
from cluster import launch as launching
from pipeline import run
from pipeline.data.index import Index
from pipeline.data.loader import Batch
from pipeline.training import train
from pipeline.training.worker import Worker

NAME = "tests.faults.training_entry"


def work(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """`run.work`, noted in the folder `records`."""
    with noted(Path(arguments["records"]), worker):
        return run.work(arguments["spec"], worker)


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


def main(records: str, *command: str) -> None:
    """The `nvae` command, whose workers take notes in the folder `records`."""
    launch = launching.launch

    def launch_noted(entry: str, arguments: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        assert entry == "pipeline.run:work"
        return launch(f"{NAME}:work", {"spec": arguments, "records": records}, **more)

    launching.launch = launch_noted
    sys.argv = ["nvae", *command]
    cli.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
