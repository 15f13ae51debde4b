"""`make campaign` with stand-ins for what it starts: everything is tried, whatever fails before."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = {
    "pytest -m campaign": "-m pytest -m campaign",
    "make faults": "-m tests.faults.training",
    "make faults-data": "-m tests.faults.data",
    "make faults-search": "-m tests.faults.search",
    "make faults-import": "-m tests.faults.importing",
    "make faults-registry": "-m tests.faults.registry",
    "make faults-promotion": "-m tests.faults.promotion",
}


def campaign(folder: Path, failing: list[str]) -> tuple[int, str, list[str]]:
    """Exit code, last line and what was started, where the parts that are named fail."""
    shutil.copyfile(ROOT / "Makefile", folder / "Makefile")
    cases = "".join(f'"{PARTS[part]}"*) exit 3;;\n' for part in failing)
    script = f'#!/bin/sh\necho "$@" >> {folder}/started\ncase "$*" in\n{cases}esac\n'
    # In this order: what was installed is newer than what it was installed from.
    for name in ("constraints.txt", "pyproject.toml", ".venv/bin/python", ".venv/torch"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(script)
    (folder / ".venv/bin/python").chmod(0o755)
    for name in (".venv/installed", ".venv-s3/installed"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    ended = subprocess.run(
        ["make", "--no-print-directory", "campaign"], cwd=folder, capture_output=True, text=True, timeout=60
    )
    return ended.returncode, ended.stdout.splitlines()[-1], (folder / "started").read_text().splitlines()


@pytest.mark.parametrize(
    "failing",
    [[*PARTS], *([part] for part in PARTS)],
)
def test_a_campaign_tries_everything_and_names_what_failed(tmp_path: Path, failing: list[str]) -> None:
    code, last, started = campaign(tmp_path, failing)
    assert code != 0
    assert last == f"FAILED: {', '.join(failing)}"
    assert [line.strip() for line in started] == [*PARTS.values()]


def test_a_campaign_without_failures_says_so(tmp_path: Path) -> None:
    code, last, started = campaign(tmp_path, [])
    assert code == 0
    assert last == f"All passed: {', '.join(PARTS)}"
    assert [line.strip() for line in started] == [*PARTS.values()]
