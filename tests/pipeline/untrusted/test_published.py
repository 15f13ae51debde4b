"""Published checkpoints through the process that opens them, and files that it refuses."""

import argparse
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from nvae.published import PublishedCheckpointError, build_published
from pipeline.published_settings import run_config
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
from tests.nvae.tiny import tiny_config, tiny_model


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


json_values = st.recursive(
    st.sampled_from([None, True, 0, -1, 3, 2**70, 0.5, math.nan, "", "res_mbconv", "x\x1b[2J"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2)
    ),
    max_leaves=4,
)
NAMES = [*arguments_of(tiny_config()), "batch_size", "epochs", "num_total_iter", "learning_rate", "seed"]
answers = st.fixed_dictionaries(
    {
        **dict.fromkeys(("epoch", "global_step"), json_values),
        "layers": st.lists(json_values, max_size=2),
        "arguments": st.dictionaries(st.sampled_from(NAMES), json_values),
    }
)
REFUSALS = (
    {"layers": [], "refused": "\x1b[2J"},
    {"layers": 1, "refused": []},
    {"refused": "x"},
    [],
    {},
    "x",
    None,
)
WEIGHTS = save({"stem.weight": torch.ones(1)})


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    answer=answers | answers | answers | st.sampled_from(REFUSALS),
    cut=st.sampled_from([None, None, None, 5]),
    weights=st.sampled_from([WEIGHTS, WEIGHTS, WEIGHTS, WEIGHTS[:-1], b""]),
)
def test_a_process_that_was_taken_can_say_what_it_likes(
    answer: Any, cut: int | None, weights: bytes, tmp_path: Path
) -> None:
    (tmp_path / "weights").write_bytes(weights)
    report = json.dumps(answer).encode()[:cut]
    with (tmp_path / "weights").open("rb") as file:
        try:
            received = published._believed(Path("x.pt"), file.fileno(), report, tmp_path / "weights")
        except UntrustedError as error:
            assert str(error).isprintable()
            event("refused")
            return
    event("believed")
    with pytest.raises(PublishedCheckpointError):
        build_published(received.arguments, received.weights)
    run_config(received.arguments, tiny_config(), None, [])
