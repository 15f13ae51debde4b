"""The commands that take models in and hand them out: `nvae import` and `nvae export`."""

import click

from cluster.options import json_option, overrides_argument, show_facts, store_option, tracking_option


@click.command("import")
@click.argument("checkpoint")
@overrides_argument
@click.option("--preset", metavar="CONFIG", help="Preset or YAML file whose model it must be.")
@click.option("--register", "name", metavar="NAME", help="Register it as a version of NAME.")
@click.option("--output", metavar="FOLDER", help="Write it to a new folder instead, a path or URL.")
@click.option("--data", metavar="URL", help="Data set on whose validation split it is measured.")
@click.option(
    "--samples",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Draws per image of that; more than one give the importance-weighted likelihood, too.",
)
@click.option(
    "--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Images of that at once."
)
@json_option
@store_option
@tracking_option
def import_(
    checkpoint: str,
    overrides: tuple[str, ...],
    preset: str | None,
    name: str | None,
    output: str | None,
    data: str | None,
    samples: int,
    batch_size: int,
    as_json: bool,
    store: str | None,
    tracking: str | None,
) -> None:
    """Import CHECKPOINT, a path or URL, of the published implementation (its checkpoint.pt).

    The model is that of the command line in the checkpoint; a preset and KEY=VALUE must agree with
    it. The file is opened in a process of its own without network, in which nothing but tensors
    and plain values can come of it. With --data it is measured before it is registered; without,
    it never becomes @best.

    \b
      nvae import checkpoint.pt --register cifar10-published --preset cifar10 --data store:cifar10
      nvae import s3://bucket/ffhq/checkpoint.pt --output ffhq256
    """
    from cluster import exchanging

    show_facts(
        exchanging.import_checkpoint(
            checkpoint, preset, overrides, name, output, data, samples, batch_size, store, tracking
        ),
        as_json,
    )


@click.command()
@click.argument("model")
@click.argument("folder")
@click.option("--pyfunc", is_flag=True, help="Write an MLflow model instead, for programs without nvae.")
@json_option
@store_option
@tracking_option
def export(
    model: str, folder: str, pyfunc: bool, as_json: bool, store: str | None, tracking: str | None
) -> None:
    """Write MODEL to FOLDER, a new path or URL: safetensors, JSON, and a manifest of their hashes.

    MODEL is models:/NAME@ALIAS, models:/NAME/VERSION, or the URL of an export or checkpoint. The folder is
    read back and compared, and every nvae command takes it as MODEL. With --pyfunc it is what
    `mlflow.pyfunc.load_model` loads: the same weights, and our code, which that executes.
    """
    from cluster import exchanging

    show_facts(exchanging.export_model(model, folder, pyfunc, store, tracking), as_json)
