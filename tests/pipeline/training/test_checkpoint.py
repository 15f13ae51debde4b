import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline import storage
from pipeline.artifacts import ArtifactError, NewerFormatError, sealed
from pipeline.training.checkpoint import CheckpointError, Wanted, newest, open_checkpoint
from pipeline.training.checkpoint_writer import NAMES, CheckpointWriter, SupersededError, claim_attempt
from tests.fault_proxy import FaultProxy
from tests.http_faults import Fail, Request

RECORD = {"config": {"train": {"seed": 1}}, "interventions": []}


def tensors(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    model = {"weight": torch.randn(6, 5, generator=generator), "u": torch.randn(5, generator=generator)}
    return {"model": model, "ema": {"weight": model["weight"] * 2}}


def write(run: str, *images: int, attempt: int = 1, keep: int = 3, bits: float = 1.0) -> CheckpointWriter:
    writer = CheckpointWriter(run, attempt, keep)
    for count in images:
        writer.save(tensors(count), RECORD, count, {"validation/bits_per_dim": bits})
    writer.wait()
    return writer


def kept(run: str) -> list[str]:
    return [n for n in storage.list_dir(storage.join(run, "checkpoints")) if not n.startswith("attempt")]


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        flat = found[name].contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(flat, tensor.contiguous().reshape(-1).view(torch.uint8)), name


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "runs" / "faces")


# -- what comes back --------------------------------------------------------------------


def test_every_kind_of_tensor_comes_back_bit_for_bit(run: str) -> None:
    weight = torch.randn(4, 3)
    odd = {
        "bf16": torch.randn(7).bfloat16(),
        "counter": torch.tensor(12345678901, dtype=torch.int64),
        "step": torch.tensor(3.0),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "transposed": weight.t(),
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "shared": weight,
        "shared_again": weight,
        "slice": weight[1:, ::2],
    }
    writer = CheckpointWriter(run, 1, 3)
    writer.save({"model": odd}, RECORD, 64, {})
    writer.wait()
    found = newest(run)
    assert found is not None
    assert_identical(found.load("model"), odd)


def test_the_record_and_the_metrics_come_back(run: str) -> None:
    writer = CheckpointWriter(run, 7, 3)
    writer.save(tensors(), RECORD, 640, {"validation/bits_per_dim": 2.5, "train/loss": float("nan")})
    writer.wait()
    found = newest(run)
    assert found is not None
    assert (found.images_seen, found.attempt, found.record) == (640, 7, RECORD)
    assert found.metrics == {"validation/bits_per_dim": 2.5, "train/loss": None}
    assert open_checkpoint(found.url) == found


def test_a_run_without_checkpoints_has_no_newest(run: str) -> None:
    assert newest(run) is None


def test_training_may_go_on_changing_the_tensors_while_they_are_written(run: str) -> None:
    may_write = threading.Event()
    state = tensors(1)
    writer = CheckpointWriter(run, 1, 3, before_commit=may_write.wait)
    writer.save(state, RECORD, 64, {})
    state["model"]["weight"].zero_()
    may_write.set()
    writer.wait()
    found = newest(run)
    assert found is not None
    assert_identical(found.load("model"), tensors(1)["model"])


def test_what_must_be_durable_before_a_checkpoint_is_so_before_its_manifest(run: str) -> None:
    seen: list[bool] = []
    manifest = storage.join(run, "checkpoints/000000000064-001/manifest.json")
    writer = CheckpointWriter(run, 1, 3, before_commit=lambda: seen.append(storage.exists(manifest)))
    writer.save(tensors(), RECORD, 64, {})
    writer.wait()
    assert seen == [False]
    assert storage.exists(manifest)


# -- damage -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = str(tmp_path_factory.mktemp("damage"))
    write(run, 64, 128)
    return run


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_or_cut_is_noticed_and_the_checkpoint_before_is_used(
    two_checkpoints: str, data: st.DataObject
) -> None:
    folder = Path(two_checkpoints) / "checkpoints" / "000000000128-001"
    file = folder / data.draw(st.sampled_from(["model.safetensors", "ema.safetensors", "manifest.json"]))
    whole = file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        damaged = bytearray(whole[:place])
    file.write_bytes(damaged)
    try:
        found = newest(two_checkpoints)
    finally:
        file.write_bytes(whole)
    assert found is not None
    assert found.images_seen == 64
    assert_identical(found.load("model"), tensors(64)["model"])


def test_a_checkpoint_under_the_name_of_another_is_noticed(run: str) -> None:
    write(run, 64, 128, 192)
    folder = Path(run) / "checkpoints"
    (folder / "000000000192-001").rename(folder / "away")
    shutil.copytree(folder / "000000000064-001", folder / "000000000192-001")
    found = newest(run)
    assert found is not None
    assert found.images_seen == 128


def test_a_missing_and_a_swapped_file_are_named_in_the_log(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(run, 64, 128, 192)
    folder = Path(run) / "checkpoints"
    (folder / "000000000192-001" / "ema.safetensors").unlink()
    swapped = (folder / "000000000064-001" / "model.safetensors").read_bytes()
    (folder / "000000000128-001" / "model.safetensors").write_bytes(swapped)
    with caplog.at_level(logging.WARNING):
        found = newest(run)
    assert found is not None
    assert found.images_seen == 64
    assert "000000000192-001/ema.safetensors: the file is gone" in caplog.text
    assert "000000000128-001/model.safetensors: SHA-256" in caplog.text


def test_the_newest_of_at_most_so_many_images_is_found(run: str) -> None:
    write(run, 64, 128, 192, keep=9)
    write(run, 160, 224, attempt=2, keep=9)
    (Path(run) / "checkpoints" / "000000000128-001" / "ema.safetensors").unlink()
    found = {images: newest(run, Wanted(at_most=images)) for images in (63, 64, 159, 160, 223, 224, 10**6)}
    places = {images: c and (c.images_seen, c.attempt) for images, c in found.items()}
    # A later attempt's is newer, though an earlier one had seen more images; damaged ones do not count.
    assert places == {
        63: None,
        64: (64, 1),
        159: (64, 1),
        160: (160, 2),
        223: (160, 2),
        224: (224, 2),
        10**6: (224, 2),
    }


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_by_itself(run: str) -> None:
    write(run, 64)
    (Path(run) / "checkpoints" / "000000000064-001" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is intact.*: 000000000064-001"):
        newest(run)


def test_a_checkpoint_of_a_later_release_is_not_passed_over(run: str) -> None:
    write(run, 64, 128)
    manifest = Path(run) / "checkpoints" / "000000000128-001" / "manifest.json"
    record = json.loads(manifest.read_text())
    manifest.write_bytes(sealed(record | {"format_version": 2}))
    with pytest.raises(NewerFormatError, match="release that wrote it"):
        newest(run)


@pytest.mark.parametrize("name", ["../escape.safetensors", "/etc/passwd", "a/b", "", "..", "s3://x/y", "x\0"])
def test_a_manifest_cannot_name_a_file_outside_its_folder(run: str, name: str) -> None:
    write(run, 64)
    folder = Path(run) / "checkpoints" / "000000000064-001"
    record = json.loads((folder / "manifest.json").read_text())
    record["files"][name] = record["files"].pop("model.safetensors")
    (folder / "manifest.json").write_bytes(sealed(record))
    with pytest.raises(ArtifactError, match="plain file names"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("field", ["images_seen", "attempt", "record", "metrics", "files", "format"])
@pytest.mark.parametrize("value", [None, "text", -1.5, []])
def test_a_manifest_with_a_field_of_the_wrong_type_is_refused(run: str, field: str, value: object) -> None:
    write(run, 64)
    folder = Path(run) / "checkpoints" / "000000000064-001"
    record = json.loads((folder / "manifest.json").read_text()) | {field: value}
    (folder / "manifest.json").write_bytes(sealed(record))
    with pytest.raises(ArtifactError, match=r"not written by us|the format is"):
        open_checkpoint(str(folder))


# -- death, failure ---------------------------------------------------------------------

KILLED_SAVES = """
import os, signal, sys
import torch
from pipeline import storage
from pipeline.training.checkpoint_writer import CheckpointWriter

torch.set_num_threads(1)
run, calls = sys.argv[1], int(sys.argv[2])
files = {name: {"weight": torch.ones(8)} for name in ("model", "ema", "optimizer")}


def fatal(real, moment):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0 and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if left == 0 and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call


# One process imports torch; each of its children dies at another moment of its last save.
for moment in ("before", "after"):
    for call in range(1, calls + 1):
        child = os.fork()
        if child == 0:
            writer = CheckpointWriter(f"{run}/{moment}-{call}", 1, keep=1)
            writer.save(files, {}, 64, {})
            writer.wait()
            left = call
            storage.write_bytes = fatal(storage.write_bytes, moment)
            storage.delete = fatal(storage.delete, moment)
            writer.save(files, {}, 128, {})
            writer.wait()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(moment, call, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "survived")
"""


@pytest.mark.parametrize("place", ["disk", pytest.param("bucket", marks=pytest.mark.campaign)])
def test_a_process_that_dies_at_any_moment_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, request: pytest.FixtureRequest, place: str
) -> None:
    folder = str(tmp_path)
    if place == "bucket":
        folder = storage.join(request.getfixturevalue("s3"), f"runs/killed-{os.getpid()}")
    # Three files, the manifest; then the deletion of the older one's manifest and folder.
    calls = 6
    done = subprocess.run(
        [sys.executable, "-c", KILLED_SAVES, folder, str(calls)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    deaths = [line.split() for line in done.stdout.splitlines()]
    assert [death[2] for death in deaths] == [str(int(signal.SIGKILL))] * 2 * calls
    for moment, call, _ in deaths:
        run = storage.join(folder, f"{moment}-{call}")
        found = newest(run)
        assert found is not None, (moment, call)
        # The fourth call writes the manifest.
        committed = int(call) > 4 or (int(call) == 4 and moment == "after")
        assert found.images_seen == (128 if committed else 64), (moment, call)
        # The next attempt clears away whatever the death left.
        write(run, 192, attempt=2, keep=1)
        assert kept(run) == ["000000000192-002"], (moment, call)


def test_a_save_that_fails_is_a_warning_and_the_older_checkpoint_stays(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    writer = write(run, 64)
    in_the_way = Path(run) / "checkpoints" / "000000000128-001"
    in_the_way.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        writer.save(tensors(), RECORD, 128, {})
        with pytest.raises(CheckpointError, match="the last checkpoint could not be written"):
            writer.wait()
    assert "000000000128-001 was not written" in caplog.text
    found = newest(run)
    assert found is not None
    assert found.images_seen == 64
    in_the_way.unlink()
    writer.save(tensors(), RECORD, 128, {})
    writer.wait()
    assert kept(run) == ["000000000064-001", "000000000128-001"]


def test_a_save_that_fails_leaves_nothing_behind(run: str) -> None:
    """On a full disk the next one needs the room."""
    writer = write(run, 64)
    in_the_way = Path(run) / "checkpoints" / "000000000128-001" / "ema.safetensors" / "a folder"
    in_the_way.mkdir(parents=True)
    writer.save(tensors(), RECORD, 128, {})
    writer.settle()
    assert kept(run) == ["000000000064-001"]


def test_a_save_waits_for_the_one_before_and_counts_the_wait(run: str) -> None:
    may_commit = threading.Event()
    writer = CheckpointWriter(run, 1, 3, before_commit=may_commit.wait)
    writer.save(tensors(), RECORD, 64, {})
    assert writer.delay_seconds < 0.1
    threading.Timer(0.2, may_commit.set).start()
    writer.save(tensors(), RECORD, 128, {})
    assert writer.delay_seconds > 0.1
    writer.wait()
    assert kept(run) == ["000000000064-001", "000000000128-001"]


def test_a_save_that_may_be_left_out_does_not_wait_for_the_one_before(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    may_commit = threading.Event()
    writer = CheckpointWriter(run, 1, 3, before_commit=may_commit.wait)
    writer.save(tensors(), RECORD, 64, {}, may_be_left_out=True)
    with caplog.at_level(logging.WARNING):
        writer.save(tensors(), RECORD, 128, {}, may_be_left_out=True)
    assert writer.left_out == 1
    assert "no checkpoint at 128 images: the one before is still being written" in caplog.text
    may_commit.set()
    writer.settle()
    writer.save(tensors(192), RECORD, 192, {}, may_be_left_out=True)
    writer.wait()
    assert kept(run) == ["000000000064-001", "000000000192-001"]


def test_what_saving_costs_is_measured_from_one_log_line_to_the_next(run: str) -> None:
    """A slow store, one that is full, and one that does as it is told."""
    may_commit = threading.Event()
    writer = CheckpointWriter(run, 1, 3, before_commit=may_commit.wait)
    writer.save(tensors(), RECORD, 64, {})
    writer.save(tensors(), RECORD, 80, {}, may_be_left_out=True)
    slow = writer.metrics(96)
    assert (slow["checkpoint/left_out"], slow["checkpoint/failed"]) == (1, 0)
    assert not {"checkpoint/write_seconds", "checkpoint/images_since"} & slow.keys()
    threading.Timer(0.2, may_commit.set).start()
    writer.save(tensors(), RECORD, 128, {})
    writer.settle()
    waited = writer.metrics(144)
    assert waited["checkpoint/delay_seconds"] > 0.1 < waited["checkpoint/write_seconds"]
    assert (waited["checkpoint/left_out"], waited["checkpoint/images_since"]) == (0, 16)
    in_the_way = Path(run) / "checkpoints" / "000000000192-001" / "ema.safetensors" / "a folder"
    in_the_way.mkdir(parents=True)
    writer.save(tensors(), RECORD, 192, {})
    writer.settle()
    full = writer.metrics(208)
    assert (full["checkpoint/failed"], full["checkpoint/images_since"]) == (1, 208 - 128)
    assert full.keys() == NAMES.keys()
    assert writer.metrics(224).keys() == NAMES.keys() - {"checkpoint/write_seconds"}


# -- retention --------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(run: str) -> None:
    writer = CheckpointWriter(run, 1, keep=2)
    for images, bits in [(1, 3.0), (2, 1.0), (3, float("nan")), (4, 2.0), (5, 4.0)]:
        writer.save(tensors(), RECORD, images, {"validation/bits_per_dim": bits})
    writer.wait()
    assert kept(run) == ["000000000002-001", "000000000004-001", "000000000005-001"]
    assert writer.best_value == 1.0
    assert CheckpointWriter(run, 2, keep=2).best_value == 1.0


@settings(max_examples=25, deadline=None)
@given(
    keep=st.integers(1, 3), bits=st.lists(st.sampled_from([1.0, 2.0, float("nan")]), min_size=1, max_size=5)
)
def test_whatever_is_saved_the_newest_loads_and_no_more_is_kept_than_asked(
    tmp_path_factory: pytest.TempPathFactory, keep: int, bits: list[float]
) -> None:
    run = str(tmp_path_factory.mktemp("kept"))
    writer = CheckpointWriter(run, 1, keep)
    for images, value in enumerate(bits, start=1):
        writer.save(tensors(images), RECORD, images, {"validation/bits_per_dim": value})
    writer.wait()
    found = newest(run)
    assert found is not None
    assert found.images_seen == len(bits)
    best_ones = sum(value == writer.best_value for value in bits)
    assert min(keep, len(bits)) <= len(kept(run)) <= keep + best_ones


def test_checkpoints_of_unknown_health_push_out_no_sound_one(run: str) -> None:
    """However often a run is stopped amid trouble, it can roll back; it goes on from the newest."""
    write(run, 64, 128, keep=1)
    for attempt in (2, 3):
        writer = CheckpointWriter(run, attempt, keep=1)
        writer.save(tensors(), RECORD, 128 + attempt, {}, sound=False)
        writer.wait()
        assert kept(run) == ["000000000128-001", f"{128 + attempt:012d}-{attempt:03d}"]
    found = newest(run)
    assert found is not None
    assert not found.sound
    write(run, 192, attempt=3, keep=1)
    assert kept(run) == ["000000000192-003"]


def test_a_second_save_of_the_same_state_does_nothing(run: str) -> None:
    writer = write(run, 64)
    manifest = Path(run) / "checkpoints" / "000000000064-001" / "manifest.json"
    before = manifest.stat()
    writer.save(tensors(9), RECORD, 64, {})
    writer.wait()
    assert manifest.stat() == before


def test_a_checkpoint_can_be_read_while_newer_ones_replace_it(run: str) -> None:
    # The first is the best and stays, so that a reader could fall back to it; it must not.
    writer = write(run, 1, keep=1)
    ended = threading.Event()

    def go_on_training() -> None:
        for images in range(2, 202):
            writer.save(tensors(images), RECORD, images, {})
        writer.wait()
        ended.set()

    training = threading.Thread(target=go_on_training)
    training.start()
    seen = []
    while not ended.is_set():
        found = newest(run)
        assert found is not None
        seen.append(found.images_seen)
        for file, expected in tensors(found.images_seen).items():
            assert_identical(found.load(file), expected)
    training.join()
    assert seen == sorted(seen)
    assert len(set(seen)) > 3


# -- attempts ---------------------------------------------------------------------------


def test_every_launch_claims_an_attempt_of_its_own(run: str) -> None:
    assert [claim_attempt(run) for _ in range(3)] == [1, 2, 3]
    write(run, 64, attempt=12)
    assert claim_attempt(run) == 13


def test_launches_at_the_same_moment_claim_different_attempts(run: str) -> None:
    claimed: list[int] = []
    threads = [threading.Thread(target=lambda: claimed.append(claim_attempt(run))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(claimed)) == 8


def test_a_superseded_attempt_can_neither_commit_nor_delete(run: str) -> None:
    first = claim_attempt(run)
    stale = CheckpointWriter(run, first, keep=1)
    stale.save(tensors(), RECORD, 64, {})
    stale.wait()
    second = claim_attempt(run)
    write(run, 96, attempt=second, keep=3)
    stale.save(tensors(), RECORD, 9_000, {})
    with pytest.raises(SupersededError, match="attempt 2 has taken over"):
        stale.wait()
    with pytest.raises(SupersededError):
        stale.save(tensors(), RECORD, 9_100, {})
    found = newest(run)
    assert found is not None
    assert (found.images_seen, found.attempt) == (96, 2)
    assert {"000000000064-001", "000000000096-002"} <= set(kept(run))


def test_a_later_attempt_counts_as_newer_even_if_it_has_seen_fewer_images(run: str) -> None:
    write(run, 64, 128, attempt=1)
    write(run, 96, attempt=2)
    found = newest(run)
    assert found is not None
    assert (found.images_seen, found.attempt) == (96, 2)


def test_a_later_attempt_clears_away_unfinished_directories_but_no_damaged_ones(run: str) -> None:
    write(run, 64, 128)
    folder = Path(run) / "checkpoints"
    (folder / "000000000128-001" / "manifest.json").unlink()
    (folder / "000000000064-001" / "manifest.json").write_text("{")
    (folder / "notes").mkdir()
    write(run, 192, attempt=2)
    assert kept(run) == ["000000000064-001", "000000000192-002", "notes"]


# -- a real S3 --------------------------------------------------------------------------


def test_checkpoints_come_back_from_a_real_object_store(s3: str) -> None:
    run = storage.join(s3, f"runs/checkpoint-{os.getpid()}")
    assert newest(run) is None
    attempt = claim_attempt(run)
    writer = CheckpointWriter(run, attempt, keep=2)
    for images in (64, 128, 192):
        writer.save(tensors(images), RECORD, images, {"validation/bits_per_dim": 1.0 / images})
    writer.wait()
    assert kept(run) == ["000000000128-001", "000000000192-001"]
    found = newest(run)
    assert found is not None
    assert found.images_seen == 192
    assert_identical(found.load("model"), tensors(192)["model"])
    storage.write_bytes(storage.join(found.url, "model.safetensors"), b"not what was written")
    found = newest(run)
    assert found is not None
    assert found.images_seen == 128


def asks_for_uploads(request: Request) -> bool:
    return request.method == "GET" and "uploads" in request.query.split("&")


@pytest.mark.parametrize("allowed", [True, False])
def test_what_killed_launches_had_begun_to_upload_is_given_up_by_the_next(
    s3: str, fault_proxy: FaultProxy, caplog: pytest.LogCaptureFixture, allowed: bool
) -> None:
    run = storage.join(s3, f"runs/parts-{os.getpid()}-{allowed}")
    attempt = [claim_attempt(run), claim_attempt(run)][-1]
    client, bucket = boto3.client("s3"), s3.removeprefix("s3://")
    prefix = f"runs/parts-{os.getpid()}-{allowed}/checkpoints/"
    earlier, others = ["000000000064-001", "000000000128-001"], ["000000000064-002", "000000000064-003", "x"]
    for directory in (*earlier, *others):
        client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}{directory}/model.safetensors")
    if not allowed:
        fault_proxy.add(Fail(403, "AccessDenied"), asks_for_uploads)
    writer = CheckpointWriter(run, attempt, keep=2)
    writer.save(tensors(), RECORD, 192, {})
    writer.wait()
    fault_proxy.clear()
    assert "000000000192-002" in kept(run)
    left = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)["Uploads"]
    names = [each["Key"].removeprefix(prefix).partition("/")[0] for each in left]
    assert sorted(names) == sorted(others if allowed else earlier + others)
    assert ("could not be given up" in caplog.text) == (not allowed)
    assert storage.drop_uploads(run, lambda path: path.startswith("checkpoints/")) == len(left)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
