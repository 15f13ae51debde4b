"""CIFAR-10's python batches: a folder cifar-10-batches-py, or cifar-10-python.tar.gz.

Each batch is a pickle of a dict with 10,000 images. It is not unpickled: the few instructions
that such a file consists of are interpreted here, on plain values. Nothing that the file names is
ever imported or called, so a hostile one can at most be refused.
"""

import gzip
import pickletools
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.images import Pixels
from pipeline.data.index import TRAIN, VALIDATION, ShardError
from pipeline.data.sources.source import Source, SourceImage

NAME = re.compile(r"data_batch_\d|test_batch")
ARCHIVE_NAME = re.compile(r"cifar-10-.*\.(tar\.gz|tgz)")
_SIDE = 32
# A batch is a pickle of 31 MB, all of them 184 MB.
_MAX_BATCH_BYTES, _MAX_ARCHIVE_BYTES = 2**26, 2**28


def cifar_folder(paths: list[Path]) -> Source:
    """The images of the batches at `paths`."""
    return _source({path.name: _read_batch(path) for path in sorted(paths)}, paths[0].parent)


def cifar_archive(path: Path) -> Source:
    """The images of the batches in the published .tar.gz."""
    batches: dict[str, bytes] = {}
    try:
        with _Limited(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                file = archive.extractfile(member) if NAME.fullmatch(name) and member.isreg() else None
                if file is not None:
                    batches[name] = file.read(_MAX_BATCH_BYTES + 1)
            # Gzip's checksum is at its end.
            while unpacked.read(2**20):
                continue
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ShardError(f"{path}: is not a whole .tar.gz ({error}). Fetch it again.") from error
    if not batches:
        raise ShardError(f"{path}: holds no batches of CIFAR-10. Other compressed tars have to be unpacked.")
    return _source(dict(sorted(batches.items())), path)


class _Limited(gzip.GzipFile):
    """A compressed file that ends with an error where it holds more than CIFAR-10 does."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path = path
        self._left = _MAX_ARCHIVE_BYTES

    def read(self, size: int | None = -1) -> bytes:
        wanted = self._left + 1 if size is None or size < 0 else min(size, self._left + 1)
        data = super().read(wanted)
        self._left -= len(data)
        if self._left < 0:
            raise ShardError(
                f"{self._path}: holds more than CIFAR-10 does: over {_MAX_ARCHIVE_BYTES >> 20} MiB."
            )
        return data


def _read_batch(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BATCH_BYTES + 1)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}).") from error


def _source(batches: dict[str, bytes], where: Path) -> Source:
    images = []
    for name, data in batches.items():
        split = VALIDATION if name == "test_batch" else TRAIN
        for number, image in enumerate(_images(data, f"{where}: {name}")):
            images.append(SourceImage(f"{name}-{number:05d}", partial(np.copy, image), split))
    return Source(images, image_size=_SIDE)


def _images(data: bytes, where: str) -> Pixels:
    """(N, H, W, C) images of one batch, which stores them as (N, C, H, W)."""
    try:
        if len(data) > _MAX_BATCH_BYTES:
            raise ValueError(f"is larger than {_MAX_BATCH_BYTES >> 20} MiB")
        batch = interpret(data)
        array = batch.get("data") if isinstance(batch, dict) else None
        if not isinstance(array, Array):
            raise ValueError("is no dict with an array `data`")
        flat = array.pixels()
        if flat.ndim != 2 or flat.shape[1] != 3 * _SIDE**2:
            raise ValueError(f"`data` has the shape {flat.shape}, not (N, {3 * _SIDE**2})")
    except (ValueError, TypeError, LookupError, EOFError, AttributeError) as error:
        raise ShardError(f"{where} is no batch of CIFAR-10 ({error}). Fetch it again.") from error
    return flat.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)


# --- pickles, as far as batches need them -----------------------------------------------------


@dataclass(frozen=True)
class _Name:
    """What a pickle would import; here it stays a name."""

    path: str


@dataclass
class Array:
    """A numpy array or its dtype as pickles describe them: how it is made, then its state."""

    made_from: tuple[Any, ...]
    state: Any = None

    def pixels(self) -> Pixels:
        """The array, if it is one of bytes. Raises ValueError or TypeError otherwise."""
        _, shape, dtype, column_major, content = self.state
        if not isinstance(dtype, Array) or dtype.made_from[0] != "u1" or column_major or len(shape) > 4:
            raise ValueError("an array is not one of bytes")
        content = content.encode("latin-1") if isinstance(content, str) else content
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError("an array has no whole shape")
        return np.frombuffer(content, np.uint8).reshape(shape)


_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_ADMITTED = (*_RECONSTRUCT, "numpy ndarray", "numpy dtype", "_codecs encode")
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES"),
    *("SHORT_BINUNICODE", "BINUNICODE"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NEW: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}


def interpret(data: bytes) -> Any:
    """The value that the pickle `data` describes: dicts, lists, text, numbers and arrays of bytes.

    Raises ValueError, TypeError or LookupError if it is damaged or needs anything else.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _NEW:
            stack.append(_NEW[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_named(argument if name == "GLOBAL" else " ".join(_pop(stack, 2))))
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            _combine(name, stack)
    raise ValueError("it has no end")


def _combine(name: str, stack: list[Any]) -> None:
    """The instructions that take several values off the stack."""
    if name == "TUPLE":
        stack.append(tuple(_since_mark(stack)))
    elif name in _TUPLES:
        stack.append(tuple(_pop(stack, _TUPLES[name])))
    elif name in ("APPEND", "APPENDS"):
        items = _pop(stack, 1) if name == "APPEND" else _since_mark(stack)
        _expect(stack[-1], list).extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        items = _pop(stack, 2) if name == "SETITEM" else _since_mark(stack)
        target = _expect(stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key.decode() if isinstance(key, bytes) else _expect(key, str)] = value
    elif name == "REDUCE":
        function, arguments = _pop(stack, 2)
        stack.append(_made(_expect(function, _Name).path, _expect(arguments, tuple)))
    elif name == "BUILD":
        (state,) = _pop(stack, 1)
        _expect(stack[-1], Array).state = state
    else:
        raise ValueError(f"it has the instruction {name}, which no batch needs")


def _named(path: str) -> _Name:
    if path not in _ADMITTED:
        raise ValueError(f"it asks for {path.replace(' ', '.')[:80]!r}, which is not run")
    return _Name(path)


def _made(path: str, arguments: tuple[Any, ...]) -> Any:
    if path in _RECONSTRUCT or path == "numpy dtype":
        return Array(arguments)
    if path == "_codecs encode":  # How Python 3 writes bytes for readers in Python 2.
        return _expect(arguments[0], str).encode("latin-1")
    raise ValueError(f"it calls {path.replace(' ', '.')!r}, which is not run")


def _since_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _pop(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("its stack is empty")
    items = stack[-count:]
    del stack[-count:]
    return items


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} stands where a {kind.__name__} belongs")
    return value
