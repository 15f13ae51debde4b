"""Prints how closely our model agrees with the published implementation.

`python -m tests.nvae.parity_table`: for every case and quantity the worst error, relative to the
largest recorded value (or as the quantity's own comparison defines it), and as a share of what the
tests allow.
"""

import functools
import re
from collections.abc import Callable

import torch

from tests.nvae.published_cases import Case, Comparison, cases
from tests.nvae.published_training import (
    Step,
    compare_batch_norm,
    compare_gradients,
    compare_state,
    compare_step,
    three_steps,
)
from tests.nvae.test_published_parity import evaluation, evaluation_in_fp64, recalibration, sampling


@functools.cache
def steps(case: Case) -> list[Step]:
    return three_steps(case)


def losses(case: Case) -> list[Comparison]:
    return [found for number, step in enumerate(steps(case)) for found in compare_step(case, number, step)]


def as_one(quantity: str, comparisons: list[Comparison]) -> list[Comparison]:
    """Comparisons of many parameters under one name, as they define their errors.

    Some parameters' true gradient is zero; errors relative to that say nothing.
    """
    return [Comparison(quantity, c.error, c.tolerance, c.error) for c in comparisons]


def updates(case: Case) -> list[Comparison]:
    gradients = compare_gradients(case, steps(case)[0])
    return [
        *as_one("gradients of step 0", gradients[:-1]),
        gradients[-1],
        *as_one("batch norm statistics after step 0", compare_batch_norm(case, steps(case)[0])),
        *as_one("state after 3 steps (absolute)", compare_state(case, steps(case)[-1])),
    ]


SECTIONS: dict[str, Callable[[Case], list[Comparison]]] = {
    "evaluation": evaluation,
    "evaluation in fp64": evaluation_in_fp64,
    "prior samples": sampling,
    "batch norms re-estimated": recalibration,
    "three training steps": losses,
    "updates": updates,
}


def kind(quantity: str) -> str:
    """What a line of the table sums up: single groups and single layers in one."""
    if quantity.startswith("bnadj/"):
        return "bnadj/" + quantity.rpartition(".")[2]
    quantity = re.sub(r" \((sum|l2|absmean|chmean|chstd)\)$", ", summaries", quantity)
    return re.sub(r" of group \d+", "", quantity)


def worst(comparisons: list[Comparison]) -> dict[str, tuple[float, float]]:
    """(relative error, share of the tolerance) of each kind of quantity."""
    found: dict[str, tuple[float, float]] = {}
    for comparison in comparisons:
        share = comparison.error / comparison.tolerance if comparison.tolerance else comparison.error
        error, largest = found.get(kind(comparison.quantity), (0.0, 0.0))
        found[kind(comparison.quantity)] = max(error, comparison.relative), max(largest, share)
    return found


def main() -> None:
    torch.set_num_threads(1)
    for parameter in cases():
        case = parameter.values[0]
        if case is None:
            raise SystemExit("no published cases; NVAE_ORACLE names their folder")
        for section, compare in SECTIONS.items():
            print(f"\n{case.name}: {section}")
            for quantity, (error, share) in worst(compare(case)).items():
                print(f"  {quantity:36} {error:9.1e}   {share:6.1%} of what is allowed")


if __name__ == "__main__":
    main()
