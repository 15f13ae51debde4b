# N images, B images of a batch, C colours, H x W pixels without the border.
"""Pictures made by a model: prior samples, reconstructions, grids.

Pixels are the likelihood's mean by default, since that is the picture one would show: what
drawing pixels adds is noise that no pixel shares with its neighbour, and a model that is
still young has much of it. `pixels="sample"` draws them, as the published figures did.
"""

import io
import math
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nvae.batch_norm import BatchNorm
from nvae.config import NVAEConfig
from nvae.distributions import Likelihood
from nvae.model import NVAE
from nvae.pixels import centred, crop_border, to_model, to_uint8
from pipeline.models.inference import inference, latent_noise, pixel_noise

Images = NDArray[np.uint8]
"""(N, H, W, C), 0..255."""

_GAP_PIXELS = 2
_RECALIBRATION_BATCH = 16
# Recalibrating on the very latents that are shown afterwards would flatter them.
_RECALIBRATION_DRAW = 1


def sample_images(
    model: NVAE,
    count: int,
    temperature: float,
    seed: int,
    *,
    batch_size: int = 16,
    first_index: int = 0,
    pixels: Literal["mean", "sample"] = "mean",
    pixel_temperature: float = 1.0,
) -> Images:
    """The images number `first_index` to `first_index + count - 1` of this seed: (N, H, W, C).

    `temperature` multiplies the standard deviation of every prior; `pixel_temperature` does
    the like to the likelihood, and has no effect on its mean. Image i is the same picture
    whatever the count, the batch size and (up to rounding) the device.
    """
    pictures = []
    with inference(model) as device:
        for start in range(first_index, first_index + count, batch_size):
            indices = range(start, min(start + batch_size, first_index + count))
            likelihood = model.sample(len(indices), latent_noise(seed, indices, device), temperature)
            if pixels == "mean":
                images = likelihood.mean()
            else:
                images = likelihood.sample(pixel_noise(seed, indices, device), pixel_temperature)
            pictures.append(_picture(images, model.config))
    return np.concatenate(pictures) if pictures else _no_images(model.config)


def reconstruct(model: NVAE, images: Tensor, seed: int = 0, *, batch_size: int = 16) -> Images:
    """Each image as the model sees it, followed by its reconstruction: (2 N, H, W, C).

    `images` are stored pixels, uint8 (N, C, H, W) with the border. The latents are drawn from
    their posteriors: it is what the likelihood is measured on. With an even number of
    columns, `grid` shows the pairs side by side.
    """
    pairs = []
    with inference(model) as device:
        for start in range(0, len(images), batch_size):
            seen = to_model(images[start : start + batch_size].to(device), model.config)
            indices = range(start, start + len(seen))
            likelihood: Likelihood = model(seen, latent_noise(seed, indices, device)).likelihood
            original = _picture(centred(seen, model.config) / 2 + 0.5, model.config)
            pairs.append(np.stack([original, _picture(likelihood.mean(), model.config)], axis=1))
    return np.concatenate(pairs).reshape(-1, *pairs[0].shape[2:]) if pairs else _no_images(model.config)


def _picture(images: Tensor, config: NVAEConfig) -> Images:
    """(B, C, H, W) in [0, 1], with the border, as (B, H, W, C) uint8 without it."""
    visible = to_uint8(crop_border(images, config.border_pixels))
    array: Images = visible.permute(0, 2, 3, 1).cpu().numpy()
    return array


def _no_images(config: NVAEConfig) -> Images:
    size = config.image_size - 2 * config.border_pixels
    return np.zeros((0, size, size, config.image_channels), np.uint8)


def grid(images: Images, columns: int | None = None) -> Image.Image:
    """The images (N, H, W, C), N >= 1, in rows of `columns` on white; by default nearly a square."""
    count, height, width, channels = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    step_y, step_x = height + _GAP_PIXELS, width + _GAP_PIXELS
    canvas = np.full((rows * step_y - _GAP_PIXELS, columns * step_x - _GAP_PIXELS, channels), 255, np.uint8)
    for index, image in enumerate(images):
        y, x = index // columns * step_y, index % columns * step_x
        canvas[y : y + height, x : x + width] = image
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def recalibrate_batch_norm(model: NVAE, temperature: float, seed: int = 0, batches: int = 100) -> bool:
    """Re-estimate the decoder's batch-norm statistics from prior samples at `temperature`.

    At a low temperature activations spread less than in training, so that statistics of the
    training fit them badly; users of the published code report better pictures this way, but
    also NaN, where it ran in half precision. Here it runs in fp32, and if a statistic is not
    finite afterwards all the old ones are put back and the answer is False. 100 batches of 16
    samples leave 0.6% of the old statistics.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    before = [buffer.clone() for buffer in _statistics(norms)]
    with inference(model) as device:
        for norm in norms:
            norm.train()
        for batch in range(batches):
            indices = range(batch * _RECALIBRATION_BATCH, (batch + 1) * _RECALIBRATION_BATCH)
            noise = latent_noise(seed, indices, device, draw=_RECALIBRATION_DRAW)
            model.sample(_RECALIBRATION_BATCH, noise, temperature)
        finite = all(bool(buffer.isfinite().all()) for buffer in _statistics(norms))
        if not finite:
            for buffer, old in zip(_statistics(norms), before, strict=True):
                buffer.copy_(old)
    return finite


def _statistics(norms: Iterable[BatchNorm]) -> Iterator[Tensor]:
    for norm in norms:
        yield from norm.buffers()
