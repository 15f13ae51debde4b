import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from nvae.flows import FlowCell, FlowPair, autoregressive_mask, channel_mask
from tests.nvae.tiny import seeded


def jacobian(flow: torch.nn.Module, channels: int, height: int = 3, width: int = 4) -> Tensor:
    """d flow(z) / d z with both sides in raster order, channel by channel within a position."""
    z = torch.randn(1, channels, height, width, generator=seeded(0), dtype=torch.float64)
    full = torch.autograd.functional.jacobian(flow.double(), z)
    size = channels * height * width
    return full[0, :, :, :, 0].permute(1, 2, 0, 4, 5, 3).reshape(size, size)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_each_latent_depends_on_those_before_it_in_raster_order_only(channels: int) -> None:
    matrix = jacobian(FlowCell(channels, mirrored=False), channels)
    assert not matrix.triu(diagonal=1).any()
    assert_close(matrix.diagonal(), torch.ones(len(matrix), dtype=torch.float64))
    assert matrix.tril(diagonal=-1).any()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_mirrored_cell_reverses_the_positions_but_not_the_channels(channels: int) -> None:
    matrix = jacobian(FlowCell(channels, mirrored=True), channels)
    blocks = matrix.view(12, channels, 12, channels)
    reversed_positions = blocks.flip(0, 2).reshape(matrix.shape)
    assert not reversed_positions.triu(diagonal=1).any()
    assert_close(matrix.diagonal(), torch.ones(len(matrix), dtype=torch.float64))


def test_every_earlier_latent_in_reach_is_used() -> None:
    matrix = jacobian(FlowCell(3, mirrored=False), 3, height=2, width=2)
    # On 2x2 positions everything is within reach of a 3x3 followed by a 5x5 convolution.
    below = matrix[torch.ones_like(matrix).tril(diagonal=-1).bool()]
    assert below.ne(0).all()


def test_a_pair_preserves_volume() -> None:
    matrix = jacobian(FlowPair(3), 3)
    assert torch.linalg.det(matrix).item() == pytest.approx(1)
    assert matrix.triu(diagonal=1).any()
    assert matrix.tril(diagonal=-1).any()


@given(narrow=st.integers(1, 6), ratio=st.integers(1, 6), widening=st.booleans(), strict=st.booleans())
def test_the_channel_mask_orders_blocks_of_channels(
    narrow: int, ratio: int, widening: bool, strict: bool
) -> None:
    outputs, inputs = (narrow * ratio, narrow) if widening else (narrow, narrow * ratio)
    mask = channel_mask(outputs, inputs, 1, strict)
    for output in range(outputs):
        if widening:
            block = output // ratio
            seen = [j < block if strict else j <= block for j in range(inputs)]
        else:
            seen = [j < output * ratio if strict else j < (output + 1) * ratio for j in range(inputs)]
        assert mask[output].bool().tolist() == seen


@given(size=st.sampled_from([1, 3, 5]), strict=st.booleans())
def test_a_depthwise_mask_ends_at_the_centre(size: int, strict: bool) -> None:
    mask = autoregressive_mask(4, 4, size, groups=4, strict=strict, mirrored=False)
    middle = size // 2
    for row in range(size):
        for column in range(size):
            before = (row, column) < (middle, middle)
            centre = (row, column) == (middle, middle) and not strict
            assert mask[:, 0, row, column].tolist() == [float(before or centre)] * 4


def test_a_new_flow_is_close_to_the_identity() -> None:
    z = torch.randn(4, 8, 8, 8, generator=seeded(1))
    assert (FlowPair(8)(z) - z).std() < 0.2
