# B images, G latent groups (coarsest first), Z channels of a group, K draws, H x W pixels.
"""What is minimized and what is reported, from a model's output; all in nats per image.

The training loss is reconstruction + kl_coefficient * sum over groups of gamma * KL. While the
KL warms up, gamma balances the groups: those whose KL is large for their share of the latents
are charged more, so that none is switched off early (NVAE Sec. 3.2). The NELBO that is
reported has neither coefficient nor balance; the published code reports its loss instead.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nvae.collectives import sum_over_ranks
from nvae.config import NVAEConfig
from nvae.model import Output
from nvae.pixels import crop_border

ACTIVE_NATS = 0.1


def reconstruction(output: Output, images: Tensor, config: NVAEConfig) -> Tensor:
    """-log p(x given z) of images (B, C, H, W) as the model takes them, border excluded: (B,)."""
    log_prob = crop_border(output.likelihood.log_prob(images), config.border_pixels)
    return -log_prob.sum(dim=(1, 2))


def kl_per_channel(output: Output) -> Tensor:
    """KL of each latent channel's posterior from its prior: (B, G, Z). With flows one draw's estimate."""
    return torch.stack([group.kl_per_channel for group in output.groups], dim=1)


def kl_per_group(output: Output) -> Tensor:
    """The same added up over the channels of each group: (B, G)."""
    return kl_per_channel(output).sum(dim=2)


def nelbo(reconstruction_B: Tensor, kl_BG: Tensor) -> Tensor:
    """The bound on -log p(x): (B,). Lower is better."""
    return reconstruction_B + kl_BG.sum(dim=1)


def log_importance_weight(output: Output, reconstruction_B: Tensor) -> Tensor:
    """log p(x, z) - log q(z given x) of the draw in `output`: (B,)."""
    difference = sum(group.log_p - group.log_q for group in output.groups)
    return difference - reconstruction_B


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """Estimate of log p(x) from the log-weights (K, B) of K draws: (B,). K = 1 gives -NELBO.

    Its expectation never exceeds log p(x), and rises with K.
    """
    return torch.logsumexp(log_weights, dim=0) - math.log(len(log_weights))


def bits_per_dim(nats: float, config: NVAEConfig) -> float:
    """Nats per image as bits per colour value."""
    return nats / (math.log(2) * config.dimensions)


def active_channels(kl_per_channel: Tensor) -> Tensor:
    """Which latent channels carry information: their KL, a mean over images, exceeds 0.1 nats."""
    return kl_per_channel > ACTIVE_NATS


def balancing_capacities(groups_per_scale: Sequence[int]) -> Tensor:
    """alpha (G,): what each group may cost, relative to the cheapest, coarsest scale first.

    A scale has four times the latents of the one before, shared by its groups.
    """
    per_scale = [4**scale / groups for scale, groups in enumerate(groups_per_scale)]
    smallest = min(per_scale)
    return torch.tensor(
        [
            capacity / smallest
            for capacity, groups in zip(per_scale, groups_per_scale, strict=True)
            for _ in range(groups)
        ]
    )


@torch.no_grad()
def balance(kl_BG: Tensor, weights: Tensor, config: NVAEConfig) -> Tensor:
    """gamma (G,), mean 1: the balance of the groups in this batch. No gradient flows through it.

    `weights` (B,) are the images' weights in the mean. The mean is that of all ranks, by one
    collective, so that the loss does not depend on how a batch is shared out; with
    `published_compatibility` each rank uses its own images.
    """
    sums = torch.cat([(weights[:, None] * kl_BG.abs()).sum(0), weights.sum()[None]])
    if not config.published_compatibility:
        sum_over_ranks(sums)
    # The floor keeps a group that has collapsed from being charged nothing at all.
    cost = sums[:-1] / sums[-1] + 0.01
    gamma = cost / balancing_capacities(config.groups_per_scale).to(cost)
    return gamma / gamma.mean()
