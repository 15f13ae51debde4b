"""Pictures in a page: as they are, or small enough."""

import io

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from pipeline.run_report.pictures import OVER_TIME, PICTURE_BYTES, fitted, spread


def noise(side: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def test_a_small_picture_stays_as_it_is_and_a_large_one_becomes_smaller():
    small, large = noise(32), noise(1200)
    assert fitted(small, 500) == small
    found = fitted(large, 500)
    assert len(found) <= PICTURE_BYTES < len(large)
    with Image.open(io.BytesIO(found)) as image:
        assert (image.format, image.size) == ("JPEG", (500, 500))


def test_damage_is_an_error_of_pillow():
    with pytest.raises(UnidentifiedImageError):
        fitted(b"not a picture", 500)
    with pytest.raises(OSError):
        fitted(noise(64)[:2000], 500)


def test_pictures_are_spread_over_the_whole_time():
    all_of_them = [(at, f"{at}.png") for at in range(100)]
    found = spread(all_of_them)
    assert len(found) == OVER_TIME
    assert (found[0], found[-1]) == (all_of_them[0], all_of_them[-1])
    assert spread(all_of_them[:3]) == all_of_them[:3]
