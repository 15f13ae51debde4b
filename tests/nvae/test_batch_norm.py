"""Batch norm against torch's own, and what may not change when memory is saved."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from nvae.batch_norm import (
    EPSILON,
    MOMENTUM,
    BatchNorm,
    batch_statistics,
    combine,
    recomputed,
    set_activation_checkpointing,
)
from tests.nvae.tiny import seeded

ACTIVATIONS = {"none": lambda y: y, "swish": F.silu, "elu": F.elu}


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def scrambled(layer: BatchNorm) -> BatchNorm:
    """Weights that are not the initial ones and zeros."""
    with torch.no_grad():
        layer.weight.copy_(images(len(layer.weight), seed=1))
        layer.bias.copy_(images(len(layer.bias), seed=2))
    return layer


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_output_gradients_and_running_statistics_are_those_of_torch(activation, recompute):
    ours = scrambled(BatchNorm(3, activation).double())
    ours.recompute = recompute
    theirs = nn.BatchNorm2d(3, eps=EPSILON, momentum=MOMENTUM).double()
    theirs.load_state_dict(ours.state_dict())
    x, direction = images(2, 3, 4, 5), images(2, 3, 4, 5, seed=3)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):
        y_ours, y_theirs = ours(x_ours), ACTIVATIONS[activation](theirs(x_theirs))
        assert_close(y_ours, y_theirs)
    y_ours.backward(direction)
    y_theirs.backward(direction)
    assert_close(x_ours.grad, x_theirs.grad)
    assert_close(ours.weight.grad, theirs.weight.grad)
    assert_close(ours.bias.grad, theirs.bias.grad)
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert_close(ours.eval()(x), ACTIVATIONS[activation](theirs.eval()(x)))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradients_are_those_of_finite_differences(activation):
    layer = scrambled(BatchNorm(2, activation).double())
    x = images(2, 2, 2, 3).requires_grad_()

    def normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(normalized, (x, layer.weight, layer.bias))


def test_statistics_keep_their_digits_where_the_mean_is_large():
    deviations = images(4, 2, 8, 8, dtype=torch.float32)
    shifted = deviations + 1000
    exact = shifted.double().var(dim=(0, 2, 3), correction=0).float()
    assert_close(batch_statistics(shifted).variance, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sizes", [[3, 3], [1, 5], [1, 2, 4]])
def test_statistics_of_unequal_parts_combine_to_those_of_the_whole(sizes):
    x = images(sum(sizes), 2, 3, 3) + 100
    parts = [batch_statistics(part) for part in x.split(sizes)]
    whole, combined = (
        batch_statistics(x),
        combine(torch.stack([torch.cat([p.mean, p.variance, p.count[None]]) for p in parts])),
    )
    assert_close(combined.mean, whole.mean)
    assert_close(combined.variance, whole.variance)
    assert combined.count == whole.count


def test_statistics_under_bf16_autocast_are_fp32():
    x = (images(2, 3, 8, 8) + 3).bfloat16()
    layer = BatchNorm(3, "swish")
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(layer.running_mean, MOMENTUM * x.double().mean((0, 2, 3)).float(), rtol=1e-6, atol=0)
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_a_single_value_per_channel_is_refused():
    with pytest.raises(ValueError, match=r"one value per channel.*larger batch"):
        BatchNorm(3)(torch.ones(1, 3, 1, 1))


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recompute = False
        self.body = nn.Sequential(
            BatchNorm(4, "none"),
            nn.Conv2d(4, 8, 1),
            BatchNorm(8, "swish"),
            nn.Conv2d(8, 4, 3, padding=1),
            BatchNorm(4, "elu"),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * (recomputed(self.body, x) if self.recompute else self.body(x))


def trained(mode: str) -> tuple[Tensor, nn.Module, int]:
    """Loss, model (with gradients) and bytes kept for the backward pass, after two forward passes."""
    torch.manual_seed(0)
    model = nn.Sequential(Cell(), Cell())
    set_activation_checkpointing(model, mode)
    model(images(2, 4, 16, 16, seed=1, dtype=torch.float32))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images(2, 4, 16, 16, dtype=torch.float32)).square().mean()
    loss.backward()
    return loss.detach(), model, sum(kept.values())


@pytest.mark.parametrize("mode", ["batch_norm", "cells"])
def test_recomputing_changes_neither_gradients_nor_statistics(mode):
    loss, plain, _ = trained("none")
    loss_again, saving, _ = trained(mode)
    assert_close(loss_again, loss)
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert_close(q.grad, p.grad, msg=name)
    # Equal counters too: the second forward of a cell is not a second batch.
    assert_close(dict(saving.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


def test_each_mode_keeps_less_than_the_one_before():
    none, batch_norm, cells = (trained(mode)[2] for mode in ("none", "batch_norm", "cells"))
    assert none > batch_norm > cells


def test_a_copied_layer_is_independent_and_equal():
    layer = scrambled(BatchNorm(3, "swish"))
    copied = copy.deepcopy(layer)
    layer(images(2, 3, 4, 4, dtype=torch.float32))
    assert copied.num_batches_tracked == 0
    assert copied.weight.data_ptr() != layer.weight.data_ptr()
