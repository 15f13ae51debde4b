"""What an evaluation leaves at a registered version: one tag.

Its name says on which data, on how many images, with how many draws and which seed, so that
evaluations stand beside each other and a repetition replaces its predecessor; its value is a
JSON object of the figures. One tag is written at once: no reader finds the likelihood of one
evaluation beside the image count of another. The tags `validation/...`, which decide who is `best`,
are those of the training and are not touched: an evaluation of the first ten images would
crown a model.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "evaluation/"
_HASH_DIGITS = 12


@dataclass(frozen=True)
class Evaluation:
    """One recorded evaluation, as its tag has it."""

    data_hash: str
    """Content hash of the data set whose validation split was evaluated."""
    images: int
    draws: int
    """K, of which the importance-weighted figures are."""
    seed: int
    metrics: Mapping[str, float]
    """By the names that they have in training, `validation/bits_per_dim` and so on; NaN if not finite."""


def evaluation_tag(answer: Mapping[str, Any]) -> tuple[str, str]:
    """Name and value of the tag for what `sharded_evaluation.work` answered."""
    scores = answer["scores"]
    images = int(scores["validation/images"])
    name = f"{PREFIX}{answer['data_hash'][:_HASH_DIGITS]}/images_{images}/draws_{answer['draws']}"
    value = {
        "data_hash": answer["data_hash"],
        "draws": answer["draws"],
        "seed": answer["seed"],
        "unused_groups": answer["unused_groups"],
        **{name: score if math.isfinite(score) else None for name, score in scores.items()},
    }
    return f"{name}/seed_{answer['seed']}", json.dumps(value, allow_nan=False)


def evaluations(tags: Mapping[str, str]) -> tuple[Evaluation, ...]:
    """The evaluations in a version's tags: of most images first, then of most draws.

    Tags can be edited by anybody: one that is not as it was written counts for nothing.
    """
    texts = [value for name, value in tags.items() if name.startswith(PREFIX)]
    if not texts:
        return ()
    found = map(_parsed, texts)
    known = [evaluation for evaluation in found if evaluation is not None]
    return tuple(sorted(known, key=lambda each: (-each.images, -each.draws, each.seed, each.data_hash)))


def _parsed(text: str) -> Evaluation | None:
    try:
        value = json.loads(text)
        scores = {name: value[name] for name in value if "/" in name}
        metrics = {name: math.nan if score is None else float(score) for name, score in scores.items()}
        return Evaluation(
            data_hash=str(value["data_hash"]),
            images=int(metrics["validation/images"]),
            draws=int(value["draws"]),
            seed=int(value["seed"]),
            metrics=metrics,
        )
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None
