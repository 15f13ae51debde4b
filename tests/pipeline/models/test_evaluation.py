import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor

from nvae.model import NVAE, Output
from nvae.pixels import crop_border, to_model
from pipeline.models.evaluation import EvaluationError, evaluate
from pipeline.models.inference import inference, latent_noise
from pipeline.training.worker import LocalWorker
from tests.pipeline.models.tiny import tiny_config, tiny_images, tiny_model

CPU = LocalWorker(torch.device("cpu"))
GREY: dict[str, Any] = {"likelihood": "bernoulli", "image_channels": 1, "border_pixels": 1}


@dataclass(frozen=True)
class Share:
    """A batch as the loader makes it, as far as an evaluation looks at it."""

    images: Tensor
    positions: Tensor
    weights: Tensor


def shares(images: Tensor, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Share]:
    """The batches of one rank: contiguous shares that differ by at most one image."""
    start, stop = (len(images) * r // world_size for r in (rank, rank + 1))
    for first in range(start, stop, batch_size):
        last = min(first + batch_size, stop)
        yield Share(images[first:last], torch.arange(first, last), torch.ones(last - first))


def draws_of(model: NVAE, stored: Tensor, count: int) -> Iterator[tuple[int, int, Tensor, Output]]:
    """(image, draw, pixels, output): every image alone, with an encoder pass for each draw."""
    for index, image in enumerate(stored):
        pixels = to_model(image[None], model.config)
        for draw in range(count):
            with inference(model):
                yield index, draw, pixels, model(pixels, latent_noise(0, [index], draw=draw))


@pytest.mark.parametrize("settings", [{}, {"pixel_bits": 5, "flow_pairs": 1}, GREY])
def test_scores_are_those_of_a_slow_loop_over_single_images(settings):
    model, config = tiny_model(**settings), tiny_config(**settings)
    stored = tiny_images(7, config.model)
    scores = evaluate(model, config, shares(stored, 3), CPU, importance_samples=4)

    reconstructions, kl, log_weights = [], torch.zeros(3, 2), torch.zeros(7, 4)
    for image, draw, pixels, output in draws_of(model, stored, 4):
        log_p_x = crop_border(output.likelihood.log_prob(pixels), config.model.border_pixels).sum()
        reconstructions.append(-float(log_p_x))
        kl += torch.cat([group.kl_per_channel for group in output.groups]) / 28
        log_weights[image, draw] = log_p_x + sum(float(g.log_p - g.log_q) for g in output.groups)
    dimensions = 36 if settings is GREY else 3 * 64
    bound = float((log_weights.double().logsumexp(1) - math.log(4)).mean())
    nelbo = sum(reconstructions) / 28 + float(kl.sum())
    expected = {
        "validation/images": 7,
        "validation/corrupt_images": 0,
        "validation/nelbo_nats": nelbo,
        "validation/bits_per_dim": nelbo / dimensions / math.log(2),
        "validation/reconstruction_nats": sum(reconstructions) / 28,
        "validation/kl_nats": float(kl.sum()),
        "validation/active_channels": int((kl > 0.1).sum()),
        "validation/importance_weighted_nats": -bound,
        "validation/importance_weighted_bits_per_dim": -bound / dimensions / math.log(2),
    }
    for group in range(3):
        expected[f"validation/kl_nats/group_{group:02d}"] = float(kl[group].sum())
        expected[f"validation/active_channels/group_{group:02d}"] = int((kl[group] > 0.1).sum())
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_without_several_draws_there_is_no_importance_weighted_score():
    model, config = tiny_model(), tiny_config()
    scores = evaluate(model, config, shares(tiny_images(2, config.model), 2), CPU)
    assert not [name for name in scores if "importance" in name]


def test_the_importance_weighted_bound_is_tighter_than_the_nelbo_and_tightens_with_more_draws():
    model, config = tiny_model(), tiny_config()
    stored = tiny_images(8, config.model)
    one, few, many = (evaluate(model, config, shares(stored, 8), CPU, draws) for draws in (1, 4, 64))
    key = "validation/importance_weighted_nats"
    assert one["validation/nelbo_nats"] > few[key] > many[key]


def evaluate_on_a_rank(rank: int, world_size: int, rendezvous: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)

    class Gloo:
        def all_reduce(self, tensor: Tensor) -> Tensor:
            dist.all_reduce(tensor)
            return tensor

    config = tiny_config()
    batches = shares(tiny_images(7, config.model), 2, rank, world_size)
    results.put(evaluate(tiny_model(), config, batches, Gloo(), importance_samples=2))
    dist.destroy_process_group()


def test_three_ranks_with_unequal_shares_agree_on_the_scores_of_one(tmp_path: Path):
    config = tiny_config()
    alone = evaluate(tiny_model(), config, shares(tiny_images(7, config.model), 7), CPU, importance_samples=2)
    context = processes.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=evaluate_on_a_rank, args=(rank, 3, str(tmp_path / "meet"), results))
        for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    scores = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(timeout=60)
    assert scores[0] == scores[1] == scores[2]
    assert scores[0] == pytest.approx(alone, rel=1e-6)


def test_images_of_weight_zero_are_counted_apart():
    model, config = tiny_model(), tiny_config()
    stored = tiny_images(6, config.model)
    readable = list(shares(stored[:4], 4))
    unreadable = Share(stored[4:], torch.arange(4, 6), torch.zeros(2))
    mixed = Share(stored, torch.arange(6), torch.tensor([1.0, 1, 1, 1, 0, 0]))
    expected = evaluate(model, config, readable, CPU) | {"validation/corrupt_images": 2.0}
    assert evaluate(model, config, [*readable, unreadable], CPU) == expected
    assert evaluate(model, config, [mixed], CPU) == pytest.approx(expected)


def test_a_split_without_images_is_refused_with_a_remedy():
    with pytest.raises(EvaluationError, match="validation-fraction"):
        evaluate(tiny_model(), tiny_config(), [], CPU)


def test_scores_of_a_broken_model_are_nan_and_not_an_error():
    model, config = tiny_model(), tiny_config()
    with torch.no_grad():
        model.image_head.weight.fill_(math.nan)
    scores = evaluate(model, config, shares(tiny_images(2, config.model), 2), CPU)
    assert math.isnan(scores["validation/bits_per_dim"])


def test_an_evaluation_leaves_the_model_in_training_mode_and_its_statistics_alone():
    model, config = tiny_model().train(), tiny_config()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, config, shares(tiny_images(4, config.model), 4), CPU)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
