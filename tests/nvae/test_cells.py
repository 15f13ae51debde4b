import copy
import re

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nvae.cells import (
    CELL_FAMILIES,
    Cell,
    DecoderCombiner,
    Direction,
    EncoderCombiner,
    Inverted,
    InvertedOperation,
    Operation,
    Residual,
)
from nvae.config import CellFamily
from tests.nvae.tiny import seeded

# The paper's ablation, in the published names of operations: encoder, decoder, before, after.
TABLE = """
res_elu res_elu,res_elu res_elu,res_elu res_elu,res_elu res_elu,res_elu
res_bnelu res_bnelu,res_bnelu res_bnelu,res_bnelu res_bnelu,res_bnelu res_bnelu,res_bnelu
res_bnswish res_bnswish,res_bnswish res_bnswish,res_bnswish res_bnswish,res_bnswish res_bnswish,res_bnswish
mbconv_sep mconv_e6k5g0 mconv_e6k5g0 mconv_e3k5g0 mconv_e3k5g0
mbconv_sep11 mconv_e6k11g0 mconv_e6k11g0 mconv_e3k5g0 mconv_e3k5g0
res_mbconv res_bnswish,res_bnswish mconv_e6k5g0 res_bnswish,res_bnswish mconv_e3k5g0
res53_mbconv res_bnswish5,res_bnswish mconv_e6k5g0 res_bnswish5,res_bnswish mconv_e3k5g0
res35_mbconv res_bnswish,res_bnswish5 mconv_e6k5g0 res_bnswish,res_bnswish5 mconv_e3k5g0
res55_mbconv res_bnswish5,res_bnswish5 mconv_e6k5g0 res_bnswish5,res_bnswish5 mconv_e3k5g0
mbconv_res mconv_e6k5g0 res_bnswish,res_bnswish mconv_e3k5g0 res_bnswish,res_bnswish
mbconv_den mconv_e6k5g0 mconv_e6k5g0 mconv_e3k5g8 mconv_e3k5g8
res_mbconv9 res_bnswish,res_bnswish mconv_e6k9g0 res_bnswish,res_bnswish mconv_e3k9g0
"""
DIRECTIONS: tuple[Direction, ...] = ("same", "down", "up")


def published_name(operation: Operation) -> str:
    if isinstance(operation, Residual):
        norm = "bn" if operation.batch_norm else ""
        return f"res_{norm}{operation.activation}{'5' if operation.dilation == 2 else ''}"
    return f"mconv_e{operation.expansion}k{operation.kernel_size}g{operation.groups or 0}"


def features(channels: int, size: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(2, channels, size, size, generator=seeded(seed))


def test_the_families_are_those_of_the_published_table() -> None:
    rows = [line.split() for line in TABLE.strip().splitlines()]
    found = [
        [
            family,
            *(
                ",".join(map(published_name, part))
                for part in (p.encoder, p.decoder, p.preprocess, p.postprocess)
            ),
        ]
        for family, p in CELL_FAMILIES.items()
    ]
    assert found == rows


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("family", CELL_FAMILIES)
def test_a_cell_of_every_family_changes_channels_and_resolution_together(
    family: CellFamily, direction: Direction
) -> None:
    parts = CELL_FAMILIES[family]
    for operations in (parts.encoder, parts.decoder, parts.preprocess, parts.postprocess):
        y = Cell(8, operations, direction=direction)(features(8))
        assert y.shape == {"same": (2, 8, 6, 6), "down": (2, 16, 3, 3), "up": (2, 4, 12, 12)}[direction]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_cell_is_its_skip_and_a_tenth_of_its_gated_operations(direction: Direction) -> None:
    cell = Cell(8, CELL_FAMILIES["res_mbconv"].encoder, direction=direction).eval()
    x = features(8)
    first, second = cell.operations
    assert_close(cell(x), cell.skip(x) + 0.1 * cell.gate(second(first(x))))


def test_the_middle_convolution_of_an_inverted_residual_is_depthwise_or_has_8_groups() -> None:
    separable = InvertedOperation(Inverted(6, 5), 8, 8, "same")
    assert (separable.spatial.groups, separable.spatial.in_channels) == (48, 48)
    dense = InvertedOperation(Inverted(3, 5, 8), 8, 8, "same")
    assert (dense.spatial.groups, dense.spatial.in_channels) == (8, 24)
    names = [re.sub(r".*\.", "", name) for name, _ in separable.named_parameters()]
    assert "log_weight_norm" not in names


@pytest.mark.parametrize("family", ["res_mbconv", "mbconv_sep", "res_elu"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_recomputed_cell_has_the_same_values_gradients_and_statistics(
    family: CellFamily, direction: Direction
) -> None:
    kept = Cell(8, CELL_FAMILIES[family].encoder, direction=direction)
    recomputed = copy.deepcopy(kept)
    recomputed.recompute = True
    results = []
    for cell in (kept, recomputed):
        x = features(8).requires_grad_()
        y = cell(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in cell.parameters()), *cell.buffers()])
    for ours, expected in zip(results[1], results[0], strict=True):
        assert_close(ours, expected)


def test_the_encoder_combiner_adds_a_projection_of_the_state() -> None:
    combiner, x, state = EncoderCombiner(6, 4), features(4), features(6, seed=1)
    weight = combiner.convolution.effective_weight()[:, :, 0, 0]
    projected = torch.einsum("oi,bihw->bohw", weight, state)
    assert combiner.convolution.bias is not None
    assert_close(combiner(x, state), x + projected + combiner.convolution.bias.view(1, -1, 1, 1))


def test_the_decoder_combiner_joins_state_then_latents_in_the_precision_of_the_state() -> None:
    combiner, state, z = DecoderCombiner(6, 3), features(6), features(3, seed=1)
    assert_close(combiner(state, z), combiner.convolution(torch.cat([state, z], dim=1)))
    with torch.autocast("cpu", torch.bfloat16):
        assert combiner(state.bfloat16(), z).dtype == torch.bfloat16
