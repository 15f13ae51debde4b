"""One run's life, with Ray or without: begin, work, finish.

`begin` runs once, on the driver: it checks everything that can be checked before a worker
starts, finds or makes the run's folder and its MLflow run, and returns a RunSpec of plain
values. `work` is the entry that every worker executes with that spec. Whether it is the
first launch or the fifth makes no difference to either: what lies in the store decides
where the run goes on, so that repeating the command is always the right thing to do.
"""

import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nvae.model import NVAE
from pipeline import config_file, run_folder, storage, store
from pipeline.config import RunConfig
from pipeline.data.index import VALIDATION, Index, load_index
from pipeline.data.loader import check_fits, default_lanes
from pipeline.data.verification import missing_shards
from pipeline.models.evaluation import evaluate
from pipeline.models.export import Lineage, export
from pipeline.models.registry import Registry, load
from pipeline.progress import evaluation_line
from pipeline.run_folder import Launch, RunError, RunRecord
from pipeline.training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    best,
    claim_attempt,
    newest,
    open_attempt,
)
from pipeline.training.tracking import NullTracker, RunTracker, Tracker, create_run
from pipeline.training.train import DivergedError, Training, draw_pictures, train, validation_batches
from pipeline.training.worker import Worker


EXPERIMENT = "nvae"


@dataclass(frozen=True)
class RunSpec:
    """What a worker needs to know of its run; plain values that travel as JSON."""

    name: str
    store: str
    url: str
    config: Mapping[str, Any]
    data_hash: str
    tracking_uri: str
    mlflow_run_id: str
    parent: str | None


# -- on the driver ----------------------------------------------------------------------


def begin(
    config: RunConfig,
    *,
    name: str,
    store_url: str,
    tracking_uri: str,
    workers: int,
    parent: str | None = None,
) -> RunSpec:
    """Start a run, or continue the one of that name. Nothing is written if anything is wrong.

    Raises RunError if the run exists with another identity, if the data set does not fit
    the model, or if the batch cannot be shared by `workers`.
    """
    url = run_folder.folder(store_url, name)
    record = run_folder.read_record(url)
    config = settle(config, store_url, record)
    data = load_index(config.data.root)
    check_fits(config, data)
    _check_shards(data)
    _check_batch(config, workers)
    if record is not None:
        _check_identity(config, data, record, parent)
        parent = record.parent
        run_folder.clear_stop(url)
    elif parent is not None:
        load(parent, tracking_uri)
    run_id = create_run(
        tracking_uri,
        run_url=url,
        experiment=EXPERIMENT,
        run_name=name,
        parameters=config_file.leaves(config),
        tags=_tags(config, data, url, parent),
    )
    record = RunRecord(
        name=name,
        created=record.created if record else run_folder.now(),
        config=config_file.to_mapping(config),
        data_hash=data.content_hash,
        tracking_uri=tracking_uri,
        mlflow_run_id=run_id,
        parent=parent,
        launches=record.launches if record else (),
    )
    run_folder.write_record(url, record)
    return RunSpec(
        name=name,
        store=store_url,
        url=url,
        config=record.config,
        data_hash=record.data_hash,
        tracking_uri=record.tracking_uri,
        mlflow_run_id=record.mlflow_run_id,
        parent=record.parent,
    )


def settle(config: RunConfig, store_url: str, record: RunRecord | None = None) -> RunConfig:
    """The configuration with its open ends closed: where the data lie, how many lanes."""
    lanes = config.data.lanes
    if lanes is None and record is not None:
        lanes = record.config["data"]["lanes"]
    data = config.data.model_copy(
        update={
            "root": store.data_url(config.data.root, store_url),
            "lanes": lanes or default_lanes(config.train.batch_size),
        }
    )
    return config.model_copy(update={"data": data})


def _check_shards(data: Index) -> None:
    """Raises RunError if a shard is missing or cut short, before a worker waits for it."""
    problems = missing_shards(data)
    if problems:
        listed = "\n".join(f"  {problem.shard} {problem.what}" for problem in problems[:10])
        raise RunError(
            f"{storage.shown(data.root)} is not the data set that its index describes:\n{listed}\n"
            "Restore these files; `nvae shards verify` checks every one."
        )


def _check_batch(config: RunConfig, workers: int) -> None:
    batch_size = config.train.batch_size
    if batch_size % workers:
        nearest = workers * max(1, batch_size // workers)
        raise RunError(
            f"train.batch_size {batch_size} cannot be shared equally by {workers} workers; use --workers "
            f"with one of its divisors, or train.batch_size={nearest}."
        )


def _tags(config: RunConfig, data: Index, url: str, parent: str | None) -> dict[str, str]:
    """What MLflow is told of a run beside its settings."""
    return {
        "data.hash": data.content_hash,
        "data.root": storage.shown(config.data.root),
        "code.version": code_version(),
        "run.url": storage.shown(url),
        "parent": parent or "",
    }


def _check_identity(config: RunConfig, data: Index, record: RunRecord, parent: str | None) -> None:
    """Raises RunError if this is not the run that the record describes."""
    changes = [
        f"  {path}: {was!r} -> {now!r}"
        for path, was, now in config_file.identity_changes(config_file.from_mapping(record.config), config)
    ]
    if data.content_hash != record.data_hash:
        changes.append(f"  the data set: content {record.data_hash[:12]} -> {data.content_hash[:12]}")
    if parent is not None and parent != record.parent:
        changes.append(f"  --from: {record.parent!r} -> {parent!r}")
    if changes:
        raise RunError(
            f"The run {record.name!r} exists and these settings, which make it the run it is, differ:\n"
            + "\n".join(changes)
            + "\nContinue it with its own settings, or start another run that begins with its weights:\n"
            f"  nvae train ... --from models:/{registered_name(record.name, config)}@best --name NEW-NAME"
        )


def registered_name(run_name: str, config: RunConfig) -> str:
    """The registered model that receives the run's weights."""
    return config.registry.name or f"nvae-{run_name}"


def code_version() -> str:
    """The release, and the commit where the code is a git working tree."""
    release = metadata.version("nvae-cluster")
    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{release}+{found.stdout.strip()}" if found.returncode == 0 else release


@contextmanager
def running(spec: RunSpec, workers: int) -> Iterator[dict[str, Any]]:
    """Keep the record true while the run is running: its state, and how it ended.

    The caller puts what `work` returned into the mapping that this yields.
    """
    record = run_folder.read_record(spec.url)
    launches = (*(record.launches if record else ()), Launch(run_folder.now(), platform.node(), workers))
    run_folder.update_record(spec.url, state="running", reason="", launches=launches)
    end: dict[str, Any] = {"state": "failed", "reason": "interrupted"}
    try:
        yield end
    except BaseException as error:
        end["reason"] = str(error) or type(error).__name__
        raise
    finally:
        run_folder.update_record(
            spec.url, state=end["state"], reason=end["reason"], result=end.get("result", {})
        )
        run_folder.clear_stop(spec.url)


# -- on every worker --------------------------------------------------------------------


def work(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """Train, evaluate and register: the entry that every worker executes.

    `arguments` is a RunSpec as a mapping. Returns `state` (finished, stopped or diverged),
    `reason` and, once the run is finished, `result`: metrics, version, where its files are.
    """
    spec = RunSpec(**arguments)
    config = config_file.from_mapping(spec.config)
    data = load_index(config.data.root)
    if data.content_hash != spec.data_hash:
        raise RunError(f"{config.data.root} was replaced by another data set after the run was begun.")
    resume = _agreed(newest, spec.url, worker)
    with ExitStack() as stack:
        tracker, checkpoints = _writers(spec, config, worker, stack)
        training = Training(config, data, worker, tracker, checkpoints)
        try:
            return _work(training, spec, resume)
        except BaseException:
            tracker.status("FAILED")
            raise


def _work(training: Training, spec: RunSpec, resume: Checkpoint | None) -> dict[str, Any]:
    worker, tracker = training.worker, training.tracker
    if resume is not None:
        worker.say(f"Continuing at {resume.images_seen:,} images from {resume.url}")
    if resume is None or resume.images_seen < training.config.train.total_images:
        state, reason = _train(training, spec, resume)
        if state != "finished":
            tracker.status("KILLED" if state == "stopped" else "FAILED")
            return {"state": state, "reason": reason}
    result = _finish(training, spec)
    tracker.status("FINISHED")
    return {"state": "finished", "reason": "", "result": result}


def _agreed(choose: Callable[[str], Checkpoint | None], url: str, worker: Worker) -> Checkpoint | None:
    """The checkpoint that rank 0 chooses: all ranks must use the same one. Collective."""
    found = choose(url) if worker.rank == 0 else None
    place = torch.tensor([found.images_seen, found.attempt] if found else [0, 0], device=worker.device)
    images_seen, attempt = worker.all_reduce(place).tolist()
    if not attempt:
        return None
    return found or open_attempt(url, images_seen, attempt)


def _writers(
    spec: RunSpec, config: RunConfig, worker: Worker, stack: ExitStack
) -> tuple[Tracker, CheckpointWriter | None]:
    """Rank 0's tracker and checkpoint writer; what stands for them on the other ranks."""
    if worker.rank != 0:
        return NullTracker(), None
    attempt = claim_attempt(spec.url)
    tracker = stack.enter_context(RunTracker(spec.url, attempt, spec.tracking_uri, spec.mlflow_run_id))
    tracker.tag("ray.job_id", worker.job)
    return tracker, CheckpointWriter(spec.url, attempt, config.checkpoint.keep, before_commit=tracker.sync)


def _train(training: Training, spec: RunSpec, resume: Checkpoint | None) -> tuple[str, str]:
    """Train until the end, a stop request or divergence: (state, reason)."""
    initial = load(spec.parent, spec.tracking_uri).model if spec.parent and not resume else None
    state, reason = "diverged", ""
    try:
        state = train(training, resume, initial)
    except DivergedError as error:
        reason = str(error)
    if training.checkpoints is not None:
        training.checkpoints.wait()
    training.worker.barrier()
    return state, reason


def _finish(training: Training, spec: RunSpec) -> dict[str, Any]:
    """Evaluate the best checkpoint on the whole validation split, then export and register it."""
    config, worker = training.config, training.worker
    chosen = _agreed(best, spec.url, worker)
    if chosen is None:
        raise RunError(f"{spec.url} has no checkpoint to register; run the same command again.")
    loaded = load(chosen.url, spec.tracking_uri)
    scores: dict[str, float] = {}
    if training.data.num_samples(VALIDATION):
        worker.say("Evaluating the best checkpoint on the whole validation split ...")
        model = loaded.model.to(worker.device)
        batches = validation_batches(training)
        scores = evaluate(model, config, batches, worker, config.evaluation.importance_samples)
        worker.say(evaluation_line(scores, chosen.images_seen))
        training.tracker.log(
            {f"final/{name}": value for name, value in scores.items()}, at=chosen.images_seen
        )
    if worker.rank != 0:
        return {}
    pictures = draw_pictures(training, loaded.model, at=chosen.images_seen) if scores else []
    result = _register(training, spec, chosen, loaded.model.cpu(), scores)
    return {**result, "pictures": [storage.join(spec.url, picture) for picture in pictures]}


def _register(
    training: Training, spec: RunSpec, chosen: Checkpoint, model: NVAE, scores: Mapping[str, float]
) -> dict[str, Any]:
    """Export the weights and register them; what the user will want to know of it."""
    name = registered_name(spec.name, training.config)
    run_id = training.tracker.run_id
    if not run_id:
        raise RunError(
            f"The run is trained, but not registered: MLflow at {storage.shown(spec.tracking_uri)} never "
            "answered. Run the same command again when it does."
        )
    lineage = Lineage(
        run_name=spec.name,
        run_id=run_id,
        images_seen=chosen.images_seen,
        data_hash=spec.data_hash,
        code_version=code_version(),
        parent=spec.parent,
    )
    manifest = export(spec.store, name, model, training.config, lineage, scores)
    registration = Registry(spec.tracking_uri).register(manifest.url, name)
    return {
        "metrics": dict(scores),
        "images_seen": chosen.images_seen,
        "model": registration.version.ref,
        "alias": f"models:/{name}@best" if registration.is_best else None,
        "verdict": registration.verdict,
        "export": manifest.url,
        "checkpoint": chosen.url,
    }
