"""Tars that somebody made to do harm, and what has to become of each.

Every payload writes one tar that holds two good images besides what is hostile. It is `ignored`
(the good images, and only they, become samples) or refused with a message that matches.
"""

import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tests.pipeline.data.foreign_tars import image_file

IGNORED = None
END = bytes(10240)
FIRST, LAST = image_file(1), image_file(2)
GOOD = {"first": FIRST, "last": LAST}
BOMB_BYTES = 10 * 2**30


@dataclass(frozen=True)
class TarPayload:
    """A hostile tar, written by `write` to a path."""

    name: str
    write: Callable[[Path], None]
    refusal: str | None = IGNORED
    """What the one message of refusal says; None if the hostile part is passed over."""
    kept: tuple[str, ...] = ("first", "last")
    """The samples, if it is not refused."""
    slow: bool = False


class _RunsOnLoad:
    def __reduce__(self):
        return os.system, ("touch marker",)


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields) -> bytes:
    """A ustar header, its data and padding."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def with_field(header: bytes, start: int, value: bytes) -> bytes:
    """A header with other bytes from `start` on, and the right checksum."""
    block = header[:start] + value + header[start + len(value) : 512]
    unsummed = block[:148] + b" " * 8 + block[156:]
    return unsummed[:148] + b"%06o\0 " % sum(unsummed) + unsummed[156:] + header[512:]


def pax(records: dict[str, str], kind: bytes = b"x") -> bytes:
    lines = b""
    for key, value in records.items():
        line = f" {key}={value}\n".encode("utf-8", "surrogateescape")
        length = len(line) + len(str(len(line) + 3))
        lines += str(length).encode() + line
    return member("pax", lines, kind)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"".join(chunk(*each) for each in (*chunks, (b"IDAT", zlib.compress(bytes(200)))))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def between(hostile: bytes) -> Callable[[Path], None]:
    """A tar with `hostile` between the two good images."""
    content = member("first.png", FIRST) + hostile + member("last.png", LAST) + END
    return lambda path: exactly(content)(path)


def exactly(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def announcing(header: bytes, hole: int) -> Callable[[Path], None]:
    """A header that is followed by `hole` bytes, which take no room on the disk."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(member("first.png", FIRST) + header)
            file.seek(hole + -hole % 512, os.SEEK_CUR)
            file.write(member("last.png", LAST) + END)

    return write


def size_field(value: bytes) -> bytes:
    return with_field(member("big.png", b"x"), 124, value.ljust(12, b"\0"))


def _zeros_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(2**20))
    return buffer.getvalue()


def _gnu_sparse() -> bytes:
    header = member("sparse.png", bytes(512), tarfile.GNUTYPE_SPARSE)
    header = with_field(header, 386, b"%011o\0%011o\0" % (0, 512))
    return with_field(header, 483, b"%012o" % BOMB_BYTES)


def _endless_sparse_map() -> bytes:
    header = with_field(member("sparse.png", b"", tarfile.GNUTYPE_SPARSE), 482, b"\1")
    more = bytes(504) + b"\1" + bytes(7)
    return header + more * 2000


def _pax_sparse() -> bytes:
    records = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "sparse.png",
        "GNU.sparse.realsize": str(BOMB_BYTES),
    }
    return pax(records) + member("GNUSparseFile.0/sparse.png", padded(b"1\n0\n512\n") + bytes(512))


def _many_members(count: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        header = member("NNNNNNNN.txt")
        with path.open("wb") as file:
            file.write(member("first.png", FIRST))
            for number in range(count):
                file.write(with_field(header, 0, b"%08d" % number))
            file.write(member("last.png", LAST) + END)

    return write


def _animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (80 * number, 0, 0)) for number in range(3)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    return buffer.getvalue()


def _tiff_bomb() -> bytes:
    tags = [(256, 4, 1, 60000), (257, 4, 1, 60000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 60000), (279, 4, 1, 100)]
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + body + bytes(104)


def _webp_bomb() -> bytes:
    bits = (16383 - 1) | (16383 - 1) << 14
    body = b"VP8L" + struct.pack("<I", 5) + b"\x2f" + struct.pack("<I", bits) + b"\0"
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


_COMPRESSED_TEXT = zlib.compress(bytes(80 * 2**20), 1)
_TAR = member("first.png", FIRST) + member("last.png", LAST) + END
_PICKLE = pickle.dumps(_RunsOnLoad())
_BIG_HEADER = "more than 256 KiB of headers"

TAR_PAYLOADS = [
    # what other readers of WebDataset would run or unpack
    TarPayload("pickle", between(member("evil.pkl", _PICKLE))),
    TarPayload("pickle beside an image's name", between(member("firs.pickle", _PICKLE))),
    TarPayload("torch file", between(member("evil.pth", _PICKLE))),
    TarPayload("python data", between(member("evil.pyd", _PICKLE))),
    TarPayload("python source", between(member("evil.py", b"import os; os.system('touch marker')"))),
    TarPayload("pickle that is named an image", between(member("evil.png", _PICKLE))),
    TarPayload("nested tar", between(member("inner.tar", _TAR))),
    TarPayload("gzipped member", between(member("evil.json.gz", gzip.compress(bytes(2**24))))),
    # names
    TarPayload("name that leads out", between(member("../../escaped.png", image_file(3)))),
    TarPayload("absolute name", between(member("/tmp/escaped.png", image_file(3)))),
    TarPayload("long name that leads out", between(member("a/" * 90 + "../" * 99 + "x.png", image_file(3)))),
    TarPayload(
        "pax name that leads out", between(pax({"path": "../x.png"}) + member("x.png", image_file(3)))
    ),
    TarPayload("empty name", between(member("", image_file(3)))),
    TarPayload("name of an extension alone", between(member(".png", image_file(3)))),
    TarPayload("newline in a name", between(member("a\nb.png", image_file(3)))),
    TarPayload("terminal escape in a name", between(member("\x1b]0;owned\x07.png", image_file(3)))),
    TarPayload("eight-bit terminal escape", between(member("\x9b2J.png", image_file(3)))),
    TarPayload("name that is no UTF-8", between(member("\udcff\udcfe.png", image_file(3)))),
    TarPayload("name of ten thousand letters", between(member("n" * 10_000 + ".png", image_file(3)))),
    TarPayload(
        "duplicate member",
        between(member("first.png", image_file(3)) + member("first.png", b"")),
        kept=("last",),
    ),
    TarPayload("name of a remark", between(member("__evil__/x.png", image_file(3)))),
    # what is no file
    TarPayload("symbolic link", between(member("s.png", b"", tarfile.SYMTYPE, linkname="/etc/passwd"))),
    TarPayload("hard link", between(member("h.png", b"", tarfile.LNKTYPE, linkname="first.png"))),
    TarPayload("character device", between(member("d.png", b"", tarfile.CHRTYPE, devmajor=1, devminor=5))),
    TarPayload("block device", between(member("d.png", b"", tarfile.BLKTYPE, devmajor=8))),
    TarPayload("named pipe", between(member("p.png", b"", tarfile.FIFOTYPE))),
    TarPayload("folder that is named an image", between(member("f.png", b"", tarfile.DIRTYPE))),
    TarPayload("unknown kind of member", between(member("u.txt", b"data", b"Z"))),
    TarPayload("sparse file of 10 GB", between(_gnu_sparse())),
    TarPayload("sparse file of 10 GB in pax", between(_pax_sparse())),
    TarPayload("endless map of a sparse file", between(_endless_sparse_map()), _BIG_HEADER),
    # headers
    TarPayload(
        "size beyond the end", between(size_field(b"77777777777")), "ends within the member 'big.png'"
    ),
    TarPayload("negative size", between(size_field(b"\xff" * 12)), "says a size of -"),
    TarPayload("size of 2**62", between(size_field(b"\x80\0\0\0\x40" + bytes(7))), "ends within the member"),
    TarPayload("size that is no number", between(size_field(b"zzzzzzz")), "no tar header at byte 1,024"),
    TarPayload("pax header of 100 MB", announcing(member("x", b"", b"x", size=10**8), 10**8), _BIG_HEADER),
    TarPayload("long name of 100 MB", announcing(member("x", b"", b"L", size=10**8), 10**8), _BIG_HEADER),
    TarPayload("thousands of pax headers", between(pax({"comment": "x"}) * 1000), _BIG_HEADER),
    TarPayload(
        "pax header without sense", between(member("x", b"99999 path=x\n", b"x")), "header .* is damaged"
    ),
    TarPayload(
        "pax size that is negative", between(pax({"size": "-512"}) + member("x.png", b"x")), "says no size"
    ),
    TarPayload(
        "pax size beyond the end", between(pax({"size": str(10**15)}) + member("x.png", b"x")), "ends within"
    ),
    TarPayload("global names", between(pax({"path": "../x.png"}, b"g")), "sets 'path' for all members"),
    TarPayload("broken header", between(bytes(100) + b"x" + bytes(411)), "no tar header at byte 1,024"),
    TarPayload("data behind the end", exactly(_TAR + _TAR), "behind its end mark"),
    TarPayload("end that is missing", exactly(_TAR[: -len(END)]), "has no end mark"),
    TarPayload("image of 100 MB", announcing(member("x.png", b"", size=10**8), 10**8)),
    TarPayload("ten thousand tiny members", _many_members(10_000)),
    TarPayload("a million tiny members", _many_members(10**6), slow=True),
    TarPayload("member of 10 GB", announcing(member("x.png", b"", size=2**33 - 1), 2**33 - 1), slow=True),
    # other formats
    TarPayload("gzip", exactly(gzip.compress(_TAR)), "is a gzip file"),
    TarPayload("bzip2", exactly(bz2.compress(_TAR)), "is a bzip2 file"),
    TarPayload("xz", exactly(lzma.compress(_TAR)), "is a xz file"),
    TarPayload("zstd", exactly(b"\x28\xb5\x2f\xfd" + bytes(600)), "is a zstd file"),
    TarPayload("zip", exactly(_zeros_zip()), "is a zip file"),
    TarPayload("pickle instead of a tar", exactly(_PICKLE), "ends within the header|no tar header"),
    TarPayload("nothing", exactly(b""), "is empty"),
    TarPayload("one byte", exactly(b"x"), "ends within the header at byte 0"),
    # images
    TarPayload("PNG of 900 million pixels", between(member("b.png", png(30000, 30000)))),
    TarPayload("PNG of 2**62 pixels", between(member("b.png", png(2**31 - 1, 2**31 - 1)))),
    TarPayload("TIFF of 3.6 billion pixels", between(member("b.png", _tiff_bomb()))),
    TarPayload("WebP of 268 million pixels", between(member("b.webp", _webp_bomb()))),
    TarPayload(
        "PNG with 80 MB of text", between(member("b.png", png(8, 8, (b"zTXt", b"a\0\0" + _COMPRESSED_TEXT))))
    ),
    TarPayload(
        "PNG with a profile of 80 MB",
        between(member("b.png", png(8, 8, (b"iCCP", b"a\0\0" + _COMPRESSED_TEXT)))),
    ),
    TarPayload("PNG that was cut", between(member("b.png", image_file(3)[:-60]))),
    TarPayload("animation", between(member("b.webp", _animation()))),
]
