# B images, Z latent channels, H x W positions of the group's scale.
"""Volume-preserving autoregressive flows: an optional refinement of every posterior.

Each cell maps z to z - m(z), where m at a position and channel depends only on the latents
before it in raster order, channel by channel. The Jacobian is triangular with ones on its
diagonal, so the density of z is that of the draw before the flow. A pair of cells has opposite
raster orders and the same order of channels.

As in the published code the flow does not see the encoder's features, and sampling from the prior needs
no flow: the prior describes the latents after it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.layers import Conv2d

_WIDENING = 6


def channel_mask(out_channels: int, in_channels: int, groups: int, strict: bool) -> Tensor:
    """Which inputs each output may see at its own position: (out, in / groups) of zeros and ones.

    The wider side is cut into as many blocks as the narrower one has channels; block i sees
    blocks j <= i, or j < i if `strict`. In a depthwise convolution every channel sees itself,
    or nothing if `strict`.
    """
    if groups > 1:
        return torch.full((out_channels, 1), 0.0 if strict else 1.0)
    blocks = min(out_channels, in_channels)
    output_block = torch.arange(out_channels) // (out_channels // blocks)
    input_block = torch.arange(in_channels) // (in_channels // blocks)
    if strict:
        return (input_block[None, :] < output_block[:, None]).float()
    return (input_block[None, :] <= output_block[:, None]).float()


def autoregressive_mask(
    out_channels: int, in_channels: int, kernel_size: int, *, groups: int = 1, strict: bool, mirrored: bool
) -> Tensor:
    """Mask (out, in / groups, k, k) of a causal convolution; `mirrored` reverses the raster order."""
    middle = (kernel_size - 1) // 2
    mask = torch.zeros(out_channels, in_channels // groups, kernel_size, kernel_size)
    mask[:, :, :middle, :] = 1
    mask[:, :, middle, :middle] = 1
    mask[:, :, middle, middle] = channel_mask(out_channels, in_channels, groups, strict)
    return mask.flip(2, 3) if mirrored else mask


class FlowCell(nn.Module):
    """z - m(z) for latents (B, Z, H, W); m is strictly causal."""

    def __init__(self, channels: int, mirrored: bool) -> None:
        super().__init__()
        hidden = _WIDENING * channels
        self.widen = _masked(channels, hidden, 3, strict=True, mirrored=mirrored)
        self.spatial = _masked(hidden, hidden, 5, groups=hidden, mirrored=mirrored)
        self.shift = _masked(hidden, channels, 1, bias=True, initial_scale=0.1, mirrored=mirrored)

    def forward(self, z: Tensor) -> Tensor:
        y = F.elu(self.spatial(F.elu(self.widen(z))))
        # ELU twice is no slip: the published shift begins with an activation of its own.
        shift: Tensor = self.shift(F.elu(y))
        return z - shift


class FlowPair(nn.Module):
    """Two flow cells with opposite raster orders."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = FlowCell(channels, mirrored=False)
        self.second = FlowCell(channels, mirrored=True)

    def forward(self, z: Tensor) -> Tensor:
        flowed: Tensor = self.second(self.first(z))
        return flowed


def _masked(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    groups: int = 1,
    bias: bool = False,
    strict: bool = False,
    mirrored: bool,
    initial_scale: float = 1.0,
) -> Conv2d:
    mask = autoregressive_mask(
        out_channels, in_channels, kernel_size, groups=groups, strict=strict, mirrored=mirrored
    )
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        groups=groups,
        bias=bias,
        mask=mask,
        initial_scale=initial_scale,
    )
