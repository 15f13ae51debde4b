"""What a stranger's checkpoint holds, as plain tensors and plain values: the part that is confined.

    python -m pipeline.untrusted.reading REPORT BYTES checkpoint     on stdin, weights to stdout
    python -m pipeline.untrusted.reading REPORT BYTES weights        a file of weights alone

started by published.py alone. The weights leave as safetensors; what else there is to know, or why
the file was refused, as JSON to the open file number REPORT. Optimizer and schedule are left behind.
Everything is imported, and tried on a checkpoint of our own, before this process is confined and
the file is looked at: afterwards no module could be imported any more.
"""

import json
import os
import sys
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

from pipeline.untrusted.confinement import Limits, confine, end_with_parent, leave_network

# A process of one thread can leave the network; torch would start others.
LAYERS = ["network"] if __name__ == "__main__" and leave_network() else []

import argparse  # noqa: E402
import io  # noqa: E402

import torch  # noqa: E402
from safetensors.torch import save  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from nvae.published import PublishedCheckpointError, is_alias, read_published, read_weights  # noqa: E402

MOST_ENTRIES = 100_000
MOST_ARGUMENTS = 1000
_LONGEST_NAME, _LONGEST_TEXT, _LONGEST_LIST = 200, 2000, 100
_PLAIN_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32)


def main() -> None:
    end_with_parent()
    report_file, size, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with os.fdopen(0, "rb") as file:
        _rehearse()
        # The file's storages, the weights and their copies in safetensors, and some for Python.
        limits = Limits(
            memory_bytes=4 * size + (512 << 20),
            processor_seconds=60 + size // (32 << 20),
            written_bytes=size + (16 << 20),
        )
        layers = LAYERS + confine(limits)
        report = _report(file, size, 1, kind)
    _write(report_file, json.dumps(report | {"layers": layers}).encode())
    # Nothing of what may have been made is given the time to end.
    os._exit(0)


def _report(file: BinaryIO, size: int, weights_file: int, kind: str) -> dict[str, Any]:
    try:
        answer, weights = read(file, size, kind)
        _write(weights_file, weights)
    except PublishedCheckpointError as error:
        return {"refused": str(error)[:_LONGEST_TEXT]}
    except MemoryError:
        return {"refused": "needs far more memory than its size"}
    except Exception as error:
        return {"refused": f"not a checkpoint, or damaged ({type(error).__name__} on reading)"}
    return answer


def read(file: BinaryIO, size: int, kind: str = "checkpoint") -> tuple[dict[str, Any], bytes]:
    """Arguments and counts, if it is a checkpoint, and the weights as a safetensors file.

    `size` is the file's. Raises PublishedCheckpointError, or whatever torch meets a damaged file with.
    """
    _check_archive(file, size)
    if kind == "weights":
        nothing: dict[str, Any] = {"arguments": {}, "epoch": None, "global_step": None}
        return nothing, save(_plain_weights(read_weights(file), size))
    loaded = read_published(file)
    state, arguments = loaded["state_dict"], vars(loaded["args"])
    answer = {
        "arguments": _plain_arguments(arguments),
        "epoch": _count(loaded["epoch"]),
        "global_step": _count(loaded["global_step"]),
    }
    loaded.clear()
    return answer, save(_plain_weights(state, size))


def _check_archive(file: BinaryIO, size: int) -> None:
    """What torch's own reader of zips does not look at: names, compression, checksums.

    A file that is no zip may be one of before torch 1.6, and is left to torch.
    """
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return
    file.seek(0)
    begins = file.read(4)
    file.seek(-22, os.SEEK_END)
    if begins != b"PK\x03\x04" or file.read(4) != b"PK\x05\x06":
        raise PublishedCheckpointError(
            "is a zip with something before or behind it, which torch never writes"
        )
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len(entries) > MOST_ENTRIES:
            raise PublishedCheckpointError(f"is a zip of {len(entries):,} entries, no checkpoint")
        names = [entry.filename for entry in entries]
        if len(set(names)) < len(names):
            raise PublishedCheckpointError("is a zip with two entries of one name; it was tampered with")
        for entry in entries:
            parts = entry.filename.split("/")
            if ".." in parts or not parts[0] or "\\" in entry.filename or entry.external_attr >> 28 == 0xA:
                raise PublishedCheckpointError(
                    f"is a zip with an entry that leads elsewhere, {entry.filename[:80]!r}"
                )
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise PublishedCheckpointError("is a compressed zip, which torch never writes")
        if sum(entry.file_size for entry in entries) > size:
            raise PublishedCheckpointError("is a zip whose entries overlap; it was tampered with")
        damaged = archive.testzip()
        if damaged is not None:
            raise PublishedCheckpointError(f"is damaged: the checksum of {damaged[:80]!r} is wrong")
    file.seek(0)


def _plain_weights(state: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """The weights, each with memory of its own.

    Raises PublishedCheckpointError if one is no plain tensor, or all would be larger than their file.
    """
    weights = {name: value for name, value in state.items() if not is_alias(name)}
    for name, value in weights.items():
        if len(name) > _LONGEST_NAME:
            raise PublishedCheckpointError("has a weight whose name is too long")
        plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
        if not plain or value.device.type != "cpu" or value.dtype not in _PLAIN_TYPES:
            raise PublishedCheckpointError(f"its weight {name!r} is no plain tensor of numbers")
    promised = sum(value.numel() * value.element_size() for value in weights.values())
    if promised > size:
        # Strides of zero make any number of values of one.
        raise PublishedCheckpointError(
            f"its weights would have {promised:,} bytes, the file has {size:,}; it was tampered with"
        )
    return {
        name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in weights.items()
    }


def _plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those that JSON can hold; the others describe no model."""
    if len(arguments) > MOST_ARGUMENTS:
        raise PublishedCheckpointError(f"has {len(arguments):,} training arguments, no command line")
    return {
        name: value for name, value in arguments.items() if len(name) <= _LONGEST_NAME and _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= _LONGEST_LIST and all(_is_scalar(each) for each in value)
    return _is_scalar(value)


def _is_scalar(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_TEXT
    if isinstance(value, int):
        return value.bit_length() < 64
    return value is None or isinstance(value, float)


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None


def _rehearse() -> None:
    """Everything once, on files of our own of both formats, and one that is refused."""
    entries: dict[str, Any] = {"state_dict": {"a": torch.ones(2)}, "args": argparse.Namespace(a=1)}
    entries |= dict.fromkeys(("optimizer", "scheduler", "grad_scalar", "epoch", "global_step"), 0)
    for state, modern in ((entries, True), (entries, False), (entries | {"epoch": argparse.Action}, True)):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=modern)
        json.dumps(_report(buffer, buffer.tell(), os.open(os.devnull, os.O_WRONLY), "checkpoint"))


def _write(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


if __name__ == "__main__":
    main()
