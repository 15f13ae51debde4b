"""The members of a plain tar, one after the other, within limits.

Python's tarfile reads what it is told to: a header that announces 100 MB of extended attributes,
or a sparse file of ten gigabytes, is read into memory. It also takes a tar that was cut between
two members, or that holds a broken header, for one that ends there. Here each of these ends in
an error. No byte is held but a member's headers and, if the caller reads it, its data; nothing
is decompressed, linked or written to disk, and names stay names.

Understood are all that tarfile and GNU tar write: v7, ustar, GNU (long names, sparse files),
pax (records before a member, and global ones that carry no names or sizes).
"""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 2**18
"""Of all headers of one member: names, extended attributes, maps of sparse files."""
_SKIPPED_AT_ONCE = 2**20
# Where an old GNU header of a sparse file, and a block of its map, say that more blocks follow.
_SPARSE_MORE, _SPARSE_MAP_MORE = 482, 504
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_GLOBAL_RECORDS = {"comment", "mtime", "atime", "ctime", "uid", "gid", "uname", "gname"}
_OTHER_FORMATS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK": "zip",
}
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
FILE, FOLDER = "a file", "a folder"


class TarError(ValueError):
    """Not a whole plain tar; the message says what is wrong and at which byte."""


@dataclass(frozen=True, slots=True)
class Member:
    """An entry of a tar, whose data comes next in the stream."""

    name: str
    """As a tar reader decodes it; bytes that are no UTF-8 are lone surrogates."""
    kind: str
    """FILE, FOLDER, or in words what else it is."""
    start: int
    """First byte of its first header."""
    data_start: int
    data_bytes: int

    @property
    def end(self) -> int:
        """First byte behind it and its padding."""
        return self.data_start + _padded(self.data_bytes)


class Tape:
    """Bytes in one direction, of which `position` have been taken.

    `checksum` is the CRC-32 of those since the present member began.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        """`read(count)` gives `count` bytes, or fewer at the end."""
        self._read = read
        self.position = self.checksum = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes, or fewer at the end."""
        data = self._read(count)
        self.position += len(data)
        self.checksum = zlib.crc32(data, self.checksum)
        return data

    def skip_to(self, position: int) -> bool:
        """Go forward to `position`. False if the end comes before."""
        while self.position < position:
            if not self.take(min(position - self.position, _SKIPPED_AT_ONCE)):
                return False
        return True


def members(tape: Tape, *, whole: bool) -> Iterator[Member]:
    """The members in `tape`; what the caller leaves of a member's data is passed over.

    If `whole`, the tape is a complete tar and has to end like one; otherwise it is a part of a
    tar, from one member to another.
    Raises TarError at the first thing that is not as it should be.
    """
    while True:
        found = _next_member(tape, whole)
        if found is None:
            break
        yield found
        if not tape.skip_to(found.end):
            raise TarError(f"ends within the member {found.name!r} at byte {found.start:,}")
    if whole:
        _check_end(tape)


def _next_member(tape: Tape, whole: bool) -> Member | None:
    start, name, pax = tape.position, None, dict[str, str]()
    tape.checksum = 0
    while True:
        header_start = tape.position
        if header_start - start > MAX_HEADER_BYTES:
            raise _too_many_headers(start)
        block = tape.take(BLOCK)
        if _is_zero(block):
            if header_start != start or len(block) not in (0, BLOCK):
                raise TarError(f"ends after half a member at byte {start:,}")
            if whole and not block:
                raise TarError(f"has no end mark: it was cut off at byte {start:,}" if start else "is empty")
            return None
        header = _header(block, header_start)
        if header.type in _LONG_NAMES:
            text = _extension(tape, header.size, start)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = text.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        elif header.type in _PAX:
            pax |= _pax_records(_extension(tape, header.size, start), header_start)
        elif header.type == tarfile.XGLTYPE:
            _check_global(_pax_records(_extension(tape, header.size, start), header_start), header_start)
        else:
            break
    size = _pax_size(pax, header_start) if "size" in pax else header.size
    name = pax.get("path", header.name if name is None else name).rstrip("/")
    kind = FILE if header.isreg() else _KINDS.get(header.type, "of an unknown kind")
    if header.type == tarfile.GNUTYPE_SPARSE:
        kind = _KINDS[header.type]
        _skip_sparse_map(tape, bool(block[_SPARSE_MORE]), start)
    elif any(record.startswith("GNU.sparse.") for record in pax):
        kind = _KINDS[tarfile.GNUTYPE_SPARSE]
    has_data = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
    return Member(name, kind, start, tape.position, size if has_data else 0)


def _header(block: bytes, position: int) -> tarfile.TarInfo:
    if position == 0 and block[257:262] != b"ustar":
        for magic, format_name in _OTHER_FORMATS.items():
            if block.startswith(magic):
                raise TarError(f"is a {format_name} file: only plain tars are read; unpack it first")
    if len(block) < BLOCK:
        raise TarError(f"ends within the header at byte {position:,}")
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise TarError(f"has no tar header at byte {position:,} ({error})") from error
    if header.size < 0:
        raise TarError(f"the header at byte {position:,} says a size of {header.size}")
    return header


def _extension(tape: Tape, size: int, start: int) -> bytes:
    """The data of a header that describes the next one."""
    if size > MAX_HEADER_BYTES:
        raise _too_many_headers(start)
    data = tape.take(_padded(size))
    if len(data) < _padded(size):
        raise TarError(f"ends within the header at byte {start:,}")
    return data[:size]


def _pax_records(data: bytes, start: int) -> dict[str, str]:
    """Records of the form `LENGTH KEY=VALUE\\n`, where the length counts all of it."""
    records = {}
    position = 0
    while position < len(data) and data[position]:
        space = data.find(b" ", position, position + 12)
        digits = data[position:space] if space > 0 else b""
        end = position + int(digits) if digits.isdigit() else 0
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(data) or data[end - 1] != ord("\n") or not equals:
            raise TarError(f"the extended header at byte {start:,} is damaged")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position = end
    return records


def _pax_size(pax: dict[str, str], start: int) -> int:
    if not (pax["size"].isascii() and pax["size"].isdigit() and len(pax["size"]) <= 18):
        raise TarError(f"the extended header at byte {start:,} says no size")
    return int(pax["size"])


def _check_global(records: dict[str, str], start: int) -> None:
    # It would hold for all members behind it, and samples are read one by one.
    strange = [name for name in records if name not in _GLOBAL_RECORDS]
    if strange:
        raise TarError(f"the global header at byte {start:,} sets {strange[0]!r} for all members")


def _skip_sparse_map(tape: Tape, more: bool, start: int) -> None:
    """Pass over the blocks that continue an old GNU header's map of a sparse file."""
    while more:
        block = tape.take(BLOCK)
        if len(block) < BLOCK:
            raise TarError(f"ends within the header at byte {start:,}")
        if tape.position - start > MAX_HEADER_BYTES:
            raise _too_many_headers(start)
        more = bool(block[_SPARSE_MAP_MORE])


def _too_many_headers(start: int) -> TarError:
    return TarError(f"the member at byte {start:,} has more than {MAX_HEADER_BYTES >> 10} KiB of headers")


def _check_end(tape: Tape) -> None:
    """All behind the end mark has to be padding."""
    while True:
        position = tape.position
        block = tape.take(_SKIPPED_AT_ONCE)
        if not block:
            return
        if not _is_zero(block):
            raise TarError(
                f"holds data behind its end mark at byte {position:,}, which no tar reader sees; "
                f"tars cannot be joined end to end"
            )


def _is_zero(data: bytes) -> bool:
    return data.count(0) == len(data)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
