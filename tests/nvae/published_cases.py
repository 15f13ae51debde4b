"""Recorded runs of the published implementation, to compare ours with.

Every folder below the one named by NVAE_ORACLE is a case: a checkpoint and what the published
code computed from it, with the noise that it drew. Nothing here knows which flags a case was
made with, but what its files say.
"""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nvae.config import NVAEConfig
from nvae.distributions import Noise
from nvae.published import PublishedCheckpoint, load_published

REPOSITORY = Path(__file__).parents[2]
ORACLE = Path(os.environ.get("NVAE_ORACLE", REPOSITORY.parent / "shared" / "oracle"))


@dataclass(frozen=True)
class Case:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "meta.json").read_text())
        return found

    @property
    def rounding(self) -> dict[str, Any]:
        """Errors of the published code in fp32 against itself in fp64; ten times these are fair."""
        found: dict[str, Any] = self.meta["fp32_vs_fp64"]
        return found

    def load(self) -> PublishedCheckpoint:
        """The checkpoint, loaded anew: the cases' procedures change models."""
        return load_published(self.path / "checkpoint.pt")

    @functools.cached_property
    def eval(self) -> dict[str, Tensor]:
        return self._arrays("eval")

    @functools.cached_property
    def sample(self) -> dict[str, Tensor]:
        return self._arrays("sample")

    @functools.cached_property
    def train(self) -> dict[str, Tensor]:
        return self._arrays("train")

    @functools.cached_property
    def gradients_of_step_0(self) -> dict[str, Tensor]:
        return self._arrays("grads_step0")

    @functools.cached_property
    def batch_norm_after_step_0(self) -> dict[str, Tensor]:
        return self._arrays("bn_after_step0")

    @functools.cached_property
    def state_after_3_steps(self) -> dict[str, Tensor]:
        return self._arrays("state_after_3_steps")

    def _arrays(self, name: str) -> dict[str, Tensor]:
        with np.load(self.path / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


def cases() -> list[Any]:
    """One pytest parameter per case folder; a skipped one with the reason if there are none."""
    found = sorted(path.parent for path in ORACLE.glob("*/meta.json")) if ORACLE.is_dir() else []
    if not found:
        reason = f"no published cases below {ORACLE}; NVAE_ORACLE names their folder"
        return [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(Case(path), id=path.name) for path in found]


def recorded_noise(arrays: dict[str, Tensor], prefix: str) -> Noise:
    """Replays the draws `{prefix}_00`, `{prefix}_01`, ...: one per group, coarsest first.

    They were stored in fp16 and used in fp32.
    """
    groups = iter(range(10_000))

    def draw(shape: tuple[int, ...]) -> Tensor:
        eps = arrays[f"{prefix}_{next(groups):02d}"].float()
        assert tuple(eps.shape) == shape
        return eps

    return draw


def in_turn(*draws: Tensor) -> Noise:
    """Replays the given draws one after the other."""
    remaining = iter(draws)

    def draw(shape: tuple[int, ...]) -> Tensor:
        found = next(remaining)
        assert tuple(found.shape) == shape
        return found

    return draw


def model_images(images: Tensor, config: NVAEConfig, dtype: torch.dtype) -> Tensor:
    """Stored pixels as the published code rounds them on the way to the model.

    It divides by 255 in fp32, whatever type it then computes in; `nvae.pixels` agrees in fp32.
    """
    if config.likelihood == "bernoulli":
        return images.to(dtype)
    values = (images.float() / 255).to(dtype)
    if config.pixel_bits != 8:
        values = torch.floor(values * 255 / 2 ** (8 - config.pixel_bits)) / (2**config.pixel_bits - 1)
    return 2 * values - 1


@dataclass(frozen=True)
class Comparison:
    """Ours against the recorded value of one quantity."""

    quantity: str
    error: float
    tolerance: float
    relative: float
    """The largest difference relative to the largest recorded value, for the table."""

    @property
    def good(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return f"{self.quantity}: off by {self.error:.2e}, allowed {self.tolerance:.2e}"


def absolute(quantity: str, ours: Tensor, recorded: Tensor, tolerance: float) -> Comparison:
    """The largest difference."""
    ours, recorded = ours.detach().double(), recorded.double()
    assert ours.shape == recorded.shape, f"{quantity}: {tuple(ours.shape)} and {tuple(recorded.shape)}"
    error = (ours - recorded).abs().max().item()
    # Some recorded values are zeros but for rounding, e.g. means of features after batch norm.
    return Comparison(quantity, error, tolerance, error / max(recorded.abs().max().item(), 1e-3))


def relative(
    quantity: str, ours: Tensor, recorded: Tensor, tolerance: float, floor: float = 1e-30
) -> Comparison:
    """The largest difference relative to its own recorded value, or to `floor` if that is larger."""
    ours, recorded = ours.detach().double(), recorded.double()
    assert ours.shape == recorded.shape, f"{quantity}: {tuple(ours.shape)} and {tuple(recorded.shape)}"
    error = ((ours - recorded).abs() / recorded.abs().clamp(min=floor)).max().item()
    return Comparison(quantity, error, tolerance, error)


def stored(arrays: dict[str, Tensor], name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """A recorded array and the function that thins ours out to it; None if it was not stored.

    Big arrays are stored at every eighth position.
    """
    if name in arrays:
        return arrays[name], lambda full: full
    if f"{name}_stride8" in arrays:
        return arrays[f"{name}_stride8"], lambda full: full[..., ::8, ::8]
    return None


def summary(full: Tensor) -> dict[str, Tensor]:
    """What is recorded of every big array, (B, C, H, W), beside its values."""
    full = full.double()
    return {
        "sum": full.sum(),
        "l2": full.norm(),
        "absmean": full.abs().mean(),
        "chmean": full.mean(dim=(0, 2, 3)),
        "chstd": full.std(dim=(0, 2, 3)),
    }
