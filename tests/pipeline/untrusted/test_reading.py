"""The reader alone, without the process around it: it makes nothing but tensors and plain values.

The same files and others through `nvae import`, in real processes: tests/faults/importing.py.
"""

import argparse
import io
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nvae.published import PublishedCheckpointError
from pipeline.untrusted.reading import read
from tests.faults import hostile_checkpoints as hostile


def reading(payload: Any) -> dict[str, Any]:
    data = hostile.content(payload)
    return read(io.BytesIO(data), len(data))[0]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_call_in_a_pickle_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for what, payload in hostile.code_payloads().items():
        if what == "a pickle within the arguments":
            # Which nobody reads.
            continue
        began = time.monotonic()
        with pytest.raises(PublishedCheckpointError):
            pytest.fail(f"{what}: {reading(payload)}")
        assert time.monotonic() - began < 2, what
        assert list(tmp_path.iterdir()) == [], what


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("an entry that leads out", "an entry that leads elsewhere, '../../marker'"),
        ("an absolute entry", "leads elsewhere"),
        ("an entry of another system", "leads elsewhere"),
        ("a link", "leads elsewhere"),
        ("two entries of one name", "two entries of one name"),
        ("100,001 entries", "100,001 entries"),
        ("compressed", "compressed"),
        ("a bomb of 64 MiB", "compressed"),
        ("entries that overlap", "overlap"),
    ],
)
def test_zips_that_torch_never_wrote_are_refused(archives: dict[str, Any], what: str, reason: str) -> None:
    with pytest.raises(PublishedCheckpointError, match=reason):
        reading(archives[what])


@pytest.fixture(scope="module")
def archives() -> dict[str, Any]:
    return hostile.archive_payloads()


def test_arguments_that_grow_when_they_are_written_are_left_out() -> None:
    laughs: list[Any] = ["ha"] * 10
    for _ in range(40):
        laughs = [laughs] * 10
    arguments = argparse.Namespace(**vars(hostile.good()["args"]), laughs=laughs, more=[1, 2.5, "x", None])
    found = reading(hostile.good(args=arguments))["arguments"]
    assert "laughs" not in found
    assert found["more"] == [1, 2.5, "x", None]


def test_a_weight_is_not_larger_than_its_file() -> None:
    state = hostile.good()["state_dict"] | {"stem.weight": torch.zeros(1).expand(2**40)}
    with pytest.raises(PublishedCheckpointError, match=r"would have 4,398,\d+,\d+,\d+ bytes, the file has"):
        reading(hostile.good(state_dict=state))
