"""Training steps of any preset's model, by the plain path and by each faster one, side by side.

    python tests/benchmarks/step.py --preset ffhq256 --channels 12
    python tests/benchmarks/step.py --preset celeba64 --channels 16 --batch 2 --ablation
    python tests/benchmarks/step.py --table cpu --json steps.json      # the README's rows
    python tests/benchmarks/step.py --table gpu --json steps.json      # likewise, on a machine with a GPU

Needs a checkout and torch, nothing else. It drives `nvae.step.update` with random images, weight averaging
included. Paths: `reference` is the plain model; `fast` uses what nvae/levers.py names for the device;
`--ablation` adds one path for each lever alone, and `--path NAME=LEVER,LEVER` any other.

Each path has processes of its own (step_process.py), one after the other and in turns, `--rounds` of them:
so each has its own peak memory, and what else the machine does falls on all alike. A path's time is its
shortest step of all rounds but for the first two of a process; the ratio is the reference's to it. The
stages come from further steps, in which a GPU is waited for after each. Ceilings are measured in
the same run: the largest rate of a product of matrices, and of a copy.

FLOPs are those of convolutions and products of matrices, the backward pass twice the forward pass;
bytes those that the reference path's operations read and write. Neither depends on the path, so that a
path's rates say how fast it gets the reference's work done.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from nvae.levers import PLAIN, Lever, levers_for  # noqa: E402
from tests.benchmarks.step_process import PRESETS, STAGES, Case, device_of  # noqa: E402

PROCESS = Path(__file__).with_name("step_process.py")
TABLES: dict[str, list[Case]] = {
    "cpu": [
        Case("mnist", batch=8, threads=2),
        Case("celeba64", channels=16, batch=2, threads=1),
        Case("celeba64", channels=16, batch=2, threads=2),
        Case("ffhq256", channels=12, batch=1, threads=2),
    ],
    "gpu": [
        Case("celeba64", batch=16, device="cuda"),
        Case("ffhq256", batch=2, device="cuda"),
        Case("ffhq256", batch=8, device="cuda", precision="bf16"),
        Case("ffhq256", batch=8, device="cuda", precision="bf16", checkpointing="cells"),
    ],
}
NEEDS: dict[str, tuple[Lever, ...]] = {"depthwise": ("channels_last",)}
"""What must be on for a lever to do anything."""


def paths_of(case: Case, ablation: bool, further: Sequence[str]) -> dict[str, Case]:
    """The same case by each path, the reference first."""
    levers: dict[str, tuple[str, ...]] = {"reference": PLAIN.names()}
    if ablation:
        for lever in get_args(Lever):
            alone = (*NEEDS.get(lever, ()), lever)
            levers["+".join(alone)] = alone
    for text in further:
        name, _, names = text.partition("=")
        levers[name] = tuple(filter(None, names.split(",")))
    fast = levers_for(device_of(case)).names()
    if fast and fast not in levers.values():
        levers["fast"] = fast
    return {name: replace(case, levers=names) for name, names in levers.items()}


def compare(paths: dict[str, Case], rounds: int, steps: int) -> dict[str, Any]:
    """Everything that is printed, by name."""
    case = paths["reference"]
    work = in_process(case, "work", steps)
    ceilings = in_process(case, "ceilings", steps)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
    for number in range(rounds):
        for name, path in paths.items():
            print(f"{case.name}: {name}, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            found[name].append(in_process(path, "measure", steps))
    reference = min(min(run["seconds"]) for run in found["reference"])
    rows = {}
    for name, runs in found.items():
        best = min(runs, key=lambda run: min(run["seconds"]))
        seconds = min(best["seconds"])
        rows[name] = {
            "levers": paths[name].levers,
            "seconds": seconds,
            "all_seconds": [run["seconds"] for run in runs],
            "ratio": reference / seconds,
            "images_per_second": case.batch / seconds,
            "flops_per_second": work["flops"] / seconds,
            "bytes_per_second": work["bytes"] / seconds,
            "peak_memory_bytes": min(run["peak_memory_bytes"] for run in runs),
            "stages": best["stages"],
            "first_seconds": best["first_seconds"],
            "losses": best["losses"],
        }
    about = {key: runs[0][key] for key in ("device_name", "torch", "threads", "parameters")}
    return {"case": asdict(case), "about": about, "work": work, "ceilings": ceilings, "paths": rows}


def in_process(case: Case, what: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, str(PROCESS), what, json.dumps(asdict(case)), str(steps)]
    environment = dict(os.environ)
    if case.threads:
        environment["OMP_NUM_THREADS"] = str(case.threads)
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(found: dict[str, Any]) -> str:
    about, ceilings, work = found["about"], found["ceilings"], found["work"]
    case = Case(**found["case"])
    stages = [stage for stage in STAGES if any(stage in row["stages"] for row in found["paths"].values())]
    lines = [
        f"{case.name}: {about['parameters'] / 1e6:.2f} M parameters, batch {case.batch}, {case.precision}, "
        f"checkpointing {case.checkpointing}; {about['device_name']}, {about['threads']} threads, "
        f"torch {about['torch']}",
        f"a step of the reference: {work['flops'] / 1e12:.3f} TFLOP, {work['bytes'] / 1e9:.1f} GB read and "
        f"written; the machine: {ceilings['flops_per_second'] / 1e12:.3f} TFLOP/s in a product of "
        f"matrices, {ceilings['bytes_per_second'] / 1e9:.1f} GB/s in a copy",
        "",
        "| path | s/step | times | images/s | TFLOP/s | of the product | GB/s | peak GiB | "
        + " | ".join(stages)
        + " |",
        "|---|" + "---:|" * (7 + len(stages)),
    ]
    for name, row in found["paths"].items():
        share = row["flops_per_second"] / ceilings["flops_per_second"]
        cells = [
            name,
            f"{row['seconds']:.3f}",
            f"{row['ratio']:.2f}",
            f"{row['images_per_second']:.3f}",
            f"{row['flops_per_second'] / 1e12:.3f}",
            f"{share:.0%}",
            f"{row['bytes_per_second'] / 1e9:.1f}",
            f"{row['peak_memory_bytes'] / 2**30:.2f}",
            *(f"{row['stages'].get(stage, 0.0):.3f}" for stage in stages),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=sorted(TABLES), help="the README's cases, instead of one")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="ffhq256")
    parser.add_argument("--channels", type=int, help="of the towers, instead of the preset's")
    parser.add_argument("--batch", type=int, default=1, help="images per step")
    parser.add_argument("--checkpointing", choices=("none", "batch_norm", "cells"), default="batch_norm")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="of a CPU; torch's choice by default")
    parser.add_argument("--ablation", action="store_true", help="each lever alone, too")
    parser.add_argument("--path", action="append", default=[], metavar="NAME=LEVER,...", help="one more path")
    parser.add_argument("--steps", type=int, default=3, help="timed, in each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each path")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    names = ("preset", "channels", "batch", "checkpointing", "precision", "device", "threads")
    cases = [Case(**{name: getattr(arguments, name) for name in names})]
    if arguments.table:
        cases = TABLES[arguments.table]
    found = []
    for case in cases:
        paths = paths_of(case, arguments.ablation, arguments.path)
        found.append(compare(paths, arguments.rounds, arguments.steps))
        print(table(found[-1]), end="\n\n", flush=True)
        if arguments.json:  # After each: a machine may be taken away.
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
