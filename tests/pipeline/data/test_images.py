"""One image file at a time: what is kept, what is changed by which rule, what is refused and why."""

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.strategies import booleans, integers, sampled_from
from numpy.testing import assert_array_equal
from PIL import Image

from nvae.config import NVAEConfig
from nvae.pixels import to_model
from pipeline.data.images import FORMATS, RejectedImageError, decode, parse_crop, prepare


def colours(size: int = 16, seed: int = 0) -> np.ndarray:
    """(size, size, 3) smooth pixels, so that JPEG stays close."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def encoded(image: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes, size: int = 16, channels: int = 3, crop="none") -> np.ndarray:
    return decode(prepare(data, size, channels, crop).data, size, channels)


def huge_png(side: int) -> bytes:
    """A few bytes that claim to be a picture of `side` x `side` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def reason(data: bytes, size: int = 16, channels: int = 3, crop="none") -> str:
    with pytest.raises(RejectedImageError) as caught:
        prepare(data, size, channels, crop)
    return str(caught.value)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_fits_keeps_its_own_bytes(form):
    data = encoded(colours(), form)
    assert prepare(data, 16, 3, "none").data == data
    grey = encoded(colours()[..., 0], "PNG")
    assert prepare(grey, 16, 1, "none").data == grey


@pytest.mark.parametrize("form", ["BMP", "TIFF", "GIF", "PPM"])
def test_other_formats_become_webp_without_loss(form):
    original = Image.fromarray(colours())
    stored = prepare(encoded(original, form), 16, 3, "none")
    assert stored.extension == "webp"
    expected = np.asarray(Image.open(io.BytesIO(encoded(original, form))).convert("RGB"))
    assert_array_equal(decode(stored.data, 16, 3), expected)


def test_grey_becomes_three_equal_channels_and_colour_becomes_luma():
    grey = colours()[..., 0]
    assert_array_equal(pixels(encoded(grey)), np.repeat(grey[..., None], 3, 2))
    luma = pixels(encoded(colours()), channels=1)[..., 0].astype(float)
    assert np.abs(luma - colours() @ [0.299, 0.587, 0.114]).max() <= 1


def test_cmyk_becomes_rgb():
    wanted = colours()
    found = pixels(encoded(Image.fromarray(wanted).convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(found.astype(int) - wanted).max() < 12


def test_sixteen_bits_are_rounded_to_eight():
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    found = pixels(encoded(Image.fromarray(values)), channels=1)[..., 0]
    assert_array_equal(found, np.round(values / 257).astype(np.uint8))


def test_a_sixteen_bit_colour_png_is_stored_with_its_high_bytes():
    # Rounding would give 0x13.
    raw = b"".join(b"\0" + np.full((16, 3), 0x12FF, ">u2").tobytes() for _ in range(16))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    stored = prepare(data, 16, 3, "none")
    assert stored.extension == "webp"
    assert (decode(stored.data, 16, 3) == 0x12).all()


def test_palettes_are_resolved_and_transparency_lies_over_white():
    palette = Image.fromarray(colours()).quantize(8)
    assert_array_equal(pixels(encoded(palette)), np.asarray(palette.convert("RGB")))
    clear = np.zeros((16, 16, 4), np.uint8)
    clear[:8, :, 3] = 255
    found = pixels(encoded(Image.fromarray(clear)))
    assert (found[:8] == 0).all()
    assert (found[8:] == 255).all()


def test_the_orientation_that_a_camera_recorded_is_applied():
    image = Image.fromarray(colours())
    exif = image.getexif()
    exif[0x0112] = 6  # The top of the scene is the right side of the stored picture.
    found = pixels(encoded(image, exif=exif))
    assert_array_equal(found, np.asarray(image.rotate(-90)))


def test_a_larger_image_is_scaled_down_without_aliases():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    found = pixels(encoded(stripes), size=64)
    assert np.abs(found[:, 2:-2].astype(int) - 127).max() <= 1


def test_crops_take_the_middle_or_the_given_box():
    tall = np.vstack([np.zeros((4, 16, 3)), colours(), np.zeros((6, 16, 3))]).astype(np.uint8)
    assert_array_equal(pixels(encoded(tall), crop="center"), tall[5:21])
    assert_array_equal(pixels(encoded(tall), crop=(0, 4, 16, 20)), colours())
    assert "not square" in reason(encoded(tall))
    assert "smaller than the crop box" in reason(encoded(tall), crop=(1, 4, 17, 20))


@pytest.mark.parametrize("text", ["middle", "1,2,3", "0,0,4,5", "4,4,0,0", "-1,0,3,4", ""])
def test_a_crop_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="crop"):
        parse_crop(text)
    assert parse_crop("15,40,163,188") == (15, 40, 163, 188)


def test_what_cannot_be_used_is_rejected_with_its_reason():
    assert "no image" in reason(b"name,age\nx,3\n")
    assert "no image" in reason(b"")
    assert "smaller than 16x16" in reason(encoded(colours(15)))
    assert "32 bits" in reason(encoded(Image.fromarray(np.ones((16, 16), np.float32)), "TIFF"))
    frames = [Image.fromarray(colours(seed=seed)) for seed in (0, 1)]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert "animation" in reason(animation)
    assert "no image" in reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_rejected(form, share):
    data = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), form)
    assert "damaged" in reason(data[: int(len(data) * share)])


def test_twenty_thousand_pixels_square_are_refused_before_they_are_decoded():
    assert "20000x20000" in reason(huge_png(20_000))
    assert "pixels" in reason(huge_png(2**31 - 1)) or "damaged" in reason(huge_png(2**31 - 1))


def test_decoding_averages_whole_squares_of_pixels():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for factor in (2, 4, 8):
        side = 16 // factor
        squares = image.reshape(side, factor, side, factor, 3).astype(int).sum((1, 3))
        expected = (squares + factor * factor // 2) // factor**2
        assert_array_equal(decode(encoded(image), 16, 3, factor), expected)


def test_a_stored_image_of_another_size_or_colour_is_not_decoded():
    for data in (encoded(colours(8)), encoded(colours()[..., 0]), encoded(colours(), "GIF"), b"\0" * 100):
        with pytest.raises(RejectedImageError):
            decode(data, 16, 3)


# --- formats of storage -----------------------------------------------------------------------

GREY_FORMATS = ("original", "png", "raw")


@given(
    integers(1, 40),
    integers(0, 2**32),
    sampled_from([(3, form) for form in FORMATS] + [(1, form) for form in GREY_FORMATS]),
    booleans(),
)
def test_every_format_stores_the_same_pixels(size, seed, stored_as, is_noise):
    channels, form = stored_as
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (size, size, 3), np.uint8) if is_noise else colours(size, seed)
    image = image if channels == 3 else image[..., 0]
    for data in (image, encoded(image), encoded(image, "TIFF")):
        stored = prepare(data, size, channels, "none", form)
        is_kept = isinstance(data, bytes) and data.startswith(b"\x89PNG")
        expected = {
            "original": "png" if is_kept or channels == 1 else "webp",
            "raw": "ppm" if channels == 3 else "pgm",
        }
        assert stored.extension == expected.get(form, form)
        assert_array_equal(decode(stored.data, size, channels), image.reshape(size, size, channels))


@given(integers(1, 8), sampled_from(FORMATS), integers(0, 2**32))
def test_a_model_of_few_bits_sees_the_same_in_images_of_few_bits(bits, form, seed):
    image = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    model = dataclasses.replace(NVAEConfig(), pixel_bits=bits)
    whole, few = (
        decode(prepare(encoded(image), 16, 3, "none", form, kept).data, 16, 3) for kept in (8, bits)
    )
    seen = [to_model(torch.from_numpy(each.transpose(2, 0, 1)[None].copy()), model) for each in (whole, few)]
    assert torch.equal(*seen)
    assert_array_equal(few, image >> (8 - bits) << (8 - bits))
