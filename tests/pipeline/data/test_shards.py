"""Building data sets: what comes out, what is refused, what survives an interruption."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from numpy.testing import assert_array_equal
from PIL import Image

from nvae.config import NVAEConfig
from pipeline import local_files, storage
from pipeline.data import shards
from pipeline.data.images import decode
from pipeline.data.index import TRAIN, VALIDATION, Index, ShardError, load_index, read_sidecar
from pipeline.data.recipe import recipe_for
from pipeline.data.tars import read_samples
from pipeline.storage import StoreError

FACES = Path(os.environ.get("NVAE_FACES", Path(__file__).parents[4] / "shared/data/faces256"))


def write_images(folder: Path, count: int, size: int = 16, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def samples(index: Index, split: str) -> dict[str, bytes]:
    found = {}
    for shard in index.shards(split):
        data = storage.read_bytes(storage.join(index.root, shard.name))
        found |= {sample.key: sample.image for sample in read_samples(data, shard.name)}
    return found


def tree(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_every_image_lands_in_one_split_and_the_fraction_is_exact(tmp_path):
    write_images(tmp_path / "in", 40)
    index = shards.build(
        str(tmp_path / "in"), str(tmp_path / "out"), image_size=16, validation_fraction=0.2
    ).index
    train, validation = samples(index, TRAIN), samples(index, VALIDATION)
    assert (len(train), len(validation)) == (32, 8)
    assert sorted([*train, *validation]) == [f"{number:03d}" for number in range(40)]
    assert all(data == (tmp_path / "in" / f"{key}.png").read_bytes() for key, data in train.items())
    assert shards.verify(index.root) == []


def test_splits_follow_content_and_not_names(tmp_path):
    write_images(tmp_path / "one", 30)
    (tmp_path / "other").mkdir()
    for number, path in enumerate(sorted((tmp_path / "one").iterdir(), reverse=True)):
        (tmp_path / "other" / f"renamed{number}.png").write_bytes(path.read_bytes())
    built = [
        shards.build(str(tmp_path / name), str(tmp_path / f"{name}-out"), image_size=16)
        for name in ("one", "other")
    ]
    for split in (TRAIN, VALIDATION):
        one, other = (list(samples(report.index, split).values()) for report in built)
        assert one == other


def test_copies_of_an_image_stay_in_one_split_and_are_counted(tmp_path):
    write_images(tmp_path / "in", 10)
    for path in list((tmp_path / "in").iterdir()):
        (tmp_path / "in" / f"copy-{path.name}").write_bytes(path.read_bytes())
    index = shards.build(
        str(tmp_path / "in"), str(tmp_path / "out"), image_size=16, validation_fraction=0.25
    ).index
    assert index.duplicates == 10
    train, validation = set(samples(index, TRAIN).values()), set(samples(index, VALIDATION).values())
    assert train.isdisjoint(validation)
    assert index.num_samples(TRAIN) + index.num_samples(VALIDATION) == 20


def test_another_spelling_of_the_source_is_the_same_source(tmp_path, monkeypatch):
    write_images(tmp_path / "in", 6)
    monkeypatch.chdir(tmp_path)
    index = shards.build("in", "out", image_size=16).index
    assert index.source == str(tmp_path / "in")
    for spelt in ("./in", "in/", "../" + tmp_path.name + "/in", (tmp_path / "in").as_uri()):
        assert shards.build(spelt, "out", image_size=16).already_there
    drawn = shards.build("portraits:4", "drawn", image_size=16).index
    assert drawn.source == "portraits:4"


def test_the_same_images_give_the_same_bytes(tmp_path):
    write_images(tmp_path / "in", 20, size=20)
    for name in ("one", "other"):
        shards.build(str(tmp_path / "in"), str(tmp_path / name), image_size=16, shard_bytes=5000, threads=3)
    assert tree(tmp_path / "one") == tree(tmp_path / "other")
    assert len(tree(tmp_path / "one")) > 8


@pytest.mark.parametrize(
    ("form", "channels", "extension"),
    [
        ("original", 3, "png"),
        ("png", 1, "png"),
        ("webp", 3, "webp"),
        ("raw", 3, "ppm"),
        ("raw", 1, "pgm"),
    ],
)
def test_stock_webdataset_reads_our_shards_in_every_format(form, channels, extension, tmp_path):
    write_images(tmp_path / "in", 12)
    options = {"image_size": 16, "shard_bytes": 4000, "form": form, "channels": channels}
    index = shards.build(str(tmp_path / "in"), str(tmp_path / "out"), **options).index
    urls = [str(tmp_path / "out" / shard.name) for shard in index.shards(TRAIN)]
    read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert {sample["__key__"]: sample[extension] for sample in read} == samples(index, TRAIN)
    decoded = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8")
    for sample in decoded:
        with Image.open(tmp_path / "in" / f"{sample['__key__']}.png") as image:
            wanted = np.asarray(image if channels == 3 else image.convert("L").convert("RGB"))
        assert_array_equal(sample[extension], wanted)
    assert shards.verify(index.root) == []
    assert load_index(index.root).arguments["format"] == form


def test_webp_is_refused_for_grey_images(tmp_path):
    with pytest.raises(ShardError, match="WebP has no grey images"):
        shards.build("portraits:2", str(tmp_path / "out"), image_size=16, channels=1, form="webp")
    assert not (tmp_path / "out").exists()


def test_images_of_few_bits_are_for_models_of_few_bits(tmp_path):
    index = shards.build("portraits:4", str(tmp_path / "out"), image_size=16, bits=5).index
    assert load_index(index.root).arguments["bits"] == 5
    fits = NVAEConfig(image_size=16, pixel_bits=5)
    assert recipe_for(fits, index, ()).factor == 1
    for other in ({"pixel_bits": 6}, {"image_size": 8}):
        with pytest.raises(ShardError, match="of which 5 bits were kept"):
            recipe_for(dataclasses.replace(fits, **other), index, ())
    grey = shards.build("portraits:4", str(tmp_path / "grey"), image_size=16, bits=5, channels=1).index
    with pytest.raises(ShardError, match="of which 5 bits were kept"):
        recipe_for(NVAEConfig(image_size=16, image_channels=1, likelihood="bernoulli"), grey, ())


def test_a_sidecar_says_where_each_sample_is(tmp_path):
    write_images(tmp_path / "in", 12)
    index = shards.build(str(tmp_path / "in"), str(tmp_path / "out"), image_size=16, shard_bytes=4000).index
    for shard in index.shards(TRAIN):
        sidecar = read_sidecar(index, shard)
        data = (tmp_path / "out" / shard.name).read_bytes()
        for key, offset, size in zip(sidecar.keys, sidecar.offsets, sidecar.sizes, strict=True):
            (sample,) = read_samples(data[offset : offset + size], shard.name)
            assert sample.key == key


def test_what_is_rejected_is_reported_counted_and_does_not_stop_the_build(tmp_path):
    source = write_images(tmp_path / "in", 10)
    (source / "notes.txt").write_text("no image")
    (source / "cut.png").write_bytes((source / "000.png").read_bytes()[:400])
    Image.new("RGB", (16, 20)).save(source / "tall.png")
    Image.new("RGB", (8, 8)).save(source / "small.png")
    report = shards.build(str(source), str(tmp_path / "out"), image_size=16, max_rejected=0.3)
    reasons = {rejection.name: rejection.reason for rejection in report.rejected}
    assert set(reasons) == {"notes.txt", "cut.png", "tall.png", "small.png"}
    assert "not square" in reasons["tall.png"]
    assert report.index.rejected == 4
    assert report.index.num_samples(TRAIN) + report.index.num_samples(VALIDATION) == 10
    again = shards.build(str(source), str(tmp_path / "out"), image_size=16)
    assert again.already_there
    assert again.rejected == report.rejected


def test_the_same_name_in_two_folders_means_two_images(tmp_path):
    write_images(tmp_path / "in/a", 3, seed=1)
    write_images(tmp_path / "in/b", 3, seed=2)
    index = shards.build(
        str(tmp_path / "in"), str(tmp_path / "out"), image_size=16, validation_fraction=0
    ).index
    assert sorted(samples(index, TRAIN)) == ["a/000", "a/001", "a/002", "b/000", "b/001", "b/002"]


def test_colours_and_sizes_are_as_asked_for(tmp_path):
    write_images(tmp_path / "in", 4, size=24)
    options = {"image_size": 8, "channels": 1, "crop": "0,0,16,16", "licence": "CC0"}
    index = shards.build(str(tmp_path / "in"), str(tmp_path / "out"), **options).index
    assert (index.image_size, index.channels, index.licence) == (8, 1, "CC0")
    for data in samples(index, TRAIN).values():
        assert decode(data, 8, 1).shape == (8, 8, 1)
    assert load_index(str(tmp_path / "out")) == index


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image_size": None}, "--image-size"),
        ({"image_size": 0}, "not between"),
        ({"validation_fraction": 1.0}, "not in"),
        ({"channels": 4}, "neither 1 nor 3"),
        ({"crop": "left"}, "crop"),
        ({"image_size": 64, "max_rejected": 1}, "not one image can be used.*smaller than 64x64"),
    ],
)
def test_a_build_that_makes_no_sense_is_refused(options, says, tmp_path):
    write_images(tmp_path / "in", 3)
    with pytest.raises(ShardError, match=says):
        shards.build(str(tmp_path / "in"), str(tmp_path / "out"), **{"image_size": 16} | options)
    assert not (tmp_path / "out/index.json").exists()


def test_another_data_set_in_the_way_is_never_overwritten(tmp_path):
    source, target = str(write_images(tmp_path / "in", 6)), str(tmp_path / "out")
    shards.build(source, target, image_size=16)
    before = tree(tmp_path / "out")
    with pytest.raises(ShardError, match=r"image_size 16 instead of 8.*delete"):
        shards.build(source, target, image_size=8)
    with pytest.raises(ShardError, match="image_size"):
        shards.build(source, target, image_size=8, if_missing=True)
    write_images(tmp_path / "in", 7)
    with pytest.raises(ShardError, match="other images"):
        shards.build(source, target, image_size=16)
    assert shards.build(source, target, image_size=16, if_missing=True).already_there
    assert tree(tmp_path / "out") == before


KILLED = """
import os, signal, sys
from pipeline.data import shards

def progress(what, done, total):
    if what == "writing train" and done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

shards.build(sys.argv[1], sys.argv[2], image_size=16, shard_bytes=4000, max_rejected=0.1, progress=progress)
"""


def test_a_build_that_was_killed_is_no_data_set_and_goes_on_where_it_was(tmp_path):
    source, target = str(write_images(tmp_path / "in", 30)), tmp_path / "out"
    (tmp_path / "in/broken.png").write_bytes(b"\x89PNG")
    killed = subprocess.run([sys.executable, "-c", KILLED, source, str(target), "15"])
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(ShardError, match="no data set"):
        load_index(str(target))
    with pytest.raises(ShardError, match="unfinished build"):
        shards.build(source, str(target), image_size=16, shard_bytes=5000, max_rejected=0.1)
    kept = {path.name: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    assert kept
    report = shards.build(source, str(target), image_size=16, shard_bytes=4000, max_rejected=0.1)
    for name, written in kept.items():
        assert (target / name).stat().st_mtime_ns == written
    whole = shards.build(source, str(tmp_path / "whole"), image_size=16, shard_bytes=4000, max_rejected=0.1)
    assert report.rejected == whole.rejected
    assert load_index(str(target)).content_hash == whole.index.content_hash
    assert not (target / "building.json").exists()
    assert shards.verify(str(target)) == []


def test_a_shard_that_vanished_before_the_build_went_on_is_built_again(tmp_path):
    source, target = str(write_images(tmp_path / "in", 30)), tmp_path / "out"
    subprocess.run([sys.executable, "-c", KILLED, source, str(target), "15"])
    (target / "train-000000.tar").unlink()
    shards.build(source, str(target), image_size=16, shard_bytes=4000, max_rejected=0.1)
    assert shards.verify(str(target)) == []


def test_a_target_that_cannot_be_written_is_named(tmp_path, s3):
    source = str(write_images(tmp_path / "in", 3))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="is a file, not a folder"):
        shards.build(source, str(tmp_path / "file/out"), image_size=16)
    with pytest.raises(StoreError, match="/proc/nvae"):
        shards.build(source, "/proc/nvae", image_size=16)
    with pytest.raises(StoreError, match="the bucket does not exist"):
        shards.build(source, "s3://no-such-bucket-here/out", image_size=16)


def test_a_target_that_cannot_be_written_is_refused_before_the_source_is_read(tmp_path):
    source = str(write_images(tmp_path / "in", 3))
    (tmp_path / "file").write_bytes(b"")
    read = []

    def look(what: str, done: int, total: int) -> None:
        read.append(what)

    for target, says in [("/proc/nvae/deep", "cannot be written"), (str(tmp_path / "file"), "is a file")]:
        with pytest.raises(StoreError, match=says):
            shards.build(source, target, image_size=16, progress=look)
    assert read == []


def test_a_look_whether_a_target_can_be_written_leaves_nothing(tmp_path):
    local_files.check_writable(tmp_path / "not/there")
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_is_the_same_in_a_bucket(tmp_path, s3):
    source = str(write_images(tmp_path / "in", 10))
    here = shards.build(source, str(tmp_path / "out"), image_size=16, shard_bytes=4000).index
    there = shards.build(source, f"{s3}/{tmp_path.name}/out", image_size=16, shard_bytes=4000).index
    assert there.content_hash == here.content_hash
    assert shards.verify(there.root) == []
    assert shards.missing_shards(there) == []


# --- checking ---------------------------------------------------------------------------------


@pytest.fixture
def built(tmp_path: Path) -> Index:
    source = str(write_images(tmp_path / "in", 8))
    return shards.build(source, str(tmp_path / "out"), image_size=16, validation_fraction=0).index


def test_a_tar_that_was_cut_anywhere_is_found_with_shard_and_place(built):
    (shard,) = built.shards(TRAIN)
    path = Path(built.root) / shard.name
    whole, sidecar = path.read_bytes(), read_sidecar(built, shard)
    second = int(sidecar.offsets[1])
    cuts = {
        "member boundary": second,
        "header": second + 100,
        "data": second + 600,
        "padding": shard.bytes - 1,
    }
    for cut in [*cuts.values(), 0, 1]:
        path.write_bytes(whole[:cut])
        what = " ".join(problem.what for problem in shards.verify(built.root))
        assert f"{cut:,} bytes instead of {shard.bytes:,}" in what
        assert "SHA-256" in what
        if cut < shard.bytes - 1:
            assert f"at byte {second if cut >= second else 0:,} is cut short" in what
        assert [problem.what for problem in shards.missing_shards(built)] == [
            f"has {cut:,} bytes instead of {shard.bytes:,}"
        ]
    path.unlink()
    assert [problem.what for problem in shards.missing_shards(built)] == ["is missing"]
    assert [problem.what for problem in shards.verify(built.root)] == ["is missing"]


def test_every_changed_byte_of_shard_and_sidecar_is_found(built):
    (shard,) = built.shards(TRAIN)
    random = np.random.default_rng(0)
    for name in (shard.name, shard.sidecar_name):
        path = Path(built.root) / name
        whole = path.read_bytes()
        for place in random.integers(0, len(whole), 60):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert shards.verify(built.root, decode_images=False)
        path.write_bytes(whole)
    assert shards.verify(built.root) == []


@pytest.mark.parametrize(
    "edit",
    [
        lambda index: index.update(format="other"),
        lambda index: index.update(format_version=99),
        lambda index: index.update(image_size="16"),
        lambda index: index.update(splits={"test": []}),
        lambda index: index.update(splits=[]),
        lambda index: index.pop("content_hash"),
        lambda index: index["splits"]["train"][0].update(samples=9),
        lambda index: index["splits"]["train"][0].update(samples=-1),
        lambda index: index["splits"]["train"][0].update(samples=True),
        lambda index: index["splits"]["train"][0].update(sha256="x"),
        lambda index: index["splits"]["train"][0].update(name="../train-000000.tar"),
        lambda index: index["splits"]["train"][0].update(name="/etc/passwd.tar"),
        lambda index: index["splits"]["train"][0].update(name="pipe:touch marker .tar"),
        lambda index: index["splits"]["train"][0].update(name="s3://other/train.tar"),
        lambda index: index["splits"]["train"][0].update(name="train.tar.gz"),
        lambda index: index["splits"]["train"].append(index["splits"]["train"][0]),
    ],
)
def test_an_index_that_was_edited_is_refused(built, edit):
    path = Path(built.root) / "index.json"
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ShardError, match=r"index\.json"):
        load_index(built.root)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (b'"source": "', b'"source": "x'),
        (b'"rejected": 0', b'"rejected": 1'),
        (b"\n", b"\n "),
        (b'"\n}', b'" }'),
    ],
)
def test_not_even_a_remark_in_an_index_can_change_unnoticed(built, was, now):
    path = Path(built.root) / "index.json"
    assert was in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(was, now, 1))
    with pytest.raises(ShardError, match="its own SHA-256: it was edited or damaged"):
        load_index(built.root)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\x00", '"x"'])
def test_an_index_that_is_none_is_refused(built, text):
    (Path(built.root) / "index.json").write_text(text)
    with pytest.raises(ShardError, match=r"index\.json"):
        load_index(built.root)


# --- real faces -------------------------------------------------------------------------------


@pytest.mark.skipif(
    not FACES.is_dir(), reason="no real faces: set NVAE_FACES to a folder of 256x256 portraits"
)
def test_real_faces_keep_their_own_bytes(tmp_path):
    faces = sorted(FACES.glob("*.png"))[:12]
    (tmp_path / "in").mkdir()
    for face in faces:
        (tmp_path / "in" / face.name).symlink_to(face)
    report = shards.build(str(tmp_path / "in"), str(tmp_path / "out"), image_size=256)
    assert report.rejected == ()
    stored = {*samples(report.index, TRAIN).values(), *samples(report.index, VALIDATION).values()}
    for face in faces:
        with Image.open(io.BytesIO(face.read_bytes())) as image:
            if image.mode == "RGB":
                assert face.read_bytes() in stored
