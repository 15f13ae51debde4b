"""`nvae shards build`: which values it takes."""

import pytest

from cluster.data import progress_line
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
        ("--validation-count", "-1", "x>=0"),
        ("--format", "jpeg", "'original', 'png', 'webp', 'raw'"),
        ("--bits", "9", "1<=x<=8"),
        ("--max-rejected", "1.5", "0<=x<=1"),
        ("--threads", "0", "x>=1"),
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


def test_splits_and_storage_are_as_asked_for(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("portrait-000003\nportrait-000001\n")
    done = nvae(capsys, *BUILD, "--validation-list", "list.txt", "--format", "webp", "--bits", "5")
    assert done.code == 0
    assert "The validation split is the list's own." in done.out
    assert "2 training and 2 validation images" in done.out
    arguments = load_index(str(tmp_path / "out")).arguments
    assert (arguments["format"], arguments["bits"]) == ("webp", 5)
    assert arguments["validation_list"].startswith("2 names, SHA-256 ")


@pytest.mark.parametrize(
    ("done", "per_second", "says"),
    [
        (0, 0.0, "writing train: 0 of 7,000"),
        (1000, 100.0, "writing train: 1,000 of 7,000, 100 a second, 1:00 min left"),
        (1000, 0.5, "writing train: 1,000 of 7,000, 0.5 a second, 3 h 20 min left"),
        (7000, 2000.0, "writing train: 7,000 of 7,000, 2,000 a second, 0:00 min left"),
    ],
)
def test_progress_says_how_fast_and_how_long(done, per_second, says):
    assert progress_line("writing train", done, 7000, per_second) == says
