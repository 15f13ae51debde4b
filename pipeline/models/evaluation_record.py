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
from typing import Any

PREFIX = "evaluation/"
_HASH_DIGITS = 12


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
