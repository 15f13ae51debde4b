"""The noise that the model gets in training, by the images that it gets it for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nvae.distributions import Noise
from pipeline.data.index import load_index
from pipeline.data.loader import training_batches
from pipeline.training.machine import Machine
from pipeline.training.metrics import Metrics
from pipeline.training.state import Training, TrainState
from pipeline.training.tracking import NullTracker
from pipeline.training.train import step
from pipeline.training.worker import LocalWorker
from tests.tiny_run import Home

START, BATCH = 20, 7


def noise_by_position(home: Home, world_size: int, micro_batch_size: int) -> Mapping[int, list[Tensor]]:
    """The draws of each group for every image of one batch, which so many ranks share."""
    config = home.config(
        f"data.root={home.store}/data/tiny",
        f"train.batch_size={BATCH}",
        f"train.micro_batch_size={micro_batch_size}",
    )
    data, found = load_index(config.data.root), {}
    for rank in range(world_size):
        worker = LocalWorker(torch.device("cpu"))
        batches = training_batches(
            config, data, rank=rank, world_size=world_size, start=START, stop=START + BATCH
        )
        (batch,) = batches
        state = TrainState.create(config, worker, None, None)
        drawn: list[list[Tensor]] = []

        def listening(_: Any, inputs: tuple[Tensor, Noise], drawn: Any = drawn) -> tuple[Tensor, Noise]:
            images, noise = inputs
            drawn.append([])

            def draw(shape: tuple[int, ...]) -> Tensor:
                drawn[-1].append(noise(shape))
                return drawn[-1][-1]

            return images, draw

        state.model.register_forward_pre_hook(listening)
        training = Training(config, data, worker, NullTracker(), None)
        step(training, state, state.model, batch, Metrics(worker, config.model, Machine(worker.device, {})))
        assert len(drawn) == -(-len(batch.images) // micro_batch_size)
        groups = [torch.cat(parts) for parts in zip(*drawn, strict=True)]
        for row, position in enumerate(batch.positions.tolist()):
            found[position] = [group[row] for group in groups]
    return found


def test_every_image_gets_the_same_noise_at_every_width_and_in_whatever_parts(home: Home) -> None:
    expected = noise_by_position(home, 1, BATCH)
    for world_size, micro_batch_size in ((1, 2), (2, 4), (3, 1), (4, 2)):
        found = noise_by_position(home, world_size, micro_batch_size)
        assert sorted(found) == sorted(expected) == list(range(START, START + BATCH))
        for position, groups in expected.items():
            assert all(map(torch.equal, found[position], groups))
