"""What the commands share: options that mean the same everywhere, and how an answer is shown."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from pipeline.width import Workers


class WorkersType(click.ParamType[Workers]):
    """`N` or `MIN:MAX`."""

    name = "N or MIN:MAX"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> Workers:
        try:
            return Workers.parse(value)
        except ValueError:
            self.fail(
                f"{value!r} is no number of workers, such as 4, and no range, such as 2:8.",
                parameter,
                context,
            )


class TemperatureType(click.ParamType[tuple[float, ...]]):
    """`T`, or one per scale, `T,T,T`; whether there are as many as scales, only the model knows."""

    name = "T or T,T,..."

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[float, ...]:
        try:
            temperatures = tuple(float(each) for each in str(value).split(","))
        except ValueError:
            temperatures = ()
        # What is not finite is refused by the first comparison or the second.
        if not temperatures or not all(0 <= each < float("inf") for each in temperatures):
            self.fail(
                f"{value!r} is no temperature, such as 0.7, and no list of one per scale, such as 1,0.9,0.7.",
                parameter,
                context,
            )
        return temperatures


workers_option = click.option(
    "--workers",
    type=WorkersType(),
    metavar="N|MIN:MAX",
    help="Ray Train workers. With a range the run goes on with fewer when nodes are lost, and with more "
    "when they return. [one per GPU, or 2 without GPUs]",
)
store_option = click.option(
    "--store", metavar="URL", help="Where runs, models and data are kept. [NVAE_STORE, else ./nvae-store]"
)
tracking_option = click.option(
    "--tracking",
    metavar="URI",
    help="MLflow server or database. [MLFLOW_TRACKING_URI, else SQLite in the store, or in ./nvae-store "
    "where the store is a bucket]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
batch_size_option = click.option(
    "--batch-size",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    help="Images at once: as many as memory holds; the result is the same.",
)
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


def show(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], as_json: bool) -> None:
    """A listing: a table with these headings for people, all there is for programs."""
    from pipeline import progress

    if as_json:
        show_json(list(rows))
    else:
        progress.table(rows, columns)


def show_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """What there is to know of one thing: a line for each fact, or an object for programs."""
    if as_json:
        show_json(facts)
    else:
        rows = ({"what": what, "value": value} for what, value in _lines(facts))
        show(rows, {"what": "WHAT", "value": "VALUE"}, as_json=False)


def _lines(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A dotted name and a value for each line: one per value, one per mapping of a list."""
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _lines(value, f"{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
            yield from ((f"{name}.{number}", each) for number, each in enumerate(value, start=1))
        else:
            yield name, value


def show_json(value: object) -> None:
    """JSON by its standard: what is not finite has no number there and is null."""
    click.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
