"""The loop that everything is compared with: DistributedDataParallel and the mathematics, no more.

It trains the same model by the same losses, penalties, optimizer and weight averaging as
nvae/step.py, on batches that lie in memory, and looks at nothing: no check of what is finite, no
curves, no checkpoints, no wish to stop.

    torchrun --nproc-per-node 2 -m tests.benchmarks.bare_loop '{"updates": 100, ...}'
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nvae import objective
from nvae.distributions import Noise
from nvae.model import NVAE
from nvae.optimizer import make_ema, make_optimizer
from nvae.pixels import to_model
from nvae.spectral import batch_norm_scale_penalty
from pipeline import config_file
from pipeline.config import RunConfig
from pipeline.training.worker import Worker

KL_COEFFICIENT = 0.5


class BareLoop:
    """One rank's model, and batches of `images` uint8 (N, b, C, H, W) that it trains on in turn."""

    def __init__(self, config: RunConfig, images: Tensor) -> None:
        torch.manual_seed(config.train.seed)
        self.config, self.images, self.number = config, images, 0
        self.noise: Noise = torch.randn
        self.network = NVAE(config.model)
        self.network.set_activation_checkpointing(config.train.activation_checkpointing)
        self.model = DistributedDataParallel(
            self.network, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        self.optimizer = make_optimizer(self.network, config.optimizer.weight_decay)
        self.ema = make_ema(self.network, config.optimizer.ema_decay)
        for group in self.optimizer.param_groups:
            group["lr"] = config.optimizer.minimum_learning_rate

    def update(self) -> None:
        """As nvae/step.py makes it in the middle of the KL warm-up."""
        images = self.images[self.number % len(self.images)]
        self.number += 1
        config, spectral = self.network.config, self.config.objective.spectral_coefficient
        levels = to_model(images, config)
        self.optimizer.zero_grad()
        with self.network.shared_weights() as stacked:
            output = self.model(levels, self.noise)
            reconstruction = objective.reconstruction(output, levels, config)
            kl = objective.kl_per_group(output)
            charged = objective.balance(kl.detach(), torch.ones(len(images)), config) * kl
            loss = (reconstruction + KL_COEFFICIENT * charged.sum(dim=1)).mean()
            penalty = self.network.spectral(stacked) + batch_norm_scale_penalty(self.network)
            (loss + spectral * penalty).backward()
        self.optimizer.step()
        self.ema.update_parameters(self.network)


def random_images(config: RunConfig, world_size: int, batches: int = 8) -> Tensor:
    """uint8 (batches, b, C, H, W): a rank's shares of a few batches."""
    shape = (config.model.image_channels, config.model.image_size, config.model.image_size)
    share = config.train.batch_size // world_size
    return torch.randint(0, 256, (batches, share, *shape), dtype=torch.uint8)


def work(arguments: Mapping[str, Any], worker: Worker | None = None) -> dict[str, Any]:
    """Seconds of `updates` updates after `warmup` others, within a process group that is there."""
    torch.set_num_threads(1)
    config = config_file.from_mapping(arguments["config"])
    loop = BareLoop(config, random_images(config, dist.get_world_size()))
    for _ in range(arguments["warmup"]):
        loop.update()
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(arguments["updates"]):
        loop.update()
    dist.barrier()
    return {"seconds": time.perf_counter() - begun}


def main(arguments: str, answer: str) -> None:
    """What each process of torchrun does; rank 0 writes the answer into a file."""
    dist.init_process_group("gloo")
    found = work(json.loads(arguments))
    if int(os.environ["RANK"]) == 0:
        Path(answer).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
