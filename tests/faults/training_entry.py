"""`python -m tests.faults.training_entry NOTES train ...` is `nvae train ...` whose workers take notes.

Each rank of each launch writes a file of its own into the folder NOTES (training_notes.py). Nothing
else is changed, but that a training grows sooner.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster import cli, supervision
from cluster import launch as launching
from pipeline import run
from pipeline.training.worker import Worker
from tests.faults.training_notes import noted
from tests.faults.training_poison import poisoned

GROW_SECONDS = 10.0
"""Sooner than users would have it, so that a training grows again between two faults."""


def work(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """`run.work`, noted in the folder `notes`, and poisoned if a plan there says so."""
    notes = Path(arguments["notes"])
    with noted(notes, worker):
        return run.work(arguments["spec"], poisoned(worker, notes))


def main(notes: str, *command: str) -> None:
    """The `nvae` command, whose workers take notes in the folder `notes`."""
    launch = launching.launch

    def launch_noted(entry: str, arguments: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        assert entry == "pipeline.run:work"
        return launch(f"{work.__module__}:work", {"spec": arguments, "notes": notes}, **more)

    launching.launch = launch_noted
    supervision.GROW_SECONDS = GROW_SECONDS
    sys.argv = ["nvae", *command]
    cli.main()


if __name__ == "__main__":
    # Under its own name, by which workers import it.
    from tests.faults import training_entry

    training_entry.main(*sys.argv[1:])
