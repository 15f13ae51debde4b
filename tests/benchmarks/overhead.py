"""What surrounds the mathematics costs: the whole of a run, and Ray Train, beside bare loops.

    make bench-overhead
    python -m tests.benchmarks.overhead --pairs 10 --only ray

Two workers, one model. `run`: inside the two workers of one `nvae` run, 10 updates of the run
take turns with 10 of a bare loop (bare_loop.py) on a second model of the same kind, so that both
see the same machine. A pair is 200 updates of each, with one checkpoint and ten log lines. Batches
are in memory on both sides: what reading them costs is told by `make bench-data`. Deliveries to
MLflow go on in the background while the bare loop has its turn, too (a rank's thread for them took
0.3 ms of processor time per bare update of 340 ms). A run that skipped an update, or left a
checkpoint out, counts for nothing. `ray`: the bare loop alone, started by Ray Train and by torchrun
in turn; Ray's own processes run only while it is Ray's turn.

A ratio is geometric mean over pairs, with the interval that holds the true one with 95% if
logarithms of ratios are normal (Student's t). What does not lie below the bound with its whole
interval, nor above it, is unresolved.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import ray
import torch
from scipy.stats import t as student

from cluster.launch import launch
from pipeline import config_file, run
from pipeline.config import RunConfig
from pipeline.data import shards
from pipeline.data.index import Index
from pipeline.data.loader import Batch
from pipeline.preparation import settle
from pipeline.training import train
from pipeline.training.worker import Worker
from tests.benchmarks.bare_loop import BareLoop
from tests.tiny_run import Home, points

ROOT = Path(__file__).parents[2]
WORKERS = 2
BATCH = 16
UPDATES = {"run": 200, "ray": 100}
"""Of each side in a pair; of `run`, between two checkpoints."""
BLOCK_UPDATES, WARMUP_UPDATES = 10, 65
"""Before the other takes its turn; not counted: the start of deliveries falls into them, and a
checkpoint into the middle of a block."""
PAIR = "pair: "
NEVER = ("train/skipped_updates", "checkpoint/left_out", "checkpoint/failed")
BOUNDS = {"run": 1.03, "ray": 1.025}
YAML = """
data: {root: "store:tiny"}
model:
  image_size: 32
  pixel_bits: 5
  mixture_components: 5
  groups_per_scale: [2, 4]
  latent_channels: 8
  encoder_channels: 16
  decoder_channels: 16
  preprocess_blocks: 1
  preprocess_cells: 1
  postprocess_cells: 1
  cell_family: res_bnswish
# Below 1 to the end: the bare loop, too, balances the KL of groups in every update.
objective: {kl_warmup_fraction: 0.9999, kl_constant_fraction: 0}
optimizer: {learning_rate: 1.0e-3, minimum_learning_rate: 1.0e-3}
train: {total_images: 1_000_000, batch_size: 16}
cadence: {log_images: 320, evaluate_images: 1_000_000, checkpoint_images: 8_000}
evaluation: {images: 2}
sampling: {count: 2}
"""


def interleaved(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """A run whose batches are in memory, and come in blocks between which a bare loop trains."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"run": [], "bare": []}
    batches_of = train.training_batches

    def in_blocks(config: RunConfig, index: Index, **where: Any) -> Generator[Batch, None, None]:
        batches = batches_of(config, index, **where)
        resident = list(islice(batches, 8))
        batches.close()
        bare, turns = BareLoop(config, torch.stack([batch.images for batch in resident])), cycle(resident)
        for _ in range(WARMUP_UPDATES):
            bare.update()
            yield next(turns)
        blocks = arguments["updates"] // BLOCK_UPDATES
        for block in range(arguments["pairs"] * blocks):
            worker.barrier()
            begun = time.perf_counter()
            for _ in range(BLOCK_UPDATES):
                yield next(turns)
            worker.barrier()
            then = time.perf_counter()
            for _ in range(BLOCK_UPDATES):
                bare.update()
            worker.barrier()
            seconds["run"].append(then - begun)
            seconds["bare"].append(time.perf_counter() - then)
            if (block + 1) % blocks == 0:
                worker.say(pair_line({name: sum(values[-blocks:]) for name, values in seconds.items()}))
        # What the end of a run does comes after the last update, here an untimed one.
        yield next(turns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "training_batches", in_blocks)
        end = run.work(arguments["spec"], worker)
    assert end["state"] == "finished"
    return {name: _by_pair(values, arguments["pairs"]) for name, values in seconds.items()}


def _by_pair(seconds: Sequence[float], pairs: int) -> list[float]:
    size = len(seconds) // pairs
    return [sum(seconds[number * size : (number + 1) * size]) for number in range(pairs)]


def compare_run(home: Home, pairs: int, updates: int) -> dict[str, list[float]]:
    """Seconds of each pair: `run`, `bare`."""
    total = WARMUP_UPDATES + pairs * updates + 1
    settings = [f"train.total_images={total * BATCH}", f"cadence.checkpoint_images={updates * BATCH}"]
    spec = home.begin("overhead", *settings, workers=WORKERS)
    seconds: dict[str, list[float]] = launch(
        "tests.benchmarks.overhead:interleaved",
        {"spec": vars(spec), "pairs": pairs, "updates": updates},
        widths=(WORKERS,),
        run_url=spec.url,
        say=lambda line: print(line, flush=True) if line.startswith(PAIR) else None,
    )
    for (name, images_seen), value in points(spec.url).items():
        if name in NEVER and value != 0:
            raise RuntimeError(f"{name} is {value} at {images_seen} images: the run has not done its work")
    return seconds


def compare_ray(home: Home, pairs: int, updates: int) -> dict[str, list[float]]:
    """Seconds of each pair: `ray`, `torchrun`, each first in every other pair."""
    config = config_file.to_mapping(settle(home.config(), home.store))
    arguments = {"config": config, "warmup": 20, "updates": updates}
    seconds: dict[str, list[float]] = {"ray": [], "torchrun": []}
    ways: dict[str, Callable[[], float]] = {
        "ray": lambda: _by_ray(home, arguments),
        "torchrun": lambda: _by_torchrun(home, arguments),
    }
    for number in range(pairs):
        for name in sorted(ways, reverse=number % 2 == 1):
            seconds[name].append(ways[name]())
        print(pair_line({name: values[-1] for name, values in seconds.items()}), flush=True)
    return seconds


def _by_ray(home: Home, arguments: Mapping[str, Any]) -> float:
    found = launch(
        "tests.benchmarks.bare_loop:work",
        arguments,
        widths=(WORKERS,),
        run_url=home.run_url("bare"),
        say=lambda line: None,
    )
    return float(found["seconds"])


def _by_torchrun(home: Home, arguments: Mapping[str, Any]) -> float:
    answer = home.folder / "answer.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"]
    command += ["-m", "tests.benchmarks.bare_loop", json.dumps(arguments), str(answer)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, timeout=1800, env=environment, capture_output=True)
    return float(json.loads(answer.read_text())["seconds"])


def pair_line(seconds: Mapping[str, float]) -> str:
    """Of one pair, as soon as it is measured: the whole takes an hour."""
    return PAIR + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())


# --- what the pairs say ----------------------------------------------------------------------


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of the ratios of pairs, and the ends of its 95% interval."""
    logs = [math.log(a / b) for a, b in zip(numerator, denominator, strict=True)]
    mean = fmean(logs)
    if len(logs) == 1:
        return math.exp(mean), 0.0, math.inf
    half = float(student.ppf(0.975, len(logs) - 1)) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def verdict(low: float, high: float, bound: float) -> str:
    if high <= bound:
        return "within the bound"
    return "above the bound" if low > bound else "unresolved"


def line(name: str, seconds: Mapping[str, Sequence[float]], updates: int) -> str:
    ours, bare = seconds[name], next(values for other, values in seconds.items() if other != name)
    mean, low, high = ratio(ours, bare)
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    return (
        f"{name:4} {len(ours)} pairs of {updates} updates: {mean - 1:+.2%} "
        f"(95%: {low - 1:+.2%} to {high - 1:+.2%}; single pairs {min(ratios) - 1:+.1%} to "
        f"{max(ratios) - 1:+.1%}), at most {BOUNDS[name] - 1:.1%} is wanted: "
        f"{verdict(low, high, BOUNDS[name])}; {fmean(bare) / updates * 1000:.1f} ms per bare update"
    )


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.overhead", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--only", choices=sorted(BOUNDS), help="one of the two comparisons")
    parser.add_argument("--short", action="store_true", help="50 updates in a pair: does it work at all?")
    asked = parser.parse_args(words)
    print(
        f"{platform.machine()}, {os.cpu_count()} logical cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, ray {ray.__version__}"
    )
    with (
        tempfile.TemporaryDirectory(prefix="nvae-overhead-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in ("NVAE_STORE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        patch.chdir(folder)
        home = Home(Path(folder))
        Path(home.yaml).write_text(YAML)
        shards.build("portraits:136", f"{home.store}/data/tiny", image_size=32, validation_count=8)
        for name, compare in (("run", compare_run), ("ray", compare_ray)):
            if asked.only in (None, name):
                updates = 50 if asked.short else UPDATES[name]
                print(line(name, compare(home, asked.pairs, updates), updates), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
