# B images of a batch, G latent groups (coarsest first), Z channels of a group, K draws.
"""How good a model is on held-out images, in nats and in bits per dimension.

Totals are exact whatever the number of ranks: each rank sums its share in float64, sums and
counts are added up once, nothing is padded or averaged twice. Noise is a function of the seed
and of each image's place in the split, so the numbers do not depend on who evaluates what.

What is comparable with what: bits/dim are nats per image divided by ln 2 and by the colour
values that the likelihood counts. Those of an 8-bit and of a 5-bit model are of different
data (5 bits have at most 5 of them per value). A `normal` likelihood is a density: its figures
compare with each other only. For `bernoulli`, papers report nats, on one fixed or on dynamic
binarization. The NELBO is an upper bound of -log p(x); the importance-weighted figure is a
tighter one that falls with K, so K belongs beside it.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from nvae.model import NVAE
from nvae.objective import active_channels, bits_per_dim
from nvae.pixels import to_model
from pipeline.config import RunConfig
from pipeline.errors import InputError
from pipeline.models.image_scores import score_images
from pipeline.models.inference import inference


class EvaluationError(InputError):
    """There is nothing that could be evaluated."""


class Batch(Protocol):
    """What is needed of data/loader.py's batches."""

    @property
    def images(self) -> Tensor:
        """(B, C, H, W) uint8."""

    @property
    def positions(self) -> Tensor:
        """(B,) places of the images in the split."""

    @property
    def weights(self) -> Tensor:
        """(B,); 0 stands for an image that could not be read."""


class Team(Protocol):
    """What is needed of training/worker.py's workers."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks."""


def evaluate(
    model: NVAE,
    config: RunConfig,
    batches: Iterable[Batch],
    worker: Team,
    importance_samples: int = 1,
    seed: int = 0,
) -> dict[str, float]:
    """Scores of `model`, the bare module, on the validation split of the data set in `config`.

    `batches` are this rank's share of it. Every rank must call it; all get the same answer.
    NELBO, reconstruction and KL are means over K = `importance_samples` draws per image, which
    share one pass of the encoder. Images of weight 0 could not be read: they are left out of every
    mean and counted by themselves. Raises EvaluationError if no image is left on any rank.

    Names: `validation/` and `nelbo_nats`, `bits_per_dim`, `reconstruction_nats`, `kl_nats` and
    `kl_nats/group_00...`, `active_channels` (latent channels whose KL exceeds 0.1 nats) and
    `active_channels/group_00...`, `images`, `corrupt_images`; with K > 1 also
    `importance_weighted_nats` and `importance_weighted_bits_per_dim`.
    """
    groups, channels = model.config.num_groups, model.config.latent_channels
    with inference(model) as device:
        sums = torch.zeros(3 + groups * channels, dtype=torch.float64, device=device)
        corrupt = torch.zeros(1, dtype=torch.float64, device=device)
        for batch in batches:
            kept = batch.weights > 0
            corrupt += len(kept) - int(kept.sum())
            if kept.any():
                images = to_model(batch.images[kept].to(device), model.config)
                sums += _batch_sums(model, images, batch.positions[kept].tolist(), importance_samples, seed)
    sums, corrupt = worker.all_reduce(torch.cat([sums, corrupt])).cpu().tensor_split([-1])
    if not sums[0]:
        raise EvaluationError(
            f"{config.data.root}: the validation split has no readable image; build the data set with "
            "--validation-fraction, or check it with `nvae shards verify`."
        )
    return _scores(sums, model, importance_samples) | {"validation/corrupt_images": corrupt.item()}


def _batch_sums(model: NVAE, images: Tensor, positions: list[int], draws: int, seed: int) -> Tensor:
    """(3 + G Z,): the number of images, and sums over them of the reconstruction, of the
    importance-weighted estimate of log p(x), and of the KL of every latent channel.

    `images` (B, C, H, W) are as the model takes them, at these places of the split.
    """
    found = score_images(model, images, positions, draws, rows=len(images), seed=seed)
    count = found.log_likelihood.new_tensor(len(images))
    scalars = torch.stack([count, found.reconstruction.sum(), found.log_likelihood.sum()])
    return torch.cat([scalars, found.kl_per_channel.sum(0).flatten()])


def _scores(sums: Tensor, model: NVAE, draws: int) -> dict[str, float]:
    """The metrics, from the sums of all ranks."""
    images, reconstruction_sum, bound_sum = sums[:3].tolist()
    kl_GZ = sums[3:].view(model.config.num_groups, -1) / images
    kl_per_group = kl_GZ.sum(1).tolist()
    active_per_group = active_channels(kl_GZ).sum(1).tolist()
    reconstruction_nats, kl_nats = reconstruction_sum / images, sum(kl_per_group)
    scores = {
        "nelbo_nats": reconstruction_nats + kl_nats,
        "bits_per_dim": bits_per_dim(reconstruction_nats + kl_nats, model.config),
        "reconstruction_nats": reconstruction_nats,
        "kl_nats": kl_nats,
        "active_channels": float(sum(active_per_group)),
        "images": images,
    }
    for group, (kl, active) in enumerate(zip(kl_per_group, active_per_group, strict=True)):
        scores[f"kl_nats/group_{group:02d}"] = kl
        scores[f"active_channels/group_{group:02d}"] = float(active)
    if draws > 1:
        scores["importance_weighted_nats"] = -bound_sum / images
        scores["importance_weighted_bits_per_dim"] = bits_per_dim(-bound_sum / images, model.config)
    return {f"validation/{name}": value for name, value in scores.items()}
