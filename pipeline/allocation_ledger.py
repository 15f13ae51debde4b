"""What operations on tensors without values would allocate and compute.

Torch's meta device knows shapes and types, and nothing of memory or time. This notes both: when each
storage comes and goes, by weak references to it, and the FLOPs of each operation, by torch's own
formulas. It stands in for what the meta device does not know, and remembers the shapes of results,
since torch finds those of most operations in Python.
"""

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten


class AllocationLedger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what the operations within it allocate and compute, and answers for values that are not there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        """Of the storages that lived at the same time, since `begin`."""
        self._live_bytes = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._flops: Counter[Any] = Counter()
        self._results: dict[object, Any] = {}

    def begin(self) -> None:
        """What lives now is all that is kept of what was."""
        self.peak_bytes = self._live_bytes
        self._flops.clear()

    @property
    def flops_of_weights(self) -> int:
        """Of the spectral penalty, once per update: the only one that multiplies stacks of matrices."""
        return self._flops[_aten.bmm]

    @property
    def flops_of_images(self) -> int:
        return self._flops.total() - self.flops_of_weights

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            # Every number that the host asks for is one: layers are initialized, singular vectors warm.
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        with torch._C.DisableTorchFunction():
            result = self._result(func, args, kwargs)
            self._flops[func.overloadpacket] += _flops(func, args, kwargs, result)
            for tensor in result if isinstance(result, list | tuple) else (result,):
                if isinstance(tensor, Tensor):
                    self._note(tensor.untyped_storage())
        return result

    def _result(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Of the operation, or made anew like that of the same one before: torch finds the shapes of most
        operations in Python, which takes ten times as long."""
        if func is _aten.batch_norm_update_stats.default:
            # For which torch knows no shapes.
            return args[0].new_empty(args[0].shape[1]), args[0].new_empty(args[0].shape[1])
        kind = _kind(func)
        if kind == "in place":
            return args[0]
        if kind == "each in place":
            return None
        if kind == "each":
            return [torch.empty_like(tensor) for tensor in args[0]]
        if kind == "other":
            return func(*args, **kwargs)
        key = (func, _described(args), _described(tuple(kwargs.items())))
        if key not in self._results:
            result = func(*args, **kwargs)
            if all(x is None or x.is_meta for x in (result if isinstance(result, tuple) else (result,))):
                self._results[key] = _described(result)
            return result
        return _made(self._results[key])

    def _note(self, storage: torch.UntypedStorage) -> None:
        """A view has the storage of another tensor."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, partial(self._forget, key, size))
        self._live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def _forget(self, key: int, size: int, _: object) -> None:
        del self._storages[key]
        self._live_bytes -= size


_Kind = Literal["new", "each", "in place", "each in place", "other"]


@cache
def _kind(func: OpOverload) -> _Kind:
    """Whether the operation makes tensors whose shapes its arguments decide, or fills its first argument,
    or does that for each tensor of a list."""
    schema = func._schema
    of_each = schema.name.startswith("aten::_foreach_")
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    if any(written):
        if of_each and written[0] and not schema.returns:
            return "each in place"
        plain = written[0] and len(schema.returns) == 1 and torch.Tag.inplace_view not in func.tags
        return "in place" if plain else "other"
    if of_each:
        return "each"
    new = all(str(r.type) == "Tensor" and r.alias_info is None for r in schema.returns)
    return "new" if new and schema.returns and func is not _aten._unsafe_view.default else "other"


@dataclass(frozen=True)
class _Shape:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_meta: bool


def _flops(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Multiplications and additions, by torch's formulas, but for the gradients of convolutions: torch counts
    those of grouped ones several times."""
    if func is _aten.convolution_backward.default:
        gradient, _, weight, *_, wanted = args
        gradients: int = sum(wanted[:2])
        of_one: int = 2 * gradient.numel() * weight[0].numel()
        return of_one * gradients
    formula = flop_registry.get(func.overloadpacket)
    flops: int = 0 if formula is None else formula(*args, **kwargs, out_val=result)
    return flops


def _described(value: Any) -> Any:
    """Equal for arguments of which an operation makes results of the same shapes."""
    if isinstance(value, Tensor):
        return _Shape(tuple(value.shape), value.stride(), value.dtype, value.is_meta)
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value


def _made(described: Any) -> Any:
    if isinstance(described, _Shape):
        return torch.empty_strided(described.size, described.stride, dtype=described.dtype, device="meta")
    if described == (type(None), None):
        return None
    return tuple(map(_made, described))
