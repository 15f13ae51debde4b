"""Seconds and memory of the plan, and how well it shuffles.

    python tests/benchmarks/plan.py              cost, for 70,000 and for 100 million samples
    python tests/benchmarks/plan.py --shuffling  its measures beside those of a full shuffle

Each row of the cost is a process of its own, so that nothing is known beforehand. One rank reads
all lanes, the most that it can have to do. `MB` is what the process's memory grew by, from after
the imports to its peak. The limits are those of the project: a second and 100 MB to the first
batch. A batch later costs a share of what decoding its images costs: see microseconds/sample.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import numpy as np  # noqa: E402

from pipeline.data import plan  # noqa: E402
from pipeline.data.plan import Stream  # noqa: E402
from tests.pipeline.data import shuffling  # noqa: E402

# Shards, samples of each.
DATA_SETS = ((280, 250), (100_000, 1000), (1000, 100_000))
BATCH, LANES, WINDOW = 256, 64, 128
STEADY_BATCHES = 400
MOST_SECONDS, MOST_MB = 1.0, 100.0


def cost(shards: int, samples: int, epoch: int) -> dict[str, float]:
    """Of the stream, of the first batch of an epoch, and of a batch later."""
    counts = np.full(shards, samples)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    stream = Stream(counts, lanes=LANES, window=WINDOW, seed=1)
    created = time.perf_counter()
    start = epoch * stream.samples
    read(stream, start)
    first = time.perf_counter()
    for number in range(1, STEADY_BATCHES + 1):
        read(stream, start + number * BATCH)
    steady = time.perf_counter() - first
    # To the next epoch, which begins while this one is still held.
    read(stream, start + stream.samples - BATCH // 2)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "create": created - started,
        "first": first - created,
        "microseconds": steady / STEADY_BATCHES / BATCH * 1e6,
        "megabytes": grown * (1 if sys.platform == "darwin" else 1024) / 1e6,
    }


def read(stream: Stream, first: int) -> None:
    stream.locate(plan.training_share(first, BATCH, lanes=LANES, rank=0, world_size=1))


def in_another_process(*case: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", *map(str, case)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def print_cost() -> bool:
    print(f"batches of {BATCH}, {LANES} lanes, windows of {WINDOW}")
    print("shards   samples      epoch  create s  first batch s      MB  microseconds/sample")
    good = True
    for shards, samples in DATA_SETS:
        for epoch in (0, 7):
            found = in_another_process(shards, samples, epoch)
            print(
                f"{shards:<8,} {shards * samples:<12,} {epoch:<6} {found['create']:8.4f}"
                f"{found['first']:15.3f}{found['megabytes']:8.1f}{found['microseconds']:21.2f}"
            )
            good &= found["create"] + found["first"] < MOST_SECONDS and found["megabytes"] < MOST_MB
    print(
        f"limits: {MOST_SECONDS:g} s and {MOST_MB:g} MB to the first batch: {'kept' if good else 'EXCEEDED'}"
    )
    return good


def print_shuffling() -> bool:
    counts = np.full(280, 250)
    planned = shuffling.orders_of(Stream(counts, lanes=LANES, window=WINDOW, seed=1), 4)
    print("280 shards of 250                                     plan   full shuffle")
    for name, measure in (
        ("correlation of turns between epochs", shuffling.rank_correlation),
        ("spread of a shard over the epoch", lambda orders: shuffling.spread(orders, counts)),
        ("shards in a batch of 64", lambda orders: shuffling.shards_per_batch(orders, counts, 64)),
        ("shards in a batch of 256", lambda orders: shuffling.shards_per_batch(orders, counts, 256)),
        ("turns between neighbours", shuffling.distance_of_neighbours),
        (
            "the same company in batches of 256",
            lambda orders: shuffling.same_company(shuffling.batches_of(orders, 256)),
        ),
        ("the same lane again", lambda orders: shuffling.same_lane(orders, LANES)),
    ):
        full = shuffling.full_shuffles(planned.shape[1], len(planned), seed=1)
        print(f"{name:<50}{measure(planned):8.3f}{measure(full):15.3f}")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shuffling", action="store_true")
    parser.add_argument("--case", nargs=3, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(cost(*arguments.case)))
        return
    sys.exit(0 if (print_shuffling() if arguments.shuffling else print_cost()) else 1)


if __name__ == "__main__":
    main()
