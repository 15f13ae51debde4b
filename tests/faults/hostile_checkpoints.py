"""Files that are called published checkpoints, and that somebody made to do harm, or that were damaged.

Each payload is what a file holds. `MARKER` is what code in them would make, in the working directory.
"""

import argparse
import functools
import io
import os
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from nvae.model import NVAE
from tests.nvae.test_published import as_bytes, training_state
from tests.pipeline.models.tiny import tiny_model

MARKER = "marker"
Payloads = dict[str, Any]
"""What is wrong -> a state that torch saves, or the bytes of a file."""


def model() -> NVAE:
    return tiny_model(groups_per_scale=[1, 2], published_compatibility=True)


@functools.cache
def _state() -> dict[str, Any]:
    return training_state(model())


def good(**changes: Any) -> dict[str, Any]:
    return _state() | changes


def content(payload: Any) -> bytes:
    return payload if isinstance(payload, bytes) else as_bytes(payload)


# --- code --------------------------------------------------------------------------------------

CALLS: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "os.system": ("os", "system", (f"touch {MARKER}",)),
    "posix.system": ("posix", "system", (f"touch {MARKER}",)),
    "nt.system": ("nt", "system", (f"touch {MARKER}",)),
    "os.popen": ("os", "popen", (f"touch {MARKER}",)),
    "os.mkdir": ("os", "mkdir", (MARKER,)),
    "posix.mkdir": ("posix", "mkdir", (MARKER,)),
    "os.execv": ("os", "execv", ("/usr/bin/touch", ["touch", MARKER])),
    "os.posix_spawn": ("posix", "posix_spawn", ("/usr/bin/touch", ["touch", MARKER], {})),
    "subprocess.Popen": ("subprocess", "Popen", (["touch", MARKER],)),
    "subprocess.check_output": ("subprocess", "check_output", (["touch", MARKER],)),
    "builtins.eval": ("builtins", "eval", (f"open('{MARKER}', 'w')",)),
    "builtins.exec": ("builtins", "exec", (f"open('{MARKER}', 'w')",)),
    "__builtin__.eval": ("__builtin__", "eval", (f"open('{MARKER}', 'w')",)),
    "builtins.open": ("builtins", "open", (MARKER, "w")),
    "io.open": ("io", "open", (MARKER, "w")),
    "builtins.__import__": ("builtins", "__import__", ("antigravity",)),
    "builtins.getattr": ("builtins", "getattr", (argparse.Namespace, "__init__")),
    "builtins.breakpoint": ("builtins", "breakpoint", ()),
    "importlib.import_module": ("importlib", "import_module", ("antigravity",)),
    "runpy.run_path": ("runpy", "run_path", ("checkpoint.pt",)),
    "pathlib.Path.touch": ("pathlib", "Path.touch", (MARKER,)),
    "pathlib.Path.write_text": ("pathlib", "Path.write_text", (MARKER, "x")),
    "shutil.copy": ("shutil", "copy", ("/etc/passwd", MARKER)),
    "socket.create_connection": ("socket", "create_connection", (("127.0.0.1", 9),)),
    "urllib.request.urlopen": ("urllib.request", "urlopen", ("http://127.0.0.1:9/",)),
    "webbrowser.open": ("webbrowser", "open", ("http://127.0.0.1:9/",)),
    "ctypes.CDLL": ("ctypes", "CDLL", ("libc.so.6",)),
    "pickle.loads": ("pickle", "loads", (b"cos\nsystem\n(S'touch marker'\ntR.",)),
    "_pickle.loads": ("_pickle", "loads", (b"cos\nsystem\n(S'touch marker'\ntR.",)),
    "torch.load": ("torch", "load", ("checkpoint.pt",)),
    "torch.save": ("torch", "save", (1, MARKER)),
    "torch.hub.load": ("torch.hub", "load", ("a/b", "c")),
    "torch.jit.load": ("torch.jit", "load", ("checkpoint.pt",)),
    "torch.utils.cpp_extension.load": ("torch.utils.cpp_extension", "load", ("x", ["x.cpp"])),
    "torch.storage._load_from_bytes": ("torch.storage", "_load_from_bytes", (b"cos\nsystem\n.",)),
    "torch.serialization.add_safe_globals": ("torch.serialization", "add_safe_globals", ([eval],)),
    "numpy.core.multiarray.scalar": ("numpy.core.multiarray", "scalar", (b"O8", b"x")),
    "numpy.load": ("numpy", "load", ("checkpoint.pt",)),
    "argparse.FileType": ("argparse", "FileType", ("w",)),
    "argparse.ArgumentParser": ("argparse", "ArgumentParser", ()),
    "operator.attrgetter": ("operator", "attrgetter", ("__class__",)),
    "functools.partial": ("functools", "partial", (len, "x")),
    "asyncio.run": ("asyncio", "run", (None,)),
    "timeit.timeit": ("timeit", "timeit", (f"open('{MARKER}', 'w')",)),
    "cProfile.run": ("cProfile", "run", (f"open('{MARKER}', 'w')",)),
    "pdb.run": ("pdb", "run", (f"open('{MARKER}', 'w')",)),
    "code.interact": ("code", "interact", ()),
    "pydoc.locate": ("pydoc", "locate", ("os.system",)),
    "logging.config.listen": ("logging.config", "listen", ()),
    "pip.main": ("pip", "main", (["download", "x"],)),
    "types.FunctionType": ("types", "FunctionType", ()),
    "nvae.published.load_published": ("nvae.published", "load_published", ("checkpoint.pt",)),
    "pipeline.storage.delete": ("pipeline.storage", "delete", ("/tmp/nothing", True)),
    "a name of control characters": ("os\x1b[2J\x07", "system", ("x",)),
}


def call(module: str, name: str, arguments: tuple[Any, ...]) -> bytes:
    """A pickle, by hand, of a call: no protocol's own writer would do some of them."""
    inner = pickle.dumps(arguments, protocol=2)[2:-1]
    return b"c" + f"{module}\n{name}\n".encode() + inner + b"R"


def code_payloads() -> Payloads:
    found: Payloads = {}
    for what, asked in CALLS.items():
        # As one entry of a state, so that whatever else is needed is there.
        stream = call(*asked)
        found[f"{what}, in a zip"] = with_pickle(b"\x80\x02}U\nstate_dict" + stream + b"s.")
        found[f"{what}, bare"] = b"\x80\x02" + stream + b"."
    last = call("os", "system", (f"touch {MARKER}",))
    found |= {
        "code of protocol 4": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch marker\x85R.",
        "code by INST": f"(S'touch {MARKER}'\nios\nsystem\n.".encode(),
        "code by OBJ": f"(cos\nsystem\nS'touch {MARKER}'\no.".encode(),
        "code by NEWOBJ_EX": b"\x80\x04\x8c\x02os\x8c\x06system\x93)}\x92.",
        "code by an extension's number": b"\x80\x02\x82\x01.",
        "code behind a whole state": with_pickle(pickle.dumps({}, protocol=2)[:-1] + last + b"."),
        "code after the end": content(good()) + b"\x80\x02" + last + b".",
        "code before the beginning": b"\x80\x02" + last + b"." + content(good()),
        "code in a second pickle": pickle.dumps({}, protocol=2) + b"\x80\x02" + last + b".",
        "a pickle within the arguments": good(
            args=argparse.Namespace(
                **vars(good()["args"]), more=pickle.dumps({1: 2}) + last + b".", dataset2=0
            ),
            state_dict={},
        ),
        "BUILD that replaces a class": with_pickle(
            b"\x80\x02cargparse\nNamespace\n)\x81}U\t__class__cos\nsystem\nsb."
        ),
        "BUILD with __setstate__": with_pickle(
            b"\x80\x02cargparse\nNamespace\n)\x81}U\x0c__setstate__cos\nsystem\nsb}b."
        ),
        "BUILD of a dict": with_pickle(b"\x80\x02}}b."),
        "REDUCE of Namespace's method": with_pickle(b"\x80\x02cargparse\nNamespace.__init__\n)R."),
        "old format with code": old_format(good(extra=_Code())),
        "new format with code": _saved(good(extra=_Code())),
    }
    return found


class _Code:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARKER}",)


def _saved(state: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def old_format(state: Any) -> bytes:
    """As torch saved before 1.6."""
    return _saved(state, _use_new_zipfile_serialization=False)


@functools.cache
def entries() -> dict[str, bytes]:
    """Those of a good checkpoint's zip."""
    with zipfile.ZipFile(io.BytesIO(content(good()))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zip_of(parts: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def with_pickle(stream: bytes) -> bytes:
    """A good checkpoint with another data.pkl."""
    return zip_of(entries() | {"archive/data.pkl": stream})


# --- archives ----------------------------------------------------------------------------------


def archive_payloads() -> Payloads:
    parts = entries()
    whole = zip_of(parts)
    link = zipfile.ZipInfo("archive/link")
    link.external_attr = 0o120777 << 16
    linked = io.BytesIO(whole)
    with zipfile.ZipFile(linked, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    doubled = io.BytesIO(whole)
    with zipfile.ZipFile(doubled, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("archive/data.pkl", b"\x80\x02" + call("os", "system", ("touch marker",)) + b".")
    names = {
        "an entry that leads out": "../../marker",
        "an entry that leads out within": "archive/../../../marker",
        "an absolute entry": "/tmp/marker",
        "an entry of another system": "..\\..\\marker",
    }
    directory = whole.rindex(b"PK\x01\x02")
    return {
        **{what: zip_of(parts | {name: b"x"}) for what, name in names.items()},
        "a link": linked.getvalue(),
        "two entries of one name": doubled.getvalue(),
        "100,001 entries": zip_of({f"archive/data/{number}": b"" for number in range(100_001)}),
        "compressed": zip_of(parts, zipfile.ZIP_DEFLATED),
        "a bomb of 64 MiB": zip_of({"archive/data.pkl": bytes(1 << 26)}, zipfile.ZIP_DEFLATED),
        "a bomb of LZMA": zip_of({"archive/data.pkl": bytes(1 << 24)}, zipfile.ZIP_LZMA),
        "entries that overlap": overlapping(whole),
        "TorchScript": zip_of(parts | {"archive/constants.pkl": b"\x80\x02).", "archive/code/x.py": b"1"}),
        "a wheel": zip_of({"setup.py": b"open('marker', 'w')", "x/METADATA": b""}),
        "no data.pkl": zip_of({name: data for name, data in parts.items() if "data.pkl" not in name}),
        "no weights": zip_of({name: data for name, data in parts.items() if "/data/" not in name}),
        "a version of the far future": zip_of(parts | {"archive/version": b"9" * 30}),
        "another order of bytes": zip_of(parts | {"archive/byteorder": b"middle"}),
        "a size in the directory of 2**32": whole[: directory + 20]
        + struct.pack("<II", 2**32 - 2, 2**32 - 2)
        + whole[directory + 28 :],
        "an offset in the directory of 2**32": whole[: directory + 42]
        + struct.pack("<I", 2**32 - 2)
        + whole[directory + 46 :],
        "a directory that begins elsewhere": whole[:-6] + struct.pack("<I", 2**31) + whole[-2:],
        "an encrypted entry": whole[: directory + 8] + b"\x01\x00" + whole[directory + 10 :],
    }


def overlapping(whole: bytes) -> bytes:
    """All entries of the directory have the place, and the size, of the largest one."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data, place = bytearray(whole), whole.index(b"PK\x01\x02")
    while data[place : place + 4] == b"PK\x01\x02":
        data[place + 16 : place + 28] = struct.pack("<III", largest.CRC, largest.file_size, largest.file_size)
        data[place + 42 : place + 46] = struct.pack("<I", largest.header_offset)
        name, extra, comment = struct.unpack("<HHH", data[place + 28 : place + 34])
        place += 46 + name + extra + comment
    return bytes(data)


# --- sizes -------------------------------------------------------------------------------------


def size_payloads() -> Payloads:
    state = good()["state_dict"]
    first = next(iter(state))
    arguments = vars(good()["args"])

    def weight(value: Any, name: str = "stem.weight") -> dict[str, Any]:
        return good(state_dict=state | {name: value})

    def argued(**changes: Any) -> dict[str, Any]:
        return good(args=argparse.Namespace(**arguments | changes))

    laughs: list[Any] = ["ha"] * 10
    for _ in range(40):
        laughs = [laughs] * 10
    circle: list[Any] = []
    circle.append(circle)
    return {
        "a weight of 2**40 equal values": weight(torch.zeros(1).expand(2**40)),
        "a weight of 2**31 equal values": weight(torch.zeros(1).expand(2**31)),
        "storage that says more than it has": with_pickle(lying(10**6)),
        "storage that says 2**31 - 1": with_pickle(lying(2**31 - 1)),
        "storage of a negative size": with_pickle(lying(-8)),
        "bytearray of 2**40": with_pickle(b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\1\x85R."),
        "bytearray of 2**36": with_pickle(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R."),
        "bytes of 2**62": with_pickle(b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x."),
        "text of 2**31": with_pickle(b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b"x."),
        "an integer of 2**31 bytes": with_pickle(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x."),
        "a memo of 2**32 places": with_pickle(b"\x80\x02}r\xff\xff\xff\xff."),
        "a pickle that makes lists only": with_pickle(b"\x80\x02" + b"]" * (4 << 20) + b"."),
        "lists in lists, a million": with_pickle(b"\x80\x02" + b"](" * 10**6 + b"e" * 10**6 + b"."),
        "tuples in tuples, a million": with_pickle(b"\x80\x02)" + b"\x85" * 10**6 + b"."),
        "marks without end": with_pickle(b"\x80\x02" + b"(" * 10**6 + b"."),
        "a pickle without an end": with_pickle(b"\x80\x02}"),
        "10**40 laughs in the arguments": argued(num_nf=laughs),
        "arguments that hold themselves": argued(num_nf=circle),
        "an argument of 10**5 digits": argued(num_nf=10**100_000),
        "a million arguments": argued(**{f"a{number}": 0 for number in range(10**5)}),
        "2**30 blocks": argued(num_preprocess_blocks=2**30, num_postprocess_blocks=2**30),
        "2**30 scales": argued(num_latent_scales=2**30),
        "2**30 groups": argued(num_groups_per_scale=2**30),
        "4096 groups": argued(num_groups_per_scale=4096, ada_groups=False),
        "4096 channels": argued(num_channels_enc=4096, num_channels_dec=4096),
        "100 cells": argued(num_preprocess_cells=100, num_cell_per_cond_enc=100),
        "an initial state of 2**20 pixels": weight(torch.zeros(1, 1, 1).expand(1, 1, 2**20), "prior_ftr0"),
        "a weight's name of a megabyte": good(state_dict=state | {"x" * 2**20: state[first]}),
        "100,000 weights": good(state_dict=state | {f"x{number}": torch.zeros(1) for number in range(10**5)}),
        "a step of 10**30": good(global_step=10**30, args=argparse.Namespace(a=1)),
    }


def lying(numel: int) -> bytes:
    """A data.pkl whose storages promise another number of values than their entries have."""
    stream = entries()["archive/data.pkl"]
    place = stream.index(b"cpu") + 3
    # BINPUT, then the number of values, then the TUPLE that ends the storage's description.
    while stream[place : place + 1] in (b"q", b"r"):
        place += 2 if stream[place : place + 1] == b"q" else 5
    length = {b"K": 2, b"M": 3, b"J": 5}[stream[place : place + 1]]
    return stream[:place] + b"J" + struct.pack("<i", numel) + stream[place + length :]


# --- damage ------------------------------------------------------------------------------------


def damage_payloads(count: int, seed: int) -> Iterator[tuple[str, bytes, bool]]:
    """What is wrong, the file, and whether it is cut. One flipped bit may be where it means nothing.

    The old format has no checksums: nobody can know of a flipped bit among its weights.
    """
    drawn = random.Random(seed)
    whole, old = content(good()), old_format(good())
    for what, data in (("zip", whole), ("old format", old)):
        for place in sorted(drawn.sample(range(len(data)), count)):
            yield f"{what} cut at {place}", data[:place], True
    for place in sorted(drawn.sample(range(len(whole)), 2 * count)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << drawn.randrange(8)
        yield f"zip with a bit of byte {place} flipped", bytes(damaged), False


# --- what is no model --------------------------------------------------------------------------


def model_payloads() -> Payloads:
    state = good()["state_dict"]
    arguments = vars(good()["args"])

    def weight(value: Any, name: str = "stem.bias") -> dict[str, Any]:
        return good(state_dict=state | {name: value})

    def argued(**changes: Any) -> dict[str, Any]:
        return good(args=argparse.Namespace(**arguments | changes))

    bias = state["stem.bias"]
    return {
        **{f"{value} in a weight": weight(torch.full_like(bias, value)) for value in (torch.nan, torch.inf)},
        "one NaN among all": weight(torch.cat([bias[:-1], torch.tensor([torch.nan])])),
        "a negative variance": weight(torch.full((8,), -1.0), "post_process.0._ops.0.conv.1.bn.running_var"),
        **{
            f"a weight of {dtype}": weight(torch.zeros(len(bias), dtype=dtype))
            for dtype in (torch.float16, torch.float64, torch.int32, torch.complex64, torch.bool)
        },
        "a sparse weight": weight(bias.to_sparse()),
        "a quantized weight": weight(torch.quantize_per_tensor(bias, 0.1, 0, torch.qint8)),
        "a weight without memory": weight(torch.empty(4, device="meta")),
        "a weight that is a list": weight([0.0] * 4),
        "a weight that is no more": good(state_dict={n: v for n, v in state.items() if n != "stem.bias"}),
        "a weight more": weight(bias, "extra.weight"),
        "a weight of another shape": weight(torch.zeros(5)),
        "a weight turned round": weight(state["stem.weight"].transpose(0, 1), "stem.weight"),
        "a weight whose name is a number": good(state_dict=state | {7: bias}),
        "no weights": good(state_dict={}),
        "a list of weights": good(state_dict=list(state.values())),
        "a model as an object": good(state_dict=None),
        "arguments as a dict": good(args=arguments),
        "no arguments": good(args=argparse.Namespace()),
        "an argument whose name is a number": good(args=_odd_namespace()),
        **{
            f"{name} missing": {k: v for k, v in good().items() if k != name}
            for name in ("args", "optimizer")
        },
        **{
            f"{name} is {value!r:.30}": argued(**{name: value})
            for name, value in [
                ("num_latent_scales", 0),
                ("num_latent_scales", -1),
                ("num_latent_scales", 2.0),
                ("num_x_bits", 9),
                ("num_channels_enc", None),
                ("num_mixture_dec", 0),
                ("use_se", "yes"),
                ("arch_instance", "../../x"),
                ("arch_instance", ["res_mbconv"]),
                ("dataset", {"x": 1}),
                ("num_channels_dec", torch.tensor(4)),
            ]
        },
        "a list": [1, 2],
        "a tensor": torch.ones(3),
        "nothing at all": None,
        "an image": b"\x89PNG\r\n\x1a\n" + bytes(1000),
        "a page of HTML": b"<!DOCTYPE html><html>404</html>",
        "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
        "nothing": b"",
        "a zero": b"\0",
        "64 MiB of zeros": bytes(64 << 20),
    }


def _odd_namespace() -> argparse.Namespace:
    found = argparse.Namespace(**vars(good()["args"]))
    found.__dict__[7] = 1  # type: ignore[index]
    return found
