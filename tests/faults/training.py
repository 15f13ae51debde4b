"""The faults of a training as real injections into real processes, a line each.

    make faults
    python -m tests.faults.training --only worker,driver --seed 7 --short

A line says what was injected, how often, and how often the training survived it: went on by
itself (or when the same command was repeated), soon enough, to final weights whose history holds
every image of the plan once. `recovery` and `worst` are seconds from a fault to the first update
after it, median and maximum. It ends with 1 if any line has survived less often than tried, and
says what did not; and if one that `--only` names could try nothing here, such as `disk` where no
disk can be mounted. In a campaign of all lines such a one says NOT TRIED, and the others count.
"""

import sys
import time
from collections.abc import Callable, Sequence

from tests.faults import training_kills as kills
from tests.faults import training_nodes as nodes
from tests.faults import training_outages as outages
from tests.faults import training_poison as poison
from tests.faults import training_stores as stores
from tests.faults.campaign import command
from tests.faults.training_runs import HEADING, Place, TrainingRow, place

ROWS: dict[str, Callable[[Place], TrainingRow]] = {
    "worker": kills.workers,
    "raylet": nodes.raylets,
    "driver": kills.drivers,
    "width": nodes.widths,
    "save": outages.saves,
    "flip": outages.damage,
    "upload": stores.uploads,
    "disk": stores.disks,
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
    return that_count(names, rows)


def that_count(names: Sequence[str], rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    """Without those that could not be tried, unless some were asked for by their names."""
    by_name = not set(names) >= ROWS.keys()
    return [row for row in rows if by_name or not row.untried]


if __name__ == "__main__":
    sys.exit(command("tests.faults.training", __doc__, ROWS, run, sys.argv[1:]))
