"""What the campaigns of faults have in common as commands: their options and how they end."""

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch


class Counted(Protocol):
    """A row of a campaign."""

    tried: int
    survived: int


def command(
    module: str,
    doc: str,
    known: Collection[str],
    run: Callable[[Sequence[str], int, bool], Sequence[Counted]],
    arguments: Sequence[str],
) -> int:
    """`run(names, seed, short)` as a command; 1 if a row has survived less often than tried.

    The first paragraph of `doc` is its help; `known` are the names of all rows.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc.split("\n\n")[0])
    parser.add_argument("--only", default=",".join(known), help=f"some of {','.join(known)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="fewer injections of each kind")
    asked = parser.parse_args(arguments)
    names = asked.only.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no rows {', '.join(unknown)}; there are {', '.join(known)}")
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
