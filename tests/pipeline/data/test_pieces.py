"""The quick way through a tar header gives what WebDataset reads, or leaves it to WebDataset."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import pieces
from pipeline.data.tars import TarBuilder, read_sample

SHARD = TarBuilder().finish("some.tar").shard
keys = st.text(st.sampled_from("ab0/_-. é"), min_size=1, max_size=12)
extensions = st.sampled_from(["png", "jpg", "PNG", "mask.png", "webp", "txt", "ppm"])
formats = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def outcome(read) -> object:
    try:
        return read()
    except Exception as error:
        return type(error)


@settings(max_examples=300, deadline=None)
@given(key=keys, extension=extensions, form=formats, data=st.binary(max_size=600), flips=st.data())
def test_a_sample_is_read_as_webdataset_reads_it(key, extension, form, data, flips):
    header = tarfile.TarInfo(f"{key}.{extension}")
    header.size = len(data)
    span = header.tobuf(form, "utf-8", "strict") + data + bytes(-len(data) % tarfile.BLOCKSIZE)
    if flips.draw(st.booleans()):
        place = flips.draw(st.integers(0, len(span) - 1))
        span = span[:place] + bytes([span[place] ^ 1 << flips.draw(st.integers(0, 7))]) + span[place + 1 :]
    expected = outcome(lambda: read_sample(span, key, "some.tar").image)
    assert outcome(lambda: pieces.image_in(span, key, SHARD)) == expected


def test_what_shards_build_writes_takes_the_quick_way(monkeypatch):
    builder = TarBuilder()
    builder.add("folder/000123", "png", b"x" * 700)
    span = builder._file.getvalue()
    monkeypatch.setattr(pieces, "read_sample", lambda *_: pytest.fail("asked WebDataset"))
    assert pieces.image_in(span, "folder/000123", SHARD) == b"x" * 700


def test_a_sample_of_several_files_is_left_to_webdataset():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (("a.png", b"image"), ("a.json", b"{}")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert pieces.image_in(file.getvalue()[:2048], "a", SHARD) == b"image"
