"""One update: its gradient against the loss written out, and what must not move when."""

import copy
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nvae import objective
from nvae.batch_norm import BatchNorm
from nvae.config import CellFamily
from nvae.model import NVAE
from nvae.noise import by_group, image_noise
from nvae.optimizer import make_ema, make_optimizer
from nvae.pixels import to_model
from nvae.spectral import batch_norm_scale_penalty
from nvae.step import Coefficients, StepResult, StepSettings, update
from tests.nvae.tiny import latent_noise, normal_noise, stored_images, tiny_config, tiny_model

WARMING_UP = Coefficients(learning_rate=1e-2, kl=0.3, spectral=0.1)


def one_update(
    model: NVAE,
    images: Tensor,
    *,
    coefficients: Coefficients = WARMING_UP,
    settings: StepSettings | None = None,
    noise: Tensor | None = None,
    **more: Any,
) -> StepResult:
    return update(
        model,
        make_optimizer(model, weight_decay=3e-4),
        images,
        coefficients,
        settings or StepSettings(),
        noise=latent_noise(model.config, len(images)) if noise is None else noise,
        **more,
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def settle(model: NVAE) -> NVAE:
    """Moves it off its initial weights, where scales are all one."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter += 0.02 * normal_noise(index)(tuple(parameter.shape)).to(parameter)
    return model


@pytest.mark.parametrize("kl", [0.3, 1.0])
def test_the_gradient_is_that_of_the_loss_written_out(kl):
    model = settle(tiny_model(flow_pairs=1).double())
    model.spectral()
    images, weights = stored_images(model.config, 3), torch.tensor([1.0, 0.5, 0.0]).double()
    written_out = copy.deepcopy(model)

    noise = by_group(latent_noise(model.config, 3), model.config)
    output = written_out(to_model(images, model.config).double(), noise)
    kl_BG = torch.stack([group.kl for group in output.groups], dim=1)
    cost = (weights @ kl_BG.abs()) / 1.5 + 0.01
    # Scales [1, 2]: one group on a quarter of the positions that two groups share.
    gamma = cost / torch.tensor([1.0, 2.0, 2.0]) if kl < 1 else torch.ones_like(cost)
    charged = kl_BG @ (gamma / gamma.mean()).detach()
    likelihood = output.likelihood.log_prob(to_model(images, model.config).double()).sum((1, 2))
    loss = (weights * (kl * charged - likelihood)).sum() / 1.5
    loss = loss + 0.1 * (written_out.spectral() + batch_norm_scale_penalty(written_out))
    loss.backward()

    result = one_update(model, images, weights=weights, coefficients=Coefficients(0.0, kl, 0.1))
    assert_close(result.loss, loss.detach())
    assert_close(result.kl_per_group, (weights @ kl_BG).detach())
    assert_close(result.nelbo, (weights * (kl_BG.sum(1) - likelihood)).sum().detach())
    assert result.images == 1.5
    assert_close(gradients(model), gradients(written_out))
    assert_close(result.gradient_norm, torch.cat([g.ravel() for g in gradients(model).values()]).norm())


@pytest.mark.parametrize("family", get_args(CellFamily))
def test_every_cell_family_can_be_trained(family):
    model = tiny_model(cell_family=family)
    before = copy.deepcopy(dict(model.named_parameters()))
    assert one_update(model, stored_images(model.config)).reading.made
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not unmoved


@pytest.mark.parametrize(
    "settings",
    [
        {"likelihood": "bernoulli", "image_channels": 1, "border_pixels": 2},
        {"likelihood": "normal"},
        {"pixel_bits": 5, "flow_pairs": 2},
        {"groups_per_scale": (1,)},
        {"residual_posterior": False, "squeeze_excitation": False},
    ],
)
def test_every_kind_of_model_can_be_trained(settings):
    model = tiny_model(**settings)
    images, optimizer = stored_images(model.config, 4), make_optimizer(model, 3e-4)
    losses = [
        update(
            model,
            optimizer,
            images,
            Coefficients(1e-2, 1.0, 1e-2),
            StepSettings(),
            noise=image_noise(range(4 * step, 4 * step + 4), model.config, seed=0),
        ).loss
        for step in range(6)
    ]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["batch_norm", "cells"])
def test_activation_checkpointing_changes_no_gradient(mode, precision):
    results = {}
    for each in ("none", mode):
        model = settle(tiny_model(flow_pairs=1))
        model.set_activation_checkpointing(each)
        one_update(model, stored_images(model.config), settings=StepSettings(precision=precision))
        results[each] = gradients(model) | dict(model.state_dict())
    assert_close(results[mode], results["none"])


def test_bf16_stays_close_to_fp32_and_keeps_fp32_weights():
    losses = {}
    for precision in ("fp32", "bf16"):
        model = settle(tiny_model())
        result = one_update(model, stored_images(model.config), settings=StepSettings(precision=precision))
        losses[precision] = result.loss
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert result.loss.dtype == result.spectral.dtype == torch.float32
    assert_close(losses["bf16"], losses["fp32"], rtol=2e-2, atol=0)
    assert losses["bf16"] != losses["fp32"]


def test_micro_batches_add_up_to_the_whole_batch_where_statistics_do_not_enter():
    # No batch norm in this family; and once the KL has warmed up there is no balancing.
    coefficients, images = Coefficients(0.0, 1.0, 0.1), stored_images(tiny_config(), 5)
    found = {}
    for parts in (1, 3):
        model = tiny_model(cell_family="res_elu").double()
        model(to_model(images, model.config).double(), normal_noise(0))  # initializes from data
        result = one_update(
            model,
            images,
            coefficients=coefficients,
            settings=StepSettings(micro_batches=parts),
            weights=torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5]),
        )
        found[parts] = gradients(model) | {"loss": result.loss, "kl": result.kl_per_group}
    assert_close(found[3], found[1])


def test_flipped_images_are_trained_on_as_if_they_were_stored_so():
    model, other = tiny_model(), tiny_model()
    images, flip = stored_images(model.config, 3), torch.tensor([True, False, True])
    mirrored = torch.stack([image.flip(-1) if f else image for image, f in zip(images, flip, strict=True)])
    assert one_update(model, images, flip=flip).loss == one_update(other, mirrored).loss


def test_an_update_that_is_not_finite_changes_nothing():
    model = tiny_model()
    optimizer, ema = make_optimizer(model, 3e-4), make_ema(model, 0.9)
    images = stored_images(model.config)

    noise = latent_noise(model.config)

    def step(noise: Tensor) -> StepResult:
        return update(model, optimizer, images, WARMING_UP, StepSettings(), noise=noise, ema=ema)

    def state() -> dict[str, Any]:
        parts = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
        return copy.deepcopy(parts)

    for _ in range(2):
        before = state()
        assert not step(torch.full_like(noise, torch.nan)).reading.made
        assert_close(state(), before, rtol=0, atol=0)
        # Neither does it remain in anything that is not part of the state.
        assert step(noise).reading.made
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_resumed_training_goes_on_bit_for_bit():
    def train(model: NVAE, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
        return [
            update(
                model,
                optimizer,
                stored_images(model.config, seed=i),
                WARMING_UP,
                StepSettings(),
                noise=image_noise((2 * i, 2 * i + 1), model.config, seed=0),
            ).loss
            for i in steps
        ]

    model = tiny_model()
    optimizer = make_optimizer(model, 3e-4)
    train(model, optimizer, range(2))
    resumed = tiny_model(seed=1)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    its_optimizer = make_optimizer(resumed, 3e-4)
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(resumed, its_optimizer, range(2, 4)) == train(model, optimizer, range(2, 4))


def test_long_gradients_are_clipped_before_weight_decay():
    model = tiny_model()
    norm = one_update(model, stored_images(model.config)).gradient_norm
    assert norm > 1
    clipped = tiny_model()
    result = one_update(clipped, stored_images(model.config), settings=StepSettings(gradient_clip_norm=1.0))
    assert_close(result.gradient_norm, norm)
    assert_close(torch.cat([g.ravel() for g in gradients(clipped).values()]).norm(), torch.tensor(1.0))


def test_without_a_spectral_coefficient_penalties_are_not_computed():
    model = tiny_model()
    result = one_update(model, stored_images(model.config), coefficients=Coefficients(1e-2, 1.0, 0.0))
    assert result.spectral == result.batch_norm_scale == 0
    assert not model.spectral.warm


def test_averaged_weights_follow_by_a_ramp_and_counters_are_copied():
    model = tiny_model()
    ema, expected = make_ema(model, decay=0.5), None
    for count in range(12):
        settle(model)
        model.train()(to_model(stored_images(model.config), model.config), normal_noise(0))
        model.spectral()
        ema.update_parameters(model)
        decay = min(0.5, (1 + count) / (10 + count)) if count else 0.0
        now = {name: value.clone() for name, value in model.state_dict().items()}
        expected = now if expected is None else {n: decay * expected[n] + (1 - decay) * now[n] for n in now}
    averaged = ema.module.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm):
            for entry in ("weight", "running_mean", "running_var"):
                assert_close(averaged[f"{name}.{entry}"], expected[f"{name}.{entry}"])
            assert averaged[f"{name}.num_batches_tracked"] == 12
    for name in model.spectral.state_dict():
        assert torch.equal(averaged[f"spectral.{name}"], model.state_dict()[f"spectral.{name}"])
    assert ema.n_averaged == 12


def test_importance_weights_use_the_same_terms_as_the_loss():
    model = tiny_model(flow_pairs=1)
    images = stored_images(model.config)
    result = one_update(model, images, coefficients=Coefficients(0.0, 1.0, 0.0))
    levels = to_model(images, model.config)
    output = model(levels, by_group(latent_noise(model.config), model.config))
    cost = objective.reconstruction(output, levels, model.config)
    assert_close(-objective.log_importance_weight(output, cost).sum(), result.nelbo)
