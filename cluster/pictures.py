"""The commands that draw: `nvae sample`, `reconstruct`, `interpolate`, `traverse`."""

from pathlib import Path
from typing import Any

import click

from cluster.options import TemperatureType, batch_size_option, store_option, tracking_option

_PLACE = click.Path(path_type=Path)
_model_argument = click.argument("model")
_output_argument = click.argument("output", type=_PLACE)
_seed_option = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="Other seeds, other images."
)
_temperature_option = click.option(
    "--temperature",
    default="0.7",
    show_default=True,
    metavar="T|T,T,...",
    type=TemperatureType(),
    help="Factor of the priors' standard deviations, or one per scale, coarsest first: lower is smoother "
    "and less varied.",
)


@click.command()
@_model_argument
@_output_argument
@click.option("--count", default=16, show_default=True, type=click.IntRange(1), help="Number of images.")
@_temperature_option
@_seed_option
@batch_size_option
@click.option(
    "--pixels",
    default="mean",
    show_default=True,
    type=click.Choice(["mean", "sample"]),
    help="Show each pixel's mean, or draw it.",
)
@click.option(
    "--pixel-temperature",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="The same for drawn pixels.",
)
@click.option("--recalibrate", is_flag=True, help="Re-estimate batch norm at this temperature first.")
@click.option("--separate", is_flag=True, help="One PNG per image, in the folder OUTPUT.")
@store_option
@tracking_option
def sample(**asked: Any) -> None:
    """Draw images from a model: a grid in OUTPUT.png, or with --separate one file each in a folder.

    Image number i of a seed is the same picture whatever the count, the batch size and the device.
    A folder that was not finished is continued by the same command, one that is may be extended
    with a greater count; other settings are refused there.

    \b
      nvae sample models:/nvae-faces@best faces.png --count 64 --temperature 1.0,0.9,0.7
      nvae sample models:/nvae-faces@best faces --count 50000 --temperature 1 --pixels sample --separate
    """
    from cluster import drawing

    click.echo(drawing.sample(**asked))


@click.command()
@_model_argument
@click.argument("images", nargs=-1, required=True, type=_PLACE)
@_output_argument
@click.option(
    "--temperature",
    default="0",
    show_default=True,
    metavar="T|T,T,...",
    type=TemperatureType(),
    help="Factor of the posteriors' standard deviations, or one per scale, coarsest first: at 0 their "
    "means are shown, at 1 draws.",
)
@_seed_option
@batch_size_option
@store_option
@tracking_option
def reconstruct(**asked: Any) -> None:
    """Show IMAGES, files or folders, each beside its reconstruction, in OUTPUT.png.

    Of each image the central square is taken and scaled down to the model's size.
    """
    from cluster import drawing

    click.echo(drawing.reconstruct(**asked))


@click.command()
@_model_argument
@click.argument("start", metavar="A")
@click.argument("end", metavar="B")
@_output_argument
@click.option(
    "--steps", type=click.IntRange(2), help="Images from A to B, both included. [10; of an animation 30]"
)
@_temperature_option
@batch_size_option
@store_option
@tracking_option
def interpolate(**asked: Any) -> None:
    """Go from A to B through the latents of all groups. Each is an image file or a sample's seed.

    `seed:7` is the first image that `nvae sample --seed 7` draws, `seed:7/3` its image number 3; the
    temperature is theirs. OUTPUT.png is a strip, OUTPUT.gif or OUTPUT.apng an animation, there and back.

    \b
      nvae interpolate models:/nvae-faces@best anna.jpg ben.jpg strip.png
      nvae interpolate models:/nvae-faces@best seed:1 seed:2 faces.gif
    """
    from cluster import drawing

    click.echo(drawing.interpolate(**asked))


@click.command()
@_model_argument
@_output_argument
@click.option(
    "--of",
    "subject",
    default="seed:0",
    show_default=True,
    metavar="IMAGE",
    help="What is varied: an image file, or seed:N.",
)
@click.option("--columns", default=8, show_default=True, type=click.IntRange(1), help="Draws in each row.")
@click.option("--groups", "each_group", is_flag=True, help="A row for each group instead of each scale.")
@click.option(
    "--finer",
    "with_finer",
    is_flag=True,
    help="In each row draw all that follow anew, too: the paper's figure.",
)
@_temperature_option
@_seed_option
@batch_size_option
@store_option
@tracking_option
def traverse(**asked: Any) -> None:
    """Show what each scale decides: OUTPUT.png has a row for each, the coarsest at the top.

    A row begins with the image that is varied; in the others of the row the latents of that one
    scale are drawn anew, and all others kept.
    """
    from cluster import drawing

    click.echo(drawing.traverse(**asked))
