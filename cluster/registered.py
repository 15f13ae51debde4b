"""The commands about registered models: `nvae registry`."""

from pathlib import Path

import click

from cluster.options import json_option, show, show_facts, show_json, store_option, tracking_option
from pipeline.errors import printable

_limit_option = click.option(
    "--limit", default=50, show_default=True, type=click.IntRange(0), help="Rows to show; 0 for all."
)
_refresh_option = click.option(
    "--refresh", is_flag=True, help="Read all of MLflow anew, not only what has changed."
)
_model_argument = click.argument("model")


@click.group()
def registry() -> None:
    """Look trained models up.

    MODEL is models:/NAME@ALIAS or models:/NAME/VERSION. Versions are remembered in ~/.cache/nvae,
    so that MLflow is asked only for what has changed.
    """


@registry.command("list")
@click.argument("name", required=False)
@_limit_option
@_refresh_option
@json_option
@store_option
@tracking_option
def list_versions(
    name: str | None, limit: int, refresh: bool, as_json: bool, store: str | None, tracking: str | None
) -> None:
    """All registered versions, or those of NAME, the newest first, with aliases and scores."""
    from cluster import models

    show(models.versions(name, limit or None, refresh, store, tracking), models.COLUMNS, as_json)


@registry.command("find")
@click.argument("query", required=False, default="")
@click.option(
    "--sort",
    default="validation.bits_per_dim",
    show_default=True,
    metavar="FIELD",
    help="What to order by; what lacks it comes last.",
)
@click.option("--descending", is_flag=True, help="The highest first.")
@_limit_option
@_refresh_option
@json_option
@store_option
@tracking_option
def find_versions(
    query: str,
    sort: str,
    descending: bool,
    limit: int,
    refresh: bool,
    as_json: bool,
    store: str | None,
    tracking: str | None,
) -> None:
    """The versions that fulfil QUERY, the best first.

    \b
      nvae registry find "data=ffhq256 and validation.bits_per_dim < 0.75"
      nvae registry find "objective.spectral_coefficient <= 0.1 and not alias=best"
      nvae registry find "run ~ faces and created >= 2026-11" --sort images_seen --descending

    \b
    Names      model version alias run trial parent code created ended images_seen world_size
               licence; data (its name, place, or six digits of its hash); validation.METRIC of
               the training; evaluation.METRIC of `nvae evaluate` (most images, then most draws);
               every setting by its dotted path (`nvae config explain`)
    Operators  = != < <= > >= and ~ (contains); and, or, not, brackets
    Values     numbers, words, 'texts', true, false, [4, 4, 8]

    What a version does not have, or is not finite, fulfils no comparison.
    """
    from cluster import models

    rows, columns = models.found(query, sort, descending, limit or None, refresh, store, tracking)
    show(rows, columns, as_json)


@registry.command("show")
@_model_argument
@click.option("--settings", "with_settings", is_flag=True, help="Show its settings, too.")
@click.option("--card", is_flag=True, help="Show the model card instead: what it is and how to use it.")
@json_option
@store_option
@tracking_option
def show_version(
    model: str, with_settings: bool, card: bool, as_json: bool, store: str | None, tracking: str | None
) -> None:
    """Everything that is recorded of one version. JSON has its settings as well."""
    from cluster import models

    if card:
        text = models.card(model, store, tracking)
        show_json({"card": text}) if as_json else click.echo(printable(text), nl=False)
        return
    facts = models.describe(model, store, tracking)
    if not as_json and not with_settings:
        facts.pop("settings")
    show_facts(facts, as_json)


@registry.command()
@click.argument("first")
@click.argument("second")
@click.option(
    "--output",
    metavar="FILE.html",
    type=click.Path(path_type=Path),
    help="Write a page with KL per group and samples side by side.",
)
@json_option
@store_option
@tracking_option
def compare(
    first: str, second: str, output: Path | None, as_json: bool, store: str | None, tracking: str | None
) -> None:
    """What distinguishes two versions: settings that differ, metrics, KL per group."""
    from cluster import models

    if output is not None:
        click.echo(models.compare_page(first, second, output, store, tracking))
        return
    rows, warnings = models.compared(first, second, store, tracking)
    if as_json:
        show_json({"warnings": warnings, "rows": rows})
        return
    for warning in warnings:
        click.echo(printable(f"Warning: {warning}"), err=True)
    columns = {"part": "PART", "name": "NAME", "first": first, "second": second, "change": "CHANGE"}
    show(rows, columns, as_json=False)


@registry.command()
@_model_argument
@json_option
@store_option
@tracking_option
def lineage(model: str, as_json: bool, store: str | None, tracking: str | None) -> None:
    """Draw what a version comes from: data set, ancestors, run; and what was made of it."""
    from cluster import models

    facts, lines = models.lineage(model, store, tracking)
    show_json(facts) if as_json else click.echo(printable("\n".join(lines)))


@registry.command()
@_model_argument
@click.argument("folder", type=click.Path(path_type=Path))
@store_option
@tracking_option
def download(model: str, folder: Path, store: str | None, tracking: str | None) -> None:
    """Copy a model's files to FOLDER, which must be new or empty; every file is verified.

    The folder is readable for you alone, there as a whole or not at all, and every command takes it as
    MODEL.
    """
    from cluster import models

    click.echo(models.downloaded(model, folder, store, tracking))
