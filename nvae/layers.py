# B images, C channels, H x W positions of the current scale.
"""The layers that cells are made of: convolutions, gates, resampling.

Every convolution of the model is a `Conv2d` of this file, with or without weight
normalization, masked or not. Spectral regularization, imported checkpoints and optimizer
states go by the order of these modules in `model.modules()`.

Weight normalization is written out instead of taken from torch.nn.utils.parametrizations: the
published norm is exp(log_weight_norm), has 1e-5 in its denominator and looks at the masked weight. A
parametrization would also compute the weight again wherever it is read, while here
`shared_weights` computes it once for the forward pass, the spectral penalty and every
importance-weighted draw.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae import depthwise
from nvae.batch_norm import batch_statistics
from nvae.collectives import sum_over_ranks, world_size

_NORM_EPSILON = 1e-5


class Conv2d(nn.Conv2d):
    """Convolution that keeps the resolution at stride 1; optionally weight-normalized and masked.

    With weight normalization each output channel has a direction (`weight`) and a learned
    length, stored as its logarithm (`log_weight_norm`). A mask (out, in / groups, k, k) of
    zeros and ones is applied to the weight before it is normalized.
    """

    log_weight_norm: nn.Parameter | None
    mask: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        weight_norm: bool = True,
        mask: Tensor | None = None,
        initial_scale: float = 1.0,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size - 1) // 2,
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        # Not in checkpoints: the mask follows from the layer's place in the model.
        self.register_buffer("mask", mask, persistent=False)
        self.register_parameter("log_weight_norm", None)
        if weight_norm:
            length = _length(self._masked_weight().detach())
            self.log_weight_norm = nn.Parameter((length + 1e-2).log() + math.log(initial_scale))
        self.own_gradient = False
        """Whether a depthwise convolution computes its weight gradient by depthwise.py where it can."""
        self._shared_weight: Tensor | None = None

    def effective_weight(self) -> Tensor:
        """The weight that the convolution uses: masked, normalized and scaled; differentiable."""
        if self._shared_weight is not None:
            return self._shared_weight
        return self.compute_effective_weight()

    def share_weight(self, weight: Tensor | None) -> None:
        """Use this effective weight, for what is computed within `shared_weights`; None: no more."""
        self._shared_weight = weight

    def compute_effective_weight(self) -> Tensor:
        if self.log_weight_norm is None:
            return self._masked_weight()
        return self.log_weight_norm.exp() * self.unit_weight()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.effective_weight()
        if self.own_gradient and depthwise.applies(x, weight, self.stride[0], self.dilation[0]):
            return depthwise.convolve(x, weight, self.stride[0])
        convolved: Tensor = self._conv_forward(x, weight, self.bias)
        return convolved

    def unit_weight(self) -> Tensor:
        """The weight with every output channel scaled to length one."""
        weight = self._masked_weight()
        return weight / (_length(weight) + _NORM_EPSILON)

    def _masked_weight(self) -> Tensor:
        return self.weight if self.mask is None else self.weight * self.mask


class DataInitializedConv2d(Conv2d):
    """Convolution whose first forward pass sets its lengths and biases from the data it sees.

    Every output channel then starts with mean 0 and standard deviation 1/5 (unbiased) on that
    batch, over all ranks, however many images each has. Used where there is no batch norm.
    Raises ValueError if the batch has only one value per channel.

    The published code forgets upon loading that this has happened, and does it again, in
    evaluation mode too; and it averages the ranks' means and standard deviations, which leaves
    out the variance between ranks. `forgetful` reproduces both. Here `initialized` is part of
    the checkpoint and only a training-mode pass initializes.
    """

    initialized: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        forgetful: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride)
        self.forgetful = forgetful
        self.register_buffer("initialized", torch.tensor(False), persistent=not forgetful)

    def forward(self, x: Tensor) -> Tensor:
        if (self.training or self.forgetful) and not self.initialized:
            self._initialize(x)
            if self._shared_weight is not None:
                self.share_weight(self.compute_effective_weight())
        return super().forward(x)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        assert self.bias is not None and self.log_weight_norm is not None
        y = at_least_float32(self._conv_forward(x, self.unit_weight(), None))
        if self.forgetful:
            mean, spread = y.mean(dim=(0, 2, 3)), 5 * y.std(dim=(0, 2, 3))
            for statistic in (mean, spread):
                sum_over_ranks(statistic).div_(world_size())
        else:
            statistics = batch_statistics(y)
            mean, spread = statistics.mean, 5 * statistics.unbiased_variance.sqrt()
        self.bias.copy_(-mean / (spread + _NORM_EPSILON))
        self.log_weight_norm.copy_(-(spread + _NORM_EPSILON).log().view(-1, 1, 1, 1))
        self.initialized.fill_(True)


@contextmanager
def shared_weights(model: nn.Module) -> Iterator[None]:
    """Within it, every convolution of `model` computes its effective weight only once.

    For one training step (forward pass and spectral penalty) or several forward passes
    without gradient. Parameters must not change within it: the weights would not follow.
    """
    convolutions = [module for module in model.modules() if isinstance(module, Conv2d)]
    try:
        for convolution in convolutions:
            convolution.share_weight(convolution.compute_effective_weight())
        yield
    finally:
        for convolution in convolutions:
            convolution.share_weight(None)


def normalized_together(convolutions: Sequence[Conv2d]) -> Tensor:
    """Effective weights (L, R, C) of L weight-normalized convolutions whose weights are R x C matrices.

    A deep NVAE has a thousand convolutions and some dozens of shapes: one normalization of all weights of a
    shape takes as many operations as one of a single layer, and on small models most of the time goes
    to operations, not to numbers.
    """
    weights = torch.stack([layer.weight.flatten(1) for layer in convolutions])
    if any(layer.mask is not None for layer in convolutions):
        masks = [torch.ones_like(x.weight) if x.mask is None else x.mask for x in convolutions]
        weights = weights * torch.stack([mask.flatten(1) for mask in masks])
    scales = torch.stack([_log_norm(layer).flatten(1) for layer in convolutions]).exp()
    lengths: Tensor = torch.linalg.vector_norm(weights, dim=2, keepdim=True)
    return scales * (weights / (lengths + _NORM_EPSILON))


def _log_norm(layer: Conv2d) -> Tensor:
    assert layer.log_weight_norm is not None
    return layer.log_weight_norm


class SqueezeExcitation(nn.Module):
    """Gate of every channel by a small network of the channels' means (B, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3))))))
        return x * gate[:, :, None, None]


class FactorizedReduce(nn.Module):
    """Swish, then half the resolution: four 1x1 convolutions, each on one pixel of every 2x2 block.

    (B, C, H, W) to (B, C_out, H/2, W/2) with H, W even and C_out >= 4; the last convolution
    makes the channels that are left when C_out is no multiple of 4.

    Computed as one 2x2 convolution, each of whose channels has a single tap that is not zero: it reads its
    input once, where four that look at every second pixel copy it four times and add up four gradients of
    its size. What is more, torch 2.13 writes beyond a tensor's end in the backward pass of such four
    in channels-last memory (12 channels, 64x64 pixels; found by glibc's MALLOC_CHECK_).
    """

    OFFSETS = ((0, 0), (1, 1), (0, 1), (1, 0))

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        quarter = out_channels // 4
        widths = (quarter, quarter, quarter, out_channels - 3 * quarter)
        self.convolutions = nn.ModuleList(Conv2d(in_channels, width, 1, stride=2) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = [], []
        for convolution, (row, column) in zip(self.convolutions, self.OFFSETS, strict=True):
            assert isinstance(convolution, Conv2d) and convolution.bias is not None
            weights.append(F.pad(convolution.effective_weight(), (column, 1 - column, row, 1 - row)))
            biases.append(convolution.bias)
        return F.conv2d(F.silu(x), torch.cat(weights), torch.cat(biases), stride=2)


class BilinearExpand(nn.Module):
    """Twice the resolution and half the channels: bilinear, with the corners aligned.

    The 1x1 convolution is applied first. Having no bias it commutes with the interpolation
    (whose weights are the same for all channels), and there it has a quarter of the work.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolution = Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.convolution(x), scale_factor=2, mode="bilinear", align_corners=True)


def double(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, 2H, 2W), every pixel repeated."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in fp32, or in its own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Turns autocast off within it; inputs must be made fp32 with `at_least_float32`."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _length(weight: Tensor) -> Tensor:
    """Euclidean norm of each output channel's weights: (out, in, k, k) to (out, 1, 1, 1)."""
    length: Tensor = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
    return length
