# N images, G latent groups (coarsest first), Z channels of a group, L latents of an image, K draws.
"""A model in depth, the same to the last bit whatever the number of workers.

Floating-point sums depend on their order and kernels on the size of their batch, so both are
settled by the data alone: images come in pieces of a size that does not know of workers, each
piece is scored by one of them, and every figure that is added up over images has a place of its
own in a table, where all other workers have zero. Adding zeros is exact; the table is then summed in
one order by all. The moments of every single latent would make that table too large: they are
added up in whole multiples of 2^-30, which is exact in any order. This holds for workers of one kind
with equally many threads; between a CPU and a GPU kernels differ.

The standard error is that of a mean over images: how far another validation split of this size
would fall, the draws' own noise included. It is not the distance to log p(x), which the bound
never exceeds and which more draws make smaller; not the spread between trainings; and no statement
about other data.

A latent channel is active, after Burda et al. (2016), if the variance over images of its
posterior mean, averaged over its positions, is above 0.01. Below the coarsest group a posterior
mean also follows the latents drawn above it, so this counts generously: whether a group is used
is judged by its KL alone, which is measured against the prior that sees the same latents.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from nvae.config import NVAEConfig
from nvae.model import NVAE
from nvae.objective import ACTIVE_NATS, bits_per_dim
from nvae.pixels import to_model
from pipeline.models.evaluation import Batch, Team
from pipeline.models.image_scores import ImageScores, score_images
from pipeline.models.inference import inference

ACTIVE_VARIANCE = 0.01
_FIXED_POINT = 2.0**30
_COLUMNS = 6
"""counted, corrupt, reconstruction, KL, log-likelihood, squared error."""


class Tally:
    """Sums of one rank's share of `images` images in `pieces` pieces; `merged` makes them all ranks'."""

    def __init__(self, config: NVAEConfig, images: int, pieces: int, device: torch.device) -> None:
        self._config = config
        self._per_image = torch.zeros(images, _COLUMNS, dtype=torch.float64, device=device)
        channels = config.num_groups * config.latent_channels
        self._kl_per_piece = torch.zeros(pieces, channels, dtype=torch.float64, device=device)
        self._moments = torch.zeros(2, config.num_latents, dtype=torch.int64, device=device)

    def add(
        self, model: NVAE, piece: int, batches: Iterable[Batch], draws: int, *, rows: int, seed: int
    ) -> None:
        """Score the images of a piece, in the order in which they come."""
        with inference(model) as device:
            for batch in batches:
                kept = batch.weights > 0
                self._per_image[batch.positions[~kept].to(device), 1] = 1
                if kept.any():
                    places = batch.positions[kept]
                    images = to_model(batch.images[kept].to(device), model.config)
                    found = score_images(model, images, places.tolist(), draws, rows=rows, seed=seed)
                    self._note(piece, places.to(device), found)

    def _note(self, piece: int, places: Tensor, found: ImageScores) -> None:
        kl_B = found.kl_per_channel.sum(dim=(1, 2))
        one = torch.ones_like(kl_B)
        columns = (one, 0 * one, found.reconstruction, kl_B, found.log_likelihood, found.squared_error)
        self._per_image[places] = torch.stack(columns, dim=1)
        self._kl_per_piece[piece] += found.kl_per_channel.sum(0).flatten()
        # Soft-clamped, so within (-5, 5): the sums have room for 10^8 images. A model whose means
        # are not numbers has no KL either.
        means = found.posterior_means.nan_to_num(0.0)
        for row, values in enumerate((means, means.square())):
            self._moments[row] += (values * _FIXED_POINT).round().long().sum(0)

    def merged(self, team: Team) -> "Tally":
        """The same of all ranks. Every rank must call it; all get the same."""
        for sums in (self._per_image, self._kl_per_piece, self._moments):
            sums.copy_(team.all_reduce(sums.clone()))
        return self

    @property
    def images(self) -> int:
        """How many have been scored."""
        return int(self._per_image[:, 0].sum())

    def scores(self, draws: int) -> dict[str, float]:
        """The figures under their names: those of `evaluation.evaluate`, and more.

        `..._standard_error` beside NELBO, bits/dim and importance-weighted figures (NaN for one
        image); `mean_squared_error` and `psnr_db` of reconstructions on 0..255;
        `active_units`; per group `kl_nats`, `active_channels`, `active_units`.
        """
        table = self._per_image.cpu()
        corrupt = float(table[:, 1].sum())
        rows = table[table[:, 0] > 0]
        reconstructions, kls, log_likelihoods, errors = rows[:, 2:].unbind(1)
        kl_GZ = (self._kl_per_piece.cpu().sum(0) / len(rows)).view(self._config.num_groups, -1)
        scores = self._in_nats_and_bits("nelbo_nats", "bits_per_dim", reconstructions + kls)
        scores |= {"reconstruction_nats": _mean(reconstructions), "kl_nats": _mean(kls)}
        if draws > 1:
            scores |= self._in_nats_and_bits(
                "importance_weighted_nats", "importance_weighted_bits_per_dim", -log_likelihoods
            )
        error = _mean(errors)
        scores |= {"mean_squared_error": error, "psnr_db": _decibels(error)}
        units = self._active_units()
        active = (kl_GZ > ACTIVE_NATS).sum(1).tolist()
        scores |= {"active_channels": float(sum(active)), "active_units": float(sum(units))}
        scores |= {"images": float(len(rows)), "corrupt_images": corrupt}
        for group, of_group in enumerate(zip(kl_GZ.sum(1).tolist(), active, units, strict=True)):
            names = "kl_nats", "active_channels", "active_units"
            scores |= {f"{name}/group_{group:02d}": float(v) for name, v in zip(names, of_group, strict=True)}
        return {f"validation/{name}": value for name, value in scores.items()}

    def _in_nats_and_bits(self, nats: str, bits: str, values: Tensor) -> dict[str, float]:
        mean, error = _mean(values), math.nan
        if len(values) > 1:
            error = float(values.std()) / math.sqrt(len(values))
        return {
            nats: mean,
            f"{nats}_standard_error": error,
            bits: bits_per_dim(mean, self._config),
            f"{bits}_standard_error": bits_per_dim(error, self._config),
        }

    def _active_units(self) -> list[int]:
        """Latent channels of each group whose posterior means vary from image to image."""
        first, second = self._moments.cpu().double() / _FIXED_POINT / self.images
        variances = second - first.square()
        sizes = [math.prod(shape) for shape in self._config.latent_shapes]
        per_group = variances.split(sizes)
        channels = self._config.latent_channels
        return [int((each.view(channels, -1).mean(1) > ACTIVE_VARIANCE).sum()) for each in per_group]


def unused_groups(scores: dict[str, float]) -> list[int]:
    """Groups without one active channel: their posteriors are their priors, whatever the image."""
    prefix = "validation/active_channels/group_"
    counts = {int(name[len(prefix) :]): n for name, n in scores.items() if name.startswith(prefix)}
    return sorted(group for group, count in counts.items() if not count)


def comparable(config: NVAEConfig, draws: int) -> str:
    """What these figures may be compared with, in words."""
    bits = config.pixel_bits
    if config.likelihood == "normal":
        what = (
            "A normal density on [-1, 1]: its nats and bits/dim compare with those of other normal "
            "densities on the same data only, not with a discretized likelihood's, and may be negative."
        )
    elif config.likelihood == "bernoulli":
        what = (
            "Binary images: compare nats, and only on the same binarization (dynamic or fixed); papers "
            "report the importance-weighted figure."
        )
    else:
        what = (
            f"Bits/dim of {bits}-bit images ({2**bits} levels): they compare with other {bits}-bit "
            f"results on the same images at {config.image_size} pixels{', not with 8-bit ones' * (bits < 8)}."
        )
    if draws == 1:
        return f"{what} The NELBO is an upper bound of -log p(x)."
    return (
        f"{what} NELBO and importance-weighted figure are upper bounds of -log p(x) in expectation; the "
        f"latter falls with K, here K = {draws}."
    )


def _mean(values: Tensor) -> float:
    return float(values.sum()) / len(values)


def _decibels(mean_squared_error: float) -> float:
    """PSNR of this error on 0..255."""
    return 10 * math.log10(255**2 / mean_squared_error) if mean_squared_error else math.inf
