# B images, C channels, H x W positions; K x K taps.
"""Depthwise convolutions whose weight gradient is not torch's.

On a CPU torch computes this gradient at 2 to 4 GFLOP/s, where the convolution itself runs at 60:
most of an NVAE's backward pass, and half of an update. `depthwise.c` computes it at 40 per thread,
and with a third of the error. Needs channels-last memory, in which the other two directions are
twice as fast in torch, too.

Time of the weight gradient, two threads, torch's to this: 20.8 to 2.1 ms for (1, 180, 128, 128),
17.4 to 0.9 ms for (1, 1440, 32, 32), 2.4 to 0.25 ms for (2, 768, 16, 16), all with 5x5 taps. What was
tried with torch alone: twenty-five products of shifted images (61, 56, 6 ms on one thread), the gradient as
the weight of a depthwise convolution, whole (39, 8, 3 ms) or in tiles (24, 9, 2 ms); torch.compile
of the products: 14, 3 and 0.8 ms.
"""

from ctypes import CDLL, c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvae import native

SIZES = (3, 5, 9, 11)
"""Those of `K` that depthwise.c has."""

_PARTS = 16
"""Partial sums: as many threads can be of use."""


def available() -> bool:
    """Whether this machine has the C, which is built when first asked for."""
    return native.load("depthwise") is not None


def applies(x: Tensor, weight: Tensor, stride: int, dilation: int) -> bool:
    """Whether `convolve` can take the place of torch's convolution for these."""
    return (
        x.device.type == "cpu"
        and not x.is_meta
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.shape[1] == weight.shape[0]
        and weight.shape[1] == 1
        and weight.shape[2] == weight.shape[3]
        and weight.shape[2] in SIZES
        and stride in (1, 2)
        and dilation == 1
        and x.is_contiguous(memory_format=torch.channels_last)
        and available()
    )


def convolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """(B, C, H, W) with `weight` (C, 1, K, K) of each channel, padded by (K - 1) / 2; see `applies`."""
    result: Tensor = _Depthwise.apply(x, weight, stride)  # type: ignore[no-untyped-call]
    return result


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            # With x itself, although its values are not used: from its layout follows that of the result.
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, *_geometry(weight, ctx.stride), [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(x, grad, weight.shape[-1], ctx.stride)
        return grad_x, grad_weight, None


def _geometry(weight: Tensor, stride: int) -> tuple[Any, ...]:
    """Stride, padding, dilation, transposition, output padding and groups."""
    padding = weight.shape[-1] // 2
    return [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], len(weight)


def weight_gradient(x: Tensor, grad: Tensor, size: int, stride: int) -> Tensor:
    """(C, 1, K, K) from the convolution's input (B, C, H, W) and the gradient of its output.

    Both fp32 on the CPU; raises ValueError for a size that is not among SIZES. The same for any
    number of threads, to the last bit.
    """
    if size not in SIZES:
        raise ValueError(f"no gradient of {size}x{size} taps; there are those of {SIZES}")
    library = native.load("depthwise")
    assert isinstance(library, CDLL)
    x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    batch, channels, *image = x.shape
    parts = min(_PARTS, batch * grad.shape[2])
    sums = x.new_empty(parts, size, size, channels)
    numbers = (batch, channels, *image, *grad.shape[2:], size, stride, parts, torch.get_num_threads())
    library.depthwise_weight_gradient(
        *(c_void_p(tensor.data_ptr()) for tensor in (grad, x, sums)), *map(c_int64, numbers)
    )
    return sums.sum(dim=0).permute(2, 0, 1).unsqueeze(1)
