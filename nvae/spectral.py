# L layers of one shape; a weight is a matrix (rows, columns) = (out, in / groups * k * k).
"""Spectral regularization and the batch-norm scale penalty: they keep a deep hierarchy stable.

The KL between two groups is unbounded, and a small change of the features in between can move
it by any amount. NVAE bounds how sharply its layers react (Sec. 3.2) by adding to the loss the
largest singular value of every convolution, and the largest scale of every batch norm, which
could undo that.

A singular value is estimated by power iteration. Weights move little in one update, so that
four iterations suffice if they go on where the last ones stopped; the singular vectors are
buffers and travel with the checkpoint. The published code starts again from noise whenever it
resumes. Matrices of one shape are stacked and iterated together: 986 convolutions of the
256x256 model have 60 shapes, more or less.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nvae.batch_norm import BatchNorm
from nvae.layers import Conv2d, full_precision, normalized_together

Matrices = Mapping[tuple[int, int], Tensor]
"""Effective weights (L, R, C) of all layers of a shape, by R and C."""

FIRST_ITERATIONS = 40
ITERATIONS = 4


class SpectralRegularization(nn.Module):
    """Sum of the largest singular values of all convolutions of a model, of which it is a part.

    Buffers: `u_RxC` (L, R) and `v_RxC` (L, C), the singular vectors of the L layers of that
    shape in the model's order; `warm`, whether they have been iterated on.
    """

    warm: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers: dict[tuple[int, int], list[Conv2d]] = defaultdict(list)
        for convolution in model.modules():
            if isinstance(convolution, Conv2d):
                rows = convolution.out_channels
                self.layers[rows, convolution.weight.numel() // rows].append(convolution)
        for (rows, columns), layers in self.layers.items():
            self.register_buffer(f"u_{rows}x{columns}", normalize(torch.randn(len(layers), rows)))
            self.register_buffer(f"v_{rows}x{columns}", normalize(torch.randn(len(layers), columns)))
        self._together: dict[tuple[int, int], list[Conv2d]] = {}
        """Of `layers`, those whose weights are normalized and nothing else."""
        self._apart: list[Conv2d] = []
        for shape, layers in self.layers.items():
            together = [each for each in layers if type(each) is Conv2d and each.log_weight_norm is not None]
            if together:
                self._together[shape] = together
            self._apart += [layer for layer in layers if layer not in together]
        self.register_buffer("warm", torch.tensor(False))
        self._known_warm = False

    @contextmanager
    def weights_by_shape(self) -> Iterator[Matrices]:
        """`nvae.layers.shared_weights` for the whole model, computed for all layers of a shape at once.

        Yields what it has stacked, which `forward` need not stack again. Layers that are initialized
        from data change their weights within it and are computed one by one, as are those without weight
        normalization, where there is nothing to compute.
        """
        stacked: dict[tuple[int, int], Tensor] = {}
        try:
            for layer in self._apart:
                layer.share_weight(layer.compute_effective_weight())
            for shape, layers in self._together.items():
                matrices = normalized_together(layers)
                for layer, matrix in zip(layers, matrices.unbind(0), strict=True):
                    layer.share_weight(matrix.view(layer.weight.shape))
                if len(layers) == len(self.layers[shape]):
                    stacked[shape] = matrices
            yield stacked
        finally:
            for layer in itertools.chain(*self.layers.values()):
                layer.share_weight(None)

    def forward(self, stacked: Matrices | None = None) -> Tensor:
        """The penalty (0-d); moves the singular vectors on. In fp32 under autocast, too.

        `stacked` are effective weights of all layers of some shapes, where they are there already.
        """
        iterations = ITERATIONS if self._is_warm() else FIRST_ITERATIONS
        penalty: Tensor = self.warm.new_zeros((), dtype=torch.float32)
        with full_precision(self.warm.device):
            for (rows, columns), layers in self.layers.items():
                weights = (stacked or {}).get((rows, columns))
                if weights is None:
                    weights = torch.stack([layer.effective_weight().flatten(1) for layer in layers])
                u, v = self.get_buffer(f"u_{rows}x{columns}"), self.get_buffer(f"v_{rows}x{columns}")
                new_u, new_v = iterate(weights.detach(), u, v, iterations)
                penalty = penalty + singular_values(weights, new_u, new_v).sum()
                # Copied, not assigned: the backward pass needs the new ones unharmed.
                u.copy_(new_u)
                v.copy_(new_v)
        self.warm.fill_(True)
        return penalty

    @torch.no_grad()
    def largest(self) -> float:
        """The largest singular value of any convolution, by the vectors of the last penalty.

        NaN before the first penalty. Waits for the device.
        """
        if not self._is_warm():
            return math.nan
        values = []
        for (rows, columns), layers in self.layers.items():
            weights = torch.stack([layer.effective_weight().flatten(1) for layer in layers]).float()
            u, v = self.get_buffer(f"u_{rows}x{columns}"), self.get_buffer(f"v_{rows}x{columns}")
            values.append(singular_values(weights, u, v).max())
        return float(torch.stack(values).max())

    def _is_warm(self) -> bool:
        """Reads the buffer until it is set, and then no more: reading waits for the device."""
        if not self._known_warm:
            self._known_warm = bool(self.warm)
        return self._known_warm

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._known_warm = False


def normalize(vectors: Tensor) -> Tensor:
    """Rows (L, N) at length one; rows shorter than 1e-3 are only divided by that."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / lengths.clamp(min=1e-3)


@torch.no_grad()
def iterate(weights: Tensor, u: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """`iterations` steps of power iteration for (L, R, C) from u (L, R); returns the new u and v (L, C)."""
    for _ in range(iterations):
        v = normalize((weights.mT @ u[..., None]).squeeze(-1))
        u = normalize((weights @ v[..., None]).squeeze(-1))
    return u, v


def singular_values(weights: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """u^T W v of each layer (L,); its gradient u v^T is that of the singular value."""
    images = (weights @ v[..., None]).squeeze(-1)
    return (u * images).sum(-1)


def batch_norm_scale_penalty(model: nn.Module) -> Tensor:
    """Sum over all batch norms of the largest absolute scale (0-d)."""
    scales: dict[int, list[Tensor]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            scales[len(module.weight)].append(module.weight)
    if not scales:
        return next(model.parameters()).new_zeros(())
    return torch.stack([torch.stack(same).abs().amax(1).sum() for same in scales.values()]).sum()
