"""What the comparison of overheads rests on: equal work, and honest intervals."""

import math
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.testing import assert_close

from nvae.noise import by_group
from nvae.step import Coefficients, StepSettings, update
from tests.benchmarks.bare_loop import KL_COEFFICIENT, BareLoop, random_images
from tests.benchmarks.overhead import ratio, verdict
from tests.nvae.tiny import latent_noise
from tests.tiny_run import Home


def test_the_bare_loop_makes_the_updates_of_the_run(home: Home, tmp_path: Path) -> None:
    config = home.config()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        images = random_images(config, world_size=1)
        bare = BareLoop(config, images)
        run = BareLoop(config, images)
        coefficients = Coefficients(
            config.optimizer.minimum_learning_rate, KL_COEFFICIENT, config.objective.spectral_coefficient
        )
        for number in range(3):
            noise = latent_noise(config.model, images.shape[1], seed=number)
            bare.noise = by_group(noise, config.model)
            bare.update()
            update(
                run.model,
                run.optimizer,
                images[number],
                coefficients,
                StepSettings(),
                noise=noise,
                ema=run.ema,
            )
    finally:
        dist.destroy_process_group()
    for mine, theirs in ((bare.network, run.network), (bare.ema.module, run.ema.module)):
        assert_close(mine.state_dict(), theirs.state_dict())


def test_an_interval_holds_the_ratio_and_is_as_wide_as_pairs_scatter() -> None:
    mean, low, high = ratio([1.02, 1.04, 1.00], [1.0, 1.0, 1.0])
    assert math.log(mean) == pytest.approx((math.log(1.02) + math.log(1.04)) / 3)
    # Student's t of 2 degrees of freedom: 4.303; standard deviation of the three logarithms: 0.0196.
    assert math.log(high / mean) == pytest.approx(4.303 * 0.0196 / math.sqrt(3), rel=1e-2)
    assert math.log(mean / low) == pytest.approx(math.log(high / mean))
    assert ratio([3.0, 3.0], [2.0, 2.0]) == pytest.approx((1.5, 1.5, 1.5))


def test_a_bound_inside_the_interval_is_unresolved() -> None:
    assert verdict(0.99, 1.01, 1.03) == "within the bound"
    assert verdict(1.04, 1.06, 1.03) == "above the bound"
    assert verdict(0.99, 1.06, 1.03) == "unresolved"
