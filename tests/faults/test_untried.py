"""What cannot be tried here is said aloud, and is no success of who asked for it by its name."""

import os
import subprocess
import sys

import pytest

from tests.faults.data_resources import ON_SMALL_DISKS, ROOT
from tests.faults.training import ROWS, that_count
from tests.faults.training_runs import TrainingRow

pytestmark = pytest.mark.campaign


def without_mounts(campaign: str, name: str) -> tuple[int, str]:
    """How a campaign of one row ends where no disk can be mounted, whoever runs this; its table."""
    ended = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{campaign}", "--only", name, "--short"],
        cwd=ROOT,
        env={**os.environ, "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return ended.returncode, ended.stdout


def test_a_row_that_could_try_nothing_fails_who_named_it() -> None:
    code, table = without_mounts("training", "disk")
    assert code == 1, table
    assert "a disk that gets full: NOT TRIED: only root" in table


def test_a_row_that_could_try_less_says_what_not() -> None:
    code, table = without_mounts("data", "D8")
    assert code == 0, table
    assert f"NOT TRIED: {', '.join(ON_SMALL_DISKS)} (only root" in table


def test_in_a_whole_campaign_only_what_says_why_may_try_nothing() -> None:
    tried, silent = TrainingRow("T", "", 1, 1, ""), TrainingRow("N", "", 0, 0, "")
    said = TrainingRow("U", "", 0, 0, "", untried="no disk")
    assert that_count([*ROWS], [tried, silent, said]) == [tried, silent]
    assert that_count(["disk"], [said]) == [said]
