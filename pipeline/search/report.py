"""What came out of a search, on one page: the ranking, what mattered, and what it cost.

The page is made from the store alone, so that it can be made again years later, on another machine
and without MLflow, and of a search that still runs. Where there is too little to show something the
page says so in words: a figure of nothing looks like a result.
"""

from pipeline import config_file, run_folder, storage
from pipeline.models import report
from pipeline.models.report import Markup, note, paragraph, section
from pipeline.search import ledger
from pipeline.search import report_figures as figures_of
from pipeline.search.cost import spent
from pipeline.search.definition import Definition
from pipeline.search.findings import Findings, hours, registered_weights, safe, short_names, shown
from pipeline.search.ledger import FAILURES, Trial
from pipeline.search.space import GROUPS, STRUCTURE
from pipeline.training.run_description import redact

_REASON_LENGTH = 160
_PICTURES = ("samples", "reconstructions")


def write_report(store: str, name: str) -> str:
    """Write STORE/searches/NAME/report.html; its URL. Raises RunError if there is no such search."""
    url = storage.join(ledger.folder(store, name), "report.html")
    storage.write_bytes(url, _page(Findings.read(store, name)))
    return url


def _page(search: Findings) -> bytes:
    return report.page(
        f"Search {search.record.name}",
        _overview(search),
        _best(search),
        _ranking(search),
        section("All settings together", figures_of.parallel(search)),
        section("What mattered", *figures_of.importance_section(search)),
        section("Score over each setting", *figures_of.scatter(search)),
        section("Learning curves", figures_of.curves(search)),
        section("KL per group", figures_of.kl(search)),
        section("Cost", *figures_of.cost(search)),
        section("Failed trials", _failures(search)),
        _definition(search),
    )


# -- the outcome --------------------------------------------------------------------------


def _overview(search: Findings) -> Markup:
    record, best = search.record, search.best
    states = ", ".join(f"{count} {state}" for state, count in ledger.counts(search.trials).items())
    answer = "none yet: no trial has finished with a score"
    if best is not None:
        answer = f"trial {best.trial.number}: {best.bits_per_dim:.4f} bits/dim at {best.images_seen:,} images"
    return report.facts(
        {
            "best": answer,
            "trials": f"{len(search.trials)} of {record.trials} ({states or 'none yet'})",
            "state": ": ".join(filter(None, (record.state, safe(record.reason)))),
            "used": f"{hours(sum(map(spent, search.trials)))} device-hours",
            "compared by": "time of their devices" if search.by_time else "images seen",
            "created": record.created,
            "this page": f"of {run_folder.now()}, from {storage.shown(storage.normalize(search.store))}",
        }
    )


def _best(search: Findings) -> Markup:
    title = "The best trial"
    if search.best is None:
        return section(title, note("No trial has finished with a score, so there is no best one."))
    trial = search.best.trial
    names = {**dict(trial.drawn), **dict(trial.settings)}
    rows = [(name, shown(value), _origin(name, trial)) for name, value in names.items()]
    parts: list[object] = [
        paragraph(f"This trains it in full, to {_in_full(search.definition, trial):,} images:"),
        report.command(f"nvae train --from-trial {search.record.name}/{trial.number}"),
        report.table(("searched setting", "value", ""), rows),
    ]
    ends = [each.name for each in search.varied() if each.near_an_end(trial.drawn.get(each.name))]
    if ends:
        those = ", ".join(short_names(ends).values())
        parts.append(note(f"Near an end of what was searched, beyond which nothing was tried: {those}."))
    if trial.model:
        weights = registered_weights(search.store, search.record.name, trial.number)
        parts.append(paragraph(f"Its model is registered as {trial.model}{weights}."))
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


def _newest_picture(search: Findings, trial: Trial, kind: str) -> Markup:
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


def _ranking(search: Findings) -> Markup:
    if not search.ranked:
        return section("Ranking", note("No trial has been drawn yet."))
    varied = search.varied()
    labels = short_names([each.name for each in varied])
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
                *(shown(trial.drawn[p.name]) if p.name in trial.drawn else "-" for p in varied),
                hours(spent(trial)),
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
    line = (safe(reason).strip().splitlines() or [""])[0]
    return line if len(line) <= _REASON_LENGTH else line[:_REASON_LENGTH] + "…"


def _failures(search: Findings) -> Markup:
    failed = [trial for trial in search.trials if trial.state in FAILURES]
    if not failed:
        return note("No trial has failed.")
    rows = [
        (
            trial.number,
            trial.state.replace("_", " "),
            f"{trial.last.images_seen:,}" if trial.last else "-",
            hours(spent(trial)),
            trial.starts,
            safe(trial.reason) or "no reason was noted",
        )
        for trial in failed
    ]
    header = ("trial", "state", "images at its last evaluation", "device-hours", "starts", "reason")
    return report.table(header, rows, {0, 2, 3, 4}, words={5})


# -- the search itself --------------------------------------------------------------------


def _definition(search: Findings) -> Markup:
    definition, record = search.definition, search.record
    rungs = [
        f"{rung / 3600:.3g} device-hours" if search.by_time else f"{rung:,.0f}" for rung in search.rungs()
    ]
    end = f"the end at {search.total_images:,} images"
    facts = {
        "rungs": ", ".join([*rungs, end]),
        "data set": storage.shown(definition.base.data.root),
        "data hash": record.data_hash,
        "in full": ", ".join(f"{path}={shown(value)}" for path, value in definition.full.items())
        or "trials train as long as the run itself",
        "workers of a trial": record.workers,
        "launches": ", ".join(f"{each.started} on {each.host}" for each in record.launches) or "none",
        "MLflow": f"{redact(record.tracking_uri)}, run {record.mlflow_run_id}",
    }
    settings = definition.search.model_dump(mode="json")
    chosen = {f"search.{name}": shown(value) for name, value in settings.items() if value is not None}
    space = [(each.name, str(each)) for each in definition.space.parameters]
    always = {
        GROUPS if each.name in STRUCTURE else each.name
        for each in definition.space.parameters
        if not each.when
    }
    base = config_file.leaves(config_file.without_secrets(definition.base))
    silent = {path: shown(value) for path, value in base.items() if path not in always}
    return section(
        "The search",
        *(note(words) for words in definition.warnings()),
        report.facts({**facts, **chosen}),
        report.table(("searched setting", "drawn from"), space),
        report.folded("All settings of a trial where the space is silent", report.facts(silent)),
    )
