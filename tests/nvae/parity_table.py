"""Prints how closely our model agrees with the published implementation.

`python -m tests.nvae.parity_table`: one line per quantity and case with the worst error, relative to
the largest recorded value, and as a share of what the tests allow.
"""

import re
from collections.abc import Callable

import torch

from tests.nvae.published_cases import Case, Comparison, cases
from tests.nvae.test_published_parity import evaluation, evaluation_in_fp64, recalibration, sampling

SECTIONS: dict[str, Callable[[Case], list[Comparison]]] = {
    "evaluation": evaluation,
    "evaluation in fp64": evaluation_in_fp64,
    "prior samples": sampling,
    "batch norms re-estimated": recalibration,
}


def kind(quantity: str) -> str:
    """What a line of the table sums up: single groups and single layers in one."""
    if quantity.startswith("bnadj/"):
        return "bnadj/" + quantity.rpartition(".")[2]
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
                print(f"  {quantity:28} {error:9.1e}   {share:6.1%} of what is allowed")


if __name__ == "__main__":
    main()
