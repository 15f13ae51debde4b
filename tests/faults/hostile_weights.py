"""Files that are called weights and that somebody made to do harm."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import torch

from tests.pipeline.models.test_registry import Opened


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[object], start: object, end: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def zip_of(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def saved(value: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def weight_payloads(marker: Path) -> dict[str, bytes]:
    """Files that are called weights. None of them is, and some would run or grow."""
    opened = Opened(marker)
    code = pickle.dumps(opened)
    stack = b"\x80\x04" + b"cos\nsystem\n(S'touch %s'\ntR." % bytes(marker)
    nothing = {f"t{number}": tensor([0], 0, 0) for number in range(200_000)}
    most = dict(list(nothing.items())[:110_000])
    return {
        "pickle": code,
        "pickle of protocol 0": pickle.dumps(opened, protocol=0),
        "pickle of a handmade stack": stack,
        "torch zip with code": saved({"state_dict": opened}),
        "torch file of old with code": saved({"state_dict": opened}, _use_new_zipfile_serialization=False),
        "zip with an entry that leads out": zip_of({"../../marker": b"x", "archive/data.pkl": code}),
        "zip with an absolute entry": zip_of({"/tmp/marker": b"x", "archive/data.pkl": code}),
        "zip bomb": zip_of({"archive/data.pkl": bytes(2**28)}, zipfile.ZIP_DEFLATED),
        "zip without end": zip_of({"archive/data.pkl": code})[:-10],
        "TorchScript's code": zip_of({"archive/code/__torch__.py": b"import os", "archive/data.pkl": code}),
        "gzip": b"\x1f\x8b" + bytes(1000),
        "nothing": b"",
        "header of 2**63 bytes": struct.pack("<Q", 2**63 - 1) + b"{" * 64,
        "header of 2**64 bytes": struct.pack("<Q", 2**64 - 1) + b"{" * 64,
        "header of 32 MB": struct.pack("<Q", 32 << 20) + b" " * (33 << 20),
        "header longer than the file": struct.pack("<Q", 1000) + b"{}",
        "header that is no JSON": safetensors(b"!!python/object:os.system"),
        "header of brackets": safetensors(b"[" * 10**6),
        "header of objects in objects": safetensors(b'{"a":' * 10**6),
        "header that is a list": safetensors([1, 2]),
        "header with equal names": safetensors(b'{"x":1,"x":2}'),
        "tensor of 10**18 values": safetensors({"x": tensor([10**9, 10**9], 0, 4 * 10**18)}),
        "tensor whose size overflows": safetensors({"x": tensor([2**32, 2**32], 0, 0)}),
        "shape of 2**64": safetensors({"x": tensor([2**64], 0, 8)}, bytes(8)),
        "negative shape": safetensors({"x": tensor([-1], 0, 4)}, bytes(4)),
        "data outside": safetensors({"x": tensor([2], 0, 10**12)}),
        "data backwards": safetensors({"x": tensor([1], 4, 0)}, bytes(4)),
        "data that overlap": safetensors({"x": tensor([1], 0, 4), "y": tensor([1], 0, 4)}, bytes(4)),
        "hole in the data": safetensors({"x": tensor([1], 4, 8)}, bytes(8)),
        "unknown type": safetensors({"x": tensor([1], 0, 4, "OBJ")}, bytes(4)),
        "type that is a path": safetensors({"x": tensor([1], 0, 4, "../x")}, bytes(4)),
        "more data than promised": safetensors({"x": tensor([1], 0, 4)}, bytes(2**20)),
        "metadata that are no text": safetensors(
            {"__metadata__": {"a": [1]}, "x": tensor([1], 0, 4)}, bytes(4)
        ),
        "200,000 tensors of nothing": safetensors(nothing),
        "as many tensors as a header may have": safetensors(most),
        "dimensions without end": safetensors({"x": tensor([1] * 100_000, 0, 4)}, bytes(4)),
    }
