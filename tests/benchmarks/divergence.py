"""A training that diverges, and the same one that is kept from it: measured, with the curves.

    make bench-divergence
    python -m tests.benchmarks.divergence --seeds 3 --picture curves.png

Fourteen groups of cells without batch norm, no spectral regularization, and a learning rate that
rises to many times what is good: what features are multiplied with grows with the depth, until the
loss jumps to thousands of times what it was. The rate was searched for: at half of it a training
explodes, too, and comes back by itself. Batches are small, so that the explosion comes after more
updates than it takes to know what is normal (stability.ENOUGH); one that comes sooner is not held.
Each seed is trained twice by `pipeline.run`, with `stability.enabled=false` and with `true`; nothing
else differs. A training has diverged if it was given up, or if the NELBO of its last log interval
is not finite or not below that of its first.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib import pyplot

from pipeline.data import shards
from pipeline.training.interventions import Kind
from tests.tiny_run import Home, points

matplotlib.use("Agg")

YAML = """
data:
  root: store:tiny
  horizontal_flip: true
model:
  image_size: 32
  pixel_bits: 5
  mixture_components: 5
  groups_per_scale: [4, 10]
  latent_channels: 8
  encoder_channels: 8
  decoder_channels: 8
  preprocess_blocks: 2
  preprocess_cells: 1
  postprocess_cells: 1
  cell_family: res_elu
objective:
  spectral_coefficient: 0
  kl_warmup_fraction: 0.1
optimizer:
  learning_rate: 0.4
  minimum_learning_rate: 0.4
  warmup_images: 2_400
  ema_decay: 0.98
train:
  total_images: 2_400
  batch_size: 4
cadence:
  log_images: 80
  evaluate_images: 2_400
  checkpoint_images: 80
stability:
  recovery_fraction: 0.5
  max_rollbacks: 8
sampling:
  count: 2
"""
BITS = "train/bits_per_dim"


@dataclass(frozen=True)
class Outcome:
    """One training: how it went and how it ended."""

    seed: int
    ladder: bool
    state: str
    curve: list[tuple[int, float]]
    """(images seen, training NELBO in bits/dim) of each log interval."""
    interventions: dict[str, int]
    """How often each rung of the ladder was used."""
    seconds: float

    @property
    def diverged(self) -> bool:
        """Given up, or in the end not better than at the beginning."""
        first, last = self.curve[0][1], self.curve[-1][1]
        return self.state != "finished" or not math.isfinite(last) or last > first

    def line(self) -> str:
        values = [value for _, value in self.curve]
        used = ", ".join(f"{count} {kind}" for kind, count in self.interventions.items()) or "nothing"
        return (
            f"seed {self.seed} {'with' if self.ladder else 'without'} the ladder: "
            f"{'DIVERGED' if self.diverged else 'ends well'}: bits/dim {values[0]:.2f} at first, at most "
            f"{max(values):.2f}, {values[-1]:.2f} in the end; {used}; {self.seconds:.0f} s"
        )


def measure(home: Home, seed: int, ladder: bool, overrides: Sequence[str] = ()) -> Outcome:
    """One training from beginning to end."""
    name = f"seed{seed}-{'with' if ladder else 'without'}"
    begun = time.monotonic()
    end = home.train(name, f"train.seed={seed}", f"stability.enabled={str(ladder).lower()}", *overrides)
    found = points(home.run_url(name))
    counts = {
        str(kind): int(max(values))
        for kind in Kind
        if (values := [value for (metric, _), value in found.items() if metric == f"stability/{kind}"])
        and max(values)
    }
    return Outcome(
        seed=seed,
        ladder=ladder,
        state=end["state"],
        curve=sorted((at, value) for (metric, at), value in found.items() if metric == BITS),
        interventions=counts,
        seconds=time.monotonic() - begun,
    )


def draw(outcomes: Sequence[Outcome], file: Path) -> None:
    """The curves of all trainings, as a PNG."""
    figure, axes = pyplot.subplots(figsize=(7.2, 3.6), dpi=110, layout="constrained")
    for outcome in outcomes:
        label = "with the ladder" if outcome.ladder else "without"
        axes.plot(
            *zip(*outcome.curve, strict=True),
            color="tab:blue" if outcome.ladder else "tab:red",
            linewidth=1.2,
            label=label if outcome.seed == outcomes[0].seed else None,
        )
    axes.set(xlabel="images seen", ylabel="training NELBO, bits/dim", yscale="log")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(frameon=False)
    figure.savefig(file)
    pyplot.close(figure)


def run(seeds: Sequence[int], overrides: Sequence[str]) -> list[Outcome]:
    """Each seed without and with the ladder; prints each training as soon as it is over."""
    outcomes = []
    with (
        tempfile.TemporaryDirectory(prefix="nvae-divergence-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.chdir(folder)
        for variable in ("NVAE_STORE", "MLFLOW_TRACKING_URI"):
            patch.delenv(variable, raising=False)
        home = Home(Path(folder))
        Path(home.yaml).write_text(YAML)
        shards.build("portraits:512", f"{home.store}/data/tiny", image_size=32, validation_fraction=0.125)
        for seed in seeds:
            for ladder in (False, True):
                outcomes.append(measure(home, seed, ladder, overrides))
                print(outcomes[-1].line(), flush=True)
    return outcomes


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.divergence", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 1")
    parser.add_argument("--picture", type=Path, help="file for a PNG of the curves")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="other settings")
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    picture = asked.picture and asked.picture.resolve()
    outcomes = run(range(1, asked.seeds + 1), asked.overrides)
    for ladder in (False, True):
        same = [outcome for outcome in outcomes if outcome.ladder is ladder]
        diverged = sum(outcome.diverged for outcome in same)
        print(f"{'with' if ladder else 'without'} the ladder {diverged} of {len(same)} diverged")
    if picture:
        draw(outcomes, picture)


if __name__ == "__main__":
    main(sys.argv[1:])
