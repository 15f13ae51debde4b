"""The drawing commands, as a user types them, on a model that is a folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nvae.batch_norm import BatchNorm
from pipeline.models.export import write_weights
from pipeline.models.sampling import sample_images
from tests.pipeline.models.tiny import tiny_config, tiny_model
from tests.tiny_run import Outcome, nvae

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder of a model with two scales, one group and two, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_weights(str(tmp_path / "model"), tiny_model(), tiny_config())
    return "model"


def picture(path: str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def draw(capsys: Capture, *arguments: str) -> Outcome:
    shown = nvae(capsys, *arguments)
    assert shown.code == 0, shown.err
    return shown


def test_a_folder_of_samples_is_extended_and_refuses_another_seed(model: str, capsys: Capture) -> None:
    command = ["sample", model, "faces", "--separate", "--temperature", "1,0.5"]
    draw(capsys, *command, "--count", "2")
    assert "2 of them were there already" in draw(capsys, *command, "--count", "5").out
    assert sorted(file.name for file in Path("faces").glob("*.png")) == [f"{i:06d}.png" for i in range(5)]
    expected = sample_images(tiny_model(), 5, (1.0, 0.5), seed=0).astype(int)
    assert np.abs(picture("faces/000004.png") - expected[4]).max() <= 1
    refused = nvae(capsys, *command, "--count", "5", "--seed", "1")
    assert refused.code == 2
    assert "seed is 0 there and 1 here" in refused.err


def test_recalibration_that_fails_is_told_and_the_trained_statistics_are_used(
    model: str, capsys: Capture
) -> None:
    broken = tiny_model()
    norm = next(module for module in broken.decoder_tower.modules() if isinstance(module, BatchNorm))
    # Statistics of the training hide it; those of a batch are not finite after it.
    with torch.no_grad():
        norm.weight.fill_(3e38)
        norm.running_var.fill_(3e38)
    write_weights("broken", broken, tiny_config())
    draw(capsys, "sample", "broken", "without.png")
    shown = draw(capsys, "sample", "broken", "with.png", "--recalibrate")
    assert "not finite: the images are drawn with those of the training" in shown.out
    assert Path("with.png").read_bytes() == Path("without.png").read_bytes()
    assert (
        "has the statistics of this temperature"
        in draw(capsys, "sample", model, "fine.png", "--recalibrate").out
    )


def test_each_image_file_is_shown_beside_its_reconstruction(model: str, capsys: Capture) -> None:
    Path("photos").mkdir()
    for name, colour in [("photos/b.png", "red"), ("photos/a.jpg", "blue"), ("c.png", "lime")]:
        Image.new("RGB", (20, 12), colour).save(name)
    draw(capsys, "reconstruct", model, "c.png", "photos", "pairs.png")
    shown = picture("pairs.png")
    assert shown.shape == (8, 6 * 10 - 2, 3)
    for place, colour in zip((0, 20, 40), ([0, 255, 0], [0, 0, 254], [255, 0, 0]), strict=True):
        assert np.abs(shown[0, place] - colour).max() <= 1


@pytest.mark.parametrize(("name", "frames"), [("way.gif", 6), ("way.apng", 6), ("way.png", 1)])
def test_an_interpolation_is_a_strip_or_an_animation_by_its_name(
    model: str, capsys: Capture, name: str, frames: int
) -> None:
    Image.new("RGB", (9, 9), "red").save("a.png")
    draw(capsys, "interpolate", model, "a.png", "seed:7/3", name, "--steps", "4")
    with Image.open(name) as image:
        assert getattr(image, "n_frames", 1) == frames
    if frames == 1:
        shown, ends = picture(name), sample_images(tiny_model(), 4, 0.7, seed=7).astype(int)
        assert shown.shape == (8, 38, 3)
        assert np.abs(shown[:, -8:] - ends[3]).max() <= 1


def test_a_traversal_has_a_row_for_each_scale_or_group_that_begins_with_the_image(
    model: str, capsys: Capture
) -> None:
    said = draw(capsys, "traverse", model, "scales.png", "--columns", "3").out
    assert "2x2 (group 0); 4x4 (groups 1 to 2)" in said
    draw(capsys, "traverse", model, "groups.png", "--columns", "3", "--groups", "--of", "seed:4")
    scales, groups = picture("scales.png"), picture("groups.png")
    assert (scales.shape, groups.shape) == ((18, 38, 3), (28, 38, 3))
    for shown, seed in [(scales, 0), (groups, 4)]:
        original = sample_images(tiny_model(), 1, 0.7, seed=seed)[0].astype(int)
        for row in range(0, len(shown), 10):
            assert np.abs(shown[row : row + 8, :8] - original).max() <= 1
            assert not np.array_equal(shown[row : row + 8, 10:18], shown[row : row + 8, 20:28])


MISTAKES = {
    "several temperatures": (["sample", "model", "x.png", "--temperature", "1,1,1"], "2 scales (2x2, 4x4)"),
    "no temperature": (["sample", "model", "x.png", "--temperature", "warm"], "'warm' is no temperature"),
    "a negative one": (["sample", "model", "x.png", "--temperature", "1,-1"], "is no temperature"),
    "no number": (["sample", "model", "x.png", "--temperature", "nan"], "is no temperature"),
    "a folder by accident": (["sample", "model", "faces"], "add --separate"),
    "somebody's folder": (["sample", "model", "model", "--separate"], "not begun by this command"),
    "a file as a folder": (["sample", "model", "model/config.json", "--separate"], "it is a file"),
    "no such image": (["reconstruct", "model", "none.png", "x.png"], "none.png: there is no such file"),
    "no output": (["reconstruct", "model", "none.png"], "Missing argument"),
    "no seed": (["interpolate", "model", "seed:1", "seed:x", "x.png"], "'seed:x' is neither"),
    "no animation": (["interpolate", "model", "seed:1", "seed:2", "x.mp4"], ".png or .gif or .apng"),
    "nothing to vary": (["traverse", "model", "x.png", "--of", "none.png"], "'none.png' is neither"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_ends_in_one_message_and_leaves_nothing(model: str, capsys: Capture, what: str) -> None:
    arguments, expected = MISTAKES[what]
    before = set(Path().rglob("*"))
    refused = nvae(capsys, *arguments)
    assert refused.code == 2
    assert expected in refused.err
    assert refused.err.count("Error: ") == 1
    assert set(Path().rglob("*")) == before
