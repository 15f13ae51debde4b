import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers

from pipeline import storage
from pipeline.artifacts import (
    MANIFEST_BYTES,
    ArtifactError,
    NewerFormatError,
    damaged_files,
    read_manifest,
    read_verified,
    sealed,
    tensors_from_bytes,
    tensors_to_bytes,
    write_directory,
)
from tests.http_faults import Fail

FILES = {"a.bin": b"first", "b.bin": b"second"}
TENSORS = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3), "none": torch.empty(0, 2)}


def written(folder: Path) -> str:
    return write_directory(str(folder), FILES.items(), format="test", version=2, fields={"x": 1}).url


def test_what_was_written_is_read_back(tmp_path):
    manifest = read_manifest(written(tmp_path), format="test", version=2)
    assert manifest.fields == {"format": "test", "format_version": 2, "x": 1}
    assert {name: read_verified(manifest, name) for name in manifest.files} == FILES
    assert damaged_files(manifest) == []


def test_a_writer_that_dies_half_way_leaves_nothing_that_counts(tmp_path):
    def dying() -> Iterator[tuple[str, bytes]]:
        yield "a.bin", b"first"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_directory(str(tmp_path), dying(), format="test", version=1, fields={})
    assert storage.list_dir(str(tmp_path)) == ["a.bin"]
    with pytest.raises(ArtifactError, match=r"there is no manifest\.json"):
        read_manifest(str(tmp_path), format="test", version=1)


@pytest.mark.parametrize("deleted", ["manifest.json", "a.bin"])
def test_a_file_that_is_deleted_after_it_was_asked_for_is_gone(deleted, s3, fault_proxy):
    url = write_directory(f"{s3}/artifacts/{deleted}", FILES.items(), format="test", version=1, fields={}).url
    fault_proxy.add(Fail(404, "NoSuchKey"), lambda each: each.method == "GET" and each.path.endswith(deleted))
    with pytest.raises(ArtifactError, match=r"there is no manifest|the file is gone"):
        read_verified(read_manifest(url, format="test", version=1), "a.bin")


@pytest.mark.parametrize("name", ["../a", "a/b", "/a", "", ".a", "manifest.json", "s3://b/a"])
def test_a_file_cannot_be_written_beside_the_directory_or_over_its_manifest(name, tmp_path):
    with pytest.raises(ValueError, match="cannot be the name"):
        write_directory(str(tmp_path), [(name, b"")], format="test", version=1, fields={})


def test_a_directory_of_a_later_release_is_not_called_damaged(tmp_path):
    with pytest.raises(NewerFormatError, match="reads up to 1"):
        read_manifest(written(tmp_path), format="test", version=1)


def test_another_format_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="the format is 'test', not other"):
        read_manifest(written(tmp_path), format="other", version=1)


def test_files_that_are_gone_or_cut_short_are_found_without_reading_them(tmp_path):
    manifest = read_manifest(written(tmp_path), format="test", version=2)
    (tmp_path / "a.bin").unlink()
    (tmp_path / "b.bin").write_bytes(b"sec")
    assert damaged_files(manifest) == ["a.bin", "b.bin"]


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"bytes": -1, "sha256": "0" * 64},
        {"bytes": True, "sha256": "0" * 64},
        {"bytes": 5, "sha256": "0" * 63},
        {"bytes": 5, "sha256": "G" * 64},
        {"sha256": "0" * 64},
    ],
)
def test_a_malformed_entry_is_refused(entry, tmp_path):
    written(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_text())
    record["files"]["a.bin"] = entry
    (tmp_path / "manifest.json").write_bytes(sealed(record))
    with pytest.raises(ArtifactError, match=r"'a\.bin'"):
        read_manifest(str(tmp_path), format="test", version=2)


def test_tensors_survive_the_way_through_a_file_and_the_same_tensors_are_the_same_bytes():
    data = tensors_to_bytes(TENSORS)
    assert data == tensors_to_bytes(dict(reversed(TENSORS.items())))
    found = tensors_from_bytes(data, "here")
    assert found.keys() == TENSORS.keys()
    for name, tensor in found.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


@given(length=integers(0, 400))
def test_a_tensor_file_that_is_cut_anywhere_is_refused(length):
    data = tensors_to_bytes(TENSORS)
    if length < len(data):
        with pytest.raises(ArtifactError, match="here"):
            tensors_from_bytes(data[:length], "here")


def test_a_header_of_more_tensors_than_any_model_has_is_refused_unread():
    entries = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(150_000)}
    header = json.dumps(entries).encode()
    with pytest.raises(ArtifactError, match=f"header would be {len(header)} bytes long"):
        tensors_from_bytes(struct.pack("<Q", len(header)) + header, "here")


@given(position=integers(0, 10_000), value=integers(0, 255))
def test_a_damaged_header_is_an_error_of_ours_or_harmless(position, value):
    data = bytearray(tensors_to_bytes(TENSORS))
    data[position % len(data)] = value
    try:
        tensors_from_bytes(bytes(data), "here")
    except ArtifactError as error:
        assert "here" in str(error)


def test_a_manifest_that_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="larger than 4 MiB"):
        write_directory(str(tmp_path), [], format="test", version=1, fields={"text": "x" * MANIFEST_BYTES})
    assert list(tmp_path.iterdir()) == []
