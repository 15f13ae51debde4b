"""Sources of images: what each offers, and keys that no tar reader misunderstands."""

import gzip
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import lists, text
from numpy.testing import assert_array_equal
from webdataset.tariterators import base_plus_ext

from pipeline.data.images import RejectedImageError
from pipeline.data.index import TRAIN, VALIDATION, ShardError
from pipeline.data.portraits import portrait
from pipeline.data.sources import open_source, unique_keys


def contents(spec: str) -> dict[str, bytes]:
    with open_source(spec, 32) as source:
        return {image.name: image.read() for image in source.images}


def write_idx(path, images: np.ndarray) -> None:
    data = struct.pack(">4I", 0x803, *images.shape) + images.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_folder_zip_and_tar_offer_the_same_files(tmp_path):
    files = {"b/x.png": b"1", "a/x.png": b"2", "a/deep/er/y.jpg": b"3", "z.txt": b"4"}
    with (
        zipfile.ZipFile(tmp_path / "all.zip", "w") as archive,
        tarfile.open(tmp_path / "all.tar", "w") as tar,
    ):
        for name, data in files.items():
            path = tmp_path / "folder" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            archive.write(path, name)
            tar.add(path, name)
    for spec in ("folder", "all.zip", "all.tar"):
        found = contents(str(tmp_path / spec))
        assert found == files
        assert list(found) == sorted(files)


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.png").write_bytes(b"1")
    (tmp_path / "folder/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "folder")
    assert contents(str(tmp_path / "folder")) == {"link/x.png": b"1"}


def test_links_devices_and_huge_members_of_a_tar_are_never_read(tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        for name, kind in [("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE)]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("../../escape.png"))
    assert list(contents(str(tmp_path / "evil.tar"))) == ["../../escape.png"]
    assert unique_keys(["../../escape.png"])[0].startswith("escape-")


def test_a_zip_bomb_is_rejected_unopened(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("bomb.png", "w") as member,
    ):
        for _ in range(257):
            member.write(bytes(2**20))
    with (
        open_source(str(tmp_path / "bomb.zip"), None) as source,
        pytest.raises(RejectedImageError, match="MiB"),
    ):
        source.images[0].read()


def test_a_tar_that_was_cut_between_members_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"x" * 512)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for number in range(3):
            tar.add(tmp_path / "x", f"{number}.png")
    data = (tmp_path / "all.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:2048])
    with pytest.raises(ShardError, match="cut short"), open_source(str(tmp_path / "cut.tar"), None):
        pass


def test_mnist_brings_its_own_splits_and_size(tmp_path):
    train = np.arange(3 * 784, dtype=np.uint32).astype(np.uint8).reshape(3, 28, 28)
    test = train[:2] ^ 255
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", train)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", test)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"not looked at")
    with open_source(str(tmp_path), None) as source:
        assert (source.image_size, source.channels) == (28, 1)
        assert [image.split for image in source.images] == [VALIDATION] * 2 + [TRAIN] * 3
        assert_array_equal(source.images[3].read(), train[1])


def test_a_damaged_idx_file_is_refused(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(path, np.zeros((2, 28, 28), np.uint8))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match="whole idx file"), open_source(str(path), None):
        pass


def test_portraits_are_drawn_at_the_wanted_size_and_known_by_their_seed():
    with open_source("portraits:3@7", 32) as source:
        assert_array_equal(source.images[2].read(), portrait((7 << 32) + 2, 32))
        identities = {image.identity for image in source.images}
    with open_source("portraits:3@8", 32) as source:
        assert identities.isdisjoint(image.identity for image in source.images)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nowhere", "no such file"),
        ("empty", "nothing in it"),
        ("portraits:0", "nothing in it"),
        ("portraits:many", "portraits:COUNT"),
        ("s3://bucket/images", "copy them here"),
        ("images.tar.gz", "unpacked"),
        ("broken.zip", "not a whole zip"),
    ],
)
def test_a_source_that_is_none_is_refused_with_a_remedy(spec, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "images.tar.gz").write_bytes(b"")
    (tmp_path / "broken.zip").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(ShardError, match=says), open_source(spec, None):
        pass


@given(lists(text(min_size=1), max_size=20))
def test_keys_are_unique_short_and_read_back_by_webdataset(names):
    keys = unique_keys(names)
    assert len(set(keys)) == len(names)
    for key in keys:
        assert base_plus_ext(f"{key}.png") == (key, "png")
        assert len(f"{key}.png".encode()) <= 100
        assert not key.startswith(("/", "_"))
        assert ".." not in key


def test_plain_names_stay_as_they_are():
    assert unique_keys(["a/0001.png", "b/0001.png", "0001.jpg"]) == ["a/0001", "b/0001", "0001"]
    one, other = unique_keys(["x.png", "x.jpg"])
    assert one == "x"
    assert other.startswith("x-")
