"""Tars written by others: what becomes of them, and that a training reads what was put in."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset

from pipeline import storage
from pipeline.data import shards, verification
from pipeline.data.images import decode
from pipeline.data.index import TRAIN, VALIDATION, Index, ShardError, load_index, read_sidecar
from pipeline.data.indexing import index_tars
from pipeline.data.loader import evaluation_batches
from pipeline.data.tar_listing import expanded
from pipeline.storage import StoreError
from tests.pipeline.data.foreign_tars import (
    by_gnu_tar,
    by_shard_writer,
    image_file,
    like_img2dataset,
    write_tar,
)
from tests.pipeline.data.test_loader import config


def delivered(index: Index, split: str) -> dict[str, bytes]:
    """Pixels by key, as a training reads them."""
    found: dict[str, bytes] = {}
    batches = evaluation_batches(config(), index, rank=0, world_size=1, split=split, batch_size=4)
    for batch in batches:
        for key, image in zip(batch.keys, batch.images, strict=True):
            assert key not in found
            found[key] = image.permute(1, 2, 0).numpy().tobytes()
    return found


def assert_delivers(index: Index, images: dict[str, bytes]) -> None:
    """Every image comes out of the loader once, as its own decoder sees it, in one of the splits."""
    train, validation = delivered(index, TRAIN), delivered(index, VALIDATION)
    assert not set(train) & set(validation)
    expected = {key: decode(data, index.image_size, index.channels).tobytes() for key, data in images.items()}
    assert train | validation == expected
    assert verification.verify(index.root) == []
    assert verification.missing_shards(index) == []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what others write ------------------------------------------------------------------------


def test_tars_of_shard_writer_deliver_what_was_written(tmp_path):
    images = by_shard_writer(tmp_path, shards=4, per_shard=6)
    before = contents(tmp_path)
    report = index_tars([str(tmp_path)])
    assert_delivers(report.index, images)
    assert (len(report.index.shards(TRAIN)), len(report.index.shards(VALIDATION))) == (3, 1)
    assert report.rejected == ()
    assert before.items() <= contents(tmp_path).items()
    assert not list(tmp_path.glob("*.building"))


def test_tars_like_img2dataset_deliver_what_was_written(tmp_path):
    images = like_img2dataset(tmp_path, shards=3, per_shard=5)
    index = index_tars([str(tmp_path / "{00000..00002}.tar")], validation=["00001.tar"]).index
    assert [shard.name for shard in index.shards(VALIDATION)] == ["00001.tar"]
    assert_delivers(index, images)


@pytest.mark.parametrize("tar_format", ["v7", "ustar", "gnu", "oldgnu", "pax"])
def test_tars_of_gnu_tar_deliver_what_was_written(tar_format, tmp_path):
    long_names = tar_format not in ("v7", "ustar")
    images = {}
    for half in (0, 1):
        folder = tmp_path / f"images{half}/below/deep.folder"
        folder.mkdir(parents=True)
        for number in range(4):
            key = f"./below/deep.folder/{half}-{number}" + ("-long" * 40 if long_names else "")
            images[key] = image_file(4 * half + number)
            (tmp_path / f"images{half}" / f"{key}.PNG").write_bytes(images[key])
            (tmp_path / f"images{half}" / f"{key}.txt").write_text("caption")
        by_gnu_tar(tmp_path / f"tars/{half}.tar", tmp_path / f"images{half}", f"--format={tar_format}")
    assert_delivers(index_tars([str(tmp_path / "tars")], validation=["1.tar"]).index, images)


def test_a_name_with_several_dots_follows_webdatasets_rule(tmp_path):
    files = {
        "a.png": image_file(1),
        "a.mask.png": image_file(2),
        "b.v2.001.png": image_file(3),
        "c.left.png": image_file(4),
        "c.right.png": image_file(5),
    }
    write_tar(tmp_path / "0.tar", files)
    report = index_tars([str(tmp_path)], validation_fraction=0, max_rejected=0.5)
    assert_delivers(report.index, {"a": files["a.png"], "b": files["b.v2.001.png"]})
    assert [(r.name, r.reason) for r in report.rejected] == [("c", "has 2 images, not one")]


def test_images_may_lie_apart_from_the_other_files_of_their_samples(tmp_path):
    images = {f"{number}": image_file(number) for number in range(6)}
    captions = {f"{key}.txt": b"caption" for key in images}
    write_tar(tmp_path / "0.tar", captions | {f"{key}.png": data for key, data in images.items()})
    report = index_tars([str(tmp_path)], validation_fraction=0)
    assert_delivers(report.index, images)
    assert report.rejected == ()
    sidecar = read_sidecar(report.index, report.index.shards(TRAIN)[0])
    assert sidecar.offsets[0] == 6 * 1024


def test_grey_images_and_a_bucket_work_alike(tmp_path, s3):
    files = {f"{number}.png": image_file(number, mode="L") for number in range(8)}
    images = {name[0]: data for name, data in files.items()}
    names = list(files)
    for part in (0, 1):
        chosen = {name: files[name] for name in names[part::2]}
        write_tar(tmp_path / f"{part}.tar", chosen)
        tar = (tmp_path / f"{part}.tar").read_bytes()
        storage.write_bytes(f"{s3}/{tmp_path.name}/{part}.tar", tar)
    here = index_tars([str(tmp_path)]).index
    there = index_tars([f"{s3}/{tmp_path.name}/{{0..1}}.tar"]).index
    assert (here.channels, here.content_hash) == (1, there.content_hash)
    assert verification.missing_shards(there) == []
    assert verification.verify(there.root) == []
    assert len(images) == sum(there.num_samples(split) for split in (TRAIN, VALIDATION))
    assert "write-check.building" not in storage.list_dir(there.root)


def test_stock_webdataset_decodes_what_our_loader_delivers(tmp_path):
    """Over shards of our own: WebDataset's own opener, grouping and decoder against our reader."""
    (tmp_path / "images").mkdir()
    for number in range(10):
        (tmp_path / f"images/{number}.png").write_bytes(image_file(number))
    options = {"image_size": 8, "validation_fraction": 0, "shard_bytes": 4000}
    index = shards.build(str(tmp_path / "images"), str(tmp_path / "out"), **options).index
    files = [str(tmp_path / "out" / shard.name) for shard in index.shards(TRAIN)]
    assert len(files) > 1
    stock = webdataset.WebDataset(files, shardshuffle=False).decode("pil")
    assert {sample["__key__"]: sample["png"].tobytes() for sample in stock} == delivered(index, TRAIN)


# --- splits -----------------------------------------------------------------------------------


def test_folders_that_name_splits_are_the_splits(tmp_path):
    for number, name in enumerate(["train/0.tar", "train/1.tar", "val/0.tar"]):
        write_tar(tmp_path / name, {f"{number}.png": image_file(number)})
    index = index_tars([str(tmp_path)]).index
    assert [shard.name for shard in index.shards(TRAIN)] == ["train/0.tar", "train/1.tar"]
    assert [shard.name for shard in index.shards(VALIDATION)] == ["val/0.tar"]
    assert verification.missing_shards(index) == []


def test_no_image_is_in_both_splits_even_under_another_name(tmp_path):
    write_tar(tmp_path / "0.tar", {f"a{number}.png": image_file(number) for number in range(5)})
    write_tar(tmp_path / "1.tar", {f"b{number}.png": image_file(number) for number in range(3, 8)})
    report = index_tars([str(tmp_path)], validation=["1.tar"])
    train, validation = delivered(report.index, TRAIN), delivered(report.index, VALIDATION)
    assert sorted(train) == ["a0", "a1", "a2"]
    assert set(train.values()).isdisjoint(validation.values())
    assert [(r.name, r.by_rule) for r in report.rejected] == [("a3", True), ("a4", True)]
    assert report.index.rejected == 2


def test_copies_within_a_split_stay_and_are_counted(tmp_path):
    write_tar(tmp_path / "0.tar", {f"{number}.png": image_file(number % 3) for number in range(7)})
    index = index_tars([str(tmp_path)], validation_fraction=0).index
    assert (index.num_samples(TRAIN), index.duplicates) == (7, 4)


def test_keys_may_repeat_in_another_tar_but_not_in_the_same(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.png": image_file(0), "b.png": image_file(1)})
    with_copy = {"a.png": image_file(2), "c.png": image_file(3), "./a.png": image_file(4)}
    write_tar(tmp_path / "1.tar", with_copy)
    index = index_tars([str(tmp_path)], validation_fraction=0).index
    assert [list(read_sidecar(index, shard).keys) for shard in index.shards(TRAIN)] == [
        ["a", "b"],
        ["a", "c", "./a"],
    ]
    write_tar(tmp_path / "again/0.tar", {"a.png": image_file(0), "c.png": image_file(3), "a.jpg": b"x"})
    report = index_tars([str(tmp_path / "again")], validation_fraction=0, max_rejected=0.5)
    assert [(r.name, r.reason) for r in report.rejected] == [
        ("a", "has the name of another sample of this tar")
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"validation": ["2.tar"]}, r"'2\.tar' is none of the 2 tars"),
        ({"validation": ["{0..1}.tar"]}, "none for training"),
        ({"validation": ["0.tar"], "validation_fraction": 0.5}, "leave the fraction out"),
        ({"image_size": 16}, r"8x8, not 16x16.*No index was made"),
        ({"channels": 1}, "mode RGB, not L"),
    ],
)
def test_arguments_that_do_not_fit_the_tars_are_refused(options, says, tmp_path):
    by_shard_writer(tmp_path, shards=2, per_shard=3)
    for number in (0, 1):
        (tmp_path / f"part-000{number}.tar").rename(tmp_path / f"{number}.tar")
    with pytest.raises(ShardError, match=says):
        index_tars([str(tmp_path)], **options)
    assert not (tmp_path / "index.json").exists()


def test_places_that_cannot_have_an_index_are_refused(tmp_path):
    with pytest.raises(ShardError, match=r"no \.tar in it"):
        index_tars([str(tmp_path)])
    with pytest.raises(ShardError, match=r"2 of 3 tars are not there: '1\.tar', '2\.tar'"):
        write_tar(tmp_path / "0.tar", {"a.png": image_file(0)})
        index_tars([str(tmp_path / "{0..2}.tar")])
    with pytest.raises(ShardError, match="there is only one"):
        index_tars([str(tmp_path)])
    with pytest.raises(ShardError, match="a web server can only be read"):
        index_tars(["https://example.org/{0..2}.tar"])
    with pytest.raises(ShardError, match="no common folder"):
        index_tars(["s3://one/0.tar", "s3://other/0.tar"])
    with pytest.raises(ShardError, match="more than 200,000 tars"):
        index_tars([str(tmp_path / "{0..999}{0..999}.tar")])
    with pytest.raises(StoreError, match="pipe:"):
        index_tars(["pipe:touch marker #.tar"])


def test_braces_count_as_in_webdataset():
    assert expanded(["a-{08..11}.tar", "b"]) == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar", "b"]
    assert expanded(["{0..1}/{0..1}.tar"]) == ["0/0.tar", "0/1.tar", "1/0.tar", "1/1.tar"]


# --- what cannot be used ----------------------------------------------------------------------


def test_what_cannot_be_used_is_left_out_listed_and_counted_up_to_a_share(tmp_path):
    good = {f"good{number}.png": image_file(number) for number in range(8)}
    bad = {
        "small.png": image_file(20, size=4),
        "grey.png": image_file(21, mode="L"),
        "cut.png": image_file(22)[:100],
        "turned.jpg": image_file(
            23,
            file_format="JPEG",
            exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
        ),
        "words.txt": b"no image",
        "empty.png": b"",
        "tab\t.png": image_file(24),
    }
    order = [*list(good)[:4], *bad, *list(good)[4:]]
    write_tar(tmp_path / "0.tar", {name: (good | bad)[name] for name in order})
    with pytest.raises(ShardError, match=r"7 of 15 samples cannot be used.*--max-rejected 0\.01.*8x8 RGB"):
        index_tars([str(tmp_path)], validation_fraction=0)
    assert not (tmp_path / "index.json").exists()
    report = index_tars([str(tmp_path)], validation_fraction=0, max_rejected=0.5)
    assert_delivers(report.index, {name[:-4]: data for name, data in good.items()})
    reasons = {row["name"]: row["reason"] for row in json.loads((tmp_path / "rejected.json").read_text())}
    assert set(reasons) == {"small", "grey", "cut", "turned", "words", "empty", "tab\\t"}
    assert reasons["small"] == "is 4x4, not 8x8"
    assert reasons["words"] == "has no image"
    assert reasons["empty"] == "is no image, or of a format that is not read"
    assert report.index.rejected == 7


def test_images_of_several_sizes_are_refused_with_counts_and_advice(tmp_path):
    sizes = [8, 8, 8, 16, 16, 32]
    write_tar(tmp_path / "0.tar", {f"{n}.png": image_file(n, size) for n, size in enumerate(sizes)})
    says = r"3 x 8x8 RGB, 2 x 16x16 RGB, 1 x 32x32 RGB.*nvae shards build"
    with pytest.raises(ShardError, match=says):
        index_tars([str(tmp_path)], validation_fraction=0)


def test_another_gap_is_another_data_set(tmp_path):
    files = {f"{number}.png": image_file(number, size=8 if number else 4) for number in range(4)}
    for name in ("one", "other"):
        write_tar(tmp_path / name / "0.tar", files)
    one = index_tars([str(tmp_path / "one")], validation_fraction=0, max_rejected=1, image_size=8).index
    other = index_tars([str(tmp_path / "other")], validation_fraction=0, max_rejected=1, image_size=4).index
    assert one.shards(TRAIN)[0].sha256 == other.shards(TRAIN)[0].sha256
    assert one.content_hash != other.content_hash


# --- repeated and interrupted -----------------------------------------------------------------


def test_indexing_again_writes_nothing_and_other_arguments_are_refused(tmp_path):
    by_shard_writer(tmp_path, shards=3, per_shard=2)
    first = index_tars([str(tmp_path)])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = index_tars([str(tmp_path)])
    assert again.already_there
    assert again.index == first.index
    with pytest.raises(ShardError, match=r"other licence\. Delete its index\.json"):
        index_tars([str(tmp_path)], licence="CC0")
    write_tar(tmp_path / "part-0003.tar", {"x.png": image_file(99)})
    with pytest.raises(ShardError, match="other tars"):
        index_tars([str(tmp_path)], validation=[shard.name for shard in first.index.shards(VALIDATION)])
    (tmp_path / "part-0003.tar").unlink()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


KILLED = """
import os, signal, sys
from pipeline.data import indexing

def write_record(*arguments, written=[], original=indexing.write_record):
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(original(*arguments))
    return written[-1]

indexing.write_record = write_record
indexing.index_tars([sys.argv[1]], threads=1)
"""


def test_indexing_that_was_killed_goes_on_where_it_was(tmp_path):
    images = by_shard_writer(tmp_path, shards=5, per_shard=3)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(ShardError, match="no data set"):
        load_index(str(tmp_path))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.idx")}
    assert len(kept) == 2
    assert_delivers(index_tars([str(tmp_path)]).index, images)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(tmp_path.glob("*.building"))


def broken_and_good_tar(tmp_path: Path) -> tuple[bytes, bytes]:
    """A tar of eight images, before and after it was fetched again: of the same size."""
    images = {f"{number}.png": image_file(number) for number in range(100, 108)}
    broken = {
        name: b"x" * len(data) if number < 3 else data for number, (name, data) in enumerate(images.items())
    }
    files = [write_tar(tmp_path / name, files) for name, files in (("broken", broken), ("good", images))]
    broken_bytes, good_bytes = (file.read_bytes() for file in files)
    assert len(broken_bytes) == len(good_bytes)
    return broken_bytes, good_bytes


def test_a_mended_tar_of_the_same_size_is_read_again_and_no_other_is(tmp_path):
    broken, good = broken_and_good_tar(tmp_path)
    images = by_shard_writer(tmp_path / "tars", shards=2, per_shard=8)
    tar = tmp_path / "tars/mended.tar"
    tar.write_bytes(broken)
    with pytest.raises(ShardError, match=r"3 of 24 samples cannot be used.*3 x is no image"):
        index_tars([str(tar.parent)], validation=["part-0000.tar"])
    kept = {path: path.stat().st_mtime_ns for path in tar.parent.glob("part-*.idx")}
    tar.write_bytes(good)
    index = index_tars([str(tar.parent)], validation=["part-0000.tar"]).index
    assert index.rejected == 0
    assert_delivers(index, images | {f"{number}": image_file(number) for number in range(100, 108)})
    assert len(kept) == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_mended_tar_with_the_size_and_time_of_the_broken_one_is_read_again(tmp_path):
    broken, good = broken_and_good_tar(tmp_path)
    tar = write_tar(tmp_path / "tars/0.tar", {})
    for data in (broken, good):
        tar.write_bytes(data)
        os.utime(tar, ns=(0, 0))
        if data is broken:
            with pytest.raises(ShardError, match="3 of 8 samples"):
                index_tars([str(tar.parent)], validation_fraction=0)
    assert index_tars([str(tar.parent)], validation_fraction=0, max_rejected=1).index.num_samples(TRAIN) == 8


def test_an_interrupted_indexing_reads_a_tar_that_changed_since_again(tmp_path):
    """Its record is whole, and nothing in it was left out."""
    by_shard_writer(tmp_path, shards=5, per_shard=3)
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == -signal.SIGKILL
    recorded = sorted(tmp_path.glob("*.building"))[-1]
    tar = recorded.with_suffix(".tar")
    shutil.copyfile(tmp_path / "part-0001.tar", tar)
    assert verification.verify(index_tars([str(tmp_path)]).index.root) == []


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_tar_of_the_same_size_that_is_newer_than_the_index_is_not_taken_for_its_own(
    place, tmp_path, request
):
    _, good = broken_and_good_tar(tmp_path)
    root = f"{request.getfixturevalue('s3')}/{tmp_path.name}" if place == "bucket" else str(tmp_path / "tars")
    storage.write_bytes(f"{root}/0.tar", good)
    index_tars([root], validation_fraction=0)
    assert index_tars([root], validation_fraction=0).already_there
    written = storage.list_times(root)["index.json"]
    while storage.list_times(root)["0.tar"] <= written:  # A bucket counts in seconds.
        storage.write_bytes(f"{root}/0.tar", good)
    says = r"1 of its 1 tars are newer, for instance 0\.tar.*nvae shards verify.*delete its index\.json"
    with pytest.raises(ShardError, match=says):
        index_tars([root], validation_fraction=0)
    storage.delete(f"{root}/index.json")
    assert not index_tars([root], validation_fraction=0).already_there


def test_a_split_that_leaves_no_training_image_is_refused_with_the_reasons(tmp_path):
    images = {f"{number}.png": image_file(number) for number in range(3)}
    write_tar(tmp_path / "0.tar", images | {"words.txt": b"no image"})
    write_tar(tmp_path / "1.tar", images)
    says = "not one training image can be used: 3 x is in the validation split, too; 1 x has no image"
    with pytest.raises(ShardError, match=says):
        index_tars([str(tmp_path)], validation=["1.tar"], max_rejected=0.5)
    assert not list(tmp_path.glob("*.building")) and not (tmp_path / "index.json").exists()


def test_another_programs_idx_file_is_not_overwritten(tmp_path):
    by_shard_writer(tmp_path, shards=2, per_shard=2)
    (tmp_path / "part-0001.idx").write_text("v1.2 2\npng 512 100\n")
    with pytest.raises(ShardError, match=r"part-0001\.idx was written by another program"):
        index_tars([str(tmp_path)])
    assert (tmp_path / "part-0001.idx").read_text().startswith("v1.2")


def test_threads_change_nothing(tmp_path):
    for name in ("one", "many"):
        by_shard_writer(tmp_path / name, shards=6, per_shard=3)
    one = index_tars([str(tmp_path / "one")], threads=1).index
    many = index_tars([str(tmp_path / "many")], threads=5).index
    # ShardWriter notes the time in its headers, so only what does not depend on it is compared.
    assert np.array_equal(one.samples_per_shard(TRAIN), many.samples_per_shard(TRAIN))
    assert [shard.name for shard in one.shards(TRAIN)] == [shard.name for shard in many.shards(TRAIN)]
