"""`nvae shards build`: which values it takes."""

import pytest

from pipeline.data.index import load_index
from tests.tiny_run import nvae

BUILD = ("shards", "build", "portraits:4", "out", "--image-size", "16")


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--channels", "2", "not one of '1', '3'"),
        ("--image-size", "3", "4<=x<=4096"),
        ("--image-size", "4097", "4<=x<=4096"),
        ("--validation-fraction", "1", "0<=x<1"),
    ],
)
def test_a_value_that_no_data_set_can_have_is_refused_with_those_that_can(
    option, value, says, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    refused = nvae(capsys, *BUILD, option, value)
    assert refused.code == 2
    assert option in refused.err
    assert says in refused.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_stored_in_the_colours_asked_for(channels, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert nvae(capsys, *BUILD, "--channels", str(channels)).code == 0
    assert load_index(str(tmp_path / "out")).channels == channels
