"""The store in processes that are started while it is in use: no hang, no noise."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("how", "count"), [("fork", 3), ("forkserver", 1), ("spawn", 1)])
def test_processes_started_while_the_store_is_in_use_can_use_it(how, count, s3):
    command = [sys.executable, "-m", "tests.storage_starts", f"{s3}/starts/{how}", how, str(count)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
