"""Schedules against the published sequences, and what holds for every configuration."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from nvae.config import NVAEConfig
from pipeline.config import RunConfig
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
