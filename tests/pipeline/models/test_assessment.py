import math
import random
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nvae.model import NVAE
from nvae.pixels import to_model
from pipeline.models.assessment import ACTIVE_VARIANCE, Tally, comparable, unused_groups
from pipeline.models.evaluation import evaluate
from pipeline.models.image_scores import score_images
from pipeline.models.inference import inference, latent_noise
from tests.pipeline.models.test_evaluation import CPU, GREY, Share, draws_of
from tests.pipeline.models.tiny import tiny_config, tiny_images, tiny_model

IMAGES, PIECES = 11, 4
STORED = tiny_images(IMAGES, tiny_config().model)
STANDARD_ERROR = "validation/nelbo_nats_standard_error"


def piece_of(stored: Tensor, piece: int, batch_size: int = 2) -> list[Share]:
    start, stop = (len(stored) * end // PIECES for end in (piece, piece + 1))
    return [
        Share(
            stored[i : min(i + batch_size, stop)], torch.arange(i, min(i + batch_size, stop)), torch.ones(n)
        )
        for i in range(start, stop, batch_size)
        if (n := min(batch_size, stop - i))
    ]


def share_of(model: NVAE, pieces: list[int], draws: int, rows: int = 2, stored: Tensor = STORED) -> Tally:
    tally = Tally(model.config, len(stored), PIECES, torch.device("cpu"))
    for piece in pieces:
        tally.add(model, piece, piece_of(stored, piece), draws, rows=rows, seed=0)
    return tally


def whole(model: NVAE, draws: int, rows: int = 2, stored: Tensor = STORED) -> dict[str, float]:
    return share_of(model, list(range(PIECES)), draws, rows, stored).merged(CPU).scores(draws)


@dataclass
class Meeting:
    """Ranks that are threads of this process: what each brings is added up in the order of arrival."""

    ranks: int

    def __post_init__(self) -> None:
        self.barrier, self.lock = threading.Barrier(self.ranks), threading.Lock()
        self.sums: list[Tensor] = []

    def all_reduce(self, tensor: Tensor) -> Tensor:
        with self.lock:
            self.sums.append(tensor)
        self.barrier.wait(60)
        total = sum(self.sums[1:], self.sums[0].clone())
        self.barrier.wait(60)
        self.sums.clear()
        self.barrier.wait(60)
        return total


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_any_number_of_workers_finds_the_figures_of_one_to_the_last_bit(ranks: int) -> None:
    model, meeting = tiny_model(), Meeting(ranks)
    shares = [share_of(model, list(range(rank, PIECES, ranks)), draws=3) for rank in range(ranks)]
    random.Random(ranks).shuffle(shares)
    found: list[dict[str, float]] = []
    threads = [
        threading.Thread(target=lambda share=share: found.append(share.merged(meeting).scores(3)))
        for share in shares
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [whole(model, 3)] * ranks


@pytest.mark.parametrize("settings", [{}, {"pixel_bits": 5, "flow_pairs": 1}, GREY])
def test_every_figure_that_a_training_reports_is_the_same_in_depth(settings: dict[str, Any]) -> None:
    model, config = tiny_model(**settings), tiny_config(**settings)
    stored = tiny_images(IMAGES, config.model)
    plain = evaluate(model, config, piece_of(stored, 0, 99), CPU, importance_samples=3)
    tally = Tally(config.model, IMAGES, 1, torch.device("cpu"))
    tally.add(model, 0, piece_of(stored, 0, 99), 3, rows=2, seed=0)
    deep = tally.merged(CPU).scores(3)
    assert {name: deep[name] for name in plain} == pytest.approx(plain, rel=1e-6)


def test_standard_errors_errors_and_active_units_are_those_of_a_slow_loop() -> None:
    model, draws = tiny_model(), 3
    nelbos, squares = torch.zeros(IMAGES).double(), torch.zeros(IMAGES).double()
    means = [torch.zeros(IMAGES, *shape).double() for shape in model.config.latent_shapes]
    for image, _, pixels, output in draws_of(model, STORED, draws):
        nelbos[image] += (
            sum(float(group.kl) for group in output.groups) - float(output.likelihood.log_prob(pixels).sum())
        ) / draws
        shown = output.likelihood.mean()[0] * 255
        squares[image] += float((shown - STORED[image]).square().mean()) / draws
        for mean, group in zip(means, output.groups, strict=True):
            mean[image] += group.posterior.mu[0] / draws
    scores = whole(model, draws)
    assert scores[STANDARD_ERROR] == pytest.approx(float(nelbos.std()) / math.sqrt(IMAGES), rel=1e-5)
    assert scores["validation/mean_squared_error"] == pytest.approx(float(squares.mean()), rel=1e-4)
    decibels = 20 * math.log10(255) - 10 * math.log10(float(squares.mean()))
    assert scores["validation/psnr_db"] == pytest.approx(decibels, rel=1e-5)
    for group, mean in enumerate(means):
        active = mean.var(0, unbiased=False).mean(dim=(1, 2)) > ACTIVE_VARIANCE
        assert scores[f"validation/active_units/group_{group:02d}"] == int(active.sum())


@pytest.mark.parametrize("rows", [1, 4, 7, 1000])
def test_how_many_draws_are_made_at_once_changes_nothing_but_rounding(rows: int) -> None:
    model = tiny_model()
    images = to_model(STORED[:2], model.config)
    with inference(model):
        one_by_one = score_images(model, images, [5, 9], 9, rows=1, seed=1)
        batched = score_images(model, images, [5, 9], 9, rows=rows, seed=1)
    for name, tensor in vars(one_by_one).items():
        torch.testing.assert_close(vars(batched)[name], tensor, rtol=1e-5, atol=1e-5)


def test_the_likelihood_of_a_thousand_draws_is_their_log_sum_exp() -> None:
    """Against all log-weights side by side, of independent full forwards."""
    model, draws = tiny_model(), 1000
    images = to_model(STORED[:1], model.config)
    log_weights = []
    with inference(model):
        found = score_images(model, images, [3], draws, rows=64, seed=0)
        for first in range(0, draws, 100):
            numbers = range(first, first + 100)
            output = model(images.repeat(100, 1, 1, 1), latent_noise(0, [3], draw=numbers))
            log_p_x = output.likelihood.log_prob(images.repeat(100, 1, 1, 1)).sum(dim=(1, 2))
            log_weights.append(log_p_x + sum(group.log_p - group.log_q for group in output.groups))
    expected = torch.cat(log_weights).double().logsumexp(0) - math.log(draws)
    assert float(found.log_likelihood) == pytest.approx(float(expected), rel=1e-5)


def test_noise_of_several_draws_is_that_of_each_draw_by_itself() -> None:
    together = latent_noise(3, [7, 2], draw=range(4, 6))((4, 2, 3, 3))
    apart = [latent_noise(3, [7, 2], draw=draw)((2, 2, 3, 3)) for draw in (4, 5)]
    assert torch.equal(together, torch.cat(apart))


def test_a_group_whose_posterior_is_its_prior_is_reported_as_unused() -> None:
    model = tiny_model(residual_posterior=True)
    assert 1 not in unused_groups(whole(model, 1))
    with torch.no_grad():
        for parameter in model.posterior_heads[1].parameters():
            parameter.zero_()
    assert 1 in unused_groups(whole(model, 1))


def test_images_that_could_not_be_read_are_counted_apart() -> None:
    model = tiny_model()
    tally = Tally(model.config, 4, 1, torch.device("cpu"))
    weights = torch.tensor([1.0, 0, 1, 1])
    tally.add(model, 0, [Share(STORED[:4], torch.arange(4), weights)], 1, rows=4, seed=0)
    scores = tally.merged(CPU).scores(1)
    kept = [float(score_one(model, image)) for image in (0, 2, 3)]
    assert (scores["validation/images"], scores["validation/corrupt_images"]) == (3, 1)
    assert scores["validation/nelbo_nats"] == pytest.approx(sum(kept) / 3, rel=1e-5)


def score_one(model: NVAE, image: int) -> Tensor:
    with inference(model):
        images = to_model(STORED[image : image + 1], model.config)
        found = score_images(model, images, [image], 1, rows=1, seed=0)
    return found.reconstruction + found.kl_per_channel.sum()


def test_a_broken_model_has_figures_that_are_no_numbers_and_one_image_no_standard_error() -> None:
    model = tiny_model()
    alone = whole(model, 1, stored=STORED[:1])
    assert math.isnan(alone[STANDARD_ERROR]) and not math.isnan(alone["validation/nelbo_nats"])
    with torch.no_grad():
        model.image_head.weight.fill_(math.nan)
    assert math.isnan(whole(model, 1)["validation/bits_per_dim"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pixel_bits": 5}, "not with 8-bit ones"),
        ({}, "8-bit"),
        (GREY, "binarization"),
        ({"likelihood": "normal"}, "density"),
    ],
)
def test_what_figures_compare_with_is_said(settings: dict[str, Any], said: str) -> None:
    assert said in comparable(tiny_config(**settings).model, 1)
    assert "K = 50" in comparable(tiny_config(**settings).model, 50)
