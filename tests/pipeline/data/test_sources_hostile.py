"""Sources that were cut, damaged or made up: one message that says so, and nothing is run."""

import gzip
import os
import pickle
import random
import struct
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import binary

from pipeline.data.images import MAX_FILE_BYTES, RejectedImageError
from pipeline.data.index import ShardError
from pipeline.data.sources import open_source
from pipeline.data.sources.cifar import interpret
from pipeline.data.sources.tfrecord import parse_example
from tests.pipeline.data.published_writers import (
    example,
    masked,
    png,
    raw_example,
    record,
    smooth,
    write_cifar,
    write_cifar_archive,
    write_lmdb,
    write_parquet,
    write_tfrecord,
)

IMAGES = smooth(5, 32)
ANSWERS = (ShardError, RejectedImageError)


def read(path: Path, image_size: int | None = 32) -> list[bytes | np.ndarray]:
    with open_source(str(path), image_size) as source:
        return [image.read() for image in source.images]


# --- every kind, cut and changed --------------------------------------------------------------


def one_file(kind: str, folder: Path) -> Path:
    """The file of a small source; what is in it matters."""
    if kind == "cifar":
        write_cifar(folder, [IMAGES[:3]], IMAGES[3:])
        return folder / "data_batch_1"
    if kind == "cifar archive":
        return write_cifar_archive(
            folder / "cifar-10-python.tar.gz", write_cifar(folder / "x", [IMAGES], IMAGES)
        )
    if kind == "lmdb":
        return write_lmdb(folder, map(png, IMAGES)) / "data.mdb"
    if kind == "tfrecord":
        return write_tfrecord(folder / "x.tfrecord", map(raw_example, IMAGES))
    return write_parquet(folder / "x.parquet", list(map(png, IMAGES)))


KINDS = ["cifar", "cifar archive", "lmdb", "tfrecord", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_was_cut_is_refused_and_named(kind, tmp_path):
    path = one_file(kind, tmp_path)
    whole = path.read_bytes()
    for cut in {1, 13, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:cut])
        with pytest.raises(ShardError, match=path.name):
            read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_changed_in_a_file_the_answer_is_a_message_or_images(kind, tmp_path):
    path = one_file(kind, tmp_path)
    whole = path.read_bytes()
    drawn = random.Random(kind)
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(drawn.choice([1, 1, 4])):
            # Headers and trees lie at the ends and at the beginnings of pages.
            place = drawn.choice(
                [drawn.randrange(len(whole)), drawn.randrange(300), -drawn.randrange(1, 300)]
            )
            changed[place] = drawn.randrange(256)
        path.write_bytes(changed)
        try:
            read(path)
        except ANSWERS as error:
            assert str(error)


def test_every_changed_byte_of_a_record_is_noticed(tmp_path):
    path = write_tfrecord(tmp_path / "x.tfrecord", [example({"image/encoded": b"content"})])
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ANSWERS, match=r"damaged|cut short|checksum"):
            read(path)


@pytest.mark.parametrize("kind", [".lmdb", ".tfrecord", ".parquet", ".zip", ".tar"])
def test_a_file_of_another_kind_is_refused_and_named(kind, tmp_path):
    path = tmp_path / f"other{kind}"
    for content in (b"", b"x" * 5000, os.urandom(9000)):
        path.write_bytes(content)
        with pytest.raises(ShardError, match=r"other|nothing"):
            read(path)


# --- pickles ----------------------------------------------------------------------------------


class Runs:
    """What a hostile pickle asks for."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("function", [os.system, exec, eval, open])
def test_what_a_pickle_asks_for_is_never_run(function, protocol, tmp_path):
    marker = tmp_path / "marker"
    argument = {os.system: f"touch {marker}", open: str(marker)}.get(function, f"open({str(marker)!r}, 'w')")
    calls = Runs(function, argument, "w") if function is open else Runs(function, argument)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": calls}, protocol))
    with pytest.raises(ShardError, match="is no batch of CIFAR-10"):
        read(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "hostile",
    [
        b"\x80\x02cposix\nsystem\nU\x04true\x85R.",
        b"\x80\x02cnumpy\ndtype\nU\x02O8\x85R.",
        b"\x80\x02(inumpy\nload\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02}q\x01h\x01h\x01s.",
        b"\x80\x02P1\n.",
        b"\x80\x02" + b"(" * 10_000 + b"t" * 10_000 + b".",
        b"\x80\x02}(" + b")\x85" * 1 + b"K\x01u.",
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
        b".",
        b"",
    ],
)
def test_a_pickle_that_is_no_batch_is_refused(hostile, tmp_path):
    (tmp_path / "data_batch_1").write_bytes(hostile)
    with pytest.raises(ShardError, match="is no batch of CIFAR-10"):
        read(tmp_path)


def test_an_array_of_objects_is_refused(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": np.array([None] * 4)}, 2))
    with pytest.raises(ShardError, match="not one of bytes"):
        read(tmp_path)


@given(binary(max_size=60))
def test_no_pickle_does_more_than_fail(tail):
    """Whatever follows the protocol's number."""
    with suppress(ValueError, TypeError, LookupError, EOFError, AttributeError):
        interpret(b"\x80\x02" + tail)


# --- bombs and lies ---------------------------------------------------------------------------


def test_a_record_that_claims_to_be_huge_is_refused(tmp_path):
    length = struct.pack("<Q", 2**62)
    (tmp_path / "x.tfrecord").write_bytes(length + masked(length) + b"x" * 100)
    with pytest.raises(ShardError, match="cut short"):
        read(tmp_path)
    with (tmp_path / "x.tfrecord").open("wb") as file:
        length = struct.pack("<Q", MAX_FILE_BYTES + 1)
        file.write(length + masked(length))
        file.truncate(12 + MAX_FILE_BYTES + 1 + 4)  # A hole, no blocks on the disk.
    with pytest.raises(RejectedImageError, match="MiB"):
        read(tmp_path)


@pytest.mark.parametrize(
    "shape",
    [[2**40, 2**40, 3], [0, 4, 4], [2**63 - 1], [4, 4, 4, 3], [4, 4, 2], [4, 4, 3, 1], [2**64 - 4, 4, 3]],
)
def test_pixels_that_do_not_fit_their_shape_are_rejected(shape, tmp_path):
    write_tfrecord(tmp_path / "x.tfrecord", [example({"data": bytes(32), "shape": shape})])
    with pytest.raises(RejectedImageError):
        read(tmp_path)


@given(binary(max_size=40))
def test_no_record_does_more_than_fail(data):
    with suppress(ValueError, IndexError):
        parse_example(data)


def test_a_record_without_an_image_says_what_it_has(tmp_path):
    (tmp_path / "x.tfrecord").write_bytes(record(example({"label": [1], "text": b"x"})))
    with pytest.raises(RejectedImageError, match=r"without an image.*label, text"):
        read(tmp_path)


def test_an_lmdb_tree_that_leads_back_to_itself_ends(tmp_path):
    path = write_lmdb(tmp_path, [png(IMAGES[0])[:400]] * 400) / "data.mdb"
    data = bytearray(path.read_bytes())
    for page in range(0, len(data), 4096):
        (flags,) = struct.unpack_from("<H", data, page + 10)
        if flags == 1 and page >= 8192:  # A branch: let its first child be itself.
            (first,) = struct.unpack_from("<H", data, page + 16)
            struct.pack_into("<HH", data, page + first, page // 4096, 0)
    path.write_bytes(data)
    with pytest.raises(ShardError, match="leads back to itself"):
        read(tmp_path)


def test_values_of_lmdb_that_are_neither_files_nor_pixels_are_refused(tmp_path):
    write_lmdb(tmp_path, [b"x" * 100, b"y" * 50])
    with pytest.raises(ShardError, match="neither image files nor square RGB"):
        read(tmp_path)


def test_bare_pixels_of_another_length_are_rejected_one_by_one(tmp_path):
    write_lmdb(tmp_path, [image.tobytes() for image in smooth(16, 32)] + [b"short"])
    with open_source(str(tmp_path), 32) as source:
        assert source.image_size == 32
        with pytest.raises(RejectedImageError, match=r"5 bytes instead of 3,072"):
            source.images[16].read()


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE])
def test_a_compressed_tar_that_unpacks_to_more_than_cifar_is_refused(kind, tmp_path):
    """Names and extensions, which readers keep in memory, are no way around the limit."""
    header = tarfile.TarInfo("data_batch_1")
    header.type, header.size = kind, 2**33 - 1
    zeros = gzip.compress(bytes(2**24))
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT)) + 40 * zeros)
    with pytest.raises(ShardError, match=r"more than CIFAR-10|is no batch"):
        read(path)


def test_rows_without_content_are_rejected_and_the_others_read(tmp_path):
    write_parquet(tmp_path / "x.parquet", [png(IMAGES[0]), None, png(IMAGES[1])])
    with open_source(str(tmp_path), 32) as source:
        assert source.images[2].read() == png(IMAGES[1])
        with pytest.raises(RejectedImageError, match="no content"):
            source.images[1].read()


def test_a_table_without_images_names_its_columns(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ShardError, match=r"text, label.*name one of them `image`"):
        read(tmp_path)


def test_a_damaged_member_of_a_zip_is_rejected(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png(IMAGES[0]))
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[60:90] = os.urandom(30)
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(ANSWERS):
        read(tmp_path / "x.zip")
