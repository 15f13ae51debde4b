"""The faults of a training as real injections into real processes, a line each.

    make faults
    python -m tests.faults.training --only worker,driver --seed 7 --short

A line says what was injected, how often, and how often the training survived it: went on by
itself (or when the same command was repeated), soon enough, to final weights whose history holds
every image of the plan once. `recovery` and `worst` are seconds from a fault to the first update
after it, median and maximum. It ends with 1 if any line has survived less often than tried, and
says what did not.
"""

import argparse
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence

import torch

from tests.faults import training_kills as kills
from tests.faults import training_nodes as nodes
from tests.faults import training_outages as outages
from tests.faults import training_poison as poison
from tests.faults.training_runs import HEADING, Place, TrainingRow, place

ROWS: dict[str, Callable[[Place], TrainingRow]] = {
    "worker": kills.workers,
    "raylet": nodes.raylets,
    "driver": kills.drivers,
    "width": nodes.widths,
    "save": outages.saves,
    "flip": outages.damage,
    "nan": poison.nans,
    "tracking": outages.tracking,
}


def run(names: Sequence[str], seed: int, short: bool) -> list[TrainingRow]:
    """Make the injections of the rows `names`; print each row as soon as it is there."""
    rows: list[TrainingRow] = []
    print(HEADING, flush=True)
    for name in names:
        begun = time.monotonic()
        with place(seed, short) as here:
            row = ROWS[name](here)
        print(row.line(time.monotonic() - begun), flush=True)
        for what in row.broken:
            print(f"     NOT SURVIVED: {what}", flush=True)
        rows.append(row)
    return rows


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.training", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--only", default=",".join(ROWS), help=f"some of {','.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="fewer injections of each kind")
    asked = parser.parse_args(arguments)
    names = asked.only.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no rows {', '.join(unknown)}; there are {', '.join(ROWS)}")
    # Told to end, it ends what it started first.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # What the rows provoke is counted, not read.
    logging.disable(logging.WARNING)
    # For tiny models: on a busy machine several threads wait for each other most of the time.
    torch.set_num_threads(1)
    rows = run(names, asked.seed, asked.short)
    tried, survived = sum(row.tried for row in rows), sum(row.survived for row in rows)
    print(f"{'all':4} {tried:6,} {survived:8,}")
    return int(any(row.survived < row.tried or not row.tried for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
