"""`nvae train`: from what the user typed to a run that has ended."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any

import torch

from cluster.models import tracking_uri
from nvae.config import NVAEConfig
from nvae.model import NVAE
from pipeline import config_file, lease, run, run_folder, storage
from pipeline import store as stores
from pipeline.config import RunConfig
from pipeline.preparation import Prepared, prepare, widths_of
from pipeline.progress import say
from pipeline.run_folder import RunError
from pipeline.run_report.page import report_url
from pipeline.search import ledger
from pipeline.training.checkpoint import images_saved
from pipeline.training.watchdog import Limits, watched
from pipeline.training.worker import LocalWorker, Poll
from pipeline.width import Workers

EXIT_CODES = {"finished": 0, "stopped": 0, "failed": 1, "diverged": 3}
NOT_REGISTERED = 4
"""Exit code of a run that is finished but for its registration."""


@dataclass(frozen=True)
class Plan:
    """A run that was asked for, with everything resolved and nothing started."""

    config: RunConfig
    name: str
    store: str
    tracking: str
    workers: Workers
    local: bool
    parent: str | None


def plan(
    config: str | None,
    overrides: Sequence[str],
    name: str | None,
    workers: Workers | None,
    local: bool,
    parent: str | None,
    from_trial: str | None,
    store: str | None,
    tracking: str | None,
) -> Plan:
    """Resolve the configuration and all defaults. Raises InputError if that is not possible."""
    one = Workers(1, 1)
    if local and workers not in (None, one):
        raise RunError(
            f"--local trains in this one process, not on {workers} workers; leave one of them out."
        )
    located = stores.locate(store)
    if from_trial is not None and config is not None and "=" in config:
        overrides, config = (config, *overrides), None
    loaded = _settings(config, overrides, from_trial, located)
    chosen_name = name or PurePosixPath(config or f"{from_trial}-full".replace("/", "-")).stem
    run_folder.folder(located, chosen_name)  # refuses what is no name
    return Plan(
        config=loaded,
        name=chosen_name,
        store=located,
        tracking=tracking_uri(store, tracking),
        workers=one if local else workers or default_workers(),
        local=local,
        parent=parent,
    )


def _settings(config: str | None, overrides: Sequence[str], from_trial: str | None, store: str) -> RunConfig:
    """What is to be trained: a configuration, a trial's settings, or the one with the other."""
    if from_trial is None:
        if config is None:
            raise RunError("Name a configuration, such as quickstart, or a trial by --from-trial SEARCH/N.")
        return config_file.load(config, overrides)
    definition, trial = ledger.known_trial(store, from_trial)
    if config is None:
        return definition.in_full(trial.settings, overrides)
    return config_file.overridden(config_file.load(config), trial.settings, overrides)


def default_workers() -> Workers:
    """One per GPU of this machine, or 2 on a machine without."""
    count = torch.cuda.device_count() or 2
    return Workers(count, count)


def describe(plan: Plan) -> str:
    """What would be trained: settings, parameters, latent shapes, steps.

    Raises RunError if the workers cannot share a batch.
    """
    config = plan.config
    widths = widths_of(config, plan.workers)
    train, model = config.train, config.model
    per_worker = train.batch_size // widths[-1]
    micro = train.micro_batch_size or per_worker
    updates = -(-train.total_images // train.batch_size)
    return "\n".join(
        [
            config_file.to_yaml(config_file.without_secrets(config)).rstrip(),
            "",
            f"run          {plan.name} in {plan.store}",
            f"tracking     {storage.shown(plan.tracking)}",
            f"workers      {_workers(plan, widths)}",
            f"parameters   {count_parameters(model):,}",
            f"latents      {_latents(model)}",
            f"steps        {updates:,} updates of {train.batch_size} images: {per_worker} per worker"
            + (
                f", in micro-batches of {micro} (batch norm sees one at a time)"
                if micro != per_worker
                else ""
            )
            + (f"; on fewer workers more, in micro-batches of {micro}" if len(widths) > 1 else ""),
        ]
    )


def _workers(plan: Plan, widths: tuple[int, ...]) -> str:
    """`2 (Ray Train)`, or `1, 2 or 4 (Ray Train): as many as there are places`."""
    if plan.local:
        return "this process"
    if len(widths) == 1:
        return f"{widths[0]} (Ray Train)"
    some = ", ".join(str(width) for width in widths[:-1])
    return f"{some} or {widths[-1]} (Ray Train): as many as there are places"


def count_parameters(config: NVAEConfig) -> int:
    """Trainable parameters of a model, counted without allocating it."""
    with torch.device("meta"):
        model = NVAE(config)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _latents(config: NVAEConfig) -> str:
    """`4 groups of 20x8x8, 8 groups of 20x16x16`: coarsest first."""
    shapes = config.latent_shapes
    counts = {shape: shapes.count(shape) for shape in shapes}
    return ", ".join(
        f"{count} group{'s' if count > 1 else ''} of {z}x{h}x{w}" for (z, h, w), count in counts.items()
    )


def execute(plan: Plan) -> int:
    """Train, with Ray or in this process; returns the exit code."""
    if not plan.local:
        import_module("cluster.launch")  # so that nothing is begun where Ray is missing
    prepared = prepare(
        plan.config,
        name=plan.name,
        store_url=plan.store,
        tracking_uri=plan.tracking,
        workers=plan.workers,
        parent=plan.parent,
    )
    with lease.held(prepared.url, say):
        spec = run.begin(prepared)
        with run.running(spec) as end:
            end.update(_work(plan, prepared, spec))
    say(farewell(plan, spec, end))
    if end["state"] == "finished" and end["result"]["model"] is None:
        return NOT_REGISTERED
    return EXIT_CODES[end["state"]]


def _work(plan: Plan, prepared: Prepared, spec: run.RunSpec) -> dict[str, Any]:
    limits = Limits.of(prepared.config.train)
    if plan.local:
        run_folder.note_launch(spec.url, 1)
        with (
            Poll(partial(run_folder.stop_requested, spec.url)) as asked,
            LocalWorker(asked_to_stop=asked) as worker,
            watched(worker.pulse, limits, spec.url, say),
        ):
            return run.work(asdict(spec), worker)
    from cluster.launch import launch

    def starting(workers: int, kind: str) -> None:
        run_folder.note_launch(spec.url, workers)
        plural = "s" if workers > 1 else ""
        say(f"Starting {workers} Ray Train worker{plural} on {workers} {kind}{plural} ...")

    return launch(
        "pipeline.run:work",
        asdict(spec),
        widths=prepared.widths,
        run_url=spec.url,
        say=say,
        progress=partial(images_saved, spec.url),
        starting=starting,
        limits=limits,
    )


def farewell(plan: Plan, spec: run.RunSpec, end: Mapping[str, Any]) -> str:
    """How the run ended, where everything is, and what to try next."""
    if end["state"] == "diverged":
        saved, reason = end["result"], f"Diverged: {end['reason']}"
        if not saved:
            return f"{reason}\nNothing is registered: no checkpoint of trained weights is known to be good."
        if saved["model"] is None:
            return reason
        return f"{reason}\nIts last good checkpoint, at {saved['images_seen']:,} images, is {saved['model']}."
    if end["state"] == "stopped":
        reason = f" ({end['reason']})" if end.get("reason") else ""
        return f"Stopped{reason}. Run the same command again to continue {spec.name}."
    if end["result"]["model"] is None:
        return f"Finished {spec.name}, trained at {images_saved(spec.url):,} images. {end['reason']}"
    result = end["result"]
    bits = result["metrics"].get("validation/bits_per_dim")
    score = "" if bits is None else f", {bits:.3f} bits/dim on the validation split"
    reached, best = images_saved(spec.url), result["images_seen"]
    chosen = "" if best == reached else f"; the best checkpoint is of {best:,}"
    model = result["alias"] or result["model"]
    where = {
        "model": result["verdict"],
        **{Path(picture).name.partition("-")[0]: picture for picture in result["pictures"]},
        "weights": result["export"],
        "checkpoints": storage.join(spec.url, "checkpoints"),
        "report": report_url(spec.url),
        "curves": f"{storage.shown(spec.tracking_uri)}, run {result['mlflow_run_id']}",
    }
    flags, nvae, mlflow = _flags(plan), _command("nvae"), _command("mlflow")
    following = [
        f"{nvae} sample {model} samples.png --count 36 --temperature 0.8{flags}",
        f"{nvae} evaluate {model} --samples 20{flags}",
        f"{nvae} registry list{flags}",
        f"{mlflow} ui --backend-store-uri {quote(spec.tracking_uri)}"
        if "sqlite" in spec.tracking_uri
        else "",
    ]
    return "\n".join(
        [
            "",
            f"Finished {spec.name} at {reached:,} images{chosen}{score}.",
            *(f"  {what:<16} {place}" for what, place in where.items()),
            "",
            "Try next:",
            *(f"  {command}" for command in following),
        ]
    )


def _command(name: str) -> str:
    """A command as it can be typed here: its name, or its path where it is not on the PATH."""
    if shutil.which(name):
        return name
    beside = Path(sys.argv[0]).with_name(name)
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


def _flags(plan: Plan) -> str:
    """The flags that make another command look where this run was put."""
    store = "" if plan.store == stores.locate(None) else f" --store {quote(plan.store)}"
    same = plan.tracking == tracking_uri(plan.store, None)
    return store + ("" if same else f" --tracking {quote(storage.shown(plan.tracking))}")
