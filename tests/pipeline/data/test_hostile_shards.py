"""Shards and indexes that were made to do harm: nothing runs, nothing escapes, nothing grows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.data.hostile_indexes import INDEX_PAYLOADS, IndexPayload
from tests.pipeline.data.hostile_tars import TAR_PAYLOADS, TarPayload

MOST_GROWN_MIB = 256
OURS = {".tar", ".idx", ".json", ".building"}


def meet_payloads(folder: Path, *options: str) -> dict[str, dict]:
    """What became of each payload, by name; the processes ran in `folder`."""
    command = [sys.executable, "-m", "tests.pipeline.data.hostile_child", str(folder), *options]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    results = [json.loads(line) for line in answer.stdout.splitlines()]
    assert len({result["name"] for result in results}) == len(results) > 0
    return {result["name"]: result for result in results}


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("hostile")
    results = meet_payloads(folder)
    results["files"] = {"left": [str(path.relative_to(folder)) for path in folder.rglob("*")]}
    return results


def assert_one_printable_message(result: dict) -> str:
    message = result["refused"]
    assert message.replace("\n", "").isprintable()
    assert len(message) < 2000
    return message


def assert_met(payload: TarPayload, result: dict) -> None:
    assert "crashed" not in result
    assert result["grown_mib"] < MOST_GROWN_MIB
    if payload.refusal is None:
        assert result["keys"] == result["delivered"] == sorted(payload.kept)
    else:
        message = assert_one_printable_message(result)
        assert re.search(payload.refusal, message), message
        assert "0.tar" in message


@pytest.mark.parametrize(
    "payload", [each for each in TAR_PAYLOADS if not each.slow], ids=lambda each: each.name
)
def test_a_hostile_tar_is_ignored_or_refused(payload, met):
    assert_met(payload, met[payload.name])


@pytest.mark.parametrize("payload", INDEX_PAYLOADS, ids=lambda each: each.name)
def test_a_hostile_index_is_refused(payload: IndexPayload, met):
    result = met[payload.name]
    assert "crashed" not in result
    assert result["grown_mib"] < MOST_GROWN_MIB
    message = assert_one_printable_message(result)
    assert re.search(payload.refusal, message), message
    if "problems" in result:
        assert any(re.search(payload.refusal, problem) for problem in result["problems"]), result["problems"]


def test_hostile_shards_leave_nothing_but_our_own_files(met):
    files = [Path(name) for name in met["files"]["left"] if "." in Path(name).name]
    assert {file.suffix for file in files} <= OURS
    assert all(len(file.parts) == 2 for file in files)
    assert not [file for file in files if "marker" in file.name or "escaped" in file.name]
    assert not Path("marker").exists()
    assert not Path("/tmp/escaped.png").exists()
