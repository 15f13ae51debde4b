"""What tracking costs the thread that trains: the time of each call, MLflow there, away and slow.

    python -m tests.benchmarks.tracking --lines 500 --metrics 100

A call notes one line of the journal; everything else happens in other threads, which take
their share of the interpreter. Lines come at the pace of `--seconds`, as log intervals do.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.training.tracking import RunTracker, create_run
from tests.fault_proxy import FaultProxy
from tests.http_faults import Reset, Stall
from tests.mlflow_server import serving


@dataclass(frozen=True)
class CallTimes:
    """Milliseconds of `Tracker.log` on the thread that trains."""

    median: float
    p99: float
    longest: float

    def __str__(self) -> str:
        return f"{self.median:8.3f} {self.p99:8.3f} {self.longest:8.3f}"


def call_times(tracker: RunTracker, lines: int, metrics: int, seconds: float) -> CallTimes:
    """Notes so many lines of so many metrics, one every `seconds`."""
    values = {f"train/kl_nats/group_{number:02d}": 1.0 / (number + 1) for number in range(metrics)}
    took = []
    for at in range(lines):
        began = time.perf_counter()
        tracker.log(values, at=at)
        took.append(1000 * (time.perf_counter() - began))
        time.sleep(seconds)
    took.sort()
    return CallTimes(took[len(took) // 2], took[int(0.99 * len(took))], took[-1])


@contextmanager
def _places(folder: Path) -> Iterator[dict[str, str]]:
    """Addresses of MLflow: one that answers, one that does not, one that takes 30 s."""
    with (
        serving(folder / "mlflow") as server,
        FaultProxy(server.url) as away,
        FaultProxy(server.url) as slow,
    ):
        away.add(Reset())
        slow.add(Stall(30))
        yield {"there": server.url, "away": away.url, "30 s for an answer": slow.url}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--metrics", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.05, help="between two lines")
    asked = parser.parse_args(arguments)
    print(f"{'MLflow':20} {'median':>8} {'p99':>8} {'longest':>8}  ms per call of {asked.metrics} metrics")
    with tempfile.TemporaryDirectory(prefix="nvae-tracking-") as folder, _places(Path(folder)) as places:
        for name, uri in places.items():
            run_url = str(Path(folder, "runs", name.replace(" ", "-")))
            create_run(uri, run_url=run_url, experiment="bench", run_name=name, parameters={}, tags={})
            tracker = RunTracker(run_url, 1, uri)
            print(f"{name:20} {call_times(tracker, asked.lines, asked.metrics, asked.seconds)}", flush=True)
            tracker.close(timeout_seconds=0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
