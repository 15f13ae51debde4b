"""The figures on the page of a search, each with its words; words alone where there is too little."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.models import figures, report
from pipeline.models.figures import Axis, Bar, Panel
from pipeline.models.report import Markup, note
from pipeline.progress import counted
from pipeline.search.cost import saved_device_seconds, spending, spent
from pipeline.search.findings import Findings, hours, short_names
from pipeline.search.importance import FEWEST_SCORES, importance
from pipeline.search.ledger import FAILURES, Trial
from pipeline.search.space import GROUPS, TOTAL
from pipeline.training.journal import StoredJournal, decode

TRIALS_PER_SETTING = 10
"""Below this what is said of importance is doubtful."""
SPECTRAL = "objective.spectral_coefficient"


def _axes(search: Findings) -> list[Axis]:
    parameters = search.varied()
    labels = short_names([each.name for each in parameters])
    return [
        Axis(each.name, labels[each.name], each.values, each.kind == "choice", each.kind == "log_uniform")
        for each in parameters
    ]


def parallel(search: Findings) -> Markup:
    axes, subjects = _axes(search), search.subjects()
    if not axes:
        return note("Every searched setting has a single value.")
    if not any(subject.score is not None for subject, _ in subjects):
        return note("No trial has a score yet, so there is nothing to compare.")
    caption = (
        "Each line is a trial, from the values that it drew to its bits/dim; the darkest (on a dark screen "
        "the brightest) are the lowest, the thick one is the best. Thin lines ended early or are "
        "still running and have the score of their last evaluation; dashed ones failed."
    )
    return figures.parallel("parallel", axes, [(each, trial.drawn) for each, trial in subjects], caption)


def scatter(search: Findings) -> list[Markup]:
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
        "Full dots finished; hollow ones ended early or are still running, so that theirs is "
        "the score of fewer images; crosses failed. The largest is the best trial."
    )
    first = [axes.pop(name) for name in (TOTAL, SPECTRAL) if name in axes]
    found = [figures.scatter("scatter-first", first, subjects, caption)] if first else []
    if axes:
        found.append(
            figures.scatter("scatter-others", list(axes.values()), subjects, "" if first else caption)
        )
    return found


@dataclass(frozen=True)
class _Basis:
    """Scores that can be compared."""

    words: str
    trials: Sequence[Trial]
    scores: Sequence[float]


def _bases(search: Findings) -> list[_Basis]:
    """Scores of trials that came equally far: the furthest, and earlier ones where far more have them."""
    found = []
    finished = [each for each in search.ranked if each.trial.state == "finished"]
    scored = [(each.trial, each.bits_per_dim) for each in finished if each.bits_per_dim is not None]
    if len(scored) >= FEWEST_SCORES:
        found.append(_basis(f"the {len(scored)} trials that finished", scored))
    at: dict[int, list[tuple[Trial, float]]] = {}
    for trial in search.trials:
        for each in trial.evaluations:
            if each.bits_per_dim is not None:
                at.setdefault(each.images_seen, []).append((trial, each.bits_per_dim))
    common = sorted(images for images, pairs in at.items() if len(pairs) >= FEWEST_SCORES)
    furthest = [] if found else common[-1:]
    most = [max(common, key=lambda images: (len(at[images]), images))] if common else []
    for images in [*furthest, *most]:
        if not found or len(at[images]) >= 2 * len(found[0].trials):
            words = f"the {len(at[images])} trials that were evaluated at {images:,} images"
            found.append(_basis(words, at[images]))
    return found


def _basis(words: str, scored: Sequence[tuple[Trial, float]]) -> _Basis:
    return _Basis(words, [trial for trial, _ in scored], [score for _, score in scored])


def importance_section(search: Findings) -> list[Markup]:
    bases = _bases(search)
    if not bases:
        words = (
            f"Too few scores: what mattered is told from {FEWEST_SCORES} trials on that finished, or that "
            "were evaluated at the same number of images."
        )
        return [note(words)]
    return [_importance_of(search, basis, f"importance-{number}") for number, basis in enumerate(bases)]


def _importance_of(search: Findings, basis: _Basis, name: str) -> Markup:
    if len(set(basis.scores)) == 1:
        return note(f"The scores of {basis.words} are all the same, so no setting made a difference.")
    names = [each.name for each in search.varied()]
    labels = short_names(names)
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
    return figures.bars(name, rows, "percent of the variance of bits/dim", caption)


# -- trainings ----------------------------------------------------------------------------


def curves(search: Findings) -> Markup:
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
        "Validation bits/dim of each trial. Dotted lines are the rungs, where trials may be pruned; a curve "
        "with a hollow end ended there or is still running, one with a cross failed, a full dot is "
        "a training's end."
    )
    marks = [rung / unit for rung in search.rungs()]
    return figures.curves("curves", axis, lines, marks, caption)


def kl(search: Findings) -> Markup:
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
    drawn = figures.columns("kl", panels, "nats per image", "latent group, the coarsest first", caption)
    return Markup(drawn + "".join(missing))


def _scales(search: Findings, trial: Trial) -> list[tuple[str, int]]:
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


def cost(search: Findings) -> list[Markup]:
    trials, price = search.trials, search.definition.search.price_per_device_hour
    total = sum(map(spent, trials))
    if not total:
        return [note("Nothing has been used yet, as far as the ledger knows.")]

    def row(label: str, count: object, seconds: float) -> list[object]:
        money = [] if price is None else [f"{seconds / 3600 * price:,.2f}"]
        return [label, count, hours(seconds), *money]

    stages = spending(trials, search.rungs(), by_time=search.by_time)
    rows = [row(each.label, each.trials, each.device_seconds) for each in stages]
    rows.append(row("all together", len(trials), total))
    failed = [each for each in trials if each.state in FAILURES]
    if failed:
        rows.append(row("of that, by trials that failed", len(failed), sum(map(spent, failed))))
    bars = [Bar(each.label, each.device_seconds / 3600, hours(each.device_seconds)) for each in stages]
    pruned = [each for each in trials if each.state == "pruned" and each.last is not None]
    words = "No trial was pruned, so that nothing was saved."
    if pruned:
        saved = saved_device_seconds(trials, search.total_images)
        rows.append(row("saved by pruning (estimate)", len(pruned), saved))
        bars.append(Bar("saved by pruning", saved / 3600, f"{hours(saved)} (estimate)", supposed=True))
        words = (
            "What was saved is an estimate: what the pruned trials would have used up to "
            f"{search.total_images:,} images, each at the speed that it had."
        )
    unmeasured = sum(each.state == "pruned" and each.last is None for each in trials)
    if unmeasured:
        words += f" {counted(unmeasured, 'trial')} without any evaluation cannot be estimated."
    header = ["between rungs", "trials", "device-hours", *([] if price is None else ["money"])]
    costs = "" if price is None else f" A device costs {price:g} an hour."
    return [
        report.table(header, rows, range(1, len(header))),
        figures.bars("cost", bars, "device-hours", words + costs),
    ]
