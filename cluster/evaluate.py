"""The command `nvae evaluate`."""

import re
from typing import Any

import click

from cluster.options import (
    TemperatureType,
    WorkersType,
    json_option,
    show_facts,
    store_option,
    tracking_option,
)


class _Sha256Type(click.ParamType[str]):
    """A SHA-256 or its beginning: eight digits are what the names of such files end with."""

    name = "SHA256"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        if not re.fullmatch(r"[0-9a-fA-F]{8,64}", str(value)):
            self.fail(
                f"{value!r} is no SHA-256: 64 digits from 0-9 and a-f, or the first 8 or more of them.",
                parameter,
                context,
            )
        return str(value).lower()


@click.command()
@click.argument("model")
@click.option("--data", metavar="URL", help="Data set to evaluate on. [the one it was trained on]")
@click.option(
    "--samples",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Draws per image; more than one give the importance-weighted likelihood, too.",
)
@click.option("--limit", type=click.IntRange(1), help="Evaluate the first N validation images only.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the latents' noise.")
@click.option(
    "--batch-size",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Images times draws at once: as many as memory holds; the result is the same but for rounding.",
)
@click.option(
    "--inception",
    metavar="FILE|URL",
    help="Inception's weights, .pth or .safetensors: measure FID, precision and recall of samples, too.",
)
@click.option(
    "--inception-sha256",
    type=_Sha256Type(),
    help="What that file's SHA-256 must be, or begin with. [it is shown]",
)
@click.option(
    "--fid-samples",
    default=10_000,
    show_default=True,
    type=click.IntRange(4),
    help="Samples to draw, and at most how many images to compare them with; papers take 50,000.",
)
@click.option(
    "--fid-reference",
    default="train",
    show_default=True,
    type=click.Choice(["train", "validation"]),
    help="The split of those images.",
)
@click.option(
    "--temperature",
    default="1",
    show_default=True,
    metavar="T|T,T,...",
    type=TemperatureType(),
    help="Of those samples: one, or one per scale, coarsest first.",
)
@click.option(
    "--workers",
    type=WorkersType(),
    metavar="N|MIN:MAX",
    help="Evaluate on Ray workers; whatever their number, the same figures. [in this process, without Ray]",
)
@click.option(
    "--record/--no-record",
    default=True,
    show_default=True,
    help="Note the figures at the registered version; a URL of a checkpoint has none.",
)
@json_option
@store_option
@tracking_option
def evaluate(
    as_json: bool,
    inception: str | None,
    inception_sha256: str | None,
    fid_samples: int,
    fid_reference: str,
    temperature: tuple[float, ...],
    **asked: Any,
) -> int:
    """Measure a model on a validation split: NELBO, bits/dim, KL per group, unused groups.

    MODEL is models:/NAME@ALIAS, models:/NAME/VERSION, or the URL of a checkpoint. With --inception, FID,
    precision and recall of its samples, too. Exit code 1 if it was asked to stop before the end.
    """
    from cluster import evaluating

    sampled = None
    if inception is not None:
        sampled = evaluating.Sampled(inception, inception_sha256, fid_samples, fid_reference, temperature)
    answer = evaluating.evaluate(**asked, sampled=sampled)
    show_facts(evaluating.facts(answer), as_json)
    return 0 if answer["state"] == "finished" else 1
