"""One page of HTML about a run: how it went, what it drew, what it cost, and all that made it.

It is made from the store alone, at the end of every training and whenever somebody asks, also of a run that
still runs or has failed. What was not measured is said to be missing.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

import torch

from nvae.model import NVAE
from pipeline import config_file, run_folder, settings, storage
from pipeline.models import report
from pipeline.models.chart import Line, Mark, chart, heat_map
from pipeline.models.report import Markup, note, section
from pipeline.progress import counted, duration
from pipeline.run_folder import Launch, RunRecord
from pipeline.run_report.history import Attempt, History, read_history
from pipeline.run_report.pictures import pictures
from pipeline.training.journal import StoredJournal
from pipeline.training.run_description import read_description, redact

NAME = "report.html"
"""Among the files of a run, and of its MLflow run."""
ACTIVE_NATS = 0.1
"""KL of a group below which nothing is seen of it."""


def report_url(run_url: str) -> str:
    return storage.join(run_url, "files", NAME)


def run_page(record: RunRecord, run_url: str, lineage: Sequence[str] = ()) -> bytes:
    """The page of the run at `run_url`; `lineage` is its model's tree, line by line, if that is known.

    Raises StoreError if the journal cannot be read.
    """
    journal = StoredJournal(run_url)
    history = read_history(journal)
    config = config_file.from_mapping(record.config)
    end = max(config.train.total_images, history.images_seen)
    marks = list(_marks(history))
    return report.page(
        f"Run {record.name}",
        _overview(record, history),
        section("Likelihood", *_likelihood(history, end, marks)),
        section("Latent groups", *_groups(record, history, end, marks)),
        section("Stability", *_stability(history, end, marks)),
        section("Schedules", _schedules(history, end)),
        section("Speed", *_speed(history, end, marks)),
        *pictures(journal, history),
        section("Starts and cost", *_cost(record, history)),
        section("Origin", *_origin(record, run_url, lineage)),
        section("Configuration", *_configuration(record)),
    )


# -- what came out --------------------------------------------------------------------------


def _overview(record: RunRecord, history: History) -> Markup:
    total = record.config["train"]["total_images"]
    metrics: Mapping[str, float] = record.result.get("metrics") or {}
    model = record.result.get("alias") or record.result.get("model")
    return report.facts(
        {
            "state": ": ".join(filter(None, (record.state, redact(record.reason)))),
            "model": model or "none is registered",
            "on the whole validation split": _scores(metrics) if metrics else "not evaluated yet",
            "images": f"{history.images_seen:,} of {total:,}",
            "parameters": f"{_parameters(record):,}",
            "trained for": _spent(record, history),
            "against divergence": _interventions(history),
            "this page": f"of {run_folder.now()}",
        }
    )


def _scores(metrics: Mapping[str, float]) -> str:
    parts = {
        "validation/bits_per_dim": "{:.4f} bits/dim",
        "validation/nelbo_nats": "{:,.2f} nats NELBO",
        "validation/kl_nats": "{:,.2f} of them KL",
        "validation/importance_weighted_bits_per_dim": "{:.4f} bits/dim importance-weighted",
    }
    found = [form.format(metrics[name]) for name, form in parts.items() if metrics.get(name) is not None]
    images = metrics.get("validation/images")
    return ", ".join(found) + (f" ({images:,.0f} images)" if images else "")


def _parameters(record: RunRecord) -> int:
    with torch.device("meta"):
        model = NVAE(config_file.from_mapping(record.config).model)
    return sum(parameter.numel() for parameter in model.parameters())


def _interventions(history: History) -> str:
    back = sum(event.rolled_back for event in history.events)
    skipped = history.last("stability/skip") or 0
    if not history.events:
        return "nothing was necessary"
    return f"{counted(skipped, 'update')} left out, {counted(back, 'rollback')}"


def _marks(history: History) -> Iterator[Mark]:
    for attempt in history.attempts[1:]:
        if attempt.first is not None:
            yield Mark(attempt.first, f"start {attempt.number}, first point at {attempt.first:,} images")
    for event in history.events:
        yield Mark(event.images_seen, event.words, strong=event.rolled_back)


# -- curves -------------------------------------------------------------------------------


def _likelihood(history: History, end: float, marks: Sequence[Mark]) -> Iterator[object]:
    def both(title: str, name: str) -> Markup:
        lines = [
            Line("train", history.curve(f"train/{name}")),
            Line("validation", history.curve(f"validation/{name}"), dots=True),
        ]
        return chart(title, lines, end, marks)

    yield report.beside(
        both("bits/dim", "bits_per_dim"),
        both("NELBO (nats per image)", "nelbo_nats"),
        both("reconstruction (nats per image)", "reconstruction_nats"),
        both("KL (nats per image)", "kl_nats"),
    )
    yield note(
        "Training is measured with the weights of the moment, validation with their average. "
        "Dashed lines are restarts, full ones rollbacks; point at one to read what it was."
    )


def _groups(record: RunRecord, history: History, end: float, marks: Sequence[Mark]) -> Iterator[object]:
    scales = record.config["model"]["groups_per_scale"]
    labels = [f"{scale}.{group}" for scale, count in enumerate(scales, 1) for group in range(1, count + 1)]
    names = history.groups("train/kl_nats")
    rows = [(label, history.curve(name)) for label, name in zip(labels, names, strict=False)]
    title = "KL of each group in training (scale.group, the coarsest on top)"
    yield heat_map(title, rows, end, marks, "nats", ACTIVE_NATS)
    active = [
        Line("train", history.curve("train/active_channels")),
        Line("validation", history.curve("validation/active_channels"), dots=True),
    ]
    yield chart("active latent channels (KL above 0.1 nats)", active, end, marks)
    validated = history.groups("validation/active_channels")
    if not validated:
        yield note("No evaluation has told yet which groups are used.")
        return
    last = [history.curve(name)[-1] for name in validated]
    unused = [label for label, (_, channels) in zip(labels, last, strict=False) if channels == 0]
    said = f"without any active channel: {', '.join(unused)}" if unused else "all have active channels"
    yield note(f"Groups at the last evaluation, at {max(at for at, _ in last):,.0f} images: {said}.")


def _stability(history: History, end: float, marks: Sequence[Mark]) -> Iterator[object]:
    def one(title: str, name: str, log: bool = False) -> Markup:
        return chart(title, [Line("", history.curve(name))], end, marks, log=log)

    yield report.beside(
        one("gradient norm, before clipping", "train/gradient_norm", log=True),
        chart(
            "highest deviation of an update (robust deviations)",
            [
                Line("loss", history.curve("stability/loss_score")),
                Line("gradient", history.curve("stability/gradient_score")),
            ],
            end,
            marks,
        ),
        one("largest singular value of any convolution", "train/largest_singular_value"),
        one("sum of the largest singular values (SR penalty)", "train/spectral_penalty"),
        one("sum of the largest scales (batch-norm penalty)", "train/batch_norm_penalty"),
        one("updates left out in an interval", "train/skipped_updates"),
    )
    if not history.events:
        yield note("No update had to be left out, and no weights came back.")
        return
    rows = [(f"{event.images_seen:,}", redact(event.words)) for event in history.events]
    yield report.table(("images", "what was done, and why"), rows[-_EVENTS:], {0}, {1})
    if len(rows) > _EVENTS:
        yield note(f"The last {_EVENTS} of {len(rows):,}; all are in the run's folder, files/stability.")


_EVENTS = 50


def _schedules(history: History, end: float) -> Markup:
    names = {
        "learning rate": "schedule/learning_rate",
        "KL coefficient": "schedule/kl_coefficient",
        "spectral coefficient": "schedule/spectral_coefficient",
    }
    return report.beside(
        *(chart(title, [Line("", history.curve(name))], end) for title, name in names.items())
    )


def _speed(history: History, end: float, marks: Sequence[Mark]) -> Iterator[object]:
    yield report.beside(
        chart("images/s, of all workers", [Line("", history.curve("speed/images_per_second"))], end, marks),
        chart(
            "share of the time spent waiting",
            [
                Line("for batches", history.curve("data/wait_fraction")),
                Line("for other workers", history.curve("speed/communication_fraction")),
            ],
            end,
            marks,
        ),
        chart(
            "memory (GiB), the fullest worker",
            [
                Line("process", history.curve("memory/process_gib/max")),
                Line("CUDA device", history.curve("memory/reserved_gib/max")),
            ],
            end,
            marks,
        ),
        chart(
            "requests to stores made again, unreadable images",
            [
                Line("requests", history.curve("data/store_retries")),
                Line("images", history.curve("data/corrupt_samples")),
            ],
            end,
            marks,
        ),
    )


# -- what it cost ---------------------------------------------------------------------------


def _seconds(attempt: Attempt) -> float:
    return (attempt.ended - attempt.began) / 1000


def _launch(record: RunRecord, attempt: Attempt) -> Launch | None:
    """The launch that the attempt belongs to: the last one before it."""
    began = datetime.fromtimestamp(attempt.began / 1000 + 1, UTC)
    before = [each for each in record.launches if datetime.fromisoformat(each.started) <= began]
    return before[-1] if before else None


def _spent(record: RunRecord, history: History) -> str:
    seconds = sum(map(_seconds, history.attempts))
    workers = sum(
        _seconds(attempt) * (launch.workers if launch else 1)
        for attempt in history.attempts
        for launch in [_launch(record, attempt)]
    )
    return (
        f"{duration(seconds)} in {counted(len(history.attempts), 'start')}, {workers / 3600:.2f} worker-hours"
    )


def _cost(record: RunRecord, history: History) -> Iterator[object]:
    rows = []
    for attempt in history.attempts:
        launch = _launch(record, attempt)
        began = datetime.fromtimestamp(attempt.began / 1000, UTC).isoformat(sep=" ", timespec="seconds")
        images = "-" if attempt.first is None else f"{attempt.first:,} to {attempt.last:,}"
        rows.append(
            (
                attempt.number,
                began.removesuffix("+00:00"),
                launch.host if launch else "-",
                launch.workers if launch else "-",
                images,
                duration(_seconds(attempt)),
            )
        )
    header = ("start", "began (UTC)", "started on", "workers", "points from and to (images)", "time")
    yield report.table(header, rows, {0, 3})
    yield note(
        f"In all {_spent(record, history)}, from the first to the last line that each start noted; workers "
        "are those that its launch began with."
    )


# -- what made it -------------------------------------------------------------------------


def _origin(record: RunRecord, run_url: str, lineage: Sequence[str]) -> Iterator[object]:
    result, described = record.result, read_description(run_url)
    yield report.facts(
        {
            "began with": storage.shown(record.initial_model) if record.initial_model else "random weights",
            "data set": storage.shown(record.config["data"]["root"]),
            "data hash": record.data_hash,
            "registered as": result.get("model") or "-",
            "weights": storage.shown(result["export"]) if result.get("export") else "-",
            "run": storage.shown(run_url),
            "MLflow": f"{redact(storage.shown(record.tracking_uri))}, run {record.mlflow_run_id or '-'}",
            "created": record.created,
            "code": described.tags.get("code.version", "-") if described else "-",
        }
    )
    if lineage:
        yield report.command("\n".join(lineage))


def _configuration(record: RunRecord) -> Iterator[object]:
    config = config_file.without_secrets(config_file.from_mapping(record.config))
    defaults = {path: setting.default for path, setting in settings.settings().items()}
    values = config_file.leaves(config)
    chosen = {path: value for path, value in values.items() if value != defaults.get(path)}
    yield note("Settings that are not the default:")
    yield report.facts(chosen)
    yield report.folded("All settings", report.facts(values))
