"""Two real processes that share a batch make the update of one process that has it all."""

import copy
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from nvae.batch_norm import BatchNorm
from nvae.collectives import Waiting
from nvae.health import Reading, Trouble
from nvae.layers import DataInitializedConv2d
from nvae.levers import ON_CPU, PLAIN, Levers
from nvae.model import NVAE
from nvae.objective import balance
from nvae.optimizer import make_ema, make_optimizer
from nvae.step import Coefficients, StepSettings, update
from tests.nvae.tiny import latent_noise, normal_noise, seeded, stored_images, tiny_config, tiny_model

UPDATES = 2
KL = torch.tensor([[1.0, 2.0, 3.0], [30.0, 5.0, 1.0]])


@dataclass(frozen=True)
class Scenario:
    """How a batch of images is shared: the images of each part of each rank, in order."""

    shares: tuple[tuple[tuple[int, ...], ...], ...]
    model: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = (1.0,) * 5
    activation_checkpointing: str = "batch_norm"
    kl: float = 0.3
    poisoned_image: int | None = None
    """Its noise is nan."""
    levers: Levers = PLAIN
    bucket_views: bool = False
    """Whether gradients stay where DistributedDataParallel sends them from."""

    def alone(self) -> "Scenario":
        """The same parts in one process."""
        parts = tuple(sum(together, ()) for together in zip(*self.shares, strict=True))
        return replace(self, shares=(parts,), levers=PLAIN)


SCENARIOS = {
    "flows and balancing": Scenario((((0, 1),), ((2, 3),)), {"flow_pairs": 1}),
    "shares of unequal size": Scenario((((0,),), ((1, 2, 3, 4),)), weights=(0.0, 1.0, 1.0, 0.0, 1.0)),
    "a rank whose images do not count": Scenario((((0, 1),), ((2, 3),)), weights=(0, 0, 1, 1, 1), kl=1.0),
    "cells recomputed": Scenario((((0, 1),), ((2,),)), activation_checkpointing="cells"),
    "two parts": Scenario((((0,), (1,)), ((2, 3), (4,)))),
    "no batch norm": Scenario((((0, 1),), ((2, 3),)), {"cell_family": "res_elu"}),
    "no batch norm, unequal shares": Scenario((((0,),), ((1, 2, 3),)), {"cell_family": "res_elu"}),
    "packed": Scenario((((0, 1),), ((2, 3),)), levers=Levers(packed=True)),
    "packed, two parts": Scenario((((0,), (1,)), ((2, 3), (4,))), levers=ON_CPU, bucket_views=True),
    "packed, not finite": Scenario((((0, 1),), ((2, 3),)), poisoned_image=1, levers=ON_CPU),
    "not finite on one rank": Scenario((((0, 1),), ((2, 3),)), poisoned_image=3),
}


def noise_of_images(scenario: Scenario, number: int) -> Tensor:
    """Of all five images of an update: every image has its own, whoever holds it."""
    noise = latent_noise(tiny_config(**scenario.model), count=5, seed=number).double()
    if scenario.poisoned_image is not None:
        noise[scenario.poisoned_image, 0] = torch.nan
    return noise


def train(scenario: Scenario, rank: int) -> dict[str, Any]:
    """The updates of one rank: results, and the state after them."""
    network = tiny_model(**scenario.model).double()
    network.set_activation_checkpointing(scenario.activation_checkpointing)
    network.use(scenario.levers)
    model: nn.Module = network
    if dist.is_initialized():
        # Nothing is broadcast: statistics and singular vectors must come out alike by themselves.
        model = DistributedDataParallel(
            network, broadcast_buffers=False, gradient_as_bucket_view=scenario.bucket_views
        )
    optimizer, ema = make_optimizer(network, 3e-4), make_ema(network, 0.9)
    parts = scenario.shares[rank]
    images = tuple(image for part in parts for image in part)
    results = [
        update(
            model,
            optimizer,
            stored_images(network.config, 5, seed=number)[list(images)],
            Coefficients(1e-2, scenario.kl, 0.1),
            StepSettings(micro_batches=len(parts)),
            noise=noise_of_images(scenario, number)[list(images)],
            weights=torch.tensor(scenario.weights)[list(images)],
            ema=ema,
        )
        for number in range(UPDATES)
    ]
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return {
        "results": [vars(result) | {"reading": plain(result.reading)} for result in results],
        "gradients": gradients,
        "model": network.state_dict(),
        "ema": ema.module.state_dict(),
    }


def plain(reading: Reading) -> dict[str, Any]:
    """In types that may be loaded from a file."""
    return vars(reading) | {"trouble": reading.trouble.value}


def features_of_ranks() -> list[Tensor]:
    """The input of a layer on each of two ranks: far apart, so that most variance is between them."""
    return [normal_noise(rank)((2, 3, 4, 4)).double() + 5 * rank for rank in range(2)]


def initialized_layer(x: Tensor, forgetful: bool) -> DataInitializedConv2d:
    layer = DataInitializedConv2d(3, 4, 1, forgetful=forgetful).double()
    layer.weight.data = torch.randn(4, 3, 1, 1, generator=seeded(7)).double()
    layer(x)
    return layer


LATE_SECONDS = 0.2
MOMENTS = ("before the update", "in a batch norm", "in the last gradient")


def late(moment: str, rank: int) -> list[tuple[float, float]]:
    """Three updates in which rank 1 is late at that moment: how long each took, and waited."""
    network = tiny_model()
    model = DistributedDataParallel(network, broadcast_buffers=False)

    def pause(*_: Any) -> None:
        if rank == 1:
            time.sleep(LATE_SECONDS)

    if moment == "in a batch norm":
        next(
            module for module in network.modules() if isinstance(module, BatchNorm)
        ).register_forward_pre_hook(pause)
    if moment == "in the last gradient":
        network.stem.weight.register_hook(pause)
    optimizer, waiting = make_optimizer(network, 0.0), Waiting(torch.device("cpu"))
    found = []
    for number in range(3):
        if moment == "before the update":
            pause()
        with waiting:
            images = stored_images(network.config, 2, seed=number)
            update(
                model,
                optimizer,
                images,
                Coefficients(1e-3, 1.0, 0.1),
                StepSettings(),
                noise=latent_noise(network.config),
            )
        found.append((waiting.total.read(), waiting.waited.read()))
    return found


def poison_gradient(network: NVAE) -> None:
    next(network.parameters()).register_hook(lambda gradient: gradient * torch.nan)


def poison_statistic(network: NVAE) -> None:
    layer = next(module for module in network.modules() if isinstance(module, BatchNorm))

    def poison(*_: Any) -> None:
        layer.running_var.fill_(torch.inf)

    layer.register_forward_hook(poison)


def poison_weight(network: NVAE) -> None:
    """One that the loss does not show."""
    with torch.no_grad():
        network.get_parameter("posterior_heads.1.bias")[0] = torch.inf


POISONS = {
    Trouble.GRADIENT: poison_gradient,
    Trouble.STATISTICS: poison_statistic,
    Trouble.WEIGHTS: poison_weight,
}


def poisoned(trouble: Trouble, rank: int) -> dict[str, Any]:
    """An update in which something is not finite on the second rank alone, and votes differ."""
    network = tiny_model()
    model = DistributedDataParallel(network, broadcast_buffers=False)
    if rank == 1:
        POISONS[trouble](network)
    before = copy.deepcopy(network.state_dict())
    result = update(
        model,
        make_optimizer(network, 3e-4),
        stored_images(network.config, 2, seed=rank),
        Coefficients(1e-2, 0.3, 0.1),
        StepSettings(),
        noise=latent_noise(network.config, seed=rank),
        ballot=[float(rank), 0.0, 1.0],
    )
    moved = [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
    return {"reading": plain(result.reading), "moved": moved}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found: dict[str, Any] = {name: train(scenario, rank) for name, scenario in SCENARIOS.items()}
    found["late"] = {moment: late(moment, rank) for moment in MOMENTS}
    found |= {f"poisoned: {trouble.name}": poisoned(trouble, rank) for trouble in POISONS}
    for compatible in (False, True):
        config = tiny_config(published_compatibility=compatible)
        found[f"balance, {compatible}"] = balance(KL[rank : rank + 1], torch.ones(1), config)
        layer = initialized_layer(features_of_ranks()[rank], forgetful=compatible)
        found[f"layer, {compatible}"] = layer.state_dict()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found in every scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_make_the_update_of_one(two_ranks, name):
    ours, theirs = two_ranks[0][name], two_ranks[1][name]
    alone = train(SCENARIOS[name].alone(), rank=0)
    for first, second, whole in zip(ours["results"], theirs["results"], alone["results"], strict=True):
        for quantity in ("images", "reconstruction", "kl_per_channel"):
            assert_close(first[quantity] + second[quantity], whole[quantity], equal_nan=True)
        for quantity in ("loss", "spectral", "batch_norm_scale", "gradient_norm"):
            assert_close(first[quantity], whole[quantity], equal_nan=True)
            assert torch.equal(first[quantity], second[quantity]) or whole[quantity].isnan()
        # What the host decides by is the same to the last bit; text, for nan is not equal to itself.
        assert str(first["reading"]) == str(second["reading"])
    for part in ("gradients", "model", "ema"):
        assert_close(ours[part], alone[part], equal_nan=True, msg=lambda text, part=part: f"{part}: {text}")
    # The ranks do not drift apart, not even by rounding.
    assert_close(ours["model"], theirs["model"], rtol=0, atol=0)


def test_no_rank_moves_if_one_is_not_finite(two_ranks):
    untouched = tiny_model().double().state_dict()
    for rank in two_ranks:
        found = rank["not finite on one rank"]
        assert not any(result["reading"]["made"] for result in found["results"])
        assert_close(found["model"], untouched, rtol=0, atol=0)


@pytest.mark.parametrize("trouble", POISONS)
def test_what_is_not_finite_on_one_rank_alone_keeps_all_ranks_from_moving(two_ranks, trouble):
    for rank in two_ranks:
        found = rank[f"poisoned: {trouble.name}"]
        assert found["moved"] == []
        assert not found["reading"]["made"]
        # Its loss is finite: nothing else would have told the other rank.
        assert found["reading"]["trouble"] == trouble.value
        assert found["reading"]["votes"] == (1.0, 0.0, 2.0)


def test_the_balance_is_that_of_all_ranks_except_with_published_compatibility(two_ranks):
    config = tiny_config()
    for rank, found in enumerate(two_ranks):
        assert_close(found["balance, False"], balance(KL, torch.ones(2), config))
        assert_close(found["balance, True"], balance(KL[rank : rank + 1], torch.ones(1), config))


def test_a_layer_is_initialized_from_all_ranks_and_a_forgetful_one_from_their_averages(two_ranks):
    features = features_of_ranks()
    unit = initialized_layer(features[0], forgetful=True).unit_weight().detach()
    outputs = [torch.einsum("oi,bihw->ohwb", unit[:, :, 0, 0], x).flatten(1) for x in features]
    deviations = {False: torch.cat(outputs, 1).std(1), True: (outputs[0].std(1) + outputs[1].std(1)) / 2}
    mean = torch.cat(outputs, 1).mean(1)
    for found in two_ranks:
        for forgetful, deviation in deviations.items():
            parameters, spread = found[f"layer, {forgetful}"], 5 * deviation + 1e-5
            assert_close(parameters["log_weight_norm"].flatten(), -spread.log())
            assert_close(parameters["bias"], -mean / spread)


@pytest.mark.parametrize("moment", MOMENTS)
def test_waiting_for_a_late_rank_is_measured_wherever_it_is_late(two_ranks, moment):
    punctual, slow = (rank["late"][moment] for rank in two_ranks)
    assert all(waited <= total for total, waited in punctual + slow)
    # The best of three, for on a busy machine either rank is late by itself now and then.
    more = [first - second for (_, first), (_, second) in zip(punctual, slow, strict=True)]
    assert max(more) > 0.5 * LATE_SECONDS


def test_one_process_waits_for_nobody():
    network, waiting = tiny_model(), Waiting(torch.device("cpu"))
    with waiting:
        update(
            network,
            make_optimizer(network, 0.0),
            stored_images(network.config, 2),
            Coefficients(1e-3, 1.0, 0.1),
            StepSettings(),
            noise=latent_noise(network.config),
        )
    assert waiting.waited.read() == 0 < waiting.total.read()
    assert waiting.total.read() == 0, "what was read is gone"
