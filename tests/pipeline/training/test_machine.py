import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.training import machine
from pipeline.training.machine import GIB, Machine, fold, free_space

CPU = torch.device("cpu")
LIMIT_SECONDS = 30


def read_when(watched: Machine, enough: Callable[[Mapping[str, float]], bool]) -> Mapping[str, float]:
    """The first reading that is enough; the last one if none is for a long time."""
    deadline = time.monotonic() + LIMIT_SECONDS
    found = watched.read()
    while not enough(found) and time.monotonic() < deadline:
        time.sleep(0.005)
        found = watched.read()
    return found


def test_what_is_told_of_this_machine_is_true(tmp_path: Path) -> None:
    with Machine(CPU, {"temporary": tmp_path}, sample_seconds=0.02) as watched:
        found = read_when(watched, bool)
    assert set(found) == {
        "memory/process_gib/max",
        "system/cpu_fraction",
        "system/memory_fraction/max",
        "system/received_mib_per_second",
        "system/sent_mib_per_second",
        "system/temporary_free_gib/min",
    }
    # This process has torch in it.
    assert 0.05 < found["memory/process_gib/max"] < psutil.virtual_memory().total / GIB
    assert 0 < found["system/memory_fraction/max"] < 1
    assert 0 <= found["system/cpu_fraction"] <= 1
    assert min(found["system/received_mib_per_second"], found["system/sent_mib_per_second"]) >= 0
    assert found["system/temporary_free_gib/min"] == pytest.approx(
        shutil.disk_usage(tmp_path).free / GIB, 0.1
    )


def test_memory_that_was_held_for_a_moment_is_in_the_peak(tmp_path: Path) -> None:
    size = 200 * 2**20
    with Machine(CPU, {}, sample_seconds=0.01) as watched:
        before = read_when(watched, bool)["memory/process_gib/max"]
        held = torch.ones(size, dtype=torch.uint8)
        found = read_when(watched, lambda found: found["memory/process_gib/max"] > before + 0.15)
    assert found["memory/process_gib/max"] == pytest.approx(before + held.numel() / GIB, abs=0.05)


def test_a_processor_at_work_is_seen() -> None:
    with Machine(CPU, {}, sample_seconds=0.1) as watched:
        # The loop that waits keeps one processor busy.
        deadline = time.monotonic() + LIMIT_SECONDS
        share = 0.0
        while share < 0.5 / (os.cpu_count() or 1) and time.monotonic() < deadline:
            share = watched.read().get("system/cpu_fraction", 0.0)
    assert share >= 0.5 / (os.cpu_count() or 1)


def test_the_thread_ends_with_the_block() -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "machine"]

    with Machine(CPU, {}):
        assert threads() == ["machine"]
    assert threads() == []


def test_between_two_samples_the_newest_is_told_again() -> None:
    with Machine(CPU, {}, sample_seconds=0.01) as watched:
        read_when(watched, bool)
    found = watched.read()
    assert found == watched.read() != {}


def test_before_the_first_sample_nothing_is_told() -> None:
    assert Machine(CPU, {}).read() == {}


def test_a_number_that_cannot_be_had_is_given_up_and_the_others_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Dismounted(type(tmp_path)):
        """A folder of a disk that is in trouble."""

        def exists(self, **_: object) -> bool:
            raise OSError(5, "Input/output error")

    with Machine(CPU, {"store": Dismounted(tmp_path)}, sample_seconds=0.01) as watched:
        found = read_when(watched, bool)
        read_when(watched, lambda _: len(caplog.records) > 0)
    assert "system/cpu_fraction" in found
    assert "system/store_free_gib/min" not in found
    assert ["Input/output error" in record.getMessage() for record in caplog.records] == [True]


def test_a_folder_that_is_not_made_yet_has_the_space_of_its_disk(tmp_path: Path) -> None:
    found = free_space("cache", tmp_path / "not" / "yet")
    assert found["system/cache_free_gib/min"] == pytest.approx(shutil.disk_usage(tmp_path).free / GIB, 0.1)


@pytest.mark.parametrize(("name", "expected"), [("a/max", 5.0), ("a/min", 2.0), ("a", 3.0)])
def test_the_end_of_a_name_says_how_values_become_one(name: str, expected: float) -> None:
    assert fold(name, [2.0, math.nan, 5.0, 2.0]) == expected
    assert math.isnan(fold(name, [math.nan]))


def test_a_cpu_has_no_device_memory() -> None:
    assert machine.device_memory(CPU) == {}
