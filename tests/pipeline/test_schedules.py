"""Schedules against the published sequences, and what holds for every configuration."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from nvae.config import NVAEConfig
from pipeline.config import RunConfig
from pipeline.training.interventions import Intervention, Kind, recovery_images
from pipeline.training.schedules import schedule
from tests.nvae.published_cases import ORACLE

SEQUENCES = ("ffhq_like", "celeba64_like", "imagenet_like", "nowarm")


def run_config(model: NVAEConfig | None = None, **changed: dict[str, Any]) -> RunConfig:
    sections: dict[str, Any] = {
        "data": {"root": "none"},
        "model": model or NVAEConfig(),
        "train": {"total_images": 1000, "batch_size": 10},
        "cadence": {"log_images": 1, "evaluate_images": 1, "checkpoint_images": 1},
    }
    return RunConfig.model_validate(sections | changed)


def published_run(cfg: np.ndarray, batch_size: int) -> tuple[RunConfig, int]:
    """The run that a row of recorded settings describes, and its images per epoch."""
    epochs, warmup, iterations, rate, minimum, anneal, constant, least, last, first, annealed = cfg
    epoch_images = int(iterations) * batch_size
    config = run_config(
        NVAEConfig(published_compatibility=True),
        optimizer={
            "learning_rate": rate,
            "minimum_learning_rate": minimum,
            "warmup_images": int(warmup) * epoch_images,
        },
        objective={
            "kl_warmup_fraction": anneal,
            "kl_constant_fraction": constant,
            "kl_minimum_coefficient": least,
            "spectral_coefficient": last,
            "spectral_coefficient_initial": first if annealed else None,
        },
        train={"total_images": int(epochs) * epoch_images, "batch_size": batch_size},
    )
    return config, epoch_images


@pytest.mark.skipif(not (ORACLE / "schedules.npz").exists(), reason=f"no schedules.npz in {ORACLE}")
@pytest.mark.parametrize("batch_size", [1, 24])
@pytest.mark.parametrize("name", SEQUENCES)
def test_with_published_compatibility_every_coefficient_is_the_published_one(name, batch_size):
    with np.load(ORACLE / "schedules.npz") as recorded:
        config, epoch_images = published_run(recorded[f"{name}_cfg"], batch_size)
        rates, betas, lambdas = (recorded[f"{name}_{what}"] for what in ("lr", "beta", "lambda"))
    ours = [schedule(config, i * batch_size, epoch_images=epoch_images) for i in range(len(rates))]
    np.testing.assert_allclose([c.learning_rate for c in ours], rates, rtol=1e-12)
    np.testing.assert_allclose([c.kl for c in ours], betas, rtol=1e-12)
    np.testing.assert_allclose([c.spectral for c in ours], lambdas, rtol=1e-12)


def test_the_learning_rate_rises_to_its_maximum_and_falls_to_its_minimum():
    config = run_config(
        optimizer={"learning_rate": 0.01, "minimum_learning_rate": 0.001, "warmup_images": 100}
    )
    rates = {seen: schedule(config, seen, epoch_images=7).learning_rate for seen in range(1001)}
    assert rates[0] == 0
    assert rates[50] == approx(0.005)
    assert max(rates, key=rates.__getitem__) == 100
    assert rates[100] == approx(0.01)
    assert rates[550] == approx(0.0055)
    assert rates[1000] == approx(0.001)


@given(
    fractions=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    warmup=st.integers(0, 2000),
    spectral=st.tuples(st.floats(0, 10), st.none() | st.floats(1e-3, 10)),
    compatible=st.booleans(),
)
def test_coefficients_stay_in_their_ranges_and_the_kl_never_falls(fractions, warmup, spectral, compatible):
    config = run_config(
        NVAEConfig(published_compatibility=compatible),
        optimizer={"learning_rate": 0.01, "minimum_learning_rate": 1e-4, "warmup_images": warmup},
        objective={
            "kl_warmup_fraction": fractions[0],
            "kl_constant_fraction": fractions[1],
            "kl_minimum_coefficient": fractions[2],
            "spectral_coefficient": spectral[0],
            "spectral_coefficient_initial": spectral[1],
        },
    )
    kl = 0.0
    for seen in range(0, 1100, 50):
        now = schedule(config, seen, epoch_images=100)
        assert 0 <= now.learning_rate <= 0.01
        assert max(kl, fractions[2]) <= now.kl <= 1
        assert 0 <= now.spectral <= max(filter(None, (*spectral, 1e-9))) * (1 + 1e-9)
        kl = now.kl


def test_the_penalty_anneals_geometrically_while_the_kl_warms_up():
    config = run_config(
        objective={
            "kl_warmup_fraction": 0.5,
            "kl_constant_fraction": 0,
            "spectral_coefficient": 1e-2,
            "spectral_coefficient_initial": 1.0,
        }
    )
    halfway, after = (schedule(config, seen, epoch_images=10) for seen in (250, 500))
    assert halfway.spectral == approx(math.sqrt(1.0 * 1e-2))
    assert after.spectral == approx(1e-2)
    assert after.kl == 1


factors = st.tuples(st.floats(1, 10), st.floats(0.1, 1))


@given(
    softenings=st.lists(st.tuples(st.integers(0, 900), factors), max_size=4),
    recovery=st.floats(0.01, 1),
    seen=st.integers(0, 1000),
)
def test_a_softening_is_its_factors_at_once_and_nothing_in_the_end(softenings, recovery, seen):
    config = run_config(stability={"recovery_fraction": recovery})
    done = [
        Intervention(Kind.SOFTEN, at, "", 0, spectral_factor=up, learning_rate_factor=down)
        for at, (up, down) in softenings
    ]
    span = recovery_images(config)
    plain = schedule(config, seen, epoch_images=10)
    now = schedule(config, seen, epoch_images=10, interventions=done)
    assert now.kl == plain.kl
    # Several multiply, each as far as it is still in force, and geometrically.
    exponents = [max(0.0, 1 - (seen - each.images_seen) / span) for each in done]
    assert now.spectral == approx(
        plain.spectral
        * math.prod(each.spectral_factor**left for each, left in zip(done, exponents, strict=True))
    )
    assert now.learning_rate == approx(
        plain.learning_rate
        * math.prod(each.learning_rate_factor**left for each, left in zip(done, exponents, strict=True))
    )
    if all(seen >= each.images_seen + span for each in done):
        assert now == plain
    # Pure: who asks again gets the same, and skips soften nothing.
    skips = [Intervention(Kind.SKIP, each.images_seen, "") for each in done]
    assert schedule(config, seen, epoch_images=10, interventions=[*done, *skips]) == now


def test_a_softening_returns_without_a_jump():
    config = run_config(stability={"recovery_fraction": 0.2})
    done = [Intervention(Kind.SOFTEN, 300, "", 0, spectral_factor=8.0, learning_rate_factor=0.25)]
    ratios = []
    for seen in range(300, 520):
        plain = schedule(config, seen, epoch_images=10)
        now = schedule(config, seen, epoch_images=10, interventions=done)
        ratios.append((now.spectral / plain.spectral, now.learning_rate / plain.learning_rate))
    assert ratios[0] == approx((8.0, 0.25))
    assert ratios[100] == approx((8.0**0.5, 0.25**0.5))
    assert ratios[200:] == [(1.0, 1.0)] * 20
    steps = [abs(math.log(after / before)) for (before, _), (after, _) in pairwise(ratios)]
    assert max(steps) < 1.01 * math.log(8.0) / 200
