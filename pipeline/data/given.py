"""Image files that a user hands to a trained model, as that model takes them.

They are fitted by the rules of images.py, which data sets are built by, except that the central
square of any image is taken: whoever asks to see one picture reconstructed looks at it.
A broken file is an error and not passed over, since a few pictures were asked for by name.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvae.config import NVAEConfig
from pipeline.data.images import MAX_FILE_BYTES, RejectedImageError, prepare
from pipeline.data.recipe import Recipe
from pipeline.data.sources.files import files_below, is_named_like_an_image
from pipeline.errors import InputError


class GivenImageError(InputError):
    """An image file that is not there, or that the model cannot take."""


def image_files(places: Sequence[Path]) -> list[Path]:
    """The files among `places`, and the image files below the folders among them, in order.

    Raises GivenImageError if a place is missing or a folder has no image.
    """
    found = []
    for place in places:
        if not place.is_dir():
            found.append(place)
            continue
        below = sorted(
            file for file in files_below(place) if is_named_like_an_image(str(file.relative_to(place)))
        )
        if not below:
            raise GivenImageError(f"{place}: there is no image file in this folder; name another.")
        found += below
    missing = [file for file in found if not file.is_file()]
    if missing:
        raise GivenImageError(f"{missing[0]}: there is no such file. Check its name.")
    return found


def load_images(files: Sequence[Path], config: NVAEConfig) -> Tensor:
    """uint8 (N, C, H, W) with the border, as the loader gives them; N >= 1.

    Raises GivenImageError, naming the file, if one cannot be read or is smaller than the model's images.
    """
    size = config.image_size - 2 * config.border_pixels
    binarize_key = ("given",) if config.likelihood == "bernoulli" else None
    recipe = Recipe(size, 1, config.border_pixels, config.image_channels, binarize_key)
    images = np.zeros((len(files), config.image_channels, config.image_size, config.image_size), np.uint8)
    for position, file in enumerate(files):
        try:
            stored = prepare(_content(file), size, config.image_channels, "center", "png")
            recipe.write(stored.data, position, images[position])
        except RejectedImageError as error:
            raise GivenImageError(f"{file} {error}. Leave it out, or mend it.") from error
    return torch.from_numpy(images)


def _content(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise RejectedImageError(f"is a file of more than {MAX_FILE_BYTES >> 20} MiB")
        return file.read_bytes()
    except OSError as error:
        raise RejectedImageError(f"cannot be read ({error.strerror})") from error
