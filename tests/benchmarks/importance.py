"""What K draws cost that share one pass of the encoder, beside K full forwards.

    python -m tests.benchmarks.importance --preset quickstart --images 4 --draws 100

Both estimate log p(x) of the same images with the same noise, in one process and in turns: one by
`score_images`, the other by a call of the whole model for each draw, on all the images at once.
The ratio has two causes, and the second column of the table separates them: full forwards that take
as many rows at once as `score_images` does save what small batches waste, but not the encoder.
Weights are newly drawn; what is timed does not depend on them.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nvae.model import NVAE
from nvae.objective import importance_weighted_bound, log_importance_weight, reconstruction
from nvae.pixels import to_model
from pipeline import config_file
from pipeline.models.image_scores import score_images
from pipeline.models.inference import inference, latent_noise

TOLERANCE = 1e-5


def shared(model: NVAE, images: Tensor, draws: int, rows: int) -> Tensor:
    """(B,) by one pass of the encoder."""
    return score_images(model, images, range(len(images)), draws, rows=rows, seed=0).log_likelihood


def independent(model: NVAE, images: Tensor, draws: int, rows: int) -> Tensor:
    """(B,) by full forwards of `rows` rows, images times draws."""
    together, found = max(1, rows // len(images)), []
    for first in range(0, draws, together):
        numbers = range(first, min(first + together, draws))
        repeated = images.repeat(len(numbers), 1, 1, 1)
        output = model(repeated, latent_noise(0, range(len(images)), images.device, numbers))
        weights = log_importance_weight(output, reconstruction(output, repeated, model.config))
        found.append(weights.double().view(len(numbers), len(images)))
    return importance_weighted_bound(torch.cat(found))


def measure(asked: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each way, and how far the furthest result is from that of full forwards."""
    torch.manual_seed(0)
    config = config_file.load(asked.preset).model
    model = NVAE(config)
    highest = 2 if config.likelihood == "bernoulli" else 256
    stored = torch.randint(highest, (asked.images, config.image_channels, *[config.image_size] * 2))
    images = to_model(stored.to(torch.uint8), config)
    ways: dict[str, Callable[[], Tensor]] = {
        "shared": lambda: shared(model, images, asked.draws, asked.rows),
        "one by one": lambda: independent(model, images, asked.draws, asked.images),
        "batched": lambda: independent(model, images, asked.draws, asked.rows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Tensor] = {}
    with inference(model):
        shared(model, images, 1, asked.rows)  # data-dependent initialization and first allocations
        for _ in range(asked.rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                results[name] = way()
                seconds[name].append(time.perf_counter() - began)
    expected = results["one by one"]
    apart = max(float(((each - expected) / expected).abs().max()) for each in results.values())
    return {name: statistics.median(each) for name, each in seconds.items()} | {"apart": apart}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    asked = parse(arguments)
    found = measure(asked)
    print(f"{asked.preset}, {asked.images} images, K = {asked.draws}, {asked.rows} rows at once")
    for name in ("one by one", "batched"):
        print(f"full forwards {name:10}  {found[name] / found['shared']:5.2f} times as long as shared draws")
    print(f"furthest result apart: {found['apart']:.1e} of its size; allowed {TOLERANCE:.0e}")
    return 0 if found["apart"] <= TOLERANCE and math.isfinite(found["apart"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
