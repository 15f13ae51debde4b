"""Latent groups as a structure: how many in all, and how they are spread over the scales.

A search over unrelated integers, one per scale, spends most of its trials on models that nobody
would build, and compares models of different cost. The structure has a number for each question:
`total`, what the model costs; `skew`, how far its groups gather on the finer scales; `minimum`,
what every scale has at least.

Each next finer scale deserves 2**skew times as many groups as the one before, and the groups are
given away one by one, each to the scale that deserves it most (Sainte-Laguë). So the numbers add
up exactly, one group more never takes one from any scale, and more skew never takes one from the
finest. Rejected: rounding shares, where a larger total can take a group from a scale.
"""

import heapq

LARGEST_SKEW = 8.0
"""Beyond it, the finest scale has everything that is not somebody's minimum."""


def spread(total: int, skew: float, minimum: int, scales: int) -> list[int]:
    """Groups per scale, coarsest first: `total` of them, at least `minimum` on each of `scales`.

    At skew 0 all scales are alike, below it the coarser ones have more. Raises ValueError if the
    minimum alone exceeds the total.
    """
    if total < minimum * scales:
        raise ValueError(
            f"{scales} scales of at least {minimum} group{'s' if minimum > 1 else ''} need "
            f"{minimum * scales}, not {total}"
        )
    groups = [minimum] * scales
    # A heap of (negative claim, negative scale, groups beyond the minimum); of equals the finer first.
    claims = [(-(2.0 ** (skew * scale)), -scale, 0) for scale in range(scales)]
    heapq.heapify(claims)
    for _ in range(total - minimum * scales):
        _, place, given = heapq.heappop(claims)
        groups[-place] += 1
        claim = 2.0 ** (-skew * place) / (2 * (given + 1) + 1)
        heapq.heappush(claims, (-claim, place, given + 1))
    return groups
