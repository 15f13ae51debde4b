# N images, B images of a batch, C colours, H x W pixels without the border.
"""Pictures made by a model: prior samples, reconstructions, grids.

Pixels are the likelihood's mean by default, since that is the picture one would show: what
drawing pixels adds is noise that no pixel shares with its neighbour, and a model that is
still young has much of it. `pixels="sample"` draws them, as the published figures did.

A temperature multiplies the latents' noise and not the standard deviations in the model, which is
the same number; so one per scale needs nothing of the model.
"""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nvae.batch_norm import BatchNorm
from nvae.config import NVAEConfig
from nvae.distributions import Likelihood, Noise
from nvae.model import NVAE
from nvae.pixels import centred, crop_border, to_model, to_uint8
from pipeline.errors import InputError
from pipeline.models.inference import inference, latent_noise, pixel_noise

Images = NDArray[np.uint8]
"""(N, H, W, C), 0..255."""
Temperature = float | Sequence[float]
"""Factor of the latents' spread: one for all, or one per scale, coarsest first."""

_GAP_PIXELS = 2
_ANIMATION_PIXELS = 128
_FRAME_MILLISECONDS = 80
_RECALIBRATION_BATCH = 16
# Recalibrating on the very latents that are shown afterwards would flatter them.
_RECALIBRATION_DRAW = 1


class TemperatureError(InputError):
    """Temperatures that the scales of a model do not fit."""


@dataclass(frozen=True)
class Drawing:
    """All that decides, beside the weights and its number, what picture a sample is."""

    temperature: Temperature = 0.7
    seed: int = 0
    pixels: Literal["mean", "sample"] = "mean"
    pixel_temperature: float = 1.0
    """Does to the likelihood what `temperature` does to the priors; has no effect on its mean."""


def sample_images(
    model: NVAE,
    count: int,
    temperature: Temperature,
    seed: int,
    *,
    batch_size: int = 16,
    first_index: int = 0,
    pixels: Literal["mean", "sample"] = "mean",
    pixel_temperature: float = 1.0,
) -> Images:
    """The images number `first_index` to `first_index + count - 1` of this seed: (N, H, W, C).

    Image i is the same picture whatever the count, the batch size and (up to rounding) the device.
    Raises TemperatureError if there are several temperatures, but not one per scale.
    """
    drawing = Drawing(temperature, seed, pixels, pixel_temperature)
    drawn = samples(model, range(first_index, first_index + count), drawing, batch_size)
    pictures = [images for _, images in drawn]
    return np.concatenate(pictures) if pictures else _no_images(model.config)


def samples(
    model: NVAE, indices: Sequence[int], drawing: Drawing, batch_size: int = 16
) -> Iterator[tuple[Sequence[int], Images]]:
    """The images with these numbers, batch by batch, each batch (B, H, W, C) after its numbers."""
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        # Not around the loop: whoever takes the batches would work in its state.
        with inference(model) as device:
            noise = tempered(latent_noise(drawing.seed, batch, device), drawing.temperature, model.config)
            likelihood = model.sample(len(batch), noise)
            images = likelihood.mean()
            if drawing.pixels == "sample":
                uniform = pixel_noise(drawing.seed, batch, device)
                images = likelihood.sample(uniform, drawing.pixel_temperature)
            pictures = picture(images, model.config)
        yield batch, pictures


def reconstruct(
    model: NVAE,
    images: Tensor,
    seed: int = 0,
    *,
    temperature: Temperature = 1.0,
    batch_size: int = 16,
) -> Images:
    """Each image as the model sees it, followed by its reconstruction: (2 N, H, W, C).

    `images` are stored pixels, uint8 (N, C, H, W) with the border. The latents are drawn from
    their posteriors: it is what the likelihood is measured on. `temperature` multiplies the
    posteriors' standard deviations; at 0 the latents are their means. With an even number of
    columns, `grid` shows the pairs side by side.
    """
    pairs = []
    with inference(model) as device:
        for start in range(0, len(images), batch_size):
            seen = to_model(images[start : start + batch_size].to(device), model.config)
            indices = range(start, start + len(seen))
            noise = tempered(latent_noise(seed, indices, device), temperature, model.config)
            likelihood: Likelihood = model(seen, noise).likelihood
            original = picture(centred(seen, model.config) / 2 + 0.5, model.config)
            pairs.append(np.stack([original, picture(likelihood.mean(), model.config)], axis=1))
    return np.concatenate(pairs).reshape(-1, *pairs[0].shape[2:]) if pairs else _no_images(model.config)


def tempered(noise: Noise, temperature: Temperature, config: NVAEConfig) -> Noise:
    """`noise`, multiplied group by group by the temperature of its scale, for one walk down the groups."""
    factors = iter(per_group(temperature, config))

    def tempered_noise(shape: tuple[int, ...]) -> Tensor:
        return noise(shape) * next(factors)

    return tempered_noise


def per_group(temperature: Temperature, config: NVAEConfig) -> list[float]:
    """The temperature of each group, coarsest first.

    Raises TemperatureError if there are several, but not one per scale, or one is no number >= 0.
    """
    several = not isinstance(temperature, int | float) and len(temperature) > 1
    scales = config.num_scales
    given = [temperature] if isinstance(temperature, int | float) else list(temperature)
    if len(given) not in (1, scales):
        raise TemperatureError(
            f"{len(given)} temperatures are given, and the model has {scales} scales "
            f"({', '.join(scale_names(config))}): give one for all or {scales}, coarsest first."
        )
    if not all(math.isfinite(each) and each >= 0 for each in given):
        raise TemperatureError(f"Temperatures are numbers from 0, not {', '.join(map(str, given))}.")
    each_scale = given if several else given * scales
    return [
        each for each, groups in zip(each_scale, config.groups_per_scale, strict=True) for _ in range(groups)
    ]


def scale_names(config: NVAEConfig) -> list[str]:
    """The resolution of each scale, coarsest first, such as `8x8`."""
    sizes = dict.fromkeys((height, width) for _, height, width in config.latent_shapes)
    return [f"{height}x{width}" for height, width in sizes]


def picture(images: Tensor, config: NVAEConfig) -> Images:
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


def animation(images: Images, form: Literal["GIF", "PNG"]) -> bytes:
    """The images (N, H, W, C), N >= 1, there and back for ever; a GIF has few colours, a PNG all.

    They are enlarged by whole factors to 128 pixels or more: players show them as they are.
    """
    factor = max(1, -(-_ANIMATION_PIXELS // images.shape[1]))
    large = images.repeat(factor, axis=1).repeat(factor, axis=2)
    frames = [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in large]
    frames += frames[-2:0:-1]
    buffer = io.BytesIO()
    first, *others = frames
    first.save(buffer, format=form, save_all=True, append_images=others, duration=_FRAME_MILLISECONDS, loop=0)
    return buffer.getvalue()


def recalibrate_batch_norm(model: NVAE, temperature: Temperature, seed: int = 0, batches: int = 100) -> bool:
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
            model.sample(_RECALIBRATION_BATCH, tempered(noise, temperature, model.config))
        finite = all(bool(buffer.isfinite().all()) for buffer in _statistics(norms))
        if not finite:
            for buffer, old in zip(_statistics(norms), before, strict=True):
                buffer.copy_(old)
    return finite


def _statistics(norms: Iterable[BatchNorm]) -> Iterator[Tensor]:
    for norm in norms:
        yield from norm.buffers()
