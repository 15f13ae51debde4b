"""Whether an outage slows a training down: it comes and goes in one run, whose updates are timed.

    python -m tests.benchmarks.outages --pairs 20 --only mlflow

`mlflow`: a real server whose every answer is lost. `slow`: a bucket that takes ten times as long
to take a checkpoint, while there is always one to be written. `refused`: one that takes none. Seconds with
the fault and without take turns, the order changes from pair to pair. What is compared is the mean
time of an update; the ratio and its interval are those of overhead.py. Servers compute on the
same processors as the training, so what they are spared in an outage is the training's gain.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tests.benchmarks.overhead import ratio, verdict
from tests.fault_proxy import Fail, Fault, FaultProxy, Request, Reset
from tests.faults.training_runs import Place, Training, place
from tests.faults.training_stores import SLOW, bucket, is_a_write
from tests.mlflow_server import serving

BATCH = 16
SETTINGS = (
    f"train.batch_size={BATCH}",
    "train.total_images=100_000_000",
    "model.encoder_channels=16",
    "model.decoder_channels=16",
    f"cadence.log_images={5 * BATCH}",
    "cadence.evaluate_images=100_000_000",
)
OFTEN, SELDOM = 20 * BATCH, 100_000_000
"""Images between checkpoints."""
WARMUP_UPDATES = 100
SETTLE_SECONDS, WINDOW_SECONDS = 3.0, 8.0
"""After the fault has come or gone; in which updates are timed."""
BOUNDS = {"mlflow": 1.01, "slow": 1.05, "refused": 1.05}
FAULTS: dict[str, Fault] = {"mlflow": Reset(), "slow": SLOW, "refused": Fail(503, "SlowDown")}


@contextmanager
def training_with(kind: str, here: Place) -> Iterator[tuple[Training, FaultProxy]]:
    """A training that has begun, on one worker, and the proxy in front of what is to fail it."""
    if kind == "mlflow":
        with serving(here.folder / "mlflow") as server, FaultProxy(server.url) as proxy:
            training = Training(here, kind, *SETTINGS, f"cadence.checkpoint_images={SELDOM}", workers="1")
            training.start("--tracking", proxy.url)
            yield training, proxy
    else:
        with bucket(here) as (store, proxy):
            settings = (*SETTINGS, f"cadence.checkpoint_images={OFTEN}", "storage.retry_seconds=3")
            training = Training(here, kind, *settings, workers="1", store=store)
            training.start()
            yield training, proxy


def seconds_per_update(training: Training) -> float:
    """Of the updates of one window that begins a little later than now."""
    time.sleep(SETTLE_SECONDS)
    begin = time.monotonic()
    time.sleep(WINDOW_SECONDS)
    (rank,) = training.notes.read().newest()
    made = [at for _, at in rank.made if at >= begin]
    return (made[-1] - made[0]) / (len(made) - 1)


def compare(kind: str, here: Place, pairs: int) -> dict[str, list[float]]:
    """Seconds per update of each pair: `with` the fault, `without` it."""
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    where: Callable[[Request], bool] = (lambda request: True) if kind == "mlflow" else is_a_write
    with training_with(kind, here) as (training, proxy):
        training.wait_for_images(WARMUP_UPDATES * BATCH)
        for number in range(pairs):
            for turn in sorted(seconds, reverse=number % 2 == 1):
                rule = proxy.add(FAULTS[kind], where) if turn == "with" else None
                seconds[turn].append(seconds_per_update(training))
                assert rule is None or rule.struck, "the fault met nobody"
                proxy.clear()
    return seconds


def line(kind: str, seconds: dict[str, list[float]]) -> str:
    mean, low, high = ratio(seconds["with"], seconds["without"])
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    without = 1000 * sum(seconds["without"]) / len(seconds["without"])
    return (
        f"{kind:8} {len(ratios)} pairs: {mean - 1:+.2%} (95%: {low - 1:+.2%} to {high - 1:+.2%}; "
        f"single pairs {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%}), at most {BOUNDS[kind] - 1:.0%} "
        f"is wanted: {verdict(low, high, BOUNDS[kind])}; {without:.1f} ms per update without"
    )


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.outages", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--only", choices=sorted(BOUNDS), help="one of the three")
    asked = parser.parse_args(words)
    for kind in BOUNDS:
        if asked.only in (None, kind):
            with place(seed=0, short=False) as here:
                print(line(kind, compare(kind, here, asked.pairs)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
