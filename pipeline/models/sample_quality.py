# N images, D features, K the neighbours of a ball.
"""How far a set of samples is from a set of images: FID, precision and recall, on Inception's features.

FID (Heusel et al. 2017): Frechet distance of two normal distributions with the features' means and
covariances. Precision and recall (Kynkaanniemi et al. 2019): the share of samples within the balls
around the images that reach to each one's third-nearest neighbour, and the other way round.

Features are rounded to multiples of 2^-12 and kept as whole numbers. While the sums of their squares have
fewer than 53 binary digits (and so, by Cauchy and Schwarz, all sums), float64 adds them exactly, in
whatever order: totals and distances are the same to the last bit however many workers add them up, at
the speed of a matrix product. Features of Inception stay below 2^4, so there is room for two million
images; it is checked. The rounding moves a feature by 0.0001 at most, its usual spread being near 0.25.
Rejected: sums in blocks of fixed images (2048 x 2048 each), and compensated sums (many times slower).

FID of few samples is too high, by an amount that depends on their number, so figures compare with others of
as many samples, the same images and the same weights only.
"""

import torch
from torch import Tensor

from pipeline.models.evaluation import Team
from pipeline.models.inception import InceptionError

STEPS = 1 << 12
"""Whole numbers per unit of a feature."""
EXACT = 2.0**53
"""Whole numbers below are exact in float64."""
LARGEST = 1 << 8
"""Of a feature: then all distances of two images are exact. Inception's stay far below."""
NEIGHBOURS = 3
_ROWS = 1024


def whole(features: Tensor) -> Tensor:
    """(B, D) float32 as whole numbers of 1/STEPS, in float64. Raises InceptionError beyond LARGEST."""
    if not torch.isfinite(features).all() or features.abs().max() > LARGEST:
        raise InceptionError(
            f"Inception gives features that are not finite or above {LARGEST}: these are not its weights, or "
            "the images are not images."
        )
    return (features.double() * STEPS).round()


class Features:
    """The features of one set of images: exact sums of all, and the first `kept` one by one."""

    def __init__(self, features: int, kept: int, device: torch.device) -> None:
        self.sums = torch.zeros(features, dtype=torch.float64, device=device)
        self.products = torch.zeros(features, features, dtype=torch.float64, device=device)
        # At most 2^20: float32 holds them exactly.
        self.rows = torch.zeros(kept, features, device=device)
        self.count = torch.zeros(1, dtype=torch.float64, device=device)
        self.seen = torch.zeros(kept, device=device)

    def add(self, features: Tensor, places: Tensor) -> None:
        """(B, D) of the images with these numbers (B,)."""
        found = whole(features)
        self.sums += found.sum(0)
        self.products += found.T @ found
        self._check()
        self.count += len(found)
        first = places < len(self.rows)
        self.rows[places[first]] = found[first].float()
        self.seen[places[first]] = 1

    def merged(self, team: Team) -> "Features":
        """The same of all ranks. Every rank must call it; all get the same."""
        for part in (self.sums, self.products, self.rows, self.count, self.seen):
            part.copy_(team.all_reduce(part.clone()))
        self._check()
        return self

    def _check(self) -> None:
        if self.products.diagonal().max() >= EXACT:
            raise InceptionError(
                "Inception's features are too large to be added up exactly, or too many: check that the "
                "weights are its own, or ask for fewer samples."
            )

    @property
    def images(self) -> int:
        return int(self.count)

    @property
    def kept(self) -> Tensor:
        """(n, D) whole numbers, float64, of those of the first that there are."""
        return self.rows[self.seen > 0].double()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and unbiased covariance (D, D), of features in their own units."""
        n = self.images
        mean = self.sums / n
        # The exact sums once, then one rounding for each entry.
        covariance = (self.products - torch.outer(self.sums, mean)) / (n - 1)
        return mean / STEPS, (covariance + covariance.T) / 2 / STEPS**2

    def tensors(self) -> dict[str, Tensor]:
        """What is to be kept of it."""
        parts = {"sums": self.sums, "products": self.products, "rows": self.rows}
        return {**parts, "count": self.count, "seen": self.seen}


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Squared distance of two normal distributions, each (mean (D,), covariance (D, D)) in float64.

    The trace of the root of the product is taken of a symmetric matrix: no complex roots, and singular
    covariances of few images need no help.
    """
    (mean_1, covariance_1), (mean_2, covariance_2) = first, second
    values, vectors = torch.linalg.eigh(covariance_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ covariance_2 @ root
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * overlap
    return float(distance)


def precision_and_recall(images: Tensor, samples: Tensor) -> tuple[float, float]:
    """Of whole features (n, D), each more than NEIGHBOURS of them."""
    precision = _share_within(samples, images, _radii(images))
    recall = _share_within(images, samples, _radii(samples))
    return precision, recall


def _radii(points: Tensor) -> Tensor:
    """Squared distance of each point from its third-nearest neighbour, itself left out."""
    parts = [
        _squared_distances(chunk, points).kthvalue(NEIGHBOURS + 1, dim=1).values
        for chunk in torch.split(points, _ROWS)
    ]
    return torch.cat(parts)


def _share_within(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    within = 0
    for chunk in torch.split(points, _ROWS):
        within += int((_squared_distances(chunk, centres) <= radii).any(dim=1).sum())
    return within / len(points)


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Exact, since all numbers are whole."""
    squares = [points.square().sum(1) for points in (first, second)]
    return squares[0][:, None] + squares[1][None] - 2 * first @ second.T
