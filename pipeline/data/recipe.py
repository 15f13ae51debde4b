"""How a stored image becomes the model's: averaged, framed, binarized.

Which pixels of a grey image are set when the likelihood is over binary images is a pure
function of (seed, position). Validation images are binarized the same way in every run, so
that runs can be compared.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nvae.config import NVAEConfig
from pipeline import storage
from pipeline.data.images import Pixels, decode
from pipeline.data.index import Index, ShardError
from pipeline.data.randomness import words


@dataclass(frozen=True)
class Recipe:
    """How a stored image becomes the model's."""

    stored_size: int
    factor: int
    border: int
    channels: int
    binarize_key: tuple[int | str, ...] | None
    """Key of the random numbers, if images are to be binarized."""

    @property
    def size(self) -> int:
        return self.stored_size // self.factor + 2 * self.border

    @property
    def blank(self) -> int:
        """Pixel value that stands for nothing: between black and white where there is a between."""
        return 128 if self.binarize_key is None else 0

    def write(self, data: bytes, position: int, out: Pixels) -> None:
        """Decode `data` into `out` (C, H, W), which holds zeros.

        Raises RejectedImageError, having written nothing, if it is no such image.
        """
        pixels = decode(data, self.stored_size, self.channels, self.factor).transpose(2, 0, 1)
        if self.binarize_key is not None:
            pixels = _binarized(pixels, self.binarize_key, position)
        inner = slice(self.border, self.size - self.border)
        out[:, inner, inner] = pixels


def recipe_for(model: NVAEConfig, index: Index, binarize_key: tuple[int | str, ...]) -> Recipe:
    """Raises ShardError if images of the data set cannot become images of the model."""
    where = f"{storage.shown(index.root)} holds images of {index.image_size}x{index.image_size} pixels"
    inner = model.image_size - 2 * model.border_pixels
    if index.channels != model.image_channels:
        raise ShardError(
            f"{where} with {index.channels} channels; model.image_channels is {model.image_channels}. "
            f"Set it to {index.channels}, or build the data set with --channels {model.image_channels}."
        )
    if inner < 1 or index.image_size % inner:
        raise ShardError(
            f"{where}; the model sees {inner}x{inner} (model.image_size {model.image_size} less the border). "
            f"Images are averaged over whole squares of pixels: choose a model.image_size that divides "
            f"{index.image_size}, or build the data set with --image-size {inner}."
        )
    _check_bits(model, index, where)
    return Recipe(
        stored_size=index.image_size,
        factor=index.image_size // inner,
        border=model.border_pixels,
        channels=index.channels,
        binarize_key=binarize_key if model.likelihood == "bernoulli" else None,
    )


def _check_bits(model: NVAEConfig, index: Index, where: str) -> None:
    """Raises ShardError if the model looks at bits that the data set was built without."""
    bits = index.arguments.get("bits")
    if not isinstance(bits, int) or bits >= 8:
        return
    averaged = index.image_size != model.image_size - 2 * model.border_pixels
    if model.likelihood == "bernoulli" or averaged or model.pixel_bits > bits:
        raise ShardError(
            f"{where} of which {bits} bits were kept: enough for model.pixel_bits up to {bits} at their full "
            f"size, not for this model. Build the data set again without --bits."
        )


def _binarized(pixels: Pixels, key: tuple[int | str, ...], position: int) -> Pixels:
    """Each pixel of value v becomes 1 with probability v / 255, else 0."""
    random: NDArray[np.uint32] = words((pixels.size + 1) // 2, *key, position).view(np.uint32)
    # 255 levels, uniform up to 2^-24; the topmost of 2^32 numbers would be a 256th.
    levels = np.minimum(random[: pixels.size] // np.uint32(2**32 // 255), 254).reshape(pixels.shape)
    binary: Pixels = (levels < pixels).astype(np.uint8)
    return binary
