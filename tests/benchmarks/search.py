"""What early stopping saves and costs: the same random draws with ASHA and to the end.

    python -m tests.benchmarks.search --trials 12

Two searches of `groups_and_spectral` on procedural portraits, by random search of one seed, so that
trial number N has the same settings in both: one trains every trial to its last image, the other
stops the worse ones at ASHA's rungs. What is compared are images trained on, time of the devices, and
the score of the trial that each finds best. The scores of a trial are the same in both as far as it
came: how the other trials do changes nothing of it.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.data import shards
from pipeline.search import ledger as ledgers
from pipeline.search import ranking
from pipeline.search.ledger import Trial
from tests.tiny_run import NVAE

SCHEDULERS = ("none", "asha")


def searched(
    store: str, scheduler: str, trials: int, concurrent: int, seed: int
) -> tuple[list[Trial], float]:
    """The trials of one search, and how long it took from the command to its end."""
    command = [NVAE, "tune", "groups_and_spectral", "search.searcher=random", f"search.seed={seed}"]
    command += [f"search.scheduler={scheduler}", "--name", scheduler, "--store", store]
    began = time.monotonic()
    subprocess.run(
        [*command, "--trials", str(trials), "--concurrent", str(concurrent)], check=True, stdout=sys.stderr
    )
    return ledgers.read_trials(ledgers.folder(store, scheduler)), time.monotonic() - began


def line(scheduler: str, trials: Sequence[Trial], seconds: float) -> str:
    best = ranking.best(trials, "images")
    assert best is not None and best.bits_per_dim is not None
    images = sum(trial.last.images_seen for trial in trials if trial.last)
    hours = sum(trial.spent_device_seconds for trial in trials) / 3600
    counts = ", ".join(f"{count} {state}" for state, count in ledgers.counts(trials).items())
    return (
        f"{scheduler:5} {images:>8,} images  {hours:5.2f} device-hours  {seconds / 60:5.1f} min  "
        f"best {best.bits_per_dim:.4f} bits/dim (trial {best.trial.number})  {counts}"
    )


def disagreements(first: Sequence[Trial], second: Sequence[Trial]) -> list[str]:
    """Where the same trial scored otherwise at the same number of images."""
    found = []
    for one, other in zip(first, second, strict=True):
        scores = {each.images_seen: each.bits_per_dim for each in one.evaluations}
        found += [
            f"trial {one.number} at {each.images_seen}: {scores[each.images_seen]} and {each.bits_per_dim}"
            for each in other.evaluations
            if scores.get(each.images_seen, each.bits_per_dim) != each.bits_per_dim
        ]
    return found


def main(words: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.search", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--concurrent", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", help="keep the searches and their reports there")
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="nvae-search-") as folder:
        store = asked.store or str(Path(folder) / "nvae-store")
        data = f"{store}/data/portraits256"
        if not Path(data).exists():
            shards.build("portraits:512", data, image_size=256, validation_fraction=0.125)
        found = {}
        for scheduler in SCHEDULERS:
            found[scheduler], seconds = searched(store, scheduler, asked.trials, asked.concurrent, asked.seed)
            print(line(scheduler, found[scheduler], seconds), flush=True)
    differing = disagreements(*found.values())
    print("\n".join(differing) or "Every score of a trial is the same in both, as far as it came.")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
