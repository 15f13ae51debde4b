import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers
from PIL import Image

from nvae.batch_norm import BatchNorm
from nvae.model import NVAE
from nvae.pixels import crop_border, to_model, to_uint8
from pipeline.models.inference import inference, latent_noise
from pipeline.models.sampling import (
    TemperatureError,
    animation,
    grid,
    png,
    recalibrate_batch_norm,
    reconstruct,
    sample_images,
)
from tests.pipeline.models.tiny import tiny_images, tiny_model

MODEL = tiny_model()
TWENTY = sample_images(MODEL, 20, 0.7, seed=5, batch_size=20)
GREY: dict[str, Any] = {"likelihood": "bernoulli", "image_channels": 1, "border_pixels": 1}


def nearly_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for one grey level of rounding: kernels add up differently in other batches."""
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max(initial=0)) <= 1


@settings(max_examples=12, deadline=None)
@given(first=integers(0, 19), count=integers(0, 20), batch_size=integers(1, 7))
def test_an_image_is_the_same_picture_whatever_the_count_and_the_batch(first, count, batch_size):
    count = min(count, 20 - first)
    images = sample_images(MODEL, count, 0.7, seed=5, batch_size=batch_size, first_index=first)
    assert nearly_equal(images, TWENTY[first : first + count])


def test_the_noise_of_an_image_does_not_depend_on_the_images_beside_it():
    together, alone = latent_noise(3, range(100)), latent_noise(3, [57])
    for shape in [(2, 4, 4), (2, 8, 8)]:
        assert torch.equal(together((100, *shape))[57:58], alone((1, *shape)))


def test_noise_is_standard_normal_and_differs_between_seeds_images_draws_and_groups():
    drawn = {}
    for seed, image, draw in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0)]:
        noise = latent_noise(seed, [image], draw=draw)
        for group in range(2):
            drawn[seed, image, draw, group] = noise((1, 20, 16, 16)).flatten()
    correlations = torch.corrcoef(torch.stack(list(drawn.values()))) - torch.eye(len(drawn))
    assert correlations.abs().max() < 0.07
    assert all(abs(values.mean()) < 0.06 and abs(values.std() - 1) < 0.05 for values in drawn.values())


def test_noise_for_another_number_of_images_is_a_bug_of_the_caller():
    with pytest.raises(ValueError, match="3 images was asked for 2"):
        latent_noise(0, range(3))((2, 1, 1, 1))


def test_two_seeds_give_two_pictures():
    assert not nearly_equal(sample_images(MODEL, 4, 0.7, seed=6), TWENTY[:4])


def test_a_lower_temperature_brings_the_images_closer_together():
    hot, cold = (sample_images(MODEL, 16, t, seed=0).astype(float) for t in (1.0, 0.01))
    assert cold.std(axis=0).mean() < 0.1 * hot.std(axis=0).mean()


def test_drawn_pixels_are_reproducible_and_calm_down_with_their_own_temperature():
    mean, drawn, cool = (
        sample_images(MODEL, 8, 0.7, 5, pixels=pixels, pixel_temperature=t).astype(float)
        for pixels, t in [("mean", 1.0), ("sample", 1.0), ("sample", 0.05)]
    )
    again = sample_images(MODEL, 3, 0.7, 5, pixels="sample", first_index=2, batch_size=2)
    assert nearly_equal(again, drawn[2:5].astype(np.uint8))
    assert drawn.std() > cool.std()
    assert not np.array_equal(mean, drawn)


def test_the_border_is_cut_off_and_grey_images_have_one_channel():
    images = sample_images(tiny_model(**GREY), 3, 1.0, seed=0)
    assert images.shape == (3, 6, 6, 1)
    assert images.dtype == np.uint8


def test_sampling_leaves_the_model_as_it_was():
    model = tiny_model().train()
    frozen = next(module for module in model.modules() if isinstance(module, BatchNorm)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sample_images(model, 2, 0.7, seed=0)
    reconstruct(model, tiny_images(2, model.config))
    assert model.training
    assert not frozen.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sampling_ignores_an_autocast_around_it():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nearly_equal(sample_images(MODEL, 4, 0.7, seed=5), TWENTY[:4])


@pytest.mark.parametrize("settings", [{}, {"pixel_bits": 5}, GREY])
def test_each_original_is_followed_by_its_reconstruction(settings):
    model = tiny_model(**settings)
    stored = tiny_images(5, model.config)
    pairs = reconstruct(model, stored, batch_size=2)
    originals, reconstructions = pairs[::2], pairs[1::2]
    border = model.config.border_pixels
    inner = stored[..., border : 8 - border, border : 8 - border].permute(0, 2, 3, 1).numpy().astype(int)
    levels = 2 if model.config.likelihood == "bernoulli" else 2**model.config.pixel_bits
    shown = inner * 255 if levels == 2 else np.round(inner * levels // 256 * 255 / (levels - 1))
    assert nearly_equal(originals, shown.astype(np.uint8))
    with inference(model):
        means = model(to_model(stored, model.config), latent_noise(0, range(5))).likelihood.mean()
    expected = to_uint8(crop_border(means, border)).permute(0, 2, 3, 1).numpy()
    assert nearly_equal(reconstructions, expected)


def test_a_grid_shows_the_images_row_by_row_on_white():
    images = np.stack([np.full((4, 6, 3), value, np.uint8) for value in (10, 20, 30)])
    pixels = np.asarray(grid(images, columns=2))
    assert pixels.shape == (10, 14, 3)
    assert [pixels[0, 0, 0], pixels[0, 8, 0], pixels[6, 0, 0]] == [10, 20, 30]
    assert (pixels[4:6] == 255).all()
    assert (pixels[6:, 8:] == 255).all()


def test_a_png_holds_the_pixels_exactly():
    image = grid(TWENTY)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(image)))), np.asarray(image))


def decoder_norms(model: NVAE) -> list[BatchNorm]:
    return [module for module in model.postprocess.modules() if isinstance(module, BatchNorm)]


def test_recalibrated_batch_norm_has_the_statistics_of_prior_samples():
    model = tiny_model()
    encoder = [buffer.clone() for buffer in model.preprocess.buffers()]
    assert recalibrate_batch_norm(model, temperature=0.7, batches=120)
    seen: list[torch.Tensor] = []
    norm = decoder_norms(model)[0]
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with inference(model) as device:
        model.sample(2000, latent_noise(9, range(2000), device), 0.7)
    mean, deviation = seen[0].mean(dim=(0, 2, 3)), seen[0].std(dim=(0, 2, 3))
    assert torch.allclose(norm.running_mean, mean, atol=0.15 * float(deviation.max()))
    assert torch.allclose(norm.running_var.sqrt(), deviation, rtol=0.2)
    assert all(torch.equal(a, b) for a, b in zip(encoder, model.preprocess.buffers(), strict=True))


def test_recalibration_that_does_not_stay_finite_is_undone():
    model = tiny_model()
    with torch.no_grad():
        next(iter(decoder_norms(model))).weight.fill_(float("inf"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not recalibrate_batch_norm(model, temperature=0.7, batches=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_temperature_per_scale_multiplies_the_noise_of_its_groups():
    with inference(MODEL):
        noise = latent_noise(5, [0])
        eps = [noise((1, *shape)) for shape in MODEL.config.latent_shapes]
        given = iter([1.2 * eps[0], 0.3 * eps[1], 0.3 * eps[2]])
        expected = to_uint8(MODEL.sample(1, lambda _: next(given)).mean()).permute(0, 2, 3, 1).numpy()
    assert nearly_equal(sample_images(MODEL, 1, (1.2, 0.3), seed=5), expected)


def test_one_temperature_is_that_of_all_scales():
    for temperature in ((0.7,), (0.7, 0.7)):
        assert nearly_equal(sample_images(MODEL, 4, temperature, seed=5), TWENTY[:4])


def test_temperatures_that_the_scales_do_not_fit_are_refused_with_the_scales():
    with pytest.raises(TemperatureError, match=r"3 temperatures .* the model has 2 scales \(2x2, 4x4\)"):
        sample_images(MODEL, 1, (1.0, 0.9, 0.8), seed=0)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(TemperatureError, match="numbers from 0"):
            sample_images(MODEL, 1, wrong, seed=0)


def test_reconstructions_at_temperature_zero_do_not_depend_on_the_seed():
    stored = tiny_images(3, MODEL.config)
    means = [reconstruct(MODEL, stored, seed, temperature=0) for seed in (0, 1)]
    draws = [reconstruct(MODEL, stored, seed) for seed in (0, 1)]
    assert np.array_equal(*means)
    assert not nearly_equal(*draws)


@pytest.mark.parametrize("form", ["GIF", "PNG"])
def test_an_animation_goes_there_and_back_and_is_large_enough_to_see(form):
    with Image.open(io.BytesIO(animation(TWENTY[:4], form))) as image:
        assert (image.format, image.size, image.n_frames) == (form, (128, 128), 6)
        frames = []
        for frame in range(6):
            image.seek(frame)
            frames.append(np.asarray(image.convert("RGB")).astype(int)[::16, ::16])
    for frame, original in zip(frames, [0, 1, 2, 3, 2, 1], strict=True):
        # Of a GIF's 256 colours one is near, but not equal.
        assert np.abs(frame - TWENTY[original]).max() <= (0 if form == "PNG" else 40)
