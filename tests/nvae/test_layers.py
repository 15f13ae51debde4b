import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from nvae.layers import (
    BilinearExpand,
    Conv2d,
    DataInitializedConv2d,
    FactorizedReduce,
    SqueezeExcitation,
    shared_weights,
)
from tests.nvae.tiny import seeded


def features(channels: int, size: int = 6, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=seeded(seed))


def norms(weight: Tensor) -> list[float]:
    return [row.norm().item() for row in weight.flatten(1)]


# --- weight normalization ----------------------------------------------------------------------


def test_the_effective_weight_is_the_direction_times_the_learned_length() -> None:
    layer = Conv2d(3, 4, 3)
    assert layer.log_weight_norm is not None
    layer.log_weight_norm.data = torch.tensor([-1.0, 0.0, 0.5, 2.0]).view(4, 1, 1, 1)
    found = layer.effective_weight()
    for channel, log_norm in enumerate((-1.0, 0.0, 0.5, 2.0)):
        direction = layer.weight[channel] / (layer.weight[channel].norm() + 1e-5)
        assert_close(found[channel], math.exp(log_norm) * direction)


def test_the_initial_length_is_that_of_the_drawn_weight() -> None:
    layer = Conv2d(3, 4, 3)
    assert layer.log_weight_norm is not None
    expected = [math.log(norm + 1e-2) for norm in norms(layer.weight.detach())]
    assert layer.log_weight_norm.flatten().tolist() == pytest.approx(expected)


def test_a_mask_is_applied_before_the_weight_is_normalized() -> None:
    mask = torch.zeros(2, 3, 3, 3)
    mask[:, :, 0] = 1
    layer = Conv2d(3, 2, 3, mask=mask, initial_scale=0.1)
    assert layer.log_weight_norm is not None
    masked = layer.weight.detach() * mask
    expected = [0.1 * (norm + 1e-2) for norm in norms(masked)]
    assert norms(layer.effective_weight().detach()) == pytest.approx(expected, rel=1e-3)
    assert not layer.effective_weight()[mask == 0].any()


def test_without_normalization_the_weight_is_used_as_it_is() -> None:
    layer = Conv2d(3, 4, 1, weight_norm=False, bias=False)
    assert layer.effective_weight() is layer.weight
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


@pytest.mark.parametrize(("size", "dilation"), [(1, 1), (3, 1), (3, 2), (5, 1), (11, 1)])
def test_a_convolution_keeps_the_resolution(size: int, dilation: int) -> None:
    assert Conv2d(2, 4, size, dilation=dilation)(features(2, 7)).shape == (2, 4, 7, 7)


def test_shared_weights_are_computed_once_and_give_the_same_gradient() -> None:
    layer, x = Conv2d(3, 4, 3), features(3)

    def gradient() -> list[Tensor]:
        loss = layer(x).square().sum() + layer.effective_weight().pow(3).sum()
        return list(torch.autograd.grad(loss, list(layer.parameters())))

    separate = gradient()
    with shared_weights(layer):
        assert layer.effective_weight() is layer.effective_weight()
        together = gradient()
    for ours, expected in zip(together, separate, strict=True):
        assert_close(ours, expected)
    assert layer.effective_weight() is not layer.effective_weight()


# --- initialization from data ------------------------------------------------------------------


@pytest.mark.parametrize("forgetful", [False, True])
@pytest.mark.parametrize(("size", "count"), [(16, 8), (2, 1)])
def test_the_first_training_batch_sets_mean_and_spread_of_every_output(
    size: int, count: int, forgetful: bool
) -> None:
    layer = DataInitializedConv2d(3, 4, 3, forgetful=forgetful)
    y = layer(3 + 2 * features(3, size=size, count=count))
    assert_close(y.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    assert_close(y.std((0, 2, 3)), torch.full((4,), 0.2), atol=1e-4, rtol=0)


def test_one_value_per_channel_cannot_initialize() -> None:
    with pytest.raises(ValueError, match=r"one value per channel.*larger batch"):
        DataInitializedConv2d(3, 4, 3)(features(3, size=1, count=1))


def test_only_the_first_training_batch_initializes() -> None:
    layer = DataInitializedConv2d(3, 4, 3)
    layer.eval()(features(3))
    assert not layer.initialized
    layer.train()(features(3))
    before = [parameter.clone() for parameter in layer.parameters()]
    layer(100 * features(3, seed=1))
    assert all(torch.equal(*pair) for pair in zip(before, layer.parameters(), strict=True))


def test_a_loaded_layer_knows_that_it_was_initialized() -> None:
    trained, loaded = DataInitializedConv2d(3, 4, 3), DataInitializedConv2d(3, 4, 3)
    trained(features(3))
    loaded.load_state_dict(trained.state_dict())
    x = 100 * features(3, seed=1)
    assert torch.equal(loaded(x), trained(x))


def test_the_published_layer_forgets_it_and_starts_again_even_in_evaluation() -> None:
    trained = DataInitializedConv2d(3, 4, 3, forgetful=True)
    loaded = DataInitializedConv2d(3, 4, 3, forgetful=True)
    trained(features(3))
    assert "initialized" not in trained.state_dict()
    loaded.load_state_dict(trained.state_dict())
    y = loaded.eval()(3 + 100 * features(3, size=16, seed=1))
    assert_close(y.std((0, 2, 3)), torch.full((4,), 0.2), atol=1e-4, rtol=0)


def test_initialization_reaches_weights_that_are_shared() -> None:
    layer = DataInitializedConv2d(3, 4, 3)
    with shared_weights(layer):
        y = layer(features(3, size=16, count=8))
        y.sum().backward()
    assert_close(y.std((0, 2, 3)), torch.full((4,), 0.2), atol=1e-4, rtol=0)
    assert layer.log_weight_norm is not None
    assert layer.log_weight_norm.grad is not None


# --- gates and resampling ----------------------------------------------------------------------


@pytest.mark.parametrize("out_channels", [4, 6, 16])
def test_factorized_reduction_looks_at_one_pixel_of_every_block_per_convolution(out_channels: int) -> None:
    layer, x = FactorizedReduce(3, out_channels), features(3, size=4)
    found = layer(x)
    activated = x * torch.sigmoid(x)
    for row in range(2):
        for column in range(2):
            parts = []
            for convolution, (r, c) in zip(layer.convolutions, ((0, 0), (1, 1), (0, 1), (1, 0)), strict=True):
                assert isinstance(convolution, Conv2d)
                pixel = activated[:, :, 2 * row + r, 2 * column + c]
                parts.append(pixel @ convolution.effective_weight()[:, :, 0, 0].T + convolution.bias)
            assert_close(found[:, :, row, column], torch.cat(parts, dim=1))
    assert found.shape == (2, out_channels, 2, 2)


def test_expansion_is_interpolation_followed_by_a_projection() -> None:
    layer, x = BilinearExpand(4, 2), features(4, size=5)
    wide = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    expected = torch.einsum("oi,bihw->bohw", layer.convolution.effective_weight()[:, :, 0, 0], wide)
    assert_close(layer(x), expected)
    # Aligned corners: the corner pixels keep their values.
    assert_close(layer(x)[:, :, ::9, ::9], layer.convolution(x)[:, :, ::4, ::4])


@pytest.mark.parametrize(("channels", "hidden"), [(8, 4), (64, 4), (160, 10)])
def test_squeeze_and_excitation_gates_channels_by_their_means(channels: int, hidden: int) -> None:
    layer, x = SqueezeExcitation(channels), features(channels)
    assert layer.squeeze.out_features == hidden
    gate = nn.Sequential(layer.squeeze, nn.ReLU(), layer.excite, nn.Sigmoid())(x.mean((2, 3)))
    for image in range(2):
        for channel in range(channels):
            assert_close(layer(x)[image, channel], x[image, channel] * gate[image, channel])
