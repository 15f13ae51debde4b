"""Published formats: every pixel and every split as an independent writer put them there."""

import random

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pipeline.data import shards
from pipeline.data.images import decode, prepare
from pipeline.data.index import TRAIN, VALIDATION, ShardError
from pipeline.data.portraits import portrait
from pipeline.data.sources import open_source
from tests.pipeline.data.published_writers import (
    cifar_pickle,
    crc32c,
    example,
    png,
    raw_example,
    smooth,
    write_cifar,
    write_cifar_archive,
    write_lmdb,
    write_parquet,
    write_tfrecord,
)
from tests.pipeline.data.test_shards import samples


def read(spec, image_size=None) -> list[tuple[str | None, np.ndarray]]:
    """Split and pixels of each image; read in another order than it is listed, twice."""
    with open_source(str(spec), image_size) as source:
        pixels = {}
        for _ in range(2):
            for number in random.Random(0).sample(range(len(source.images)), len(source.images)):
                content = source.images[number].read()
                size = content.shape[0] if isinstance(content, np.ndarray) else 16
                pixels[number] = decode(prepare(content, size, 3, "none").data, size, 3)
        assert len({image.name for image in source.images}) == len(source.images)
        return [(image.split, pixels[number]) for number, image in enumerate(source.images)]


def portraits(count: int, side: int) -> np.ndarray:
    return np.stack([portrait(number, side) for number in range(count)])


def assert_holds(found, train: np.ndarray, validation: np.ndarray = ()) -> None:
    splits = (TRAIN, VALIDATION) if len(validation) else (None,)
    for split, wanted in zip(splits, (train, validation), strict=False):
        there = [pixels for name, pixels in found if name == split]
        assert len(there) == len(wanted)
        assert_array_equal(np.stack(there), wanted)


@pytest.mark.parametrize("archive", [False, True])
def test_cifar_10_has_its_pixels_and_its_published_split(archive, tmp_path):
    images = smooth(8, 32)
    spec = write_cifar(tmp_path / "cifar-10-batches-py", [images[:3], images[3:6]], images[6:])
    if archive:
        spec = write_cifar_archive(tmp_path / "cifar-10-python.tar.gz", spec)
    assert_holds(read(spec), images[:6], images[6:])
    with open_source(str(spec), None) as source:
        assert source.image_size == 32


def test_the_test_writes_cifar_batches_that_python_unpickles_to_the_same():
    import pickle

    images = smooth(3, 32)
    batch = pickle.loads(cifar_pickle(images), encoding="latin1")
    assert batch["labels"] == [0, 1, 2]
    assert_array_equal(batch["data"].reshape(3, 3, 32, 32).transpose(0, 2, 3, 1), images)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_batches_that_python_3_pickled_are_read_too(protocol, tmp_path):
    import pickle

    images = smooth(3, 32)
    data = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(3, -1)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": data, b"labels": [1, 2, 3]}, protocol))
    assert_holds(read(tmp_path), images)


@pytest.mark.parametrize(
    "names", [("train.lmdb", "validation.lmdb"), ("train.lmdb", "valid.lmdb", "test.lmdb")]
)
def test_lmdb_databases_of_image_files_have_their_pixels_and_splits(names, tmp_path):
    images = smooth(20, 16)
    parts = dict(zip(names, (images[:13], images[13:], images[:2]), strict=False))
    for name, part in parts.items():
        write_lmdb(tmp_path / name, map(png, part))
    assert_holds(read(tmp_path), images[:13], images[13:])
    with open_source(str(tmp_path), 16) as source:
        assert bool(source.remarks) == ("test.lmdb" in names)
    assert_holds(read(tmp_path / "train.lmdb"), images[:13])
    assert_holds(read(tmp_path / "train.lmdb/data.mdb"), images[:13])


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("make", [smooth, portraits], ids=["smooth", "portraits"])
@pytest.mark.parametrize("side", [32, 64])
def test_bare_pixels_in_lmdb_are_read_in_the_order_in_which_they_lie(side, make, channels_first, tmp_path):
    images = make(12, side)
    stored = images.transpose(0, 3, 1, 2) if channels_first else images
    write_lmdb(tmp_path / "all", [np.ascontiguousarray(image).tobytes() for image in stored])
    assert_holds(read(tmp_path / "all"), images)


@pytest.mark.parametrize("count", [0, 1, 2, 50, 3000])
def test_an_lmdb_tree_of_any_depth_is_read_whole(count, tmp_path):
    """Small values lie in leaves, large ones on pages of their own, and many keys need branches."""
    files = [png(image) + bytes(number % 7 * 1500) for number, image in enumerate(smooth(8, 16))]
    keys = [f"{number:x}" * (1 + number % 40) for number in range(count)]
    write_lmdb(tmp_path / "all", [files[n % 8] for n in range(count)], keys)
    if not count:
        with pytest.raises(ShardError, match="nothing in it"), open_source(str(tmp_path), 16):
            pass
        return
    with open_source(str(tmp_path), 16) as source:
        found = {image.name: image.read() for image in source.images}
    assert found == {key: files[number % 8] for number, key in enumerate(keys)}


def test_the_checksum_of_the_tests_is_crc_32c():
    assert crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize("packed", [True, False])
def test_glow_tfrecords_have_their_pixels_and_splits(packed, tmp_path):
    images = smooth(9, 16)
    for name, part in [
        ("train/train-r04-s-0000-of-0002", images[:3]),
        ("train/train-r04-s-0001-of-0002", images[3:6]),
        ("validation/validation-r04-s-0000-of-0001", images[6:]),
    ]:
        write_tfrecord(tmp_path / f"{name}.tfrecords", [raw_example(image, packed) for image in part])
    assert_holds(read(tmp_path), images[:6], images[6:])
    with open_source(str(tmp_path), None) as source:
        assert source.image_size == 16


def test_of_several_resolutions_the_wanted_one_is_read(tmp_path):
    for power in (3, 4):
        examples = [raw_example(image) for image in smooth(3, 2**power)]
        write_tfrecord(tmp_path / f"ffhq-r{power:02d}.tfrecords", examples)
    assert_holds(read(tmp_path, 8), smooth(3, 8))
    assert_holds(read(tmp_path, 16), smooth(3, 16))
    for size in (None, 32):
        with pytest.raises(ShardError, match=r"8, 16 pixels.*--image-size"), open_source(str(tmp_path), size):
            pass


def test_tfrecords_may_hold_planes_or_image_files(tmp_path):
    images = smooth(2, 16)
    planes = example({"data": images[0].transpose(2, 0, 1).tobytes(), "shape": [3, 16, 16]})
    path = write_tfrecord(tmp_path / "x.tfrecord", [planes, example({"image/encoded": png(images[1])})])
    assert_holds(read(path), images)


@pytest.mark.parametrize("flat", [False, True])
def test_parquet_files_have_their_pixels_and_splits(flat, tmp_path):
    images = smooth(40, 16)
    files = [png(image) for image in images]
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", files[:20], flat=flat)
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", files[20:33], flat=flat)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", files[33:], flat=flat)
    assert_holds(read(tmp_path), images[:33], images[33:])
    assert_holds(read(tmp_path / "data/test-00000-of-00001.parquet"), images[33:])
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", files[:2], flat=flat)
    assert_holds(read(tmp_path), images[:33], images[:2])


def test_a_table_beside_images_is_not_taken_for_them(tmp_path):
    write_parquet(tmp_path / "metadata.parquet", [b"x"])
    (tmp_path / "0.png").write_bytes(png(smooth(1, 16)[0]))
    with open_source(str(tmp_path), 16) as source:
        assert [image.name for image in source.images] == ["0.png", "metadata.parquet"]


def test_files_of_which_only_some_name_a_split_are_refused(tmp_path):
    for name in ("train-0", "validation-0", "more"):
        write_parquet(tmp_path / f"{name}.parquet", [b"x"])
    with pytest.raises(ShardError, match=r"do not: more\.parquet"), open_source(str(tmp_path), 16):
        pass


@pytest.mark.parametrize("kind", ["cifar", "lmdb", "tfrecord", "parquet"])
def test_a_data_set_of_each_kind_has_the_source_s_pixels_in_the_source_s_splits(kind, tmp_path):
    images, source = smooth(9, 32), tmp_path / "in"
    for split, part in (("train", images[:6]), ("validation", images[6:])):
        if kind == "cifar":
            write_cifar(source, [images[:6]], images[6:])
        elif kind == "lmdb":
            write_lmdb(source / f"{split}.lmdb", [image.tobytes() for image in part])
        elif kind == "tfrecord":
            write_tfrecord(source / split / f"{split}-r05.tfrecords", map(raw_example, part))
        else:
            write_parquet(source / f"{split}-0.parquet", list(map(png, part)))
    index = shards.build(str(source), str(tmp_path / "out"), image_size=32, form="raw").index
    assert shards.verify(index.root) == []
    for split, part in ((TRAIN, images[:6]), (VALIDATION, images[6:])):
        found = {decode(data, 32, 3).tobytes() for data in samples(index, split).values()}
        assert found == {image.tobytes() for image in part}
