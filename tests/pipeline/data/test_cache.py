"""The local cache: within its budget, never wrong, never in the way; with real processes and full disks."""

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.data.cache import PieceCache
from pipeline.data.index import TRAIN, Index, load_index
from pipeline.data.loader import training_batches
from tests.pipeline.data.data_set import TRAINING, build, config
from tests.pipeline.data.web_server import Change, serving

BLOCK = 4096
BUDGET = 64 * BLOCK
PIECE = bytes(range(200))
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")

# What a process of a run does: keep and ask for pieces whose content follows from their name.
WORKER = """
import hashlib, itertools, random, sys
from pathlib import Path
from pipeline.data.cache import PieceCache
folder, budget, seed, rounds = sys.argv[1], *map(int, sys.argv[2:])
cache, choose = PieceCache(Path(folder), budget), random.Random(seed)
print("begun", flush=True)
for _ in range(rounds) if rounds else itertools.count():
    name = str(choose.randrange(60))
    whole = hashlib.sha256(name.encode()).digest() * (int(name) * 16)
    found = cache.get(name, len(whole))
    assert found in (None, whole), f"{name} is wrong"
    if found is None:
        cache.put(name, whole)
    if choose.random() < 0.02:
        cache.drop(name)
"""


def content(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest() * (int(name) * 16)


def start(folder: Path, seed: int, rounds: int, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, str(folder), str(BUDGET), str(seed), str(rounds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def occupied(folder: Path) -> int:
    """Bytes of all files, in blocks."""
    total = 0
    for path in (folder / "nvae-pieces").iterdir():
        try:
            total += -(-path.stat().st_size // BLOCK) * BLOCK
        except FileNotFoundError:
            continue
    return total


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "nvae-pieces").iterdir()} - {"ledger"}


def assert_sound(folder: Path) -> None:
    """A writer that comes by leaves nothing half-written, and a budget that is kept."""
    cache = PieceCache(folder, BUDGET)
    cache.put("1000", content("1000")[:100])
    assert not [name for name in names(folder) if name.endswith(".partial")]
    assert occupied(folder) <= BUDGET
    for name in names(folder) - {"1000"}:
        assert cache.get(name, len(content(name))) == content(name)


def test_several_processes_share_a_folder_within_the_budget(tmp_path):
    processes = [start(tmp_path, seed, rounds=400) for seed in range(3)]
    while any(process.poll() is None for process in processes):
        assert occupied(tmp_path) <= BUDGET
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert_sound(tmp_path)


def test_processes_killed_while_they_write_leave_a_sound_cache(tmp_path):
    choose = random.Random(1)
    for seed in range(8):
        process = start(tmp_path, seed, rounds=0)
        time.sleep(choose.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert occupied(tmp_path) <= BUDGET
        assert_sound(tmp_path)


def test_a_piece_half_written_by_a_killed_process_is_swept_and_counted_anew(tmp_path):
    cache = PieceCache(tmp_path, BUDGET)
    cache.put("1", content("1"))
    folder = tmp_path / "nvae-pieces"
    (folder / "2.partial").write_bytes(bytes(10 * BLOCK))
    # What the ledger is while somebody writes.
    (folder / "ledger").write_bytes(bytes(16))
    cache.put("3", content("3"))
    assert names(tmp_path) == {"1", "3"}


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    cache = PieceCache(tmp_path, 11 * BLOCK)
    for number in range(10):
        cache.put(str(number), bytes(BLOCK))
        os.utime(tmp_path / "nvae-pieces" / str(number), (number, number))
    assert len(names(tmp_path)) == 10
    assert cache.get("0", BLOCK) == bytes(BLOCK)
    cache.put("10", bytes(BLOCK))
    assert {"0", "10"} <= names(tmp_path)
    assert "1" not in names(tmp_path)


def test_what_exceeds_the_budget_by_itself_is_not_kept_and_nothing_makes_room_for_it(tmp_path):
    cache = PieceCache(tmp_path, 4 * BLOCK)
    cache.put("small", bytes(10))
    cache.put("large", bytes(4 * BLOCK))
    assert names(tmp_path) == {"small"}


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A cache folder with a piece "1" in it."""
    PieceCache(tmp_path, BUDGET).put("1", PIECE)
    return tmp_path / "nvae-pieces"


def opened_by_others(folder: Path) -> None:
    folder.chmod(0o777)


def readable_by_a_group(folder: Path) -> None:
    folder.chmod(0o750)


def of_another_owner(folder: Path) -> None:
    os.chown(folder, 12345, -1)


def linked_from_elsewhere(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


@as_root
@pytest.mark.parametrize(
    "spoil", [opened_by_others, readable_by_a_group, of_another_owner, linked_from_elsewhere]
)
def test_a_folder_that_is_not_its_owners_alone_is_neither_read_nor_written_nor_cleared(
    spoil, planted, caplog
):
    assert planted.stat().st_mode & 0o777 == 0o700
    spoil(planted)
    before = {path.name: path.read_bytes() for path in planted.iterdir()}
    cache = PieceCache(planted.parent, BUDGET)
    assert cache.get("1", len(PIECE)) is None
    cache.put("2", PIECE)
    cache.drop("1")
    assert {path.name: path.read_bytes() for path in planted.iterdir()} == before
    assert "cannot be used" in caplog.text


def a_pipe(entry: Path) -> None:
    os.mkfifo(entry)


def a_link(entry: Path) -> None:
    (entry.parent.parent / "target").write_bytes(PIECE)
    entry.symlink_to(entry.parent.parent / "target")


def a_sparse_file_of_a_tebibyte(entry: Path) -> None:
    entry.touch()
    os.truncate(entry, 2**40)


def a_file_of_another_owner(entry: Path) -> None:
    entry.write_bytes(PIECE)
    os.chown(entry, 12345, -1)


def a_socket(entry: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(entry))


@as_root
@pytest.mark.parametrize(
    "plant", [a_pipe, a_link, a_sparse_file_of_a_tebibyte, a_file_of_another_owner, a_socket]
)
def test_what_is_no_file_of_ours_of_the_right_size_is_not_read_but_replaced(plant, planted, caplog):
    (planted / "1").unlink()
    plant(planted / "1")
    cache = PieceCache(planted.parent, BUDGET)
    assert cache.get("1", len(PIECE)) is None
    cache.put("1", PIECE)
    assert cache.get("1", len(PIECE)) == PIECE
    assert (planted / "1").lstat().st_size == len(PIECE)
    assert caplog.text == ""


def test_a_folder_is_complained_about_once_in_a_process_however_many_readers_come(planted, caplog):
    planted.chmod(0o777)
    for _ in range(3):
        PieceCache(planted.parent, BUDGET).put("2", PIECE)
    assert ["cannot be used" in record.message for record in caplog.records] == [True]


def test_a_cache_too_small_for_a_piece_is_refused_as_a_setting():
    with pytest.raises(ValidationError, match="cache_gib"):
        config(cache_gib=0.001)


# --- disks that are full or locked ------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_on_a_full_disk_everything_kept_is_whole_and_the_run_goes_on(small_disk, caplog):
    cache = PieceCache(small_disk, 2**30)
    for number in range(40):
        cache.put(str(number), content(str(number)))
    assert 5 < len(names(small_disk)) < 40
    assert all(cache.get(name, len(content(name))) == content(name) for name in names(small_disk))
    assert ["No space left" in record.message for record in caplog.records] == [True]


def test_a_disk_that_became_read_only_is_still_read(small_disk, caplog):
    cache = PieceCache(small_disk, 2**30)
    cache.put("1", content("1"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    cache.put("2", content("2"))
    cache.put("3", content("3"))
    cache.drop("1")
    assert (cache.get("1", len(content("1"))), cache.get("2", len(content("2")))) == (content("1"), None)
    assert ["Read-only" in record.message for record in caplog.records] == [True]
    PieceCache(small_disk, 2**30).put("2", content("2"))


def test_a_quota_that_is_reached_leaves_no_half_piece(tmp_path):
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)){WORKER}"
    command = [sys.executable, "-c", limited, str(tmp_path), str(BUDGET), "1", "200"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    assert ended.stderr.count("can only be read (File too large)") == 1
    assert all((tmp_path / "nvae-pieces" / name).read_bytes() == content(name) for name in names(tmp_path))


def test_a_place_that_cannot_hold_a_folder_is_named_once(tmp_path, caplog):
    (tmp_path / "file").touch()
    cache = PieceCache(tmp_path / "file", BUDGET)
    cache.put("1", content("1"))
    assert cache.get("1", len(content("1"))) is None
    assert [str(tmp_path / "file") in record.message for record in caplog.records] == [True]


# --- below a reader ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("data")
    return build(folder, str(folder / "out"))


def read(
    root: str, cache: Path | None, world: int = 1, epochs: int = 1, **data
) -> dict[int, tuple[str, bytes]]:
    settings = config(cache_folder=None if cache is None else str(cache), **data)
    index = load_index(root)
    found = {}
    for rank in range(world):
        arguments = {"rank": rank, "world_size": world, "start": 0, "stop": epochs * TRAINING}
        for batch in training_batches(settings, index, **arguments):
            rows = zip(batch.positions.tolist(), batch.keys, batch.images, batch.weights, strict=True)
            found |= {place: (key, image.numpy().tobytes()) for place, key, image, weight in rows if weight}
    return found


def test_the_store_is_asked_once_whatever_epoch_and_worker(index, tmp_path):
    expected = read(index.root, None, epochs=2)
    with serving(index.root) as served:
        assert read(served.url, tmp_path, epochs=2) == expected
        # Besides the pieces, only the first image of each lane.
        pieces = [request for request in served.of_tars() if request in set(whole(index))]
        assert sorted(pieces) == sorted(whole(index))
        served.asked.clear()
        assert read(served.url, tmp_path, world=3, epochs=2) == expected
        assert not set(served.of_tars()) & set(whole(index))
    assert names(tmp_path) == {
        f"{shard.sha256}-{start}-{end}"
        for shard in index.shards(TRAIN)
        for name, start, end in whole(index)
        if name == shard.name
    }


def whole(index: Index) -> list[tuple[str, int, int]]:
    """Each training shard of the tiny data set is one piece: all but the tar's end."""
    return [(shard.name, 0, shard.bytes - 1024) for shard in index.shards(TRAIN)]


def test_damaged_entries_are_dropped_and_fetched_again(index, tmp_path):
    expected = read(index.root, None)
    with serving(index.root) as served:
        read(served.url, tmp_path)
        entries = sorted((tmp_path / "nvae-pieces").glob("*-*"))
        intact = [entry.read_bytes() for entry in entries]
        entries[0].write_bytes(b"")
        entries[1].write_bytes(intact[1][:-1])
        entries[2].write_bytes(bytes([intact[2][0] ^ 1]) + intact[2][1:])
        assert read(served.url, tmp_path) == expected
        assert [entry.read_bytes() for entry in entries] == intact


def test_what_is_damaged_in_the_store_is_not_kept(index, tmp_path):
    def spoil(name: str, begin: int, data: bytearray) -> None:
        if name == index.shards(TRAIN)[0].name:
            data[600 if begin == 0 else 0] ^= 1

    change: Change = spoil
    with serving(index.root, change) as served:
        read(served.url, tmp_path, on_corrupt="skip", max_corrupt_fraction=1.0)
    assert not [name for name in names(tmp_path) if name.startswith(index.shards(TRAIN)[0].sha256)]
    assert len(names(tmp_path)) == len(index.shards(TRAIN)) - 1


def test_data_sets_with_equal_names_do_not_meet(index, tmp_path):
    (tmp_path / "other").mkdir()
    other = build(tmp_path / "other", str(tmp_path / "other/out"), channels=1)
    grey = {"model": {"image_channels": 1, "likelihood": "bernoulli"}}
    assert {shard.name for shard in index.shards(TRAIN)} & {shard.name for shard in other.shards(TRAIN)}
    cache = tmp_path / "cache"
    with serving(index.root) as one, serving(other.root) as two:
        for _ in range(2):
            assert read(one.url, cache) == read(index.root, None)
            assert read(two.url, cache, **grey) == read(other.root, None, **grey)


def test_data_on_a_local_disk_are_not_cached(index, tmp_path):
    read(index.root, tmp_path)
    assert list(tmp_path.iterdir()) == []
