"""The commands that move aliases of registered models past a gate: promote, rollback, history."""

from typing import Any

import click

from cluster.options import WorkersType, json_option, show, show_facts, store_option, tracking_option


def _told(facts: dict[str, Any]) -> dict[str, Any]:
    """Of the facts those that say something: a rollback has no scores."""
    return {name: fact for name, fact in facts.items() if fact not in ("", None, False)}


_alias_option = click.option("--alias", required=True, help="The alias to move, such as champion; not best.")


@click.command()
@click.argument("model", metavar="NAME/VERSION")
@_alias_option
@click.option("--data", metavar="URL", help="Data set to evaluate on. [the one it was trained on]")
@click.option(
    "--samples",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Draws per image of the evaluation.",
)
@click.option("--limit", type=click.IntRange(1), help="Evaluate the first N validation images only.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the latents' noise.")
@click.option(
    "--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Images times draws at once."
)
@click.option(
    "--workers",
    type=WorkersType(),
    metavar="N|MIN:MAX",
    help="Evaluate on Ray workers. [in this process, without Ray]",
)
@click.option("--force", is_flag=True, help="Promote a worse or incomparable model; needs --reason.")
@click.option("--reason", default="", metavar="TEXT", help="Why; recorded in the history.")
@json_option
@store_option
@tracking_option
def promote(as_json: bool, **asked: Any) -> int:
    """Give an alias to a version that is better than the one that has it.

    Every file is verified and the weights must be finite; then both versions are evaluated on the same
    images with the same draws, unless `nvae evaluate` has done so. Equal is not better. Whatever becomes
    of it is recorded: `nvae registry history NAME`. Damage cannot be forced.

    Exit code 1 if the gate refuses, 2 for bad input, of which nothing is recorded.

    \b
      nvae registry promote nvae-faces/7 --alias champion --samples 100
      nvae registry promote nvae-faces/3 --alias champion --force --reason "7 draws grey faces"
    """
    from cluster import promoting

    facts = promoting.promote(**asked)
    show_facts(facts if as_json else _told(facts), as_json)
    return 0 if promoting.went_through(facts) else 1


@click.command()
@click.argument("name")
@_alias_option
@click.option("--reason", default="", metavar="TEXT", help="Why; recorded in the history.")
@json_option
@store_option
@tracking_option
def rollback(as_json: bool, **asked: Any) -> int:
    """Return an alias of model NAME to the version that had it before, if that is still whole.

    Twice goes back twice. Former holders that are damaged or gone are passed over. Exit code 1 if somebody
    else moved the alias at the same moment, 2 if there is nothing to go back to.
    """
    from cluster import promoting

    facts = promoting.rollback(**asked)
    show_facts(facts if as_json else _told(facts), as_json)
    return 0 if promoting.went_through(facts) else 1


@click.command()
@click.argument("name")
@click.option("--alias", help="Of this alias alone.")
@json_option
@store_option
@tracking_option
def history(name: str, alias: str | None, as_json: bool, store: str | None, tracking: str | None) -> None:
    """Every attempt to promote a version of model NAME, and what became of it, the oldest first."""
    from cluster import promoting

    columns = {
        "number": "#",
        "when": "WHEN",
        "who": "WHO",
        "kind": "WHAT",
        "alias": "ALIAS",
        "from": "FROM",
        "to": "TO",
        "score": "SCORE",
        "outcome": "OUTCOME",
        "why": "WHY",
        "reason": "REASON",
    }
    show(promoting.history(name, alias, store, tracking), columns, as_json)
