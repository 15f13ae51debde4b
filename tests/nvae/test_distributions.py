import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from nvae.config import NVAEConfig
from nvae.distributions import (
    BernoulliImage,
    LogisticMixtureImage,
    Normal,
    NormalImage,
    image_likelihood,
    logit_channels,
    soft_clamp,
)
from tests.nvae.published_cases import ORACLE
from tests.nvae.tiny import seeded, uniform_noise


def random_logits(components: int, size: int = 1, seed: int = 0, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(1, 10 * components, size, size, generator=seeded(seed), dtype=torch.float64)


def levels(bits: int) -> Tensor:
    return torch.linspace(-1, 1, 2**bits, dtype=torch.float64)


def one_pixel(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    """Images (N, 3, 1, 1) from N values per colour."""
    return torch.stack([red, green, blue], dim=1)[:, :, None, None]


def component(means: list[float], log_scales: list[float]) -> Tensor:
    """Logits (1, 10, 1, 1) of one component, whose colours are independent."""
    per_colour = [
        value for mean, log_scale in zip(means, log_scales, strict=True) for value in (mean, log_scale, 0)
    ]
    return torch.tensor([0, *per_colour], dtype=torch.float64).view(1, 10, 1, 1)


def total_probability(logits: Tensor, bits: int, published: bool = False) -> float:
    """Sum over all colours of a pixel of one component with independent colours.

    The sum over (r, g, b) factorizes; every factor is found with the other colours held.
    """
    every, held = levels(bits), torch.full((2**bits,), levels(bits)[0].item(), dtype=torch.float64)
    probability = [
        LogisticMixtureImage(logits, 1, bits, published).log_prob(one_pixel(*colours)).exp()
        for colours in ((every, held, held), (held, every, held), (held, held, every))
    ]
    at_held = probability[0][0].item()
    return math.prod(values.sum().item() for values in probability) / at_held**2


# --- logistic mixture --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [5, 8])
@settings(deadline=None, max_examples=50)
@given(
    means=st.lists(st.floats(-1.5, 1.5), min_size=3, max_size=3),
    log_scales=st.lists(st.floats(-4, 2), min_size=3, max_size=3),
)
def test_a_discretized_logistic_sums_to_one_over_all_pixel_values(
    bits: int, means: list[float], log_scales: list[float]
) -> None:
    # Held at the lowest level, which stays likely enough for the quotient to be exact.
    logits = component([mean - 1 for mean in means], log_scales)
    assert total_probability(logits, bits) == pytest.approx(1, abs=1e-9)


@given(seed=st.integers(0, 1000))
def test_a_mixture_with_dependent_colours_sums_to_one_over_all_of_them(seed: int) -> None:
    bits, components = 2, 3
    colours = torch.tensor(list(product(levels(bits).tolist(), repeat=3)), dtype=torch.float64)
    likelihood = LogisticMixtureImage(random_logits(components, seed=seed), components, bits)
    assert likelihood.log_prob(one_pixel(*colours.T)).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_published_probabilities_sum_to_more_than_one_near_white_at_8_bits_only() -> None:
    logits = component([0.99, -0.99, -0.99], [-4.5, -4.5, -4.5])
    assert total_probability(logits, 8, published=True) == pytest.approx(1.367, abs=1e-3)
    assert total_probability(logits, 5, published=True) == pytest.approx(1.0, abs=1e-3)
    assert total_probability(logits, 8) == pytest.approx(1, abs=1e-9)


@pytest.mark.skipif(not (ORACLE / "schedules.npz").exists(), reason="no published values")
@pytest.mark.parametrize("bits", [5, 8])
def test_published_log_probabilities_of_grey_pixels_are_reproduced(bits: int) -> None:
    with np.load(ORACLE / "schedules.npz") as recorded:
        logits = torch.from_numpy(recorded[f"dml{bits}_param"]).view(1, 30, 1, 1)
        expected = torch.from_numpy(recorded[f"dml{bits}_logp_gray"])
    grey = torch.linspace(0, 1, 2**bits) * 2 - 1
    found = LogisticMixtureImage(logits, 3, bits, published=True).log_prob(one_pixel(grey, grey, grey))
    assert_close(found.flatten(), expected.flatten().to(found), rtol=1e-5, atol=1e-5)


@given(mean=st.floats(-0.9, 0.9), log_scale=st.floats(-3, 0), value=st.integers(0, 255))
def test_a_bin_has_the_difference_of_the_logistic_distribution_function(
    mean: float, log_scale: float, value: int
) -> None:
    def cdf(x: float) -> float:
        return 1 / (1 + math.exp(-(x - mean) / math.exp(log_scale)))

    y, half = 2 * value / 255 - 1, 1 / 255
    expected = (cdf(y + half) if value < 255 else 1.0) - (cdf(y - half) if value > 0 else 0.0)
    mixture = LogisticMixtureImage(component([mean, 0, 0], [log_scale, 0, 0]), 1, 8)
    reference = LogisticMixtureImage(component([0, 0, 0], [0, 0, 0]), 1, 8)
    pixel = one_pixel(*torch.tensor([[y], [0.0], [0.0]], dtype=torch.float64))
    # Green and blue are the same in both, and red of the second is known.
    ratio = (mixture.log_prob(pixel) - reference.log_prob(pixel)).exp().item()
    known = (1 / (1 + math.exp(-y - half)) if value < 255 else 1.0) - (
        1 / (1 + math.exp(-y + half)) if value > 0 else 0.0
    )
    assert ratio * known == pytest.approx(expected, rel=1e-6)


def test_likelihood_and_gradient_stay_finite_for_extreme_logits() -> None:
    for size in (1e2, 1e4):
        logits = (size * torch.randn(2, 20, 4, 4, generator=seeded(1))).requires_grad_()
        images = torch.randint(0, 256, (2, 3, 4, 4), generator=seeded(2)) / 127.5 - 1
        total = LogisticMixtureImage(logits, 2, 8).log_prob(images).sum()
        (gradient,) = torch.autograd.grad(total, logits)
        assert total.isfinite()
        assert gradient.isfinite().all()


def test_draws_are_as_frequent_as_their_probability_says() -> None:
    bits, count = 3, 200
    logits = random_logits(2, seed=4)
    logits[:, 2:].view(1, 3, 3, 2, 1, 1)[:, :, 2] = 0  # independent colours
    likelihood = LogisticMixtureImage(logits.expand(1, -1, count, count), 2, bits)
    drawn = (likelihood.sample(uniform_noise(0)) * (2**bits - 1)).round().long()
    joint = torch.zeros(2**bits, 2**bits, 2**bits, dtype=torch.float64)
    red, green, blue = drawn.flatten(2)[0]
    joint.index_put_((red, green, blue), torch.tensor(1 / count**2, dtype=torch.float64), accumulate=True)
    colours = torch.tensor(list(product(levels(bits).tolist(), repeat=3)), dtype=torch.float64)
    expected = LogisticMixtureImage(logits, 2, bits).log_prob(one_pixel(*colours.T)).exp().view_as(joint)
    assert_close(joint.sum((1, 2)), expected.sum((1, 2)), atol=0.01, rtol=0)
    assert_close(joint.sum((0, 1)), expected.sum((0, 1)), atol=0.01, rtol=0)
    assert_close(joint.sum(2), expected.sum(2), atol=0.01, rtol=0)


@pytest.mark.parametrize(("published", "narrower"), [(False, True), (True, False)])
def test_a_lower_pixel_temperature_narrows_draws_but_in_the_published_code(
    published: bool, narrower: bool
) -> None:
    logits = component([0, 0, 0], [-3, -3, -3]).expand(1, -1, 50, 50)
    likelihood = LogisticMixtureImage(logits, 1, 8, published)
    cold, warm = (likelihood.sample(uniform_noise(0), t).std().item() for t in (0.5, 1.0))
    assert (cold < warm) == narrower
    assert cold / warm == pytest.approx(0.5 if narrower else 2, rel=0.01)


def test_the_mean_image_of_one_component_is_its_mean_with_the_colours_joined() -> None:
    logits = component([0.2, -0.4, 0.9], [-3, -3, -3])
    coefficients = logits[:, 1:].view(3, 3)[:, 2]
    coefficients[:] = torch.tensor([0.5, -0.3, 2.0])
    c_red, c_green, c_blue = coefficients.tanh().tolist()
    green = -0.4 + c_red * 0.2
    blue = 0.9 + c_green * 0.2 + c_blue * green
    expected = torch.tensor([0.2, green, min(blue, 1.0)], dtype=torch.float64) / 2 + 0.5
    assert_close(LogisticMixtureImage(logits, 1, 8).mean().flatten(), expected)


# --- normal and Bernoulli ----------------------------------------------------------------------


def normals(seed: int) -> tuple[Normal, Normal, torch.distributions.Normal, torch.distributions.Normal]:
    """A posterior and a prior (2, 3, 4, 4), ours and torch's."""
    parameters = torch.randn(4, 2, 3, 4, 4, generator=seeded(seed), dtype=torch.float64)
    ours = [Normal.soft_clamped(*parameters[i : i + 2]) for i in (0, 2)]
    theirs = [
        torch.distributions.Normal(
            5 * torch.tanh(parameters[i] / 5), (5 * torch.tanh(parameters[i + 1] / 5)).exp() + 0.01
        )
        for i in (0, 2)
    ]
    return ours[0], ours[1], theirs[0], theirs[1]


def test_density_and_kl_of_normals_are_those_of_torch() -> None:
    posterior, prior, torch_posterior, torch_prior = normals(0)
    x = torch.randn(2, 3, 4, 4, generator=seeded(1), dtype=torch.float64)
    assert_close(posterior.log_prob(x), torch_posterior.log_prob(x))
    kl = torch.distributions.kl_divergence(torch_posterior, torch_prior)
    assert_close(posterior.kl_from(prior), kl)


def test_analytic_kl_is_the_mean_log_ratio_of_draws() -> None:
    posterior, prior, *_ = normals(2)
    eps = torch.randn(4000, 2, 3, 4, 4, generator=seeded(3), dtype=torch.float64)
    z = posterior.sample(eps)
    ratios = (posterior.log_prob(z) - prior.log_prob(z)).sum((1, 2, 3, 4))
    standard_error = ratios.std().item() / math.sqrt(len(ratios))
    assert posterior.kl_from(prior).sum().item() == pytest.approx(
        ratios.mean().item(), abs=5 * standard_error
    )


@given(seed=st.integers(0, 1000))
def test_kl_is_never_negative(seed: int) -> None:
    posterior, prior, *_ = normals(seed)
    assert (posterior.kl_from(prior) >= -1e-12).all()


def test_temperature_multiplies_sigma_with_its_floor() -> None:
    zeros = torch.zeros(3)
    assert Normal.soft_clamped(zeros, zeros, 0.7).sigma.tolist() == pytest.approx([1.01 * 0.7] * 3)


@given(x=st.floats(-1e6, 1e6))
def test_the_soft_clamp_is_bounded_and_close_to_the_identity_near_zero(x: float) -> None:
    clamped = soft_clamp(torch.tensor(x, dtype=torch.float64)).item()
    assert -5 <= clamped <= 5
    if abs(x) < 0.1:
        # The second term of 5 tanh(x / 5), whose series alternates.
        assert clamped == pytest.approx(x, abs=abs(x) ** 3 / 75 + 1e-15)


def test_half_precision_parameters_give_single_precision_distributions() -> None:
    half = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert Normal.soft_clamped(half, half).sigma.dtype == torch.float32
    config = NVAEConfig(mixture_components=1)
    logits = torch.zeros(1, logit_channels(config), 2, 2, dtype=torch.bfloat16)
    assert image_likelihood(logits, config).logits.dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 3])
def test_the_normal_likelihood_is_that_of_torch_and_draws_from_it(channels: int) -> None:
    config = NVAEConfig(likelihood="normal", image_channels=channels)
    logits = torch.randn(2, logit_channels(config), 3, 3, generator=seeded(0), dtype=torch.float64)
    images = torch.rand(2, channels, 3, 3, generator=seeded(1), dtype=torch.float64) * 2 - 1
    mu, log_sigma = (5 * torch.tanh(part / 5) for part in logits.chunk(2, dim=1))
    expected = torch.distributions.Normal(mu, log_sigma.exp() + 0.01)
    likelihood = image_likelihood(logits, config)
    assert_close(likelihood.log_prob(images), expected.log_prob(images).sum(1))
    eps = torch.randn(2, channels, 3, 3, generator=seeded(2), dtype=torch.float64)
    drawn = likelihood.sample(lambda _: torch.special.ndtr(eps), temperature=0.5)
    assert_close(drawn, (mu + 0.5 * expected.scale * eps).clamp(-1, 1) / 2 + 0.5)


def test_the_published_normal_likelihood_ignores_the_temperature() -> None:
    likelihood = NormalImage(torch.zeros(1, 6, 4, 4), ignore_temperature=True)
    assert torch.equal(likelihood.sample(uniform_noise(0), 0.1), likelihood.sample(uniform_noise(0), 1.0))


def test_bernoulli_probabilities_sum_to_one_and_are_those_of_torch() -> None:
    logits = torch.randn(2, 1, 3, 3, generator=seeded(0), dtype=torch.float64) * 5
    likelihood = BernoulliImage(logits)
    images = torch.randint(0, 2, logits.shape, generator=seeded(1)).double()
    expected = torch.distributions.Bernoulli(logits=logits)
    assert_close(likelihood.log_prob(images), expected.log_prob(images).sum(1))
    both = likelihood.log_prob(images).exp() + likelihood.log_prob(1 - images).exp()
    assert_close(both, torch.ones_like(both))


def test_bernoulli_draws_are_binary_and_as_frequent_as_their_mean_says() -> None:
    likelihood = BernoulliImage(torch.full((1, 1, 200, 200), 0.8))
    drawn = likelihood.sample(uniform_noise(0))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn.mean().item() == pytest.approx(likelihood.mean()[0, 0, 0, 0].item(), abs=0.01)
