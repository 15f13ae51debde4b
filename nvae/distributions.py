# B images, C colours, M mixture components, Z latent channels; H, W of the current scale.
"""The distributions of latents and of images.

Everything here is computed in fp32 or wider: densities lose their meaning in half precision.
Log-probabilities are in nats. Images are as `nvae.pixels.to_model` makes them where a
likelihood judges them, and in [0, 1] where it makes them.

A bin of the discretized logistic has its exact probability, in a form that neither overflows
nor cancels: sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - exp(b - a)). The published code, after
PixelCNN++, subtracts the two and replaces small differences by the density in the middle of
the bin times its width, which is wrong by nats for narrow components far from the pixel; and
its right edge begins at 0.99, where it catches the value 254 of 255 too. `published` selects that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.config import NVAEConfig
from nvae.layers import at_least_float32

Noise = Callable[[tuple[int, ...]], Tensor]
"""Draws a tensor of the given shape, on the model's device: standard normal for latents,
uniform on [0, 1) for pixels."""

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_SIGMA_FLOOR = 0.01
_UNIFORM_MARGIN = 1e-5
_MIN_LOG_SCALE = -7.0


def soft_clamp(x: Tensor) -> Tensor:
    """Bends x smoothly into (-5, 5)."""
    return 5 * torch.tanh(x / 5)


@dataclass(frozen=True)
class Normal:
    """Independent normal distributions with means and standard deviations of any one shape."""

    mu: Tensor
    sigma: Tensor

    @classmethod
    def soft_clamped(cls, mu: Tensor, log_sigma: Tensor, temperature: float = 1.0) -> "Normal":
        """From unbounded parameters: both soft-clamped, a floor added to sigma.

        `temperature` multiplies sigma, floor included.
        """
        mu, log_sigma = at_least_float32(mu), at_least_float32(log_sigma)
        sigma = (soft_clamp(log_sigma).exp() + _SIGMA_FLOOR) * temperature
        return cls(soft_clamp(mu), sigma)

    def sample(self, eps: Tensor) -> Tensor:
        """The draw that belongs to standard normal `eps`; differentiable."""
        return self.mu + self.sigma * eps

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density at x, element by element."""
        deviation = (x - self.mu) / self.sigma
        return -0.5 * deviation**2 - _HALF_LOG_TWO_PI - self.sigma.log()

    def kl_from(self, prior: "Normal") -> Tensor:
        """KL(self || prior), element by element: all >= 0 up to rounding."""
        shift = (self.mu - prior.mu) / prior.sigma
        ratio = self.sigma / prior.sigma
        return 0.5 * (shift**2 + ratio**2) - 0.5 - ratio.log()


class Likelihood(Protocol):
    """Distribution of a batch of images (B, C, H, W) given the latents."""

    @property
    def logits(self) -> Tensor:
        """What the decoder put out: the unbounded parameters (B, channels, H, W)."""

    def log_prob(self, images: Tensor) -> Tensor:
        """(B, H, W) log-probability of every pixel of `images` (B, C, H, W), summed over colours."""

    def mean(self) -> Tensor:
        """(B, C, H, W) images in [0, 1] to look at: the mean, or close to it."""

    def sample(self, uniform: Noise, temperature: float = 1.0) -> Tensor:
        """(B, C, H, W) images in [0, 1], drawn with less spread at lower temperature (> 0)."""


def logit_channels(config: NVAEConfig) -> int:
    """Channels that the decoder must put out for the likelihood of `config`."""
    if config.likelihood == "bernoulli":
        return config.image_channels
    if config.likelihood == "normal":
        return 2 * config.image_channels
    # Per component: its weight; per colour a mean, a log-scale and a coefficient.
    return config.mixture_components * (1 + 3 * config.image_channels)


def image_likelihood(logits: Tensor, config: NVAEConfig) -> Likelihood:
    """The likelihood of `config` with parameters `logits` (B, logit_channels, H, W)."""
    logits = at_least_float32(logits)
    if config.likelihood == "bernoulli":
        return BernoulliImage(logits)
    if config.likelihood == "normal":
        return NormalImage(logits, ignore_temperature=config.published_compatibility)
    return LogisticMixtureImage(
        logits, config.mixture_components, config.pixel_bits, published=config.published_compatibility
    )


@dataclass(frozen=True)
class BernoulliImage:
    """Binary images: every pixel is 0 or 1 on its own."""

    logits: Tensor

    def log_prob(self, images: Tensor) -> Tensor:
        return (images * self.logits - F.softplus(self.logits)).sum(dim=1)

    def mean(self) -> Tensor:
        return self.logits.sigmoid()

    def sample(self, uniform: Noise, temperature: float = 1.0) -> Tensor:
        probability = (self.logits / temperature).sigmoid()
        return (_draw(uniform, probability) < probability).to(probability.dtype)


@dataclass(frozen=True)
class NormalImage:
    """Every colour value has a normal density on [-1, 1]: its bits per dimension are those of a
    density and cannot be compared with a discretized likelihood's.

    Draws outside [-1, 1] are clamped. The published code ignores the temperature.
    """

    logits: Tensor
    ignore_temperature: bool = False

    def log_prob(self, images: Tensor) -> Tensor:
        return self._normal().log_prob(images).sum(dim=1)

    def mean(self) -> Tensor:
        return _to_unit_range(self._normal().mu)

    def sample(self, uniform: Noise, temperature: float = 1.0) -> Tensor:
        normal = self._normal(1.0 if self.ignore_temperature else temperature)
        # In fp64, where the tails of a uniform draw are not yet coarse.
        eps = torch.special.ndtri(uniform(tuple(normal.mu.shape)).double().clamp(1e-12, 1 - 1e-12))
        return _to_unit_range(normal.sample(eps.to(normal.mu.dtype)))

    def _normal(self, temperature: float = 1.0) -> Normal:
        mu, log_sigma = self.logits.chunk(2, dim=1)
        return Normal.soft_clamped(mu, log_sigma, temperature)


@dataclass(frozen=True)
class _Mixture:
    """Parameters of the logistic mixture; (B, 3, M, H, W) but for the weights (B, M, H, W)."""

    weight_logits: Tensor
    means: Tensor
    log_scales: Tensor
    coefficients: Tensor


@dataclass(frozen=True)
class LogisticMixtureImage:
    """Mixture of discretized logistics over the three colours of a pixel, as in PixelCNN++.

    The mean of green depends linearly on red, the mean of blue on both. `published` selects
    the published code's probability of a bin and its temperature, which divides the scales.
    """

    logits: Tensor
    components: int
    bits: int
    published: bool = False

    def log_prob(self, images: Tensor) -> Tensor:
        mixture = self._mixture()
        pixels = images.unsqueeze(2)
        red, green, _ = pixels.unbind(1)
        c_red, c_green, c_blue = mixture.coefficients.unbind(1)
        of_green = c_red * red
        of_blue = c_green * red + c_blue * green
        shifts = torch.stack([torch.zeros_like(of_green), of_green, of_blue], dim=1)
        deviation = pixels - (mixture.means + shifts)
        log_bin = self._published_log_bin if self.published else self._log_bin
        per_component = log_bin(pixels, deviation, mixture.log_scales).sum(dim=1)
        return torch.logsumexp(per_component + mixture.weight_logits.log_softmax(dim=1), dim=1)

    def mean(self) -> Tensor:
        """Mean of the mixture's means and coefficients, with red and green at their means."""
        mixture = self._mixture()
        weights = mixture.weight_logits.softmax(dim=1).unsqueeze(1)
        return _join_colours((mixture.means * weights).sum(2), (mixture.coefficients * weights).sum(2))

    def sample(self, uniform: Noise, temperature: float = 1.0) -> Tensor:
        mixture = self._mixture()
        gumbel = -(-_draw(uniform, mixture.weight_logits).log()).log()
        chosen = (mixture.weight_logits / temperature + gumbel).argmax(dim=1)
        index = chosen[:, None, None].expand(-1, 3, -1, -1, -1)
        means, log_scales, coefficients = (
            parameter.gather(2, index).squeeze(2)
            for parameter in (mixture.means, mixture.log_scales, mixture.coefficients)
        )
        u = _draw(uniform, means)
        spread = log_scales.exp() * (1 / temperature if self.published else temperature)
        return _join_colours(means + spread * (u.log() - (1 - u).log()), coefficients)

    def _mixture(self) -> _Mixture:
        weight_logits = self.logits[:, : self.components]
        rest = self.logits[:, self.components :]
        per_colour = rest.view(len(rest), 3, 3 * self.components, *rest.shape[2:])
        means, log_scales, coefficients = per_colour.chunk(3, dim=2)
        return _Mixture(weight_logits, means, log_scales.clamp(min=_MIN_LOG_SCALE), coefficients.tanh())

    def _log_bin(self, pixels: Tensor, deviation: Tensor, log_scales: Tensor) -> Tensor:
        """Log-probability of the bin around each pixel; the outermost bins are open."""
        half = 1 / (2**self.bits - 1)
        inverse_scale = (-log_scales).exp()
        upper = (deviation + half) * inverse_scale
        lower = (deviation - half) * inverse_scale
        # The bound keeps the logarithm finite for scales beyond 1e27, met only in divergence.
        width = (2 * half * inverse_scale).clamp(min=1e-30)
        first, last = pixels < -1 + half, pixels > 1 - half
        # Where a side is open its factor is 1, and there is nothing to subtract.
        below_upper = torch.where(last, 0, F.logsigmoid(upper))
        above_lower = torch.where(first, 0, F.logsigmoid(-lower))
        inside = torch.where(first | last, 0, torch.log(-torch.expm1(-width)))
        return below_upper + above_lower + inside

    def _published_log_bin(self, pixels: Tensor, deviation: Tensor, log_scales: Tensor) -> Tensor:
        steps = 2**self.bits - 1
        inverse_scale = (-log_scales).exp()
        upper = (deviation + 1 / steps) * inverse_scale
        lower = (deviation - 1 / steps) * inverse_scale
        middle = deviation * inverse_scale
        difference = upper.sigmoid() - lower.sigmoid()
        log_density = middle - log_scales - 2 * F.softplus(middle)
        inside = torch.where(
            difference > 1e-5, difference.clamp(min=1e-10).log(), log_density - math.log(steps / 2)
        )
        inside = torch.where(pixels > 0.99, -F.softplus(lower), inside)
        return torch.where(pixels < -0.999, F.logsigmoid(upper), inside)


def _draw(uniform: Noise, like: Tensor) -> Tensor:
    """Uniform draws of the shape of `like`, away from 0 and 1 where logarithms end."""
    return uniform(tuple(like.shape)).to(like.dtype).clamp(_UNIFORM_MARGIN, 1 - _UNIFORM_MARGIN)


def _join_colours(values: Tensor, coefficients: Tensor) -> Tensor:
    """Adds to green and blue (B, 3, H, W) what red and green contribute; to [0, 1]."""
    red, green, blue = values.unbind(1)
    c_red, c_green, c_blue = coefficients.unbind(1)
    red = red.clamp(-1, 1)
    green = (green + c_red * red).clamp(-1, 1)
    blue = (blue + c_green * red + c_blue * green).clamp(-1, 1)
    return _to_unit_range(torch.stack([red, green, blue], dim=1))


def _to_unit_range(images: Tensor) -> Tensor:
    return images.clamp(-1, 1) / 2 + 0.5
