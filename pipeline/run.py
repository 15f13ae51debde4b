"""One run's life, with Ray or without: begin, work, finish.

`begin` runs once, on the driver, with what preparation.py has checked: it finds or makes
the run's folder and its MLflow run, and returns a RunSpec of plain values. `work` is the
entry that every worker executes with that spec. Whether it is the first launch or the fifth
makes no difference to either: what lies in the store decides where the run goes on, so that
repeating the command is always the right thing to do.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from nvae.model import NVAE
from pipeline import config_file, run_folder, storage
from pipeline.artifacts import MANIFEST
from pipeline.code_version import code_version
from pipeline.config import RunConfig
from pipeline.data.index import load_index
from pipeline.models.export import export, load_directory, write_weights
from pipeline.models.lineage import Lineage
from pipeline.models.names import UnreachableError
from pipeline.models.registry import Registry, load
from pipeline.preparation import Prepared, registered_name
from pipeline.registration import NotRegisteredError, Patience
from pipeline.run_folder import RunError, RunRecord
from pipeline.run_report.writing import report_on
from pipeline.training.checkpoint import Checkpoint, Wanted, newest
from pipeline.training.checkpoint_writer import CheckpointWriter, claim_attempt
from pipeline.training.recovery import DivergedError, agreed
from pipeline.training.run_description import status_of
from pipeline.training.selection import Selected, select
from pipeline.training.state import Training
from pipeline.training.tracking import NullTracker, RunTracker, Tracker, conclude, create_run
from pipeline.training.train import train
from pipeline.training.validation import StoppedError, draw_pictures
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
    initial_model: str | None
    """Model whose weights the run begins with."""
    trial: str = ""
    """SEARCH/NUMBER, if it is one."""


# -- on the driver ----------------------------------------------------------------------


def begin(prepared: Prepared, tags: Mapping[str, str] | None = None, trial: str = "") -> RunSpec:
    """Start a run, or continue the one of that name; call it with the run's lease held.

    `tags` are for MLflow, beside those that every run has; `trial` is SEARCH/NUMBER of a trial. Raises
    RunError if somebody else ran the run since it was prepared.
    """
    record = run_folder.read_record(prepared.url)
    if record != prepared.record:
        raise RunError(
            f"The run {prepared.name!r} was run by somebody else just now; repeat the command to continue it."
        )
    run_folder.clear_stop(prepared.url)
    _keep_initial_weights(prepared)
    run_id = create_run(
        prepared.tracking_uri,
        run_url=prepared.url,
        experiment=EXPERIMENT,
        run_name=prepared.name,
        parameters=config_file.leaves(prepared.config),
        tags=_tags(prepared) | dict(tags or {}),
    )
    record = RunRecord(
        name=prepared.name,
        created=record.created if record else run_folder.now(),
        config=config_file.to_mapping(config_file.without_secrets(prepared.config)),
        data_hash=prepared.data.content_hash,
        tracking_uri=storage.shown(prepared.tracking_uri),
        mlflow_run_id=run_id,
        parent=prepared.parent,
        initial_model=prepared.initial_model,
        launches=record.launches if record else (),
        # Until there is a new one; the state tells that it is of an earlier launch.
        result=record.result if record else {},
    )
    run_folder.write_record(prepared.url, record)
    return RunSpec(
        name=record.name,
        store=prepared.store,
        url=prepared.url,
        config=config_file.to_mapping(prepared.config),
        data_hash=record.data_hash,
        tracking_uri=prepared.tracking_uri,
        mlflow_run_id=record.mlflow_run_id,
        initial_model=record.initial_model,
        trial=trial,
    )


def _keep_initial_weights(prepared: Prepared) -> None:
    """A copy for the run itself: where they come from may be deleted, or away, when it needs them again.

    Written anew as long as there is no run: what lies there may be another model, of a start that
    was broken off.
    """
    url = _initial_weights(prepared.url)
    is_kept = prepared.record is not None and storage.exists(storage.join(url, MANIFEST))
    if prepared.initial_model is not None and not is_kept:
        loaded = load(prepared.initial_model, prepared.tracking_uri)
        write_weights(url, loaded.model, loaded.config)


def _initial_weights(run_url: str) -> str:
    return storage.join(run_url, "initial")


def _tags(prepared: Prepared) -> dict[str, str]:
    """What MLflow is told of a run beside its settings."""
    return {
        "data.hash": prepared.data.content_hash,
        "data.root": storage.shown(prepared.config.data.root),
        "code.version": code_version(),
        "run.url": storage.shown(prepared.url),
        "parent": prepared.initial_model or "",
    }


@contextmanager
def recorded(
    update: Callable[..., Any], url: str, tracking_uri: str, mlflow_run_id: str
) -> Iterator[dict[str, Any]]:
    """Keep a record true while what it describes is running: its state, and how that ended.

    `update` replaces fields of the record of what lies at `url`. The caller puts `state`, `reason` and
    `result` into the mapping that this yields.
    """
    update(state="running", reason="")
    end: dict[str, Any] = {"state": "failed", "reason": "interrupted"}
    try:
        yield end
    except KeyboardInterrupt:
        end["state"] = "stopped"
        raise
    except BaseException as error:
        end["reason"] = str(error) or type(error).__name__
        raise
    finally:
        result = {"result": end["result"]} if end.get("result") else {}
        update(state=end["state"], reason=end["reason"], **result)
        run_folder.clear_stop(url)
        run_id = conclude(url, tracking_uri, status_of(end["state"]))
        # MLflow may have been away when it began.
        if run_id not in ("", mlflow_run_id):
            update(mlflow_run_id=run_id)


def running(spec: RunSpec) -> AbstractContextManager[dict[str, Any]]:
    """Keep the record of a run true while it is running; it yields what takes the result of `work`."""
    update = partial(run_folder.update_record, spec.url)
    return recorded(update, spec.url, spec.tracking_uri, spec.mlflow_run_id)


# -- on every worker --------------------------------------------------------------------


def work(arguments: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """Train, evaluate and register: the entry that every worker executes.

    `arguments` is a RunSpec as a mapping. Returns `state` (finished, stopped or diverged),
    `reason` and, once the run is finished, `result`: metrics, version, where its files are.
    """
    spec = RunSpec(**arguments)
    config = config_file.from_mapping(spec.config)
    # The driver has just read both: a store that is silent now is down, and may come back.
    storage.configure(config.storage, reached=(spec.url, config.data.root))
    data = load_index(config.data.root)
    if data.content_hash != spec.data_hash:
        raise RunError(f"{config.data.root} was replaced by another data set after the run was begun.")
    with ExitStack() as stack:
        tracker, checkpoints = _writers(spec, config, worker, stack)
        training = Training(
            config,
            data,
            worker,
            tracker,
            checkpoints,
            spec.url,
            initial=partial(_initial_model, spec),
        )
        try:
            # With the attempt claimed: a launch before, should it live, deletes nothing meanwhile.
            resume = agreed(partial(newest, spec.url), spec.url, worker)
            if checkpoints is not None and resume is not None:
                checkpoints.continue_from(resume)
            outcome = _work(training, spec, resume)
            if worker.rank == 0:
                report_on(tracker, spec.url, outcome)
            tracker.status(status_of(outcome["state"]))
            return outcome
        except BaseException as error:
            # A store that does not answer would hold up the bad news.
            reportable = isinstance(error, Exception) and not isinstance(error, storage.StoreError)
            if reportable and worker.rank == 0:
                report_on(tracker, spec.url, {"state": "failed", "reason": str(error)})
            tracker.status("FAILED")
            raise


def _work(training: Training, spec: RunSpec, resume: Checkpoint | None) -> dict[str, Any]:
    worker = training.worker
    if resume is not None:
        worker.say(f"Continuing at {resume.images_seen:,} images from {resume.url}")
    state, reason, good = "finished", "", None
    if resume is None or not _is_trained(resume, training.config):
        state, reason, good = _train(training, resume)
    else:
        worker.say(f"Nothing is left to train: train.total_images is {training.config.train.total_images:,}.")
    if state == "stopped":
        return {"state": state, "reason": reason}
    try:
        result = _finish(training, spec, good)
    except StoppedError:
        return {"state": "stopped", "reason": ""}
    if result.get("model", "") is None:
        reason = f"{reason}\n{result['verdict']}".lstrip()
    return {"state": state, "reason": reason, "result": result}


def _is_trained(checkpoint: Checkpoint, config: RunConfig) -> bool:
    """Whether nothing of the training itself is left to do."""
    return checkpoint.images_seen >= config.train.total_images and not checkpoint.record["evaluation_due"]


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


def _initial_model(spec: RunSpec) -> NVAE | None:
    """The model whose weights the run begins with, if it is to begin with a model's."""
    return load_directory(_initial_weights(spec.url)).model if spec.initial_model else None


def _train(training: Training, resume: Checkpoint | None) -> tuple[str, str, Wanted | None]:
    """Train until the end, a stop request or divergence: (state, reason, checkpoints from before it)."""
    state, reason, good = "diverged", "", None
    try:
        state = train(training, resume)
    except DivergedError as error:
        reason, good = str(error), error.good
    training.worker.mark("finish", training.config.train.total_images)
    if training.checkpoints is not None:
        training.checkpoints.wait()
    training.worker.barrier()
    return state, reason, good


def _finish(training: Training, spec: RunSpec, good: Wanted | None) -> dict[str, Any]:
    """Evaluate the run's model on the whole validation split, then export and register it.

    `good` is given of a run that diverged, and its result is empty if there is no such checkpoint.
    """
    selected = select(training, spec.url, good)
    if selected is None and good is not None:
        return {}
    if selected is None:
        raise RunError(
            f"{spec.url} has no checkpoint that could be registered: none is intact and evaluates to "
            "numbers (the log says what is wrong with each)."
        )
    model, at = selected.model, selected.checkpoint.images_seen
    if selected.scores:
        training.tracker.log({f"final/{name}": value for name, value in selected.scores.items()}, at=at)
    if training.worker.rank != 0:
        return {}
    pictures = draw_pictures(training, model, at=at) if selected.scores else []
    result = _register(training, spec, selected, diverged=good is not None)
    return {**result, "pictures": [storage.join(spec.url, picture) for picture in pictures]}


def _register(training: Training, spec: RunSpec, selected: Selected, *, diverged: bool) -> dict[str, Any]:
    """Export the weights and register them; what the user will want to know of it.

    `model` is None there if MLflow did not take it, and `verdict` says why.
    """
    name = registered_name(spec.name, training.config)
    patience = Patience(training.worker, spec.tracking_uri)
    chosen, scores = selected.checkpoint, selected.scores
    result: dict[str, Any] = {
        "metrics": dict(scores),
        "images_seen": chosen.images_seen,
        "checkpoint": chosen.url,
        "export": None,
    }
    try:
        run_id = patience.ask(lambda: _run_id(training.tracker))
        lineage = Lineage(
            run_name=spec.name,
            run_id=run_id,
            images_seen=chosen.images_seen,
            data_hash=spec.data_hash,
            code_version=code_version(),
            parent=spec.initial_model,
            diverged=diverged,
            data_licence=training.data.licence or "",
            trial=spec.trial,
            world_size=training.worker.world_size,
            ray_job=training.worker.job,
            journal=storage.shown(storage.join(spec.url, "journal")),
        )
        manifest = export(spec.store, name, selected.model.cpu(), training.config, lineage, scores)
        result["export"] = manifest.url
        registry = patience.ask(lambda: Registry(spec.tracking_uri))
        registration = patience.ask(lambda: registry.register(manifest.url, name))
    except NotRegisteredError as error:
        verdict = (
            f"The model is not registered: {error}\nIts weights are safe in {chosen.url}. Run the same "
            f"command again when MLflow at {storage.shown(spec.tracking_uri)} answers: it registers them "
            "without training again."
        )
        return {**result, "model": None, "alias": None, "verdict": verdict}
    return {
        **result,
        "model": registration.version.ref,
        "alias": f"models:/{name}@best" if registration.is_best else None,
        "verdict": registration.verdict,
        "mlflow_run_id": run_id,
    }


def _run_id(tracker: Tracker) -> str:
    if not tracker.run_id:
        raise UnreachableError("MLflow has not answered since the run was started.")
    return tracker.run_id
