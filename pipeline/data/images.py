"""One image file -> one square 8-bit image of the wanted size, by stated rules.

Rules, in this order:
- PNG, JPEG, WebP, BMP, TIFF, GIF and PNM are read; the size is known from the header before
  anything is decoded, and more than 67 million pixels are refused. Animations are refused.
- The orientation that a camera recorded is applied. Colour profiles are ignored.
- Sixteen bits of grey become eight by rounding, sixteen bits per colour as Pillow decodes them:
  a PNG keeps the high byte, so 0x00ff becomes 0. 32-bit values are refused. Palette, CMYK and
  other colour spaces become RGB; transparency is laid over white. One channel means luma (ITU-R
  601), three channels of a grey image are equal.
- An image must be square. A crop to the central square, or to a box, is made only when asked for:
  it cuts into faces that nobody looked at.
- A larger image is scaled down by Pillow's bilinear filter, whose support grows with the factor:
  it is antialiased, does not ring, and is what published results on FFHQ 256x256 used. A smaller
  one is refused: enlarged images hold less detail than their size promises.
- The file's own bytes are kept if nothing of this changes a pixel and any reader decodes them
  alike (8-bit PNG, JPEG, WebP); otherwise the image is stored without loss: as WebP, or as PNG if
  it is grey, which WebP does not know. Every image can also be stored as PNG, lossless WebP or
  bare pixels (PPM, PGM): the pixels are the same. `make bench-formats` compares them.
- A data set for models of few bits can leave the lower bits of each value out (as zeros): the
  upper ones are all that such a model sees (nvae/pixels.py). That is done last.
"""

import io
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# H, W height and width in pixels; C colours, 1 or 3.
Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]
Crop = Literal["none", "center"] | Box
Format = Literal["original", "png", "webp", "raw"]
FORMATS: tuple[Format, ...] = ("original", "png", "webp", "raw")

MAX_PIXELS = 2**26
MAX_FILE_BYTES = 2**28
_READ = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_KEPT = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
_STORED = ("PNG", "JPEG", "WEBP", "PPM")
NO_IMAGE = "is no image, or of a format that is not read"
"""The reason for leaving a file out of which Pillow knows no more."""
# PNG's own scale of effort. Portraits take 8% more bytes than at 6, in less than half the time.
_PNG_EFFORT = 4
# WebP's two, the lowest: more effort saves a tenth of the bytes, takes ten times as long to
# write and not less to read.
_WEBP_METHOD, _WEBP_EFFORT = 0, 0

# Our own limit is checked before Pillow decodes; its warning would come on top.
Image.MAX_IMAGE_PIXELS = None


# How Pillow's decoders are known to report damage; 40,000 changed files of all formats met no other.
_DAMAGE = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError),
    *(AttributeError, MemoryError, struct.error),
)


class RejectedImageError(ValueError):
    """An image that cannot or may not become part of a data set; the message is the reason."""


@dataclass(frozen=True)
class StoredImage:
    """An image as it is written to a shard."""

    data: bytes
    extension: str
    """png, jpg, webp, ppm or pgm."""


def parse_crop(text: str) -> Crop:
    """`none`, `center` or `LEFT,TOP,RIGHT,BOTTOM` in pixels. Raises ValueError otherwise."""
    if text == "none":
        return "none"
    if text == "center":
        return "center"
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.strip().isdigit() for number in numbers):
        raise ValueError(f"crop {text!r} is not `none`, `center` or LEFT,TOP,RIGHT,BOTTOM in pixels")
    left, top, right, bottom = (int(number) for number in numbers)
    if not (left < right and right - left == bottom - top):
        raise ValueError(f"crop {text!r} is not a square of at least one pixel")
    return left, top, right, bottom


def prepare(
    data: bytes | Pixels,
    image_size: int,
    channels: int,
    crop: Crop,
    form: Format = "original",
    bits: int = 8,
) -> StoredImage:
    """The image in `data` (a file's content, or (H, W) or (H, W, C) pixels) as it is to be stored.

    Of each value the upper `bits` are kept.

    Raises RejectedImageError with the reason if the rules above refuse it.
    """
    if isinstance(data, np.ndarray):
        return _stored(_fitted(Image.fromarray(data), image_size, channels, crop), form, bits)
    try:
        with _opened(data, _READ) as image:
            fitted = _fitted(_upright(image), image_size, channels, crop)
            if form == "original" and bits == 8 and _is_kept(data, image, fitted):
                return StoredImage(data, _KEPT[image.format or ""])
            return _stored(fitted, form, bits)
    except RejectedImageError:
        raise
    except _DAMAGE as error:
        raise RejectedImageError(f"is damaged ({error})") from error


def decode(data: bytes, image_size: int, channels: int, factor: int = 1) -> Pixels:
    """(H, W, C) pixels of an image that `prepare` stored, averaged over squares of `factor` pixels.

    Raises RejectedImageError if it is damaged or of another size or number of channels.
    """
    try:
        with _opened(data, _STORED) as image:
            if image.size != (image_size, image_size):
                raise RejectedImageError(f"is {image.width}x{image.height}, not {image_size}x{image_size}")
            if image.mode != _mode(channels):
                raise RejectedImageError(f"has mode {image.mode}, not {_mode(channels)}")
            side = image_size // factor
            reduced = image.reduce(factor) if factor > 1 else image
            # Colour by colour: models want planes, and Pillow takes them apart faster than NumPy.
            planes = b"".join(reduced.tobytes("raw", band) for band in reduced.getbands())
            pixels: Pixels = np.frombuffer(planes, np.uint8).reshape(channels, side, side).transpose(1, 2, 0)
            return pixels
    except RejectedImageError:
        raise
    except _DAMAGE as error:
        raise RejectedImageError(f"cannot be decoded ({error})") from error


def _opened(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    if len(data) > MAX_FILE_BYTES:
        raise RejectedImageError(f"is a file of more than {MAX_FILE_BYTES >> 20} MiB")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        # Its message names an address in memory, another one each time.
        raise RejectedImageError(NO_IMAGE) from error
    if image.width * image.height > MAX_PIXELS:
        raise RejectedImageError(f"is {image.width}x{image.height}: more than {MAX_PIXELS:,} pixels")
    frames = getattr(image, "n_frames", 1)
    # A camera's MPO holds previews beside the photo, which comes first.
    if frames != 1 and image.format != "MPO":
        raise RejectedImageError(f"is an animation of {frames} frames")
    return image


def _upright(image: Image.Image) -> Image.Image:
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    turned: Image.Image = ImageOps.exif_transpose(image)
    return turned


def _fitted(image: Image.Image, image_size: int, channels: int, crop: Crop) -> Image.Image:
    """`image` cropped, in 8 bits of the wanted colours, scaled down."""
    box = _crop_box(image.width, image.height, crop)
    if box != (0, 0, image.width, image.height):
        image = image.crop(box)
    if image.width < image_size:
        raise RejectedImageError(f"is {image.width}x{image.height}: smaller than {image_size}x{image_size}")
    image = _in_colours(_in_eight_bits(image), channels)
    if image.width > image_size:
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    image.load()
    return image


def _crop_box(width: int, height: int, crop: Crop) -> Box:
    if isinstance(crop, tuple):
        if crop[2] > width or crop[3] > height:
            raise RejectedImageError(f"is {width}x{height}: smaller than the crop box")
        return crop
    if width != height and crop == "none":
        raise RejectedImageError(f"is {width}x{height}, not square (--crop center takes the middle)")
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _in_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise RejectedImageError("has 32 bits per pixel, whose range is unknown")
    return image


def _in_colours(image: Image.Image, channels: int) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    elif image.mode not in ("RGB", "L"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image if image.mode == _mode(channels) else image.convert(_mode(channels))


def _is_kept(data: bytes, opened: Image.Image, fitted: Image.Image) -> bool:
    sixteen_bits = opened.format == "PNG" and data[24] == 16
    upright = opened.getexif().get(ExifTags.Base.Orientation, 1) == 1
    same = opened.size == fitted.size and opened.mode == fitted.mode
    opaque = not opened.has_transparency_data
    return opened.format in _KEPT and same and upright and opaque and not sixteen_bits


def _stored(image: Image.Image, form: Format, bits: int) -> StoredImage:
    """`image`, fitted, in the wanted format without loss."""
    if bits < 8:
        mask = 256 - (1 << (8 - bits))
        image = image.point([value & mask for value in range(256)] * len(image.getbands()))
    buffer = io.BytesIO()
    if form == "raw":
        image.save(buffer, "PPM")
        return StoredImage(buffer.getvalue(), "pgm" if image.mode == "L" else "ppm")
    if form == "webp" or (form == "original" and image.mode == "RGB"):
        image.save(buffer, "WEBP", lossless=True, method=_WEBP_METHOD, quality=_WEBP_EFFORT)
        return StoredImage(buffer.getvalue(), "webp")
    image.save(buffer, "PNG", compress_level=_PNG_EFFORT)
    return StoredImage(buffer.getvalue(), "png")


def _mode(channels: int) -> str:
    return {1: "L", 3: "RGB"}[channels]
