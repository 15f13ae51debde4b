import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.training import journal as journal_module
from pipeline.training.journal import Entry, Journal, StoredJournal, decode, encode, json_number

numbers = st.floats(allow_nan=True, allow_infinity=True)


def entries(run: str) -> list[Entry]:
    stored = StoredJournal(run)
    return [entry for segment in stored.segments() for entry in decode(stored.read(segment))]


def values(run: str) -> list[float]:
    return [value for entry in entries(run) for value in entry.body["values"].values()]


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@given(values=st.dictionaries(st.text(min_size=1), numbers), at=st.integers(0, 2**40))
def test_an_entry_comes_back_with_every_number_there_is(values: dict[str, float], at: int) -> None:
    body = {"at": at, "values": {name: json_number(value) for name, value in values.items()}}
    (found,) = decode(encode(Entry("metrics", 1, body)))
    assert found.body["at"] == at
    for name, value in values.items():
        back = found.body["values"][name]
        assert back == value or (math.isnan(back) and math.isnan(value))


@given(cut=st.integers(0, 200))
def test_of_a_journal_that_is_cut_anywhere_the_complete_lines_are_read(cut: int) -> None:
    lines = [encode(Entry("tag", i, {"key": "k", "value": "v" * i})) for i in range(5)]
    data = b"".join(lines)[:cut]
    # Without its line feed a line is whole, too.
    whole = sum(len(b"".join(lines[: i + 1])) - 1 <= len(data) for i in range(5))
    assert [entry.time for entry in decode(data)] == list(range(whole))


def test_a_flipped_bit_costs_the_line_that_it_is_in_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    body = {"at": 4_096, "values": {"train/loss": 1.5, "train/kl_nats/group_03": "nan"}}
    written = [Entry("metrics", time, body) for time in range(3)]
    data = b"".join(map(encode, written))
    whole = set(map(repr, decode(data)))
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        found = set(map(repr, decode(bytes(flipped))))
        assert len(found) >= 2
        assert found <= whole
    assert "are damaged and left out" in caplog.text


@given(start=st.integers(0, 400), length=st.integers(0, 200))
def test_a_piece_that_is_lost_costs_the_lines_that_it_touches_and_no_other(start: int, length: int) -> None:
    lines = [encode(Entry("tag", i, {"key": "k", "value": "v" * i})) for i in range(6)]
    places = [len(b"".join(lines[:i])) for i in range(7)]
    data = b"".join(lines)
    found = {entry.time for entry in decode(data[:start] + data[start + length :])}
    touched = {i for i in range(6) if places[i] < start + length and start < places[i + 1] - 1}
    assert found >= set(range(6)) - touched
    assert found <= set(range(6))


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"null",
        b'{"kind":"status","time":1,"value":"FINISHED"}',
        b'{"kind":"status","time":1,"value":"FINISHED","crc":"00000000"}',
        encode(Entry("metrics", 1, {})),
        encode(Entry("metrics", 1, {"at": 2, "values": {"x": "high"}})),
        encode(Entry("tag", 1, {"key": "x", "value": 3})),
        encode(Entry("unknown", 1, {})),  # type: ignore[arg-type]
        b"\xff\xfe",
    ],
)
def test_a_damaged_line_is_left_out_and_the_others_are_read(
    line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    good = encode(Entry("status", 7, {"value": "FINISHED"}))
    assert [entry.time for entry in decode(good + line + b"\n" + good)] == [7, 7]
    assert caplog.text.count("left out") == 1


def test_what_is_noted_is_in_the_store_in_order_over_segments_and_attempts(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 300)
    for attempt in (2, 1, 10):
        journal = Journal(run, attempt)
        for at in range(8):
            journal.note("metrics", at=at, values={"x": 100.0 * attempt + at})
        journal.close()
    assert len(StoredJournal(run).segments()) == 6
    assert values(run) == [100.0 * attempt + at for attempt in (1, 2, 10) for at in range(8)]


def test_a_second_journal_of_the_same_attempt_does_not_touch_the_first_ones_segments(run: str) -> None:
    first, second = Journal(run, 1), Journal(run, 1)
    for journal, at in [(first, 1), (second, 2), (first, 3)]:
        journal.note("metrics", at=at, values={"x": float(at)})
    first.close()
    second.close()
    assert values(run) == [1.0, 3.0, 2.0]
    third = Journal(run, 1)
    third.note("metrics", at=4, values={"x": 4.0})
    third.close()
    assert values(run) == [1.0, 3.0, 2.0, 4.0]


def test_a_name_that_leads_out_of_the_run_is_refused(run: str) -> None:
    journal = Journal(run, 1)
    for name in ("../x.png", "/etc/x", "a/../../x", "s3://b/x"):
        with pytest.raises(storage.StoreError):
            journal.attach(name, b"")


KILLED = """
import os, signal, sys
from pipeline.training.journal import Journal
journal = Journal(sys.argv[1], 1)
for at in range(int(sys.argv[2])):
    journal.note("metrics", at=at, values={"x": float(at)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_everything_noted_before_a_kill_is_there(run: str) -> None:
    died = subprocess.run([sys.executable, "-c", KILLED, run, "5000"], timeout=60)
    assert died.returncode == -signal.SIGKILL
    assert values(run) == [float(at) for at in range(5000)]


@contextmanager
def files_no_longer_than(bytes_: int) -> Iterator[None]:
    """As on a disk that is full: writing beyond is an OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_warning_and_nothing_is_lost_when_there_is_room_again(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(run, 1, copy_seconds=60)
    journal.note("metrics", at=0, values={"x": 0.0})
    length = len(StoredJournal(run).read("001-00000.jsonl"))
    with caplog.at_level(logging.WARNING), files_no_longer_than(length + 10):
        journal.note("metrics", at=1, values={"x": 1.0})
        with files_no_longer_than(0):
            journal.note("metrics", at=2, values={"x": 2.0})
            assert not journal.attach("pictures/x.png", b"png")
        assert not journal.sync()
        assert values(run) == [0.0]
    assert len(caplog.records) == 1
    assert "wait in memory" in caplog.text
    journal.note("metrics", at=3, values={"x": 3.0})
    journal.close()
    assert values(run) == [0.0, 1.0, 2.0, 3.0]
    assert len(StoredJournal(run).segments()) == 1


def test_a_disk_that_stays_full_costs_bounded_memory_and_says_what_is_lost(
    run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_module, "LINES_IN_MEMORY", 3)
    journal = Journal(run, 1, copy_seconds=60)
    with files_no_longer_than(0):
        for at in range(5):
            journal.note("metrics", at=at, values={"x": float(at)})
    journal.sync()
    assert values(run) == [2.0, 3.0, 4.0]
    with files_no_longer_than(0):
        journal.note("metrics", at=5, values={"x": 5.0})
        journal.close()
    assert "1 lines of the journal" in caplog.text


def test_noting_takes_well_under_a_millisecond(run: str) -> None:
    journal = Journal(run, 1)
    metrics = {f"train/kl_nats/group_{group:02d}": 1.0 / (group + 1) for group in range(60)}
    took = []
    for at in range(300):
        began = time.perf_counter()
        journal.note("metrics", at=at, values=metrics)
        took.append(time.perf_counter() - began)
    assert sorted(took)[len(took) // 2] < 1e-3


def test_only_what_a_remote_store_has_may_be_read_for_delivery(s3: str) -> None:
    run = storage.join(s3, f"runs/journal-{os.getpid()}")
    journal = Journal(run, 3, copy_seconds=60)
    journal.note("metrics", at=1, values={"x": 1.0})
    assert journal.attach("pictures/samples.png", b"png")
    assert journal.own_segments() == {"003-00000.jsonl": 0}
    assert journal.read("003-00000.jsonl") == b""
    assert entries(run) == []
    assert journal.sync()
    assert values(run) == [1.0]
    assert StoredJournal(run).read_file("pictures/samples.png") == b"png"
    copied = dict(journal.own_segments())
    journal.note("metrics", at=2, values={"x": 2.0})
    assert journal.own_segments() == copied
    assert len(list(decode(journal.read("003-00000.jsonl")))) == 1
    journal.close()
    assert values(run) == [1.0, 2.0]


def test_a_remote_store_gets_the_notes_by_itself(s3: str) -> None:
    run = storage.join(s3, f"runs/copied-{os.getpid()}")
    journal = Journal(run, 1, copy_seconds=0.05)
    journal.note("metrics", at=1, values={"x": 1.0})
    deadline = time.monotonic() + 20
    while not entries(run) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert values(run) == [1.0]
    journal.close()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary files, of processes too that are started here."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def test_a_picture_is_on_this_machine_only_until_the_remote_store_has_it(s3: str, temporary: Path) -> None:
    journal = Journal(storage.join(s3, f"runs/pictures-{os.getpid()}"), 1, copy_seconds=60)
    for content in (b"one", b"two"):
        assert journal.attach("pictures/x.png", content)
        assert journal.sync()
        assert list(temporary.rglob("*.png")) == []
        assert journal.read_file("pictures/x.png") == content
    # A name that is used twice before it is copied.
    for content in (b"three", b"four"):
        assert journal.attach("pictures/x.png", content)
    journal.close()
    assert journal.read_file("pictures/x.png") == b"four"
    assert list(temporary.iterdir()) == []


def test_a_later_journal_removes_the_folder_of_a_killed_one_and_of_no_other(
    s3: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = storage.join(s3, f"runs/swept-{os.getpid()}")
    living = Journal(run, 1, copy_seconds=60)
    (of_the_living,) = temporary.iterdir()
    died = subprocess.run([sys.executable, "-c", KILLED, run, "1"], timeout=60)
    assert died.returncode == -signal.SIGKILL
    assert len(list(temporary.iterdir())) == 2
    not_of_a_journal = temporary / "nvae-journal-notes"
    not_of_a_journal.mkdir()
    later = Journal(run, 2, copy_seconds=60)
    assert {of_the_living, not_of_a_journal} < {*temporary.iterdir()}
    assert len(list(temporary.iterdir())) == 3
    living.close()
    later.note("metrics", at=1, values={"x": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(later, "run_url", f"{__file__}/is no folder")
        later.close()
    Journal(run, 3).close()
    # What could not be copied is the user's.
    (kept,) = [each for each in temporary.iterdir() if each != not_of_a_journal]
    assert list(kept.glob("journal/*.jsonl")) != []


def test_lines_are_json_for_every_reader(run: str) -> None:
    journal = Journal(run, 1)
    journal.note("metrics", at=1, values={"x": json_number(math.nan), "y": json_number(-math.inf)})
    journal.close()
    (line,) = StoredJournal(run).read("001-00000.jsonl").splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["values"] == {"x": "nan", "y": "-inf"}
