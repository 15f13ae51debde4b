# B images, C channels, H x W positions of the current scale.
"""Residual cells of the towers, and the combiners that join towers and latents.

Cell(x) = skip(x) + 0.1 * gate(op_n(... op_1(x))). The first operation changes the channels and
the resolution. `CELL_FAMILIES` is the table of the paper's ablation: which operations the cells
of each part of the model are made of.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nvae.batch_norm import Activation, BatchNorm, activate, recomputed
from nvae.config import CellFamily
from nvae.layers import (
    BilinearExpand,
    Conv2d,
    DataInitializedConv2d,
    FactorizedReduce,
    SqueezeExcitation,
    double,
)

RESIDUAL_SCALE = 0.1


@dataclass(frozen=True)
class Residual:
    """(Batch norm,) activation and one 3x3 convolution."""

    batch_norm: bool
    activation: Activation
    dilation: int = 1


@dataclass(frozen=True)
class Inverted:
    """Widening 1x1, depthwise (or grouped) kxk and narrowing 1x1 convolution, as in MobileNetV2."""

    expansion: int
    kernel_size: int
    groups: int | None = None
    """Groups of the middle convolution; None: one per channel."""


Operation = Residual | Inverted
Direction = Literal["same", "down", "up"]


@dataclass(frozen=True)
class PartOperations:
    """The operations of a cell in each part of the model."""

    encoder: tuple[Operation, ...]
    decoder: tuple[Operation, ...]
    preprocess: tuple[Operation, ...]
    postprocess: tuple[Operation, ...]


_ELU = Residual(batch_norm=False, activation="elu")
_BN_ELU = Residual(batch_norm=True, activation="elu")
_R = Residual(batch_norm=True, activation="swish")
_R5 = Residual(batch_norm=True, activation="swish", dilation=2)
_M3, _M6 = Inverted(3, 5), Inverted(6, 5)


def _alike(*operations: Operation) -> PartOperations:
    return PartOperations(operations, operations, operations, operations)


def _residual_encoder(*operations: Operation) -> PartOperations:
    return PartOperations(operations, (_M6,), operations, (_M3,))


CELL_FAMILIES: dict[CellFamily, PartOperations] = {
    "res_elu": _alike(_ELU, _ELU),
    "res_bnelu": _alike(_BN_ELU, _BN_ELU),
    "res_bnswish": _alike(_R, _R),
    "mbconv_sep": PartOperations((_M6,), (_M6,), (_M3,), (_M3,)),
    "mbconv_sep11": PartOperations((Inverted(6, 11),), (Inverted(6, 11),), (_M3,), (_M3,)),
    "res_mbconv": _residual_encoder(_R, _R),
    "res53_mbconv": _residual_encoder(_R5, _R),
    "res35_mbconv": _residual_encoder(_R, _R5),
    "res55_mbconv": _residual_encoder(_R5, _R5),
    "mbconv_res": PartOperations((_M6,), (_R, _R), (_M3,), (_R, _R)),
    "mbconv_den": PartOperations((_M6,), (_M6,), (Inverted(3, 5, 8),), (Inverted(3, 5, 8),)),
    "res_mbconv9": PartOperations((_R, _R), (Inverted(6, 9),), (_R, _R), (Inverted(3, 9),)),
}


class ResidualOperation(nn.Module):
    """See `Residual`. Upsampling, where asked for, is just before the convolution."""

    def __init__(
        self,
        kind: Residual,
        in_channels: int,
        out_channels: int,
        direction: Direction,
        forgetful: bool,
    ) -> None:
        super().__init__()
        self.kind, self.direction = kind, direction
        stride = 2 if direction == "down" else 1
        self.batch_norm = BatchNorm(in_channels, kind.activation) if kind.batch_norm else None
        if kind.batch_norm:
            self.convolution = Conv2d(in_channels, out_channels, 3, stride=stride, dilation=kind.dilation)
        else:
            self.convolution = DataInitializedConv2d(
                in_channels, out_channels, 3, stride=stride, forgetful=forgetful
            )

    def forward(self, x: Tensor) -> Tensor:
        x = activate(x, self.kind.activation) if self.batch_norm is None else self.batch_norm(x)
        if self.direction == "up":
            x = double(x)
        convolved: Tensor = self.convolution(x)
        return convolved


class InvertedOperation(nn.Module):
    """See `Inverted`. Batch norms before, between and after; no biases, no weight normalization."""

    def __init__(self, kind: Inverted, in_channels: int, out_channels: int, direction: Direction) -> None:
        super().__init__()
        self.direction = direction
        hidden = kind.expansion * in_channels
        stride = 2 if direction == "down" else 1
        self.input_norm = BatchNorm(in_channels)
        self.expand = Conv2d(in_channels, hidden, 1, bias=False, weight_norm=False)
        self.expand_norm = BatchNorm(hidden, "swish")
        self.spatial = Conv2d(
            hidden,
            hidden,
            kind.kernel_size,
            stride=stride,
            groups=kind.groups or hidden,
            bias=False,
            weight_norm=False,
        )
        self.spatial_norm = BatchNorm(hidden, "swish")
        self.project = Conv2d(hidden, out_channels, 1, bias=False, weight_norm=False)
        self.project_norm = BatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.direction == "up":
            x = double(x)
        x = self.expand_norm(self.expand(self.input_norm(x)))
        x = self.spatial_norm(self.spatial(x))
        projected: Tensor = self.project_norm(self.project(x))
        return projected


class Cell(nn.Module):
    """One residual cell. `down` halves the resolution and doubles the channels; `up` the reverse."""

    def __init__(
        self,
        channels: int,
        operations: tuple[Operation, ...],
        *,
        direction: Direction = "same",
        squeeze_excitation: bool = True,
        forgetful: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = False
        """Keep only the input for the backward pass, which computes the cell again."""
        out_channels = {"same": channels, "down": 2 * channels, "up": channels // 2}[direction]
        # The order of registration is the published order of parameters.
        self.skip = _skip(channels, out_channels, direction)
        self.operations = nn.ModuleList()
        for kind in operations:
            self.operations.append(_operation(kind, channels, out_channels, direction, forgetful))
            channels, direction = out_channels, "same"
        self.gate = SqueezeExcitation(out_channels) if squeeze_excitation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self._compute, x)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        y = x
        for operation in self.operations:
            y = operation(y)
        y = self.gate(y)
        result: Tensor = self.skip(x) + RESIDUAL_SCALE * y
        return result


class EncoderCombiner(nn.Module):
    """Features from below plus a projection of the state from above: what a posterior sees."""

    def __init__(self, state_channels: int, feature_channels: int) -> None:
        super().__init__()
        self.convolution = Conv2d(state_channels, feature_channels, 1)

    def forward(self, features: Tensor, state: Tensor) -> Tensor:
        projected: Tensor = self.convolution(state)
        return features + projected


class DecoderCombiner(nn.Module):
    """The state from above joined with a group's latents: the new state."""

    def __init__(self, state_channels: int, latent_channels: int) -> None:
        super().__init__()
        self.convolution = Conv2d(state_channels + latent_channels, state_channels, 1)

    def forward(self, state: Tensor, z: Tensor) -> Tensor:
        # Latents are fp32; under autocast the state is not, and joining them would widen it.
        joined: Tensor = self.convolution(torch.cat([state, z.to(state.dtype)], dim=1))
        return joined


def _skip(in_channels: int, out_channels: int, direction: Direction) -> nn.Module:
    if direction == "down":
        return FactorizedReduce(in_channels, out_channels)
    if direction == "up":
        return BilinearExpand(in_channels, out_channels)
    return nn.Identity()


def _operation(
    kind: Operation, in_channels: int, out_channels: int, direction: Direction, forgetful: bool
) -> nn.Module:
    if isinstance(kind, Residual):
        return ResidualOperation(kind, in_channels, out_channels, direction, forgetful)
    return InvertedOperation(kind, in_channels, out_channels, direction)
