"""The lease of a run: one launch at a time, whatever dies and whenever."""

import json
import subprocess
import sys
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from pipeline import lease
from pipeline.lease import LeaseError


def claim_files(url: Path) -> list[Path]:
    return sorted((url / "leases").glob("*.json"))


def test_a_run_is_run_by_one_launch_at_a_time(tmp_path: Path) -> None:
    with lease.held(str(tmp_path)):
        assert lease.holder(str(tmp_path)) is not None
        with pytest.raises(LeaseError, match="already being run by"), lease.held(str(tmp_path)):
            pass
        assert lease.holder(str(tmp_path)) is not None
    assert lease.holder(str(tmp_path)) is None
    assert claim_files(tmp_path) == []


def test_of_many_launches_at_the_same_moment_at_most_one_goes_on(tmp_path: Path) -> None:
    launches = 8
    for number in range(25):
        url, start, leave = str(tmp_path / str(number)), Barrier(launches), Barrier(launches)

        def launch(url: str = url, start: Barrier = start, leave: Barrier = leave) -> str:
            start.wait()
            try:
                with lease.held(url):
                    leave.wait()
                    return "ran"
            except LeaseError:
                leave.wait()
                return "withdrew"

        with ThreadPoolExecutor(launches) as pool:
            outcomes = Counter(future.result() for future in [pool.submit(launch) for _ in range(launches)])
        assert outcomes["ran"] <= 1
        assert outcomes.total() == launches
        with lease.held(url):
            pass


def test_a_killed_run_can_be_started_again_at_once(tmp_path: Path) -> None:
    script = f"""
        from pipeline import lease
        with lease.held({str(tmp_path)!r}):
            print("running", flush=True)
            input()
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "running\n"
        assert lease.holder(str(tmp_path)) is not None
        holder.kill()
    assert lease.holder(str(tmp_path)) is None
    with lease.held(str(tmp_path)):
        assert len(claim_files(tmp_path)) == 1


def test_another_process_with_the_number_of_a_dead_one_runs_nothing(tmp_path: Path) -> None:
    with lease.held(str(tmp_path)):
        (file,) = claim_files(tmp_path)
        claim = json.loads(file.read_text())
        file.write_text(json.dumps(claim | {"started": "1"}))
        assert lease.holder(str(tmp_path)) is None


def test_a_claim_of_another_machine_expires(tmp_path: Path) -> None:
    with lease.held(str(tmp_path)):
        claim = json.loads(claim_files(tmp_path)[0].read_text())
    elsewhere = claim | {"host": "elsewhere", "owner": "another"}
    file = tmp_path / "leases" / "another.json"
    file.write_text(json.dumps(elsewhere))
    assert lease.holder(str(tmp_path)) == f"elsewhere, process {claim['pid']}"
    file.write_text(json.dumps(elsewhere | {"renewed": claim["renewed"] - lease.LEASE_SECONDS - 1}))
    assert lease.holder(str(tmp_path)) is None


def test_a_lease_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.01)
    with lease.held(str(tmp_path)):
        (file,) = claim_files(tmp_path)
        first = json.loads(file.read_text())["renewed"]
        while json.loads(file.read_text())["renewed"] == first:
            pass


def of_another_machine(url: Path, age: float) -> Path:
    """The claim of a process elsewhere that was renewed so many seconds ago."""
    with lease.held(str(url)):
        claim = json.loads(claim_files(url)[0].read_text())
    file = url / "leases" / "another.json"
    changes = {"host": "elsewhere", "owner": "another", "renewed": claim["renewed"] - age}
    file.write_text(json.dumps(claim | changes))
    return file


def test_a_run_whose_machine_died_is_taken_over_when_its_claim_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.01)
    of_another_machine(tmp_path, lease.LEASE_SECONDS - 0.3)
    said: list[str] = []
    with lease.held(str(tmp_path), said.append):
        assert len(claim_files(tmp_path)) == 1
    assert len(said) == 1
    assert "elsewhere, process" in said[0]


def test_the_clock_of_a_dead_machine_is_not_relied_upon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.3)
    of_another_machine(tmp_path, -3600)
    with lease.held(str(tmp_path), lambda line: None):
        assert len(claim_files(tmp_path)) == 1


def test_a_run_that_lives_elsewhere_turns_a_launch_away_as_soon_as_it_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    file = of_another_machine(tmp_path, 5)

    def renew(line: str) -> None:
        claim = json.loads(file.read_text())
        file.write_text(json.dumps(claim | {"renewed": claim["renewed"] + 5}))

    with pytest.raises(LeaseError, match="elsewhere, process"), lease.held(str(tmp_path), renew):
        pass
    assert claim_files(tmp_path) == [file]


def test_a_run_whose_clock_is_behind_turns_a_launch_away_as_soon_as_it_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    file = of_another_machine(tmp_path, 5 * lease.LEASE_SECONDS)

    def renew(line: str) -> None:
        claim = json.loads(file.read_text())
        file.write_text(json.dumps(claim | {"renewed": claim["renewed"] + 5}))

    with pytest.raises(LeaseError, match="elsewhere, process"), lease.held(str(tmp_path), renew):
        pass
    assert claim_files(tmp_path) == [file]


@pytest.mark.parametrize(("leases_ago", "waits"), [(5, True), (100, False)])
def test_a_claim_that_expired_is_watched_for_some_renewals_unless_it_is_ancient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leases_ago: float, waits: bool
) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    file = of_another_machine(tmp_path, leases_ago * lease.LEASE_SECONDS)
    said: list[str] = []
    began = time.monotonic()
    with lease.held(str(tmp_path), said.append):
        assert (time.monotonic() - began > 2 * lease.RENEW_SECONDS, len(said)) == (waits, int(waits))
        assert not file.exists()


@pytest.mark.skipif(not Path("/proc/self/ns/pid").is_symlink(), reason="the system has no PID namespaces")
def test_the_process_of_another_container_is_not_looked_for_among_our_own(tmp_path: Path) -> None:
    with lease.held(str(tmp_path)):
        (file,) = claim_files(tmp_path)
        claim = json.loads(file.read_text())
        boot = claim["boot"].replace(str(Path("/proc/self/ns/pid").readlink()), "pid:[1]")
        file.write_text(json.dumps(claim | {"boot": boot, "started": "1"}))
        assert lease.holder(str(tmp_path)) is not None


DAMAGED = {
    "empty": b"",
    "cut": b'{"owner": "another", "ho',
    "no text": b"\xff\xfe",
    "no claim": b"[]",
    "no time": json.dumps(
        {"owner": "another", "host": "h", "boot": "", "pid": 1, "started": "", "renewed": "now"}
    ).encode(),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_claim_that_nobody_writes_anew_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.1)
    file = tmp_path / "leases" / "another.json"
    file.parent.mkdir()
    file.write_bytes(content)
    assert "another.json cannot be read" in (lease.holder(str(tmp_path)) or "")
    said: list[str] = []
    with lease.held(str(tmp_path), said.append):
        assert not file.exists()
    assert len(said) == 1


def test_a_damaged_claim_of_a_living_run_turns_a_launch_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.3)
    with lease.held(str(tmp_path)):
        (file,) = claim_files(tmp_path)
        file.write_bytes(b"")
        with pytest.raises(LeaseError, match=", process "), lease.held(str(tmp_path)):
            pass
        assert claim_files(tmp_path) == [file]
