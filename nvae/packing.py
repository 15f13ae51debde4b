"""Tensors of a model, packed: made views of one, so that an operation on all of them is one.

What an update does besides its mathematics goes through all weights, gradients, averages and buffers a
dozen times. Small models have thousands of small tensors, and pay by the tensor: a few microseconds for
each on a CPU, where torch's foreach functions are loops.
"""

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from nvae.batch_norm import BatchNorm

_ALIGNMENT = 16
"""Values: where each tensor begins, so that vector instructions find it aligned."""

_CACHED = 2**17
"""Values of a slice that stays in a core's cache while several operations pass over it."""


class Packed:
    """Tensors of one type, whose memory becomes that of slices of one tensor.

    They stay what they are to everybody else, and may be changed in place by anybody. If their memory
    is replaced, as moving a model to a device does, they are packed again when next asked for.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._flat = torch.empty(0)

    @property
    def flat(self) -> Tensor:
        """All values in one tensor, with zeros between those of one tensor and the next."""
        if not self._holds():
            self._pack()
        return self._flat

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is these tensors, the very objects, that are packed."""
        return len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self._tensors

    def views(self, flat: Tensor) -> list[Tensor]:
        """Slices of `flat`, each in the place and the shape of a tensor."""
        pieces = zip(self._tensors, self._places(), strict=True)
        return [flat[start : start + t.numel()].view(t.shape) for t, start in pieces]

    def _places(self) -> Iterator[int]:
        start = 0
        for tensor in self._tensors:
            yield start
            start += -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT

    def _holds(self) -> bool:
        storage = self._flat.untyped_storage()._cdata
        return all(
            tensor.storage_offset() == start and tensor.untyped_storage()._cdata == storage
            for tensor, start in zip(self._tensors, self._places(), strict=True)
        )

    @torch.no_grad()
    def _pack(self) -> None:
        values = sum(-(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT for tensor in self._tensors)
        like = self._tensors[0] if self._tensors else self._flat
        flat = torch.zeros(values, dtype=like.dtype, device=like.device)
        views = self.views(flat)
        if views:
            torch._foreach_copy_(views, [tensor.detach() for tensor in self._tensors])
        for tensor, view in zip(self._tensors, views, strict=True):
            tensor.data = view
        self._flat = flat


class ModelPacks:
    """The tensors of a model by what becomes of them."""

    def __init__(self, model: nn.Module) -> None:
        statistics = [
            buffer
            for module in model.modules()
            if isinstance(module, BatchNorm)
            for buffer in (module.running_mean, module.running_var)
        ]
        known = {id(buffer) for buffer in statistics}
        others: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for buffer in model.buffers():
            if id(buffer) not in known:
                others[buffer.dtype].append(buffer)
        self.weights = Packed(model.parameters())
        self.statistics = Packed(statistics)
        """Of batch norms: they are averaged as weights are."""
        self.others = [Packed(buffers) for buffers in others.values()]

    @property
    def buffers(self) -> list[Tensor]:
        return [self.statistics.flat, *(packed.flat for packed in self.others)]


def pieces(*flats: Tensor) -> Iterator[Sequence[Tensor]]:
    """The same slice of each, one after the other, such that a CPU's cache holds them; all on a GPU."""
    step = _CACHED if flats[0].device.type == "cpu" else max(1, len(flats[0]))
    return (tuple(f[start : start + step] for f in flats) for start in range(0, len(flats[0]), step))
