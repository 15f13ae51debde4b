"""The members of a tar: the same as Python's tarfile finds, wherever a tar is whole."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.members import FILE, Tape, TarError, members
from pipeline.data.tars import read_samples

NAMES = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0/"), min_size=1, max_size=150
)
FILES = st.lists(st.tuples(NAMES, st.binary(max_size=1200)), max_size=5)
FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def written(files: list[tuple[str, bytes]], tar_format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, encoding="utf-8") as archive:
        for name, data in files:
            member = tarfile.TarInfo(f"folder/{name}")
            member.size, member.mtime, member.uname = len(data), 12345.5, "jemand"
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def found(data: bytes) -> list[tuple[str, bytes]]:
    tape = Tape(io.BytesIO(data).read)
    return [
        (member.name, tape.take(member.data_bytes))
        for member in members(tape, whole=True)
        if member.kind == FILE
    ]


@settings(max_examples=50)
@given(files=FILES, tar_format=FORMATS)
def test_members_are_those_that_were_written(files, tar_format):
    assert found(written(files, tar_format)) == [(f"folder/{name}", data) for name, data in files]


@settings(max_examples=50)
@given(files=st.lists(st.tuples(NAMES, st.binary(max_size=700)), min_size=1, max_size=3), data=st.data())
def test_a_tar_that_was_cut_before_its_end_mark_never_passes_for_whole(files, data):
    content = written(files, tarfile.PAX_FORMAT)
    end = len(content.rstrip(b"\0"))
    cut = data.draw(st.integers(0, end - 1))
    with pytest.raises(TarError):
        found(content[:cut])


@settings(max_examples=50)
@given(files=FILES, data=st.data())
def test_a_members_place_is_that_of_its_headers_data_and_padding(files, data):
    """The bytes of one member alone are a tar with that member in it."""
    content = written(files, tarfile.PAX_FORMAT)
    tape = Tape(io.BytesIO(content).read)
    for number, member in enumerate(members(tape, whole=True)):
        alone = Tape(io.BytesIO(content[member.start : member.end]).read)
        (again,) = [(one.name, alone.take(one.data_bytes)) for one in members(alone, whole=False)]
        assert again == (f"folder/{files[number][0]}", files[number][1])


@settings(max_examples=50)
@given(noise=st.binary(max_size=3000))
def test_noise_is_refused_and_nothing_else_is_raised(noise):
    with pytest.raises(TarError):
        found(noise + b"x")


@settings(max_examples=50)
@given(place=st.integers(0, 2047), value=st.integers(1, 255))
def test_a_changed_byte_gives_other_members_or_an_error_and_nothing_else(place, value):
    content = bytearray(written([("a.png", b"x" * 600)], tarfile.USTAR_FORMAT))
    content[place] ^= value
    try:
        found(bytes(content))
        list(read_samples(bytes(content), "shard"))
    except ValueError:
        pass
