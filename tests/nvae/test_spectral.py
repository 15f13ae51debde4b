"""Power iteration against the SVD, and its memory."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nvae.batch_norm import BatchNorm
from nvae.layers import Conv2d
from nvae.spectral import (
    SpectralRegularization,
    batch_norm_scale_penalty,
    iterate,
    normalize,
    singular_values,
)
from tests.nvae.tiny import seeded


class Layers(nn.Module):
    """Two convolutions whose matrices have one shape, one of another; with and without norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Conv2d(4, 6, 3)
        self.depthwise = Conv2d(6, 6, 5, groups=6, weight_norm=False)
        self.second = Conv2d(4, 6, 3, bias=False, weight_norm=False)
        self.spectral = SpectralRegularization(self)

    def exact(self) -> torch.Tensor:
        convolutions = [self.first, self.depthwise, self.second]
        return sum(torch.linalg.svdvals(c.effective_weight().flatten(1))[0] for c in convolutions)


def test_power_iteration_finds_the_largest_singular_value():
    weights = torch.randn(3, 6, 9, generator=seeded(0))
    start = torch.randn(3, 6, generator=seeded(1)), torch.randn(3, 9, generator=seeded(2))
    u, v = iterate(weights, *start, iterations=200)
    assert_close(singular_values(weights, u, v), torch.linalg.svdvals(weights)[:, 0])


def test_short_vectors_are_not_blown_up():
    assert_close(normalize(torch.tensor([[3.0, 4.0], [0.0, 1e-4]])), torch.tensor([[0.6, 0.8], [0.0, 0.1]]))


def test_the_penalty_and_its_gradient_are_those_of_the_singular_values():
    layers = Layers().double()
    for _ in range(50):
        penalty = layers.spectral()
    assert_close(penalty, layers.exact(), rtol=1e-6, atol=0)
    parameters = [p for p in layers.parameters() if p.ndim > 1]
    ours = torch.autograd.grad(penalty, parameters)
    for mine, exact in zip(ours, torch.autograd.grad(layers.exact(), parameters), strict=True):
        assert_close(mine, exact, rtol=1e-3, atol=1e-4)


def test_the_largest_of_all_layers_is_known_after_a_penalty_and_does_not_move_the_vectors():
    layers = Layers()
    assert math.isnan(layers.spectral.largest())
    for _ in range(30):
        layers.spectral()
    before = copy.deepcopy(dict(layers.spectral.named_buffers()))
    exact = max(
        float(torch.linalg.svdvals(convolution.effective_weight().detach().flatten(1))[0])
        for convolution in (layers.first, layers.depthwise, layers.second)
    )
    assert layers.spectral.largest() == pytest.approx(exact, rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in layers.spectral.named_buffers())


def test_the_first_penalty_is_close_and_later_ones_go_on_from_there():
    layers = Layers()
    first = layers.spectral()
    assert_close(first, layers.exact(), rtol=0.02, atol=0)
    later = [layers.spectral() for _ in range(30)]
    assert first < later[0] <= later[-1] * (1 + 1e-6)
    assert_close(later[-1], layers.exact(), rtol=1e-4, atol=0)


def test_a_copy_a_reload_and_the_original_go_on_alike():
    layers = Layers()
    layers.spectral()
    copied, reloaded = copy.deepcopy(layers), Layers()
    # A warm module that is given the state of a cold one starts anew, and the reverse.
    reloaded.spectral()
    cold = Layers().state_dict()
    reloaded.load_state_dict(cold)
    assert not reloaded.spectral.warm
    reloaded.load_state_dict(layers.state_dict())
    expected = [layers.spectral() for _ in range(3)]
    assert [copied.spectral() for _ in range(3)] == expected
    assert [reloaded.spectral() for _ in range(3)] == expected
    with torch.no_grad():
        copied.first.weight.zero_()
        copied.second.weight.zero_()
    assert copied.spectral() < layers.spectral(), "a copy looks at its own convolutions"


def test_the_penalty_is_computed_in_fp32_under_autocast():
    layers, same = Layers(), Layers()
    same.load_state_dict(layers.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        penalty = layers.spectral()
    assert penalty.dtype == torch.float32
    assert_close(penalty, same.spectral(), rtol=0, atol=0)


def test_the_scale_penalty_adds_up_the_largest_absolute_scales():
    model = nn.Sequential(BatchNorm(2), BatchNorm(3), BatchNorm(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.5, -3.0]))
        model[1].weight.copy_(torch.tensor([0.0, 1.0, 2.0]))
    penalty = batch_norm_scale_penalty(model)
    assert penalty == 3 + 2 + 1
    penalty.backward()
    assert model[0].weight.grad.tolist() == [0, -1]
    # A tie is shared, as in the published code.
    assert model[2].weight.grad.tolist() == [0.5, 0.5]
    assert batch_norm_scale_penalty(nn.Linear(1, 1)) == 0


@pytest.mark.parametrize("iterations", [0, 4])
def test_no_gradient_flows_through_the_singular_vectors(iterations):
    weights = torch.randn(1, 3, 4, generator=seeded(0)).requires_grad_()
    u, v = iterate(weights, torch.ones(1, 3), torch.ones(1, 4), iterations)
    (gradient,) = torch.autograd.grad(singular_values(weights, u, v).sum(), weights)
    assert_close(gradient, u[:, :, None] * v[:, None, :])
