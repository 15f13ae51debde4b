"""What came out of a search, on one page: the ranking, what mattered, and what it cost.

The page is made from the store alone, so that it can be made again years later, on another machine
and without MLflow, and of a search that still runs. Where there is too little to show something the
page says so in words: a figure of nothing looks like a result.

Importance is fANOVA: the share of the scores' variance that a forest of trees explains by one setting
alone. Trials are compared at one number of images only, or the number would be what matters. Settings
that were drawn from a logarithmic range enter by their logarithm, since fANOVA weighs each setting's
range as if values were drawn evenly from it. A setting with a condition is judged among the trials
that drew it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline import config_file, run_folder, storage
from pipeline.models import report
from pipeline.models.report import Axis, Bar, Markup, Panel, Subject, note, paragraph, section
from pipeline.progress import counted
from pipeline.search import ledger, ranking
from pipeline.search.definition import Definition
from pipeline.search.ledger import FAILURES, UNFINISHED, SearchRecord, Trial
from pipeline.search.ranking import Ranked
from pipeline.search.space import GROUPS, STRUCTURE, Parameter
from pipeline.training.journal import StoredJournal, decode
from pipeline.training.run_description import redact

FEWEST_SCORES = 4
"""Below this nothing is said of importance."""
TRIALS_PER_SETTING = 10
"""Below this what is said of it is doubtful."""
TOTAL = f"{GROUPS}.total"
SPECTRAL = "objective.spectral_coefficient"
_REASON_LENGTH = 160
_PICTURES = ("samples", "reconstructions")


def write_report(store: str, name: str) -> str:
    """Write STORE/searches/NAME/report.html; its URL. Raises RunError if there is no such search."""
    url = storage.join(ledger.folder(store, name), "report.html")
    storage.write_bytes(url, _page(_Search.read(store, name)))
    return url


@dataclass(frozen=True)
class _Search:
    """All that the page is made from."""

    store: str
    record: SearchRecord
    definition: Definition
    trials: Sequence[Trial]
    ranked: Sequence[Ranked]
    best: Ranked | None

    @classmethod
    def read(cls, store: str, name: str) -> "_Search":
        record = ledger.known_search(store, name)
        trials = ledger.read_trials(ledger.folder(store, name))
        definition = Definition.from_plain(record.definition)
        compare = definition.search.compare
        ranked, best = ranking.rank(trials, compare), ranking.best(trials, compare)
        return cls(store, record, definition, trials, ranked, best)

    @property
    def total_images(self) -> int:
        return self.definition.base.train.total_images

    @property
    def by_time(self) -> bool:
        return self.definition.search.compare == "device_seconds"

    def run_url(self, trial: Trial) -> str:
        return run_folder.folder(self.store, ledger.run_name(self.record.name, trial.number))

    def groups(self, trial: Trial) -> tuple[int, ...]:
        """Per scale, the coarsest first."""
        return tuple(trial.settings.get(GROUPS, self.definition.base.model.groups_per_scale))

    def varied(self) -> list[Parameter]:
        """The parameters that have more than one value."""
        return [each for each in self.definition.space.parameters if len(set(map(repr, each.values))) > 1]

    def rungs(self) -> list[float]:
        """Where trials could be stopped: images, or device-seconds as far as any trial came."""
        search, found = self.definition.search, []
        end = float(self.total_images)
        if self.by_time:
            end = max((each.last.device_seconds for each in self.trials if each.last), default=0.0)
        if search.scheduler == "asha":
            rung = float(self.definition.first_rung)
            while 0 < rung < end:
                found.append(rung)
                rung *= search.reduction_factor
        return found

    def subject(self, ranked: Ranked) -> Subject:
        trial = ranked.trial
        is_best = self.best is not None and trial.number == self.best.trial.number
        kind: Literal["whole", "part", "failed"] = "whole" if trial.state == "finished" else "part"
        if ranked.bits_per_dim is None:  # so it is of all failures
            kind = "failed"
        return Subject(f"trial {trial.number}", ranked.bits_per_dim, kind, is_best)

    def subjects(self) -> list[tuple[Subject, Trial]]:
        """The trials that figures show: all but those of which there is nothing to be said yet."""
        return [
            (self.subject(each), each.trial)
            for each in self.ranked
            if each.bits_per_dim is not None or each.trial.state not in UNFINISHED
        ]


def _page(search: _Search) -> bytes:
    return report.page(
        f"Search {search.record.name}",
        _overview(search),
        _best(search),
        _ranking(search),
        section("All settings together", _parallel(search)),
        section("What mattered", *_importance(search)),
        section("Score over each setting", *_scatter(search)),
        section("Learning curves", _curves(search)),
        section("KL per group", _kl(search)),
        section("Cost", *_cost(search)),
        section("Failed trials", _failures(search)),
        _definition(search),
    )


def _safe(text: str) -> str:
    """Words from outside without the passwords of URLs in them."""
    return redact(text)


def _shown(value: Any) -> str:
    """A setting's value."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return storage.shown(value) if isinstance(value, str) else str(value)


def _hours(device_seconds: float) -> str:
    hours = device_seconds / 3600
    return f"{hours:,.{1 if hours >= 100 else 2 if hours >= 10 else 3}f}"


def _spent(trial: Trial) -> float:
    """Device-seconds; of a running trial what it is known to have trained, until its start ends."""
    return max(trial.spent_device_seconds, trial.last.device_seconds if trial.last else 0.0)


# -- the outcome --------------------------------------------------------------------------


def _overview(search: _Search) -> Markup:
    record, best = search.record, search.best
    states = ", ".join(f"{count} {state}" for state, count in ledger.counts(search.trials).items())
    answer = "none yet: no trial has finished with a score"
    if best is not None:
        answer = f"trial {best.trial.number}: {best.bits_per_dim:.4f} bits/dim at {best.images_seen:,} images"
    spent = _hours(sum(map(_spent, search.trials)))
    return report.facts(
        {
            "best": answer,
            "trials": f"{len(search.trials)} of {record.trials} ({states or 'none yet'})",
            "state": ": ".join(filter(None, (record.state, _safe(record.reason)))),
            "used": f"{spent} device-hours",
            "compared by": "time of their devices" if search.by_time else "images seen",
            "created": record.created,
            "this page": f"of {run_folder.now()}, from {storage.shown(storage.normalize(search.store))}",
        }
    )


def _best(search: _Search) -> Markup:
    title = "The best trial"
    if search.best is None:
        return section(title, note("No trial has finished with a score, so there is no best one."))
    trial = search.best.trial
    names = {**dict(trial.drawn), **dict(trial.settings)}
    rows = [(name, _shown(value), _origin(name, trial)) for name, value in names.items()]
    parts: list[object] = [
        paragraph(f"This trains it in full, to {_in_full(search.definition, trial):,} images:"),
        report.command(f"nvae train --from-trial {search.record.name}/{trial.number}"),
        report.table(("searched setting", "value", ""), rows),
    ]
    if trial.model:
        parts.append(paragraph(f"Its model is registered as {trial.model}."))
    for kind in _PICTURES:
        parts.append(_newest_picture(search, trial, kind))
    return section(title, *parts)


def _in_full(definition: Definition, trial: Trial) -> int:
    """Images of the training that the trial tried out."""
    return definition.in_full(trial.settings).train.total_images


def _origin(name: str, trial: Trial) -> str:
    if name not in trial.settings:
        return f"drawn; gives {GROUPS}"
    return "drawn" if name in trial.drawn else "follows"


def _newest_picture(search: _Search, trial: Trial, kind: str) -> Markup:
    folder = storage.join(search.run_url(trial), "pictures")
    names = [name for name in storage.list_dir(folder) if name.startswith(f"{kind}-")]
    found = sorted(name for name in names if name.endswith(".png"))
    if not found:
        return note(f"There are no {kind} of trial {trial.number} in the store.")
    images = int(found[-1].removeprefix(f"{kind}-").removesuffix(".png"))
    caption = f"{kind.capitalize()} of trial {trial.number} at {images:,} images."
    if kind == "reconstructions":
        caption += " Each validation image stands beside its reconstruction."
    return report.picture(storage.read_bytes(storage.join(folder, found[-1])), caption, caption)


def _ranking(search: _Search) -> Markup:
    if not search.ranked:
        return section("Ranking", note("No trial has been drawn yet."))
    varied = search.varied()
    labels = _labels([each.name for each in varied])
    header = ["rank", "trial", "bits/dim", "images", "state", "groups per scale", *labels.values()]
    header += ["device-hours", "starts", "reason"]
    rows = []
    for each in search.ranked:
        trial = each.trial
        rows.append(
            [
                each.rank,
                trial.number,
                "-" if each.bits_per_dim is None else f"{each.bits_per_dim:.4f}",
                "-" if each.images_seen is None else f"{each.images_seen:,}",
                trial.state.replace("_", " "),
                ", ".join(map(str, search.groups(trial))),
                *(_shown(trial.drawn[p.name]) if p.name in trial.drawn else "-" for p in varied),
                _hours(_spent(trial)),
                trial.starts,
                _first_line(trial.reason),
            ]
        )
    last = len(header) - 1
    numbers = {0, 1, 2, 3, *range(6, last)}
    words = (
        "Who came further ranks higher, and of those the lower bits/dim; failed trials are last. "
        "A dash is a setting that was not drawn or a score that is not there."
    )
    return section("Ranking", note(words), report.table(header, rows, numbers, words={last}))


def _first_line(reason: str) -> str:
    line = (_safe(reason).strip().splitlines() or [""])[0]
    return line if len(line) <= _REASON_LENGTH else line[:_REASON_LENGTH] + "…"


def _failures(search: _Search) -> Markup:
    failed = [trial for trial in search.trials if trial.state in FAILURES]
    if not failed:
        return note("No trial has failed.")
    rows = [
        (
            trial.number,
            trial.state.replace("_", " "),
            f"{trial.last.images_seen:,}" if trial.last else "-",
            _hours(_spent(trial)),
            trial.starts,
            _safe(trial.reason) or "no reason was noted",
        )
        for trial in failed
    ]
    header = ("trial", "state", "images at its last evaluation", "device-hours", "starts", "reason")
    return report.table(header, rows, {0, 2, 3, 4}, words={5})


# -- settings and scores ------------------------------------------------------------------


def _labels(names: Sequence[str]) -> dict[str, str]:
    """The shortest ends of dotted paths that tell them apart."""
    found = {}
    for name in names:
        parts = name.split(".")
        least = 2 if name.startswith(f"{GROUPS}.") else 1
        for count in range(least, len(parts) + 1):
            end = ".".join(parts[-count:])
            if sum(other == end or other.endswith(f".{end}") for other in names) <= 1:
                break
        found[name] = end
    return found


def _axes(search: _Search) -> list[Axis]:
    parameters = search.varied()
    labels = _labels([each.name for each in parameters])
    return [
        Axis(each.name, labels[each.name], each.values, each.kind == "choice", each.kind == "log_uniform")
        for each in parameters
    ]


def _parallel(search: _Search) -> Markup:
    axes, subjects = _axes(search), search.subjects()
    if not axes:
        return note("Every searched setting has a single value.")
    if not any(subject.score is not None for subject, _ in subjects):
        return note("No trial has a score yet, so there is nothing to compare.")
    caption = (
        "Each line is a trial, from the values that it drew to its bits/dim; the darkest (on a dark screen "
        "the brightest) are the lowest, the thick one is the best. Thin lines were stopped early or are "
        "still running and have the score of their last evaluation; dashed ones failed."
    )
    return report.parallel("parallel", axes, [(each, trial.drawn) for each, trial in subjects], caption)


def _scatter(search: _Search) -> list[Markup]:
    subjects = [
        (subject, {**trial.drawn, TOTAL: sum(search.groups(trial))}) for subject, trial in search.subjects()
    ]
    if not any(subject.score is not None for subject, _ in subjects):
        return [note("No trial has a score yet.")]
    axes = {axis.name: axis for axis in _axes(search) if axis.name != GROUPS}
    totals = sorted({values[TOTAL] for _, values in subjects})
    if len(totals) > 1:
        axes[TOTAL] = Axis(TOTAL, "groups in all", (totals[0], totals[-1]))
    if not axes:
        return [note("Every searched setting has a single value.")]
    caption = (
        "Full dots finished; hollow ones were stopped early or are still running, so that theirs is "
        "the score of fewer images; crosses failed. The largest is the best trial."
    )
    first = [axes.pop(name) for name in (TOTAL, SPECTRAL) if name in axes]
    found = [report.scatter("scatter-first", first, subjects, caption)] if first else []
    if axes:
        found.append(
            report.scatter("scatter-others", list(axes.values()), subjects, "" if first else caption)
        )
    return found


@dataclass(frozen=True)
class _Basis:
    """Scores that can be compared."""

    words: str
    trials: Sequence[Trial]
    scores: Sequence[float]


def _bases(search: _Search) -> list[_Basis]:
    """Scores at the end if enough trials finished; else, and where far more have one, at fewer images."""
    found = []
    finished = [each for each in search.ranked if each.trial.state == "finished"]
    scored = [(each.trial, each.bits_per_dim) for each in finished if each.bits_per_dim is not None]
    if len(scored) >= FEWEST_SCORES:
        words = f"the {len(scored)} trials that finished"
        found.append(_Basis(words, [trial for trial, _ in scored], [score for _, score in scored]))
    at: dict[int, list[tuple[Trial, float]]] = {}
    for trial in search.trials:
        for each in trial.evaluations:
            if each.bits_per_dim is not None:
                at.setdefault(each.images_seen, []).append((trial, each.bits_per_dim))
    common = sorted(images for images, pairs in at.items() if len(pairs) >= FEWEST_SCORES)
    if common and found:
        most = max(common, key=lambda images: (len(at[images]), images))
        common = [most] if len(at[most]) >= 2 * len(scored) else []
    if common:
        pairs = at[common[-1]]
        words = f"the {len(pairs)} trials that were evaluated at {common[-1]:,} images"
        found.append(_Basis(words, [trial for trial, _ in pairs], [score for _, score in pairs]))
    return found


def _importance(search: _Search) -> list[Markup]:
    bases = _bases(search)
    if not bases:
        words = (
            f"Too few scores: what mattered is told from {FEWEST_SCORES} trials on that finished, or that "
            "were evaluated at the same number of images."
        )
        return [note(words)]
    return [_importance_of(search, basis, f"importance-{number}") for number, basis in enumerate(bases)]


def _importance_of(search: _Search, basis: _Basis, name: str) -> Markup:
    if len(set(basis.scores)) == 1:
        return note(f"The scores of {basis.words} are all the same, so no setting made a difference.")
    names = [each.name for each in search.varied()]
    labels = _labels(names)
    shares = importance(search.definition, basis.trials, basis.scores)
    rows = []
    for setting, (share, count) in shares.items():
        of = "" if count == len(basis.trials) else f" (of the {count} trials that drew it)"
        rows.append(Bar(labels[setting], 100 * share, f"{share:.0%}{of}"))
    unknown = ", ".join(labels[setting] for setting in names if setting not in shares)
    few = f"Too few different values or scores to tell: {unknown}." if unknown else ""
    if not rows:
        return note(f"Nothing can be told from {basis.words}. {few}")
    thin = len(basis.trials) < TRIALS_PER_SETTING * len(rows)
    doubt = "So few trials for so many settings: chance has a part in this. " if thin else ""
    caption = (
        f"Share of the variance of bits/dim that each setting explains alone (fANOVA), by {basis.words}; "
        f"what is missing to 100% is their interplay. {doubt}{few}"
    )
    rows.sort(key=lambda bar: -bar.value)
    return report.bars(name, rows, "percent of the variance of bits/dim", caption)


def importance(
    definition: Definition, trials: Sequence[Trial], scores: Sequence[float]
) -> dict[str, tuple[float, int]]:
    """Share of the scores' variance that a setting explains alone, and the number of trials that say so.

    Settings of which nothing can be said are not in it: those that have one value in all trials, or
    that fewer than FEWEST_SCORES trials have drawn, or whose trials all have one score.
    """
    drew: dict[frozenset[int], list[Parameter]] = {}
    for parameter in definition.space.parameters:
        places = frozenset(n for n, trial in enumerate(trials) if parameter.name in trial.drawn)
        drew.setdefault(places, []).append(parameter)
    found: dict[str, tuple[float, int]] = {}
    for places, parameters in drew.items():
        known = [(trials[place], scores[place]) for place in sorted(places)]
        if len(known) < FEWEST_SCORES or len({score for _, score in known}) == 1:
            continue
        beside = [
            each
            for others, more in drew.items()
            if others >= places
            for each in more
            if len({repr(trial.drawn[each.name]) for trial, _ in known}) > 1
        ]
        shares = _explained(beside, known) if beside else {}
        found |= {each.name: (shares[each.name], len(known)) for each in parameters if each.name in shares}
    return found


def _explained(parameters: Sequence[Parameter], known: Sequence[tuple[Trial, float]]) -> dict[str, float]:
    """fANOVA of parameters that all these trials have drawn, and not all alike."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    for trial, score in known:
        study.add_trial(
            optuna.trial.create_trial(
                value=score,
                params={each.name: _even(each, trial.drawn[each.name]) for each in parameters},
                distributions={each.name: _evenly(each) for each in parameters},
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    # Not scaled to add up to 1: what is missing is interplay, and that is worth knowing.
    return evaluator.evaluate(study, params=[each.name for each in parameters])


def _even(parameter: Parameter, value: Any) -> Any:
    """A value where a draw lies anywhere with the same chance; of a choice its place in the list."""
    if parameter.kind == "choice":
        return parameter.values.index(value)
    return math.log(value) if parameter.kind == "log_uniform" else value


def _evenly(parameter: Parameter) -> Any:
    from optuna import distributions

    if parameter.kind == "choice":
        return distributions.CategoricalDistribution(range(len(parameter.values)))
    low, high = (_even(parameter, value) for value in parameter.values)
    if parameter.kind == "integer":
        return distributions.IntDistribution(low, high)
    return distributions.FloatDistribution(low, high)


# -- trainings ----------------------------------------------------------------------------


def _curves(search: _Search) -> Markup:
    lines = []
    for subject, trial in search.subjects():
        points = [
            (each.device_seconds / 3600 if search.by_time else each.images_seen, each.bits_per_dim)
            for each in trial.evaluations
            if each.bits_per_dim is not None
        ]
        if points:
            lines.append((subject, points))
    if not lines:
        return note("No trial has been evaluated with a finite score yet.")
    reached = [x for _, points in lines for x, _ in points]
    end = max(reached) if search.by_time else float(max(*reached, search.total_images))
    unit = 3600 if search.by_time else 1
    label = "device-hours" if search.by_time else "images seen"
    low = min(min(reached), *(rung / unit for rung in search.rungs()), end)
    axis = Axis("", f"{label} (logarithmic)", (low, end), log=True)
    if end < 12 * low:
        axis = Axis("", label, (0, end))
    caption = (
        "Validation bits/dim of each trial. Dotted lines are the rungs, where trials may be stopped; a curve "
        "with a hollow end was stopped there or is still running, one with a cross failed, a full dot is "
        "a training's end."
    )
    marks = [rung / unit for rung in search.rungs()]
    return report.curves("curves", axis, lines, marks, caption)


def _kl(search: _Search) -> Markup:
    finished = [
        each.trial
        for each in search.ranked
        if each.trial.state == "finished" and each.bits_per_dim is not None
    ]
    if not finished:
        return note("No trial has finished with a score.")
    chosen = {"best": finished[0], "worst": finished[-1]} if len(finished) > 1 else {"only": finished[0]}
    panels, missing = [], []
    for which, trial in chosen.items():
        found = kl_per_group(search.run_url(trial))
        if found is None:
            missing.append(note(f"The journal of trial {trial.number} ({which}) has no KL per group."))
            continue
        images, values = found
        title = f"Trial {trial.number}, the {which} that finished, at {images:,} images"
        panels.append(Panel(f"{title}: {sum(values):,.1f} nats", values, _scales(search, trial)))
    if not panels:
        return Markup("".join(missing))
    caption = (
        "KL of the posterior from the prior on validation images, by latent group with the side of its "
        "scale. Groups near 0 are not used."
    )
    drawn = report.columns("kl", panels, "nats per image", "latent group, the coarsest first", caption)
    return Markup(drawn + "".join(missing))


def _scales(search: _Search, trial: Trial) -> list[tuple[str, int]]:
    """Side of the latents of each scale, and its groups; the coarsest first."""
    model, groups = search.definition.base.model, search.groups(trial)
    blocks = trial.settings.get("model.preprocess_blocks", model.preprocess_blocks)
    finest = model.image_size >> blocks
    sides = [finest >> (len(groups) - 1 - scale) for scale in range(len(groups))]
    return [(f"{side}x{side}", count) for side, count in zip(sides, groups, strict=True)]


def kl_per_group(run_url: str) -> tuple[int, list[float]] | None:
    """Images seen, and nats of each group at the newest evaluation in a run's journal; None without one."""
    journal = StoredJournal(run_url)
    for segment in reversed(journal.segments()):
        for entry in reversed(list(decode(journal.read(segment)))):
            values = entry.body["values"] if entry.kind == "metrics" else {}
            names = sorted(name for name in values if name.startswith("validation/kl_nats/group_"))
            if names:
                return entry.body["at"], [values[name] for name in names]
    return None


# -- cost ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What all trials together have used between two rungs."""

    label: str
    trials: int
    """That came into it."""
    device_seconds: float


def spending(trials: Sequence[Trial], rungs: Sequence[float], *, by_time: bool) -> list[Stage]:
    """Where the device-seconds of a search went, in order of the rungs; the last are in no evaluation."""
    bounds = [0.0, *rungs, math.inf]
    unit = "device-hours" if by_time else "images"
    names = [f"{bound / 3600:.3g}" if by_time else f"{bound:,.0f}" for bound in bounds[:-1]]
    stages = []
    for low, high, name, after in zip(bounds, bounds[1:], names, [*names[1:], ""], strict=False):
        used = [_seconds_at(each, high, by_time) - _seconds_at(each, low, by_time) for each in trials]
        label = f"{name} to {after} {unit}" if after else f"from {name} {unit} on" if rungs else "training"
        if any(used):
            stages.append(Stage(label, sum(seconds > 0 for seconds in used), sum(used)))
    beside = [_spent(each) - (each.last.device_seconds if each.last else 0.0) for each in trials]
    label = "starts, lost work, work not evaluated"
    return [*stages, Stage(label, sum(seconds > 0 for seconds in beside), sum(beside))]


def _seconds_at(trial: Trial, place: float, by_time: bool) -> float:
    """Device-seconds of a trial when it was at a rung, between evaluations at even speed."""
    if trial.last is None:
        return 0.0
    if by_time:
        return min(place, trial.last.device_seconds)
    images, seconds = 0, 0.0
    for each in trial.evaluations:
        if each.images_seen >= place:
            share = (place - images) / (each.images_seen - images)
            return seconds + share * (each.device_seconds - seconds)
        images, seconds = each.images_seen, each.device_seconds
    return seconds


def saved_device_seconds(trials: Sequence[Trial], total_images: int) -> float:
    """What the trials that were stopped would have used besides, each at its own speed so far."""
    return sum(
        (total_images - each.last.images_seen) * each.last.device_seconds / each.last.images_seen
        for each in trials
        if each.state == "stopped" and each.last is not None
    )


def _cost(search: _Search) -> list[Markup]:
    trials, price = search.trials, search.definition.search.price_per_device_hour
    total = sum(map(_spent, trials))
    if not total:
        return [note("Nothing has been used yet, as far as the ledger knows.")]

    def row(label: str, count: object, seconds: float) -> list[object]:
        money = [] if price is None else [f"{seconds / 3600 * price:,.2f}"]
        return [label, count, _hours(seconds), *money]

    stages = spending(trials, search.rungs(), by_time=search.by_time)
    rows = [row(each.label, each.trials, each.device_seconds) for each in stages]
    rows.append(row("all together", len(trials), total))
    failed = [each for each in trials if each.state in FAILURES]
    if failed:
        rows.append(row("of that, by trials that failed", len(failed), sum(map(_spent, failed))))
    bars = [Bar(each.label, each.device_seconds / 3600, _hours(each.device_seconds)) for each in stages]
    stopped = [each for each in trials if each.state == "stopped" and each.last is not None]
    words = "No trial was stopped early, so that nothing was saved."
    if stopped:
        saved = saved_device_seconds(trials, search.total_images)
        rows.append(row("saved by stopping early (estimate)", len(stopped), saved))
        bars.append(
            Bar("saved by stopping early", saved / 3600, f"{_hours(saved)} (estimate)", supposed=True)
        )
        words = (
            "What was saved is an estimate: what the stopped trials would have used up to "
            f"{search.total_images:,} images, each at the speed that it had."
        )
    unmeasured = sum(each.state == "stopped" and each.last is None for each in trials)
    if unmeasured:
        words += f" {counted(unmeasured, 'trial')} without any evaluation cannot be estimated."
    header = ["between rungs", "trials", "device-hours", *([] if price is None else ["money"])]
    costs = "" if price is None else f" A device costs {price:g} an hour."
    return [
        report.table(header, rows, range(1, len(header))),
        report.bars("cost", bars, "device-hours", words + costs),
    ]


# -- the search itself --------------------------------------------------------------------


def _definition(search: _Search) -> Markup:
    definition, record = search.definition, search.record
    rungs = [
        f"{rung / 3600:.3g} device-hours" if search.by_time else f"{rung:,.0f}" for rung in search.rungs()
    ]
    end = f"the end at {search.total_images:,} images"
    facts = {
        "rungs": ", ".join([*rungs, end]),
        "data set": storage.shown(definition.base.data.root),
        "data hash": record.data_hash,
        "in full": ", ".join(f"{path}={_shown(value)}" for path, value in definition.full.items())
        or "trials train as long as the run itself",
        "workers of a trial": record.workers,
        "launches": ", ".join(f"{each.started} on {each.host}" for each in record.launches) or "none",
        "MLflow": f"{redact(record.tracking_uri)}, run {record.mlflow_run_id}",
    }
    settings = definition.search.model_dump(mode="json")
    chosen = {f"search.{name}": _shown(value) for name, value in settings.items() if value is not None}
    space = [(each.name, str(each)) for each in definition.space.parameters]
    always = {
        GROUPS if each.name in STRUCTURE else each.name
        for each in definition.space.parameters
        if not each.when
    }
    base = config_file.leaves(config_file.without_secrets(definition.base))
    silent = {path: _shown(value) for path, value in base.items() if path not in always}
    return section(
        "The search",
        *(note(words) for words in definition.warnings()),
        report.facts({**facts, **chosen}),
        report.table(("searched setting", "drawn from"), space),
        report.folded("All settings of a trial where the space is silent", report.facts(silent)),
    )
