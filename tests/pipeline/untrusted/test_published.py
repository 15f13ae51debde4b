"""Published checkpoints through the process that opens them, and files that it refuses."""

import argparse
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.untrusted import published
from pipeline.untrusted.published import UntrustedError, receive
from tests.nvae.test_published import (
    COMPATIBLE,
    Bomb,
    arguments_of,
    as_bytes,
    published_state,
    training_state,
)
from tests.nvae.tiny import tiny_model


def file_of(folder: Path, content: Any) -> Path:
    path = folder / "checkpoint.pt"
    path.write_bytes(content if isinstance(content, bytes) else as_bytes(content))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UntrustedError) as caught:
        receive(path)
    return str(caught.value)


def test_weights_and_arguments_arrive_and_nothing_else_is_left(tmp_path, monkeypatch):
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    model = tiny_model(**COMPATIBLE)
    state = training_state(model)
    state["args"].unknown_to_us = argparse.Namespace(a=1)
    received = receive(file_of(tmp_path, state))
    expected = {name: value for name, value in published_state(model).items() if "_normalized" not in name}
    assert received.weights.keys() == expected.keys()
    for name, value in received.weights.items():
        # Drawn anew by published_state, and not of ours in a model with towers.
        assert torch.equal(value, state["state_dict"][name])
    assert received.arguments == arguments_of(model.config)
    assert (received.epoch, received.global_step) == (3, 12)
    assert {"audit"} <= set(received.layers)
    assert list(place.iterdir()) == []


def test_code_is_refused_by_name_and_not_run(tmp_path):
    target = tmp_path / "written"
    path = file_of(tmp_path, training_state(tiny_model(), extra=Bomb(target)))
    assert "was not opened, since that would run code" in refusal(path)
    assert not target.exists()


def test_a_flipped_bit_among_the_weights_is_found(tmp_path):
    path = file_of(tmp_path, training_state(tiny_model()))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("archive/data/0")
    data[entry.header_offset + 200] ^= 1
    path.write_bytes(data)
    assert "is damaged: the checksum of 'archive/data/0' is wrong" in refusal(path)


def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for place, why in (
        (tmp_path / "pipe", "is no file"),
        (tmp_path, "is no file"),
        (Path("/dev/zero"), "no file"),
    ):
        assert why in refusal(place)
    assert "No such file" in refusal(tmp_path / "checkpoint.pt")
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(published.MOST_BYTES + 1)
    assert "more than any checkpoint" in refusal(sparse)


def test_no_password_of_ours_is_in_that_process(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert "secret" not in str(published._environment(tmp_path))


def test_one_that_is_not_opened_in_time_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "_START_SECONDS", 0.05)
    assert "took far too long" in refusal(file_of(tmp_path, training_state(tiny_model())))


def test_words_from_the_file_cannot_command_a_terminal(tmp_path):
    path = file_of(tmp_path, b"\x80\x02cos\x1b[2J\nsystem\n.")
    assert refusal(path).isprintable()
