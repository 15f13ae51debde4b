"""How long a checkpoint delays a training, beside the time of an update; and what it takes beside.

    python -m tests.benchmarks.checkpoint --preset celeba64 --channels 16 --batch 4

Updates and saves take turns, so that a save is measured while the one before is long done and
between updates that have used the caches. `fresh memory` is what copying the state took before
its memory was used again. `written` is the time of the thread that hashes and stores, meanwhile
of which a last update is made; an update that is slower then shows what that costs.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import torch

from nvae.model import NVAE
from nvae.noise import image_noise
from nvae.optimizer import make_ema, make_optimizer
from nvae.step import Coefficients, StepSettings, update
from pipeline import config_file, storage
from pipeline.training.checkpoint_writer import CheckpointWriter, claim_attempt
from pipeline.training.optimizer_state import flatten_optimizer

MIB = 2**20


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def shown(name: str, measured: Sequence[float]) -> str:
    low, high = min(measured) * 1000, max(measured) * 1000
    return f"{name:28} {statistics.median(measured) * 1000:9.1f} ms  ({low:.1f} to {high:.1f})"


def measure(preset: str, channels: int, batch: int, rounds: int, store: str) -> list[str]:
    overrides = [f"model.encoder_channels={channels}", f"model.decoder_channels={channels}"]
    config = config_file.load(preset, overrides if channels else [])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = NVAE(config.model).to(device)
    model.set_activation_checkpointing(config.train.activation_checkpointing)
    optimizer, ema = make_optimizer(model, weight_decay=3e-4), make_ema(model, decay=0.9995)
    shape = (batch, config.model.image_channels, config.model.image_size, config.model.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)

    def train() -> None:
        noise = image_noise(range(batch), config.model, device, seed=0)
        update(model, optimizer, images, Coefficients(1e-4, 1.0, 1e-2), StepSettings(), noise=noise, ema=ema)

    def state() -> dict[str, dict[str, torch.Tensor]]:
        averaged = ema.module.state_dict()
        return {
            "model": model.state_dict(),
            "ema": averaged,
            "optimizer": flatten_optimizer(optimizer, model),
        }

    def copy_to_fresh_memory() -> None:
        for tensors in state().values():
            copies.extend(tensor.to("cpu", copy=True) for tensor in tensors.values())

    train()  # Some power iterations are made in the first update alone.
    writer = CheckpointWriter(store, claim_attempt(store), keep=2)
    updates, saves, written, during, fresh = [], [], [], [], []
    for number in range(rounds + 1):
        updates.append(seconds(train))
        copies: list[torch.Tensor] = []
        fresh.append(seconds(copy_to_fresh_memory))
        copies.clear()
        began = time.perf_counter()
        saves.append(seconds(lambda number=number: writer.save(state(), {}, number + 1, {})))
        during.append(seconds(train))
        writer.wait()
        written.append(time.perf_counter() - began)
    size = sum(tensor.nbytes for tensors in state().values() for tensor in tensors.values()) / MIB
    every = 100 * statistics.median(saves[1:]) / statistics.median(updates)
    return [
        f"{preset}, {channels or 'all'} channels, batch {batch}, on {device.type}; {size:,.0f} MiB of state",
        shown("update", updates),
        shown("save, first of its memory", saves[:1]),
        shown("save", saves[1:]),
        shown("copy to fresh memory", fresh),
        shown("update while one is written", during),
        shown("written after (at most)", written),
        f"a save is {every:.2f}% of an update, {every / 500:.5f}% of 500",
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB",
    ]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.checkpoint", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--preset", default="celeba64")
    parser.add_argument("--channels", type=int, default=16, help="0: those of the preset")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--store", help="a folder or s3://bucket/folder; default: a temporary one")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        store = storage.join(asked.store or folder, "checkpoint-benchmark")
        try:
            print("\n".join(measure(asked.preset, asked.channels, asked.batch, asked.rounds, store)))
        finally:
            storage.delete(store, recursive=True)


if __name__ == "__main__":
    main(sys.argv[1:])
