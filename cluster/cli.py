"""The `nvae` command. What is trained is KEY=VALUE; where and how it runs is a flag.

Each command parses, calls one function and shows its answer. Imports that cost seconds
stand inside the functions, so that help texts are instant. Commands that look at what is
there are in lookups.py, `nvae evaluate` in evaluate.py, those that draw in pictures.py, import and
export in exchange.py.

Exit codes: 0 done, 1 a failed run or a bug, 2 bad input, 3 training diverged for good,
4 trained, but MLflow did not take the model.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from cluster import aliases, evaluate, exchange, lookups, pictures, registered
from cluster.options import (
    json_option,
    overrides_argument,
    show,
    show_json,
    store_option,
    tracking_option,
    workers_option,
)
from cluster.track import track
from nvae.config import NVAEConfigError
from pipeline.errors import FailedError, InputError, printable

# MLflow reads these when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_EXTRAS = {
    **dict.fromkeys(("google_crc32c", "psutil", "ray", "webdataset"), "train"),
    **dict.fromkeys(("matplotlib", "optuna", "sklearn"), "tune"),
}
"""What a plain installation lacks, and what brings it."""

logger = logging.getLogger(__name__)


def main() -> None:
    """Run the command line: a user's mistake ends in one message, a bug in a traceback."""
    try:
        sys.exit(cli(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt) as error:
        # An Abort without a cause comes from a question that was not answered with yes; an
        # interruption is Abort's cause. The one question is whether to delete a run.
        declined = isinstance(error, click.Abort) and error.__cause__ is None
        click.echo("Nothing was deleted." if declined else "Interrupted.", err=True)
        sys.exit(1 if declined else 130)
    except (InputError, NVAEConfigError, FailedError) as error:
        logger.info("raised here:", exc_info=True)
        click.echo(printable(f"Error: {error}"), err=True)
        sys.exit(1 if isinstance(error, FailedError) else 2)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _EXTRAS:
            raise
        logger.info("raised here:", exc_info=True)
        extra = _EXTRAS[library]
        click.echo(f"Error: {library} is missing: pip install 'nvae-cluster[{extra}]'", err=True)
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read the output has seen enough, as in `nvae config show mnist | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="nvae-cluster", prog_name="nvae")
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


for group in (lookups.shards, registered.registry, lookups.runs, track, lookups.config):
    cli.add_command(group)
for command in (pictures.sample, pictures.reconstruct, pictures.interpolate, pictures.traverse):
    cli.add_command(command)
for command in (evaluate.evaluate, exchange.import_, exchange.export):
    cli.add_command(command)
for command in (aliases.promote, aliases.rollback, aliases.history):
    registered.registry.add_command(command)


@cli.command()
@click.argument("config", required=False)
@overrides_argument
@click.option("--name", help="The run's name; CONFIG's by default. The same name again continues the run.")
@workers_option
@click.option("--local", is_flag=True, help="Train in this process, without Ray.")
@click.option("--from", "parent", metavar="MODEL", help="Begin with the weights of a trained model.")
@click.option(
    "--from-trial",
    metavar="SEARCH/N",
    help="Train the run of a search with a trial's settings, in full; with CONFIG, put the searched settings "
    "alone over that one.",
)
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
      nvae train --from-trial groups/7                  # in full, what a search has found
    """
    from cluster import training

    plan = training.plan(**asked)
    if dry_run:
        click.echo(training.describe(plan))
        return 0
    return training.execute(plan)


@cli.command()
@click.argument("config")
@overrides_argument
@click.option(
    "--name", help="The search's name; CONFIG's by default. The same name again continues the search."
)
@click.option(
    "--trials",
    type=click.IntRange(1),
    help="Trials in all; more of them extend a search. [20, or all of a grid]",
)
@click.option("--concurrent", type=click.IntRange(1), help="Trials at a time. [as many as there are places]")
@click.option(
    "--workers-per-trial",
    "workers",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="One trains within Ray Tune's own process; several are started by Ray Train for each trial.",
)
@click.option(
    "--resources",
    metavar="CPU=N,GPU=N",
    default="",
    help="What a trial of one worker reserves. [GPU=1, or CPU=1 without GPUs]",
)
@click.option("--dry-run", is_flag=True, help="Show trials as they would be drawn, and do nothing.")
@store_option
@tracking_option
def tune(dry_run: bool, **asked: Any) -> int:
    """Search for the best settings of a run. CONFIG is groups_and_spectral, a YAML file or a URL.

    Run the same command again to continue a search that was stopped or killed. `nvae runs stop NAME`
    stops one in order, `nvae runs stop NAME-0007` one trial of it, `nvae report NAME` shows how far it is.

    \b
      nvae tune groups_and_spectral --trials 12 --dry-run
      nvae tune groups_and_spectral --trials 12 --concurrent 2
      nvae tune my_space.yaml train.total_images=200_000 search.max_device_hours=100 --name groups
    """
    from cluster import search_lookup
    from cluster import tune as tuning

    plan = tuning.plan(**asked)
    if dry_run:
        search_lookup.show_draws(plan)
        return 0
    return tuning.execute(plan)


@cli.command()
@click.argument("name")
@click.option("--output", type=click.Path(path_type=Path), help="Copy the page to this file, too.")
@click.option("--run", "is_run", is_flag=True, help="NAME is a run, although a search has the same name.")
@json_option
@store_option
@tracking_option
def report(
    name: str,
    output: Path | None,
    is_run: bool,
    as_json: bool,
    store: str | None,
    tracking: str | None,
) -> None:
    """Write the report of NAME as it is now: one page of HTML that needs no other file.

    NAME is a run, a search (whose trials are shown here, too, the best first), or a model
    models:/NAME@ALIAS, of which the run that trained it is reported. Every training writes the page at
    its end, and logs it to MLflow.
    """
    from cluster import reporting

    written = reporting.report(name, output, store, tracking, is_run=is_run, facts=as_json)
    if written.rows is not None:
        show(written.rows, written.columns, as_json)
    elif as_json:
        show_json({"report": written.url, "output": written.output})
    click.echo(f"Report: {written.output or written.url}", err=as_json)


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

    results = list(checks.examine(config, store, tracking))
    show(
        [vars(result) for result in results],
        {"name": "CHECK", "ok": "OK", "found": "FOUND", "remedy": "REMEDY"},
        as_json,
    )
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    main()
