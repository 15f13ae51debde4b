"""The commands about what is already there: `nvae shards`, `runs` and `config`."""

from collections.abc import Sequence
from typing import Any

import click

from cluster.options import (
    json_option,
    overrides_argument,
    show,
    show_facts,
    show_json,
    store_option,
)

# -- data sets --------------------------------------------------------------------------


@click.group()
def shards() -> None:
    """Build and check data sets: WebDataset shards with an index."""


@shards.command()
@click.argument("source")
@click.argument("target")
@click.option(
    "--image-size", type=click.IntRange(4, 4096), help="Height and width in pixels. [the source's own]"
)
@click.option(
    "--validation-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of the images that is kept for evaluation. [the source's own split, else 0.1]",
)
@click.option("--validation-count", type=click.IntRange(0), help="How many images are kept for evaluation.")
@click.option(
    "--validation-list",
    metavar="FILE",
    help="The images that are kept for evaluation: a name in each line, as the source has it.",
)
@click.option(
    "--crop",
    default="none",
    show_default=True,
    help="Part of each image to take: center, LEFT,TOP,RIGHT,BOTTOM in pixels, or none, which rejects images "
    "that are not square.",
)
@click.option("--channels", type=click.Choice([1, 3]), help="3 for colour, 1 for grey. [the source's own]")
@click.option(
    "--format",
    "form",
    default="original",
    show_default=True,
    type=click.Choice(["original", "png", "webp", "raw"]),
    help="How images are stored, always without loss. original keeps files that fit as they are and makes "
    "all others webp (grey: png); webp is a quarter smaller than png and faster to decode; raw is two to "
    "four times larger and the fastest.",
)
@click.option(
    "--bits",
    default=8,
    show_default=True,
    type=click.IntRange(1, 8),
    help="Upper bits of each colour to keep. 5 halves the size, for models with model.pixel_bits=5.",
)
@click.option("--shard-mib", default=32, show_default=True, type=click.IntRange(1), help="Size of a shard.")
@click.option("--licence", help="A note on the images' licence, kept with the data set.")
@click.option(
    "--max-rejected",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Share of the images that may be unusable; above it the build stops. 1 leaves any number out.",
)
@click.option(
    "--threads", type=click.IntRange(1), help="Images that are read or converted at a time. [all cores]"
)
@click.option(
    "--if-missing",
    is_flag=True,
    help="If TARGET holds the complete data set of these options, do not look at SOURCE. Another one there "
    "is an error, with this option or without.",
)
@store_option
def build(source: str, target: str, store: str | None, shard_mib: int, **options: Any) -> None:
    """Pack the images of SOURCE into shards below TARGET, a URL or store:NAME.

    \b
    SOURCE is one of these, on this machine:
      photos/ photos.zip photos.tar    image files, in folders or not
      mnist/                           train-images-idx3-ubyte[.gz], t10k-...
      cifar-10-batches-py/             or cifar-10-python.tar.gz
      celeba64_lmdb/                   train.lmdb, validation.lmdb; LSUN's, too
      celeba-tfr/                      GLOW's and StyleGAN's .tfrecords
      ffhq/                            Hugging Face's train-*.parquet
      portraits:512                    512 procedural portraits, drawn here

    Folders train/ and validation/ at the top of a folder, .zip or .tar are its splits, as are
    those of published data sets. Otherwise validation images are drawn by content, or listed;
    copies of one image are never in both splits.

    Images that cannot be used are listed and left out; if they are many, the build stops. A
    build that was stopped continues when the same command is run again.
    """
    from cluster import data

    click.echo(data.build(source, target, store, shard_bytes=shard_mib << 20, **options))


@shards.command("index")
@click.argument("urls", metavar="URL...", nargs=-1, required=True)
@click.option(
    "--image-size", type=click.IntRange(4, 4096), help="Height and width in pixels. [the first images']"
)
@click.option("--channels", type=click.Choice([1, 3]), help="3 for colour, 1 for grey. [the first images']")
@click.option(
    "--validation-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of the tars that is kept for evaluation. [folders train/ and validation/, else 0.1]",
)
@click.option(
    "--validation",
    metavar="TAR",
    multiple=True,
    help="A tar that is kept for evaluation, as it lies below the common folder; may be repeated.",
)
@click.option("--licence", help="A note on the images' licence, kept with the data set.")
@click.option(
    "--max-rejected",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Share of the samples that may be unusable; above it there is no index. 1 leaves any number out.",
)
@click.option("--threads", default=4, show_default=True, type=click.IntRange(1), help="Tars read at a time.")
@store_option
def index_tars(urls: Sequence[str], store: str | None, **options: Any) -> None:
    """Make a data set of WebDataset tars that are already there, without copying them.

    \b
    URL... is one folder with tars, or tars below one folder:
      s3://bucket/laion                what webdataset's ShardWriter, img2dataset or tar wrote
      's3://bucket/t-{000..069}.tar'   numbers in braces count
      t-0.tar t-1.tar                  tars of this machine

    Every tar is read once and every image decoded. An index and a sidecar for each tar are
    written beside the tars, which stay as they are; so the folder must be writable. Images must
    have one size; of others, `nvae shards build` makes a data set.

    A split takes whole tars. A training image that a validation tar holds, too, is left out.
    An indexing that was stopped continues when the same command is run again.
    """
    from cluster import data

    click.echo(data.index(urls, store, **options))


@shards.command()
@click.argument("root")
@click.option("--decode/--no-decode", default=True, help="Whether to decode every image, too. [yes]")
@json_option
@store_option
def verify(root: str, decode: bool, as_json: bool, store: str | None) -> int:
    """Check every shard's size, hash and samples against the index. Exit code 1 if one is bad."""
    from cluster import data

    problems = data.verify(root, store, decode)
    if as_json:
        show_json(problems)
    else:
        click.echo("\n".join(problems) or "Every shard is as it was written.")
    return 1 if problems else 0


@shards.command("show")
@click.argument("root")
@json_option
@store_option
def show_shards(root: str, as_json: bool, store: str | None) -> None:
    """Describe a data set: image size, splits, shards, content hash, what was rejected."""
    from cluster import data

    show_facts(data.summary(root, store), as_json)


# -- runs -------------------------------------------------------------------------------


@click.group()
def runs() -> None:
    """Look after training runs."""


@runs.command("list")
@json_option
@store_option
def list_runs(as_json: bool, store: str | None) -> None:
    """All runs of the store, the newest first."""
    from cluster import runs as known

    columns = {
        "name": "NAME",
        "state": "STATE",
        "images_seen": "IMAGES SEEN",
        "total_images": "OF",
        "bits_per_dim": "BITS/DIM",
        "skipped": "SKIPPED",
        "rollbacks": "ROLLBACKS",
        "model": "MODEL",
        "created": "CREATED",
    }
    show(known.listing(store), columns, as_json)


@runs.command("show")
@click.argument("name")
@click.option("--settings", "with_settings", is_flag=True, help="Show its settings, too.")
@json_option
@store_option
def show_run(name: str, with_settings: bool, as_json: bool, store: str | None) -> None:
    """How a run goes: its newest numbers, what was done against divergence, checkpoints, result.

    All of it comes from the run's folder, whether MLflow answers or not. JSON has everything, under
    the names that the curves have.
    """
    from cluster import runs as known
    from cluster.run_report import report

    facts = known.describe(name, store)
    show_facts(facts if as_json else report(facts, with_settings), as_json)


@runs.command()
@click.argument("name")
@store_option
def stop(name: str, store: str | None) -> None:
    """Ask a run, or a search with all its trials, to save and leave. Its command continues it."""
    from cluster import runs as known

    click.echo(known.stop(name, store))


@runs.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@store_option
def delete(name: str, yes: bool, store: str | None) -> None:
    """Delete a run's checkpoints, journal and pictures. Registered models are kept."""
    from cluster import runs as known

    known.check_deletable(name, store)
    if not yes:
        click.confirm(f"Delete the run {name} and all its checkpoints?", abort=True)
    click.echo(known.delete(name, store))


# -- configuration ----------------------------------------------------------------------


@click.group()
def config() -> None:
    """Understand settings and presets."""


@config.command("show")
@click.argument("config", required=False)
@overrides_argument
@json_option
def show_config(config: str | None, overrides: Sequence[str], as_json: bool) -> None:
    """Print CONFIG with all defaults; without it, name the presets."""
    from pipeline import config_file

    if config is None:
        names = list(config_file.presets())
        show_json(names) if as_json else click.echo("\n".join(names))
        return
    loaded = config_file.load(config, overrides)
    if as_json:
        show_json(config_file.to_mapping(loaded))
    else:
        click.echo(config_file.to_yaml(loaded), nl=False)


@config.command()
@click.argument("path")
def explain(path: str) -> None:
    """What a setting means, may be, and is in each preset; or all settings of a section."""
    from pipeline import config_file

    click.echo("\n\n".join(str(explanation) for explanation in config_file.explain(path)))


@config.command()
@click.argument("first")
@click.argument("second")
@json_option
def diff(first: str, second: str, as_json: bool) -> None:
    """The settings in which two configurations differ."""
    from pipeline import config_file

    changes = config_file.changed(config_file.load(first), config_file.load(second))
    rows = ({"setting": path, "first": was, "second": now} for path, was, now in changes)
    show(rows, {"setting": "SETTING", "first": first, "second": second}, as_json)


@config.command()
def schema() -> None:
    """Print the JSON schema of configuration files, for editors."""
    from pipeline import settings

    show_json(settings.schema())
