"""The store in processes that are started while it is in use: no hang, no noise.

A forked one is the dangerous kind; tests/faults/test_storage_starts.py starts fifty of every kind.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_forked_processes_can_use_a_store_that_is_in_use(s3):
    command = [sys.executable, "-m", "tests.storage_starts", f"{s3}/starts/forked", "fork", "3"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
