"""Seconds and memory of training steps, of any preset's model, on a machine that has only torch.

    python tests/benchmarks/step.py --preset ffhq256 --batch 1 --steps 2 --checkpointing batch_norm

It drives `nvae.step.update` with random images, weight averaging included. The model settings
are in presets.json beside it, since reading configs/ needs YAML; a test holds both equal. The
first step is a row of its own: memory is touched for the first time, the spectral penalty makes
40 power iterations instead of 4, and the first average is a copy. `cpu` is processor time of all
threads: on a machine with other work it says more than `seconds`. What a step does besides its
stages is computing each convolution's weight once, and copying buffers. On a GPU each stage waits
for the device, which a real step does not.

The stages are the profiler's ranges in nvae/step.py, replaced here by a stopwatch: profiling
the tens of thousands of operations of a step takes a GiB and most of a minute.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402

import nvae.step  # noqa: E402
from nvae.config import NVAEConfig  # noqa: E402
from nvae.model import NVAE  # noqa: E402
from nvae.noise import image_noise  # noqa: E402
from nvae.optimizer import make_ema, make_optimizer  # noqa: E402
from nvae.step import Coefficients, StepSettings, update  # noqa: E402

PRESETS: dict[str, Any] = json.loads((Path(__file__).parent / "presets.json").read_text())
STAGES = ("forward", "penalties", "backward", "optimizer")
GIB = 2**30


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, by name."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    config = NVAEConfig(**PRESETS[arguments.preset])
    model = NVAE(config).to(device)
    model.set_activation_checkpointing(arguments.checkpointing)
    optimizer, ema = make_optimizer(model, weight_decay=3e-4), make_ema(model, decay=0.9995)
    shape = (arguments.batch, config.image_channels, config.image_size, config.image_size)
    images = torch.randint(0, 2 if config.likelihood == "bernoulli" else 256, shape, dtype=torch.uint8).to(
        device
    )
    settings = StepSettings(precision=arguments.precision)
    stopwatch: dict[str, float] = {}
    nvae.step.record_function = lambda name: stopwatch_stage(name, device, stopwatch)  # type: ignore[assignment]
    rows = []
    for number in range(arguments.steps):
        noise = image_noise(range(arguments.batch), config, device, seed=number)
        stopwatch.clear()
        started, cpu_started = time.perf_counter(), time.process_time()
        result = update(
            model, optimizer, images, Coefficients(1e-3, 0.5, 1e-2), settings, noise=noise, ema=ema
        )
        wait_for(device)
        seconds = time.perf_counter() - started
        row = {"seconds": seconds, "cpu": time.process_time() - cpu_started, "loss": result.loss.item()}
        rows.append(row | stopwatch)
    return {
        "preset": arguments.preset,
        "batch": arguments.batch,
        "precision": arguments.precision,
        "checkpointing": arguments.checkpointing,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "images_per_second": arguments.batch / rows[-1]["seconds"],
        "peak_memory_gib": peak_memory(device) / GIB,
        "steps": rows,
    }


@contextmanager
def stopwatch_stage(name: str, device: torch.device, seconds: dict[str, float]) -> Iterator[None]:
    """Adds the time spent in it to `seconds`, under the last part of the name."""
    stage = name.rpartition("/")[2]
    wait_for(device)
    started = time.perf_counter()
    yield
    wait_for(device)
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's tensors, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(found: dict[str, Any]) -> str:
    columns = ("seconds", "cpu", *STAGES)
    lines = [
        f"{found['preset']}: {found['parameters'] / 1e6:.2f} M parameters, batch {found['batch']}, "
        f"{found['precision']}, checkpointing {found['checkpointing']}",
        f"on {found['device']}, {found['threads']} threads, torch {found['torch']}",
        "step  " + "".join(f"{column:>12}" for column in columns) + f"{'loss':>14}",
    ]
    for number, row in enumerate(found["steps"]):
        cells = "".join(f"{row[column]:>12.2f}" for column in columns)
        lines.append(f"{number:<6}{cells}{row['loss']:>14.1f}")
    lines.append(
        f"peak memory {found['peak_memory_gib']:.2f} GiB; last step {found['images_per_second']:.3f} images/s"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="ffhq256")
    parser.add_argument("--batch", type=int, default=1, help="images per step")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--checkpointing", choices=("none", "batch_norm", "cells"), default="batch_norm")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    found = measure(arguments)
    print(json.dumps(found, indent=2) if arguments.json else table(found))


if __name__ == "__main__":
    main()
