"""Whether an outage slows a training down: it comes and goes in one run, whose updates are timed.

    python -m tests.benchmarks.outages --pairs 10 --only mlflow

`mlflow`: a real server to which every connection breaks. `slow`: a bucket that takes 0.3 s longer
for each write, while there is always a checkpoint to be written. `refused`: one that takes none.
Seconds with the fault and without take turns, the order changes from pair to pair. A window with the
fault begins when a request has met it. After it nothing is timed until what gathered meanwhile is
delivered: the curves, or a checkpoint that was begun later. The proxy must have counted the fault in
each window with it, and requests, but no fault, in each without; else there is no result. What is
compared is the mean time of an update; the ratio and its interval are those of overhead.py. Servers
compute on the same processors as the training, so what they are spared in an outage is the
training's gain.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.training.checkpoint import images_saved
from pipeline.training.courier import read_delivered
from pipeline.training.journal import StoredJournal, complete
from tests.benchmarks.overhead import ratio, verdict
from tests.fault_proxy import FaultProxy
from tests.faults.training_runs import Place, Training, place
from tests.faults.training_stores import SLOW, bucket, is_a_write
from tests.http_faults import Fail, Fault, Request, Reset
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
PAIRS = 10
"""Of each kind, unless told otherwise."""
BOUNDS = {"mlflow": 1.01, "slow": 1.05, "refused": 1.05}
FAULTS: dict[str, Fault] = {"mlflow": Reset(), "slow": SLOW, "refused": Fail(503, "SlowDown")}


START_SECONDS, CATCH_UP_SECONDS = 45.0, {"mlflow": 12.0, "slow": 3.0, "refused": 3.0}
"""About what a kind takes to begin, and the end of each outage: for the estimate alone."""


@dataclass(frozen=True)
class Timing:
    """Of one window."""

    settle_seconds: float = 3.0
    """From when the fault has come or gone, before updates are timed."""
    window_seconds: float = 8.0
    """In which they are."""

    def estimate(self, kinds: Sequence[str], pairs: int) -> float:
        """About how many seconds it all takes."""
        pair = 2 * (self.settle_seconds + self.window_seconds)
        return sum(START_SECONDS + pairs * (pair + CATCH_UP_SECONDS[kind]) for kind in kinds)


SHORT = Timing(settle_seconds=1.0, window_seconds=7.0)
"""Enough for every check, too little for a figure."""


@dataclass(frozen=True)
class Window:
    """What was seen in one."""

    seconds_per_update: float
    requests: int
    """Those that the fault meets where there is one."""


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


def compare(kind: str, here: Place, pairs: int, timing: Timing) -> dict[str, list[Window]]:
    """The windows of each pair: `with` the fault, `without` it."""
    found: dict[str, list[Window]] = {"with": [], "without": []}
    where: Callable[[Request], bool] = (lambda request: True) if kind == "mlflow" else is_a_write
    with training_with(kind, here) as (training, proxy):
        training.wait_for_images(WARMUP_UPDATES * BATCH)
        for number in range(pairs):
            for turn in sorted(found, reverse=number % 2 == 1):
                if turn == "with":
                    proxy.reset()
                    proxy.add(FAULTS[kind], where)
                    training.wait_for(proxy.injected.total, "a request that meets the fault")
                found[turn].append(window(training, proxy, where, turn == "with", timing))
                if turn == "with":
                    proxy.clear()
                    catch_up(kind, training, proxy)
    return found


def window(
    training: Training, proxy: FaultProxy, where: Callable[[Request], bool], fault: bool, timing: Timing
) -> Window:
    """One that begins a little later than now. Raises RuntimeError if it was not what it should be."""
    time.sleep(timing.settle_seconds)
    requests, injected, begin = len(proxy.requests), proxy.injected.total(), time.monotonic()
    time.sleep(timing.window_seconds)
    met = sum(where(request) for request in proxy.requests[requests:])
    check(met, proxy.injected.total() - injected, fault)
    (rank,) = training.notes.read().newest()
    made = [at for _, at in rank.made if at >= begin]
    if len(made) < 2:
        raise RuntimeError(f"{len(made)} updates in {timing.window_seconds:g} s: {training.last_words()}")
    return Window((made[-1] - made[0]) / (len(made) - 1), met)


def check(requests: int, faults: int, fault: bool) -> None:
    """Raises RuntimeError if a window had no requests, no fault though it should, or one though not."""
    if not requests:
        raise RuntimeError("nothing was asked of the server in a window: it has cost nothing to compare")
    if fault and not faults:
        raise RuntimeError(f"none of {requests} requests met the fault in a window that should have it")
    if faults and not fault:
        raise RuntimeError(f"{faults} of {requests} requests met a fault in a window without")


def catch_up(kind: str, training: Training, proxy: FaultProxy) -> None:
    """Waits until what gathered in the outage is where it belongs: no window without one pays for it."""
    if kind == "mlflow":
        journal = StoredJournal(training.run_url)
        # Never quite empty, a journal goes on: what it had when the outage ended is what counts.
        had = {segment: complete(journal.read(segment)) for segment in journal.segments()}

        def delivered() -> bool:
            has = read_delivered(training.run_url, proxy.url).segments
            return all(has.get(segment, 0) >= length for segment, length in had.items())

        training.wait_for(delivered, "the delivery of what gathered in the outage")
    else:
        images = training.notes.read().images_seen()
        training.wait_for(lambda: images_saved(training.run_url) > images, "a checkpoint after the outage")


def line(kind: str, found: dict[str, list[Window]]) -> str:
    seconds = {turn: [each.seconds_per_update for each in windows] for turn, windows in found.items()}
    requests = {
        turn: sum(each.requests for each in windows) / len(windows) for turn, windows in found.items()
    }
    mean, low, high = ratio(seconds["with"], seconds["without"])
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    without = 1000 * sum(seconds["without"]) / len(seconds["without"])
    return (
        f"{kind:8} {len(ratios)} pairs: {mean - 1:+.2%} (95%: {low - 1:+.2%} to {high - 1:+.2%}; "
        f"single pairs {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%}), at most {BOUNDS[kind] - 1:.0%} "
        f"is wanted: {verdict(low, high, BOUNDS[kind])}; {without:.1f} ms per update without; "
        f"requests in a window: {requests['with']:.1f} with, {requests['without']:.1f} without"
    )


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.outages", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--only", choices=sorted(BOUNDS), help="one of the three")
    parser.add_argument("--short", action="store_true", help="short windows: does it work at all?")
    asked = parser.parse_args(words)
    timing, kinds = SHORT if asked.short else Timing(), [asked.only] if asked.only else [*BOUNDS]
    print(f"{asked.pairs} pairs of {', '.join(kinds)}: about ", end="")
    print(f"{timing.estimate(kinds, asked.pairs) / 60:.0f} min", flush=True)
    begun = time.monotonic()
    for kind in kinds:
        with place(seed=0, short=asked.short) as here:
            print(line(kind, compare(kind, here, asked.pairs, timing)), flush=True)
    print(f"took {(time.monotonic() - begun) / 60:.1f} min")


if __name__ == "__main__":
    main(sys.argv[1:])
