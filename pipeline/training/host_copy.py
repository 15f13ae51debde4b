"""A copy of the training's state in host memory, laid out as the files that it becomes.

Each file of a checkpoint is one block of memory: the header of the safetensors format, then the
tensors' bytes. Tensors are copied straight to their places in it, and the block is hashed and
uploaded as it is, so that host memory holds the state once and a save is delayed by one copy.
The next save uses the blocks again, since taking memory (on a GPU, pinning it) costs time.

On a GPU the blocks are pinned and the copies wait in the queue of the stream that trains, behind
the update that they are to show and before the next one. The host goes on at once.

Rejected: `safetensors.save` of a copy (two more copies of each file), a local file that is then
read again to be hashed and uploaded (slower than memory, and one more disk to be full), copies on
a stream of their own during the next update (which changes what they read).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# In the order of the safetensors library, which puts the last ones first: each tensor's place is
# then a multiple of its own element size.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: number for number, dtype in enumerate(_DTYPES)}
_ALIGNMENT = 8
"""Bytes of the header are a multiple of it."""

Files = Mapping[str, Mapping[str, Tensor]]
"""Tensors by their name, of each file by its name."""


class HostCopy:
    """Memory for one copy of some files of tensors."""

    def __init__(self) -> None:
        self._blocks: dict[str, _Block] = {}
        self._copied: list[torch.cuda.Event] = []

    def take(self, files: Files) -> None:
        """Copies the tensors, in the place of what was copied before.

        Whatever is done to them afterwards, on the host or on the current stream of their
        device, does not change the copy.
        """
        everything = [tensor for tensors in files.values() for tensor in tensors.values()]
        devices = {tensor.device for tensor in everything if tensor.is_cuda}
        self._blocks = {
            name: self._fitting(name, tensors, pinned=bool(devices)) for name, tensors in files.items()
        }
        places = [self._blocks[name].places[key] for name, tensors in files.items() for key in tensors]
        if everything:
            with torch.no_grad():
                # One call for thousands of small tensors, whose copying is mostly calling.
                torch._foreach_copy_(places, everything, non_blocking=True)
        self._copied = [torch.cuda.current_stream(device).record_event() for device in devices]

    def contents(self) -> Iterator[tuple[str, memoryview]]:
        """The files that were copied last, in the safetensors format; waits until they are.

        They are views of memory that the next `take` writes to.
        """
        for event in self._copied:
            event.synchronize()
        for name, block in self._blocks.items():
            yield name, block.memory.numpy().data

    def _fitting(self, name: str, tensors: Mapping[str, Tensor], pinned: bool) -> "_Block":
        """The block that is there, if it is for such tensors, or a new one."""
        block = self._blocks.pop(name, None)
        if block is not None and block.fits(tensors):
            return block
        del block  # Before memory for another one is taken.
        return _Block.make(tensors, pinned)


@dataclass(frozen=True)
class _Block:
    """The memory of one file."""

    memory: Tensor
    """(N,) uint8."""
    places: Mapping[str, Tensor]
    """Views of the memory, like the tensors that belong there."""

    @classmethod
    def make(cls, tensors: Mapping[str, Tensor], pinned: bool) -> "_Block":
        names = sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name))
        extents, end = {}, 0
        for name in names:
            begin, end = end, end + tensors[name].nbytes
            extents[name] = (begin, end)
        entries = {
            name: {
                "dtype": _DTYPES[tensors[name].dtype],
                "shape": list(tensors[name].shape),
                "data_offsets": extent,
            }
            for name, extent in extents.items()
        }
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        header = len(header).to_bytes(8, "little") + header
        memory = torch.empty(len(header) + end, dtype=torch.uint8, pin_memory=pinned)
        memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        data = memory[len(header) :]
        places = {
            name: data[begin:end].view(tensors[name].dtype).view(tensors[name].shape)
            for name, (begin, end) in extents.items()
        }
        return cls(memory, places)

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether names, types and shapes are those of the places."""

        def kinds(of: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
            return {name: (tensor.dtype, tensor.shape) for name, tensor in of.items()}

        return kinds(self.places) == kinds(tensors)
