"""The `nvae` command. What is trained is KEY=VALUE; where and how it runs is a flag.

Each command parses, calls one function of the pipeline and shows its answer. Imports that
cost seconds stand inside the functions, so that help texts are instant.

Exit codes: 0 done, 1 a failed run or a bug, 2 bad input, 3 training diverged for good.
"""

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from nvae.config import NVAEConfigError
from pipeline.errors import InputError

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

store_option = click.option(
    "--store", metavar="URL", help="Where runs, models and data are kept. [NVAE_STORE, else ./nvae-store]"
)
tracking_option = click.option(
    "--tracking", metavar="URI", help="MLflow server or database. [MLFLOW_TRACKING_URI, else in the store]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


def main() -> None:
    """Run the command line: a user's mistake ends in one message, a bug in a traceback."""
    try:
        sys.exit(cli(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except (InputError, NVAEConfigError) as error:
        if logging.getLogger().isEnabledFor(logging.INFO):
            logging.getLogger(__name__).info("raised here:", exc_info=True)
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)


@click.group(context_settings=_CONTEXT)
@click.option("-v", "--verbose", is_flag=True, help="Log more, and show where an error comes from.")
def cli(verbose: bool) -> None:
    """Train NVAE on image shards, look trained models up, draw samples from them.

    \b
    First steps:
      nvae shards build FOLDER store:faces --image-size 256 --validation-fraction 0.1
      nvae train quickstart data.root=store:faces --name faces
      nvae sample models:/nvae-faces@best faces.png
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s"
    )


def show(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], as_json: bool) -> None:
    """A listing, for people or for programs."""
    from pipeline import progress

    if as_json:
        show_json(list(rows))
    else:
        progress.table(rows, columns)


def show_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


# -- training ---------------------------------------------------------------------------


@cli.command()
@click.argument("config")
@overrides_argument
@click.option("--name", help="The run's name; CONFIG's by default. The same name again continues the run.")
@click.option("--workers", type=click.IntRange(1), help="Ray Train workers. [one per GPU, or 2 without GPUs]")
@click.option("--local", is_flag=True, help="Train in this process, without Ray.")
@click.option("--from", "parent", metavar="MODEL", help="Begin with the weights of a trained model.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained, and do nothing.")
@store_option
@tracking_option
def train(dry_run: bool, **asked: Any) -> int:
    """Train a model. CONFIG is a preset, a YAML file or a URL.

    Run the same command again to continue a run that was stopped or killed.

    \b
      nvae train quickstart                             # 2 workers on this machine
      nvae train ffhq256 data.root=s3://bucket/ffhq256  # one worker per GPU
      nvae train quickstart train.batch_size=32 --local --dry-run
    """
    from cluster import training

    plan = training.plan(**asked)
    if dry_run:
        click.echo(training.describe(plan))
        return 0
    return training.execute(plan)


@cli.command()
@click.argument("model")
@click.option("--data", metavar="URL", help="Data set to evaluate on. [the one it was trained on]")
@click.option("--samples", default=1, show_default=True, type=click.IntRange(1), help="Importance samples.")
@click.option("--limit", type=click.IntRange(1), help="Evaluate the first N validation images only.")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1))
@json_option
@store_option
@tracking_option
def evaluate(as_json: bool, **asked: Any) -> None:
    """Measure a model on a validation split: NELBO, bits/dim, KL per group.

    MODEL is models:/NAME@ALIAS, models:/NAME/VERSION, or the URL of a checkpoint.
    """
    from cluster import models

    scores = models.evaluate(**asked)
    rows = [{"metric": name, "value": value} for name, value in scores.items()]
    if as_json:
        show_json(scores)
    else:
        show(rows, {"metric": "METRIC", "value": "VALUE"}, as_json=False)


@cli.command()
@click.argument("model")
@click.argument("output", type=click.Path(dir_okay=False, writable=True, path_type=Path))
@click.option("--count", default=16, show_default=True, type=click.IntRange(1), help="Number of images.")
@click.option("--temperature", default=0.7, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1))
@click.option("--pixels", default="mean", show_default=True, type=click.Choice(["mean", "sample"]))
@click.option("--recalibrate", is_flag=True, help="Re-estimate batch norm at this temperature first.")
@store_option
@tracking_option
def sample(output: Path, **asked: Any) -> None:
    """Draw images from a model into one grid, OUTPUT.png.

    Image number i of a seed is the same picture whatever the count, the batch size and the device.
    """
    from cluster import models

    click.echo(models.sample(output=output, **asked))


# -- data sets --------------------------------------------------------------------------


@cli.group()
def shards() -> None:
    """Build and check data sets: WebDataset shards with an index."""


@shards.command("build")
@click.argument("source")
@click.argument("target")
@click.option("--image-size", required=True, type=click.IntRange(1), help="Height and width, in pixels.")
@click.option("--validation-fraction", default=0.1, show_default=True, type=click.FloatRange(0, 1))
@click.option("--crop", type=click.Choice(["none", "center"]), default="none", show_default=True)
@click.option("--grey", is_flag=True, help="One channel instead of three.")
@click.option("--shard-mib", default=64, show_default=True, type=click.IntRange(1), help="Size of a shard.")
@click.option("--licence", help="A note on the images' licence, kept with the data set.")
@click.option("--if-missing", is_flag=True, help="Do nothing if TARGET already holds a complete data set.")
@store_option
def build(source: str, target: str, **options: Any) -> None:
    """Pack the images of SOURCE into shards below TARGET, a URL or store:NAME.

    SOURCE is a folder, a .zip or .tar, MNIST's idx files, or portraits:COUNT for
    procedural portraits. Images that cannot be used are listed and left out. A build that
    was interrupted continues when the same command is run again.
    """
    from cluster import data

    click.echo(data.build(source, target, **options))


@shards.command()
@click.argument("root")
@click.option("--decode/--no-decode", default=True, help="Decode every image, too. [yes]")
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

    summary = data.summary(root, store)
    if as_json:
        show_json(summary)
    else:
        show(
            ({"what": key, "value": value} for key, value in summary.items()),
            {"what": "", "value": ""},
            False,
        )


# -- registry ---------------------------------------------------------------------------


@cli.group()
def registry() -> None:
    """Look trained models up."""


@registry.command("list")
@click.argument("name", required=False)
@json_option
@store_option
@tracking_option
def list_versions(name: str | None, as_json: bool, store: str | None, tracking: str | None) -> None:
    """All registered versions, or those of NAME, with their aliases and scores."""
    from cluster import models

    columns = {
        "model": "MODEL",
        "aliases": "ALIASES",
        "bits_per_dim": "BITS/DIM",
        "images_seen": "IMAGES SEEN",
        "data": "DATA",
        "created": "CREATED",
    }
    show(models.versions(name, store, tracking), columns, as_json)


@registry.command("show")
@click.argument("model")
@json_option
@store_option
@tracking_option
def show_version(model: str, as_json: bool, store: str | None, tracking: str | None) -> None:
    """Everything that is recorded of one version."""
    from cluster import models

    version = models.describe(model, store, tracking)
    if as_json:
        show_json(version)
    else:
        show(
            ({"what": key, "value": value} for key, value in version.items()),
            {"what": "", "value": ""},
            False,
        )


# -- runs -------------------------------------------------------------------------------


@cli.group()
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
        "model": "MODEL",
        "created": "CREATED",
    }
    show(known.listing(store), columns, as_json)


@runs.command("show")
@click.argument("name")
@json_option
@store_option
def show_run(name: str, as_json: bool, store: str | None) -> None:
    """One run: settings, launches, checkpoints, result."""
    from cluster import runs as known

    run = known.describe(name, store)
    if as_json:
        show_json(run)
    else:
        show(({"what": key, "value": value} for key, value in run.items()), {"what": "", "value": ""}, False)


@runs.command()
@click.argument("name")
@store_option
def stop(name: str, store: str | None) -> None:
    """Ask a run to write a checkpoint and leave; `nvae train` with its name continues it."""
    from cluster import runs as known

    click.echo(known.stop(name, store))


@runs.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@store_option
def delete(name: str, yes: bool, store: str | None) -> None:
    """Delete a run's checkpoints, journal and pictures. Registered models are kept."""
    from cluster import runs as known

    if not yes:
        click.confirm(f"Delete the run {name} and all its checkpoints?", abort=True)
    click.echo(known.delete(name, store))


# -- configuration ----------------------------------------------------------------------


@cli.group()
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
        click.echo("\n".join(config_file.presets()))
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
    rows = ({"setting": path, first: was, second: now} for path, was, now in changes)
    show(rows, {"setting": "SETTING", first: first, second: second}, as_json)


@config.command()
def schema() -> None:
    """Print the JSON schema of configuration files, for editors."""
    from pipeline import settings

    show_json(settings.schema())


# -- the installation -------------------------------------------------------------------


@cli.command()
@click.argument("config", required=False)
@json_option
@store_option
@tracking_option
def doctor(config: str | None, as_json: bool, store: str | None, tracking: str | None) -> int:
    """Check what training needs: packages, devices, Ray, store, MLflow, CONFIG's data set.

    Each failure comes with its remedy. Exit code 1 if something failed.
    """
    from cluster import doctor as checks

    results = checks.examine(config, store, tracking)
    show(
        [vars(result) for result in results],
        {"name": "CHECK", "ok": "OK", "found": "FOUND", "remedy": "REMEDY"},
        as_json,
    )
    return 0 if all(result.ok for result in results) else 1
