"""What all ranks agree on: every kind of trouble has its name, and nothing moves because of it."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nvae.batch_norm import BatchNorm
from nvae.health import Buffers, Limits, Reading, Trouble, agree
from nvae.model import NVAE
from nvae.optimizer import make_ema, make_optimizer
from nvae.step import Coefficients, StepResult, StepSettings, update
from tests.nvae.tiny import latent_noise, stored_images, tiny_model

SOUND: dict[str, Any] = {
    "loss": torch.tensor(2.0),
    "penalties": torch.tensor(0.5),
    "gradient_norm": torch.tensor(3.0),
    "buffers": [torch.ones(3), torch.zeros(2, 2)],
    "weights": [torch.ones(4)],
    "ballot": (1.0, 0.0),
    "limits": Limits(loss=2.0, gradient_norm=3.0),
}


def reading(**changes: Any) -> Reading:
    return agree(**SOUND | changes).reading


def test_what_is_finite_and_within_its_limits_is_made_and_votes_come_back() -> None:
    # At the limit, not above it. Penalties are no part of the loss that is limited.
    assert reading() == Reading(2.0, 3.0, Trouble.NONE, True, (1.0, 0.0))
    assert agree(**SOUND).loss == 2.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("where", "trouble"),
    [
        ("loss", Trouble.LOSS),
        ("penalties", Trouble.LOSS),
        ("gradient_norm", Trouble.GRADIENT),
        ("buffers", Trouble.STATISTICS),
        ("weights", Trouble.WEIGHTS),
    ],
)
def test_every_kind_of_trouble_has_its_name(where: str, trouble: Trouble, bad: float) -> None:
    value = torch.tensor(bad)
    found = reading(**{where: [torch.ones(2), value[None]] if where in ("buffers", "weights") else value})
    assert (found.trouble, found.made) == (trouble, False)


def test_a_number_that_no_network_makes_sense_of_counts_as_not_finite() -> None:
    assert reading(weights=[torch.tensor([-1e18])], buffers=[torch.tensor([1e18])]).made
    assert reading(weights=[torch.tensor([-1e20, 1.0])]).trouble is Trouble.WEIGHTS


def test_spikes_are_told_from_numbers_that_are_none_and_long_gradients_may_be_clipped() -> None:
    long = {"gradient_norm": torch.tensor(3.1)}
    assert reading(loss=torch.tensor(2.1)).trouble is Trouble.LOSS_SPIKE
    assert reading(**long).trouble is Trouble.GRADIENT_SPIKE
    assert not reading(**long).made
    clip = Limits(loss=2.0, gradient_norm=3.0, clip=True)
    assert reading(**long, limits=clip).made
    assert not reading(**long, loss=torch.tensor(2.1), limits=clip).made
    assert not reading(gradient_norm=torch.tensor(math.inf), limits=clip).made
    assert not reading(**long, weights=[torch.tensor([math.nan])], limits=clip).made


class Trained:
    """A model in the midst of its training."""

    def __init__(self) -> None:
        self.model: NVAE = tiny_model()
        self.optimizer, self.ema = make_optimizer(self.model, 3e-4), make_ema(self.model, 0.9)
        assert self.step().reading.made

    def step(self, settings: StepSettings | None = None, **more: Any) -> StepResult:
        return update(
            self.model,
            self.optimizer,
            stored_images(self.model.config),
            Coefficients(1e-2, 0.3, 0.1),
            settings or StepSettings(),
            noise=latent_noise(self.model.config),
            ema=self.ema,
            **more,
        )

    def state(self) -> dict[str, Any]:
        parts = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        return copy.deepcopy(parts)


@pytest.mark.parametrize("limits", [Limits(gradient_norm=1.0), Limits(1.0, 1.0, clip=True)])
def test_an_update_beyond_its_limits_changes_nothing(limits: Limits) -> None:
    training = Trained()
    before = training.state()
    result = training.step(limits=limits)
    assert not result.reading.made
    assert torch.isfinite(result.loss)
    assert_close(training.state(), before, rtol=0, atol=0)


def test_a_gradient_beyond_its_limit_can_be_shortened_to_it() -> None:
    found, expected = Trained(), Trained()
    result = found.step(limits=Limits(gradient_norm=1.0, clip=True))
    assert result.reading.gradient_norm > 1
    expected.step(StepSettings(gradient_clip_norm=1.0))
    assert_close(found.state(), expected.state(), rtol=0, atol=0)


def test_an_infinite_weight_is_found_though_the_loss_is_finite() -> None:
    """A soft clamp makes a number of it, and its gradient zero."""
    training = Trained()
    with torch.no_grad():
        training.model.get_parameter("posterior_heads.1.bias")[0] = math.inf
    result = training.step()
    assert torch.isfinite(result.loss)
    assert result.reading.trouble is Trouble.WEIGHTS


def test_statistics_that_are_not_finite_are_found_and_put_back() -> None:
    training = Trained()
    before = training.state()
    layer = next(module for module in training.model.modules() if isinstance(module, BatchNorm))

    def poison(*_: Any) -> None:
        layer.running_var.fill_(math.nan)

    handle = layer.register_forward_hook(poison)
    result = training.step()
    handle.remove()
    assert result.reading.trouble is Trouble.STATISTICS
    assert_close(training.state(), before, rtol=0, atol=0)


def test_buffers_are_put_back_whatever_their_type() -> None:
    model = tiny_model()
    copied, expected = Buffers(model), {name: b.clone() for name, b in model.named_buffers()}
    assert {tensor.dtype for tensor in expected.values()} >= {torch.float32, torch.int64, torch.bool}
    for tensor in model.buffers():
        tensor.fill_(1)
    copied.restore()
    found: dict[str, Tensor] = dict(model.named_buffers())
    assert_close(found, expected, rtol=0, atol=0)
    assert all(tensor.is_floating_point() for tensor in copied.numbers)
