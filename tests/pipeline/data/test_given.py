import numpy as np
import pytest
from PIL import Image

from nvae.config import NVAEConfig
from pipeline.data.given import GivenImageError, image_files, load_images

SETTINGS = {"image_size": 8, "preprocess_blocks": 0, "groups_per_scale": (1,)}
COLOUR = NVAEConfig(**SETTINGS)
BINARY = NVAEConfig(**SETTINGS, image_channels=1, border_pixels=1, likelihood="bernoulli")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(8, 8), (40, 24), (9, 30)])
def test_an_image_of_any_mode_and_shape_is_fitted(tmp_path, mode, size):
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new(mode, size, 0).save(file)
    for config in (COLOUR, BINARY):
        images = load_images([file], config)
        assert images.shape == (1, config.image_channels, 8, 8)


def test_the_central_square_is_shown_scaled_down(tmp_path):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = (200, 100, 50)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = load_images([tmp_path / "x.png"], COLOUR)[0]
    assert image.flatten(1).unique(dim=1).flatten().tolist() == [200, 100, 50]


def test_a_binary_model_gets_binary_pixels_within_its_border(tmp_path):
    Image.new("L", (6, 6), 255).save(tmp_path / "white.png")
    image = load_images([tmp_path / "white.png"], BINARY)[0, 0]
    assert image[1:7, 1:7].min() == 1
    assert image.sum() == 36


def test_a_folder_means_the_image_files_below_it_in_order(tmp_path):
    for name in ("b.png", "a/c.JPG", "notes.txt", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = image_files([tmp_path / "notes.txt", tmp_path])
    assert [str(file.relative_to(tmp_path)) for file in found] == ["notes.txt", "a/c.JPG", "b.png"]


@pytest.mark.parametrize(("name", "reason"), [("none.png", "no such file"), ("empty", "no image file")])
def test_a_place_without_images_is_named(tmp_path, name, reason):
    (tmp_path / "empty").mkdir()
    with pytest.raises(GivenImageError, match=f"{name}: there is {reason}"):
        image_files([tmp_path / name])


def test_a_file_that_cannot_be_taken_is_named_with_the_reason(tmp_path):
    Image.new("RGB", (7, 20)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(GivenImageError, match=r"small\.png is 7x7: smaller than 8x8"):
        load_images([tmp_path / "small.png"], COLOUR)
    with pytest.raises(GivenImageError, match=r"text\.png is no image"):
        load_images([tmp_path / "text.png"], COLOUR)
