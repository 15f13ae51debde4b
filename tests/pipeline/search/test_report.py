"""The page of a search: it stands alone, says what the ledger says, and names what is missing."""

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config_file
from pipeline.config import SearchConfig
from pipeline.models.figures import Axis
from pipeline.models.report import element, page
from pipeline.run_folder import RunError
from pipeline.search import ledger
from pipeline.search.cost import saved_device_seconds, spending
from pipeline.search.definition import Definition
from pipeline.search.importance import importance
from pipeline.search.ledger import Evaluation, Ledger, SearchRecord, Trial, write_search
from pipeline.search.ranking import rank
from pipeline.search.report import write_report
from pipeline.search.report_figures import kl_per_group
from pipeline.search.space import Parameter, Space
from pipeline.training.journal import Entry, encode

SPECTRAL = Parameter("objective.spectral_coefficient", "log_uniform", (1e-4, 1.0))
RATE = Parameter("optimizer.learning_rate", "log_uniform", (1e-3, 1e-1))
BALANCING = Parameter("objective.kl_balancing", "choice", (True, False))
WARMUP = Parameter("objective.kl_warmup_fraction", "uniform", (0.1, 0.5), {BALANCING.name: (True,)})
TOTAL = Parameter("model.groups_per_scale.total", "integer", (3, 12))
GROUPS = Parameter("model.groups_per_scale", "choice", ([1, 1, 1], [1, 2, 3], [2, 2, 2]))
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
VOID = {"meta", "img", "br", "wbr"}
END = 9000
RUNGS = [1000.0, 3000.0]


class Parsed(HTMLParser):
    """A page as a browser reads it, in as much as the tests ask."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def table(self, first_heading: str) -> list[list[str]]:
        """The rows below the heading, of the first such table."""
        return next(rows[1:] for rows in self.tables if rows[0][0] == first_heading)


class Searched:
    """A search in a store of its own, whose trials were not really trained."""

    def __init__(self, folder: Path, *parameters: Parameter, **search: object) -> None:
        self.store = str(folder / "store")
        base = config_file.load("quickstart", [f"train.total_images={END}", "cadence.evaluate_images=1_000"])
        config = SearchConfig.model_validate({"first_rung_images": 1000, **search})
        space = Space(parameters or (SPECTRAL,), base.model.num_scales)
        self.definition = Definition(base, config, space, {"train.total_images": 90_000})
        self.url = ledger.folder(self.store, "demo")
        uri = "https://user:geheim@mlflow.example"
        record = SearchRecord("demo", "2026-11-23", self.definition.as_plain(), "c0ffee", uri, "4711", 9, 1)
        write_search(self.url, record)
        self.ledger = Ledger(self.url)

    def trial(self, drawn: dict, state: str = "finished", scores: tuple = (3.0, 2.5, 2.0), **more) -> Trial:
        """One with scores at 1,000, 3,000 and 9,000 images, at a tenth of a device-second each."""
        number = len(self.ledger.trials) + 1
        self.ledger.add(Trial(number, drawn, self.definition.space.settings(drawn), starts=1))
        for images, score in zip((1000, 3000, END), scores, strict=False):
            self.ledger.evaluated(number, images, score, images / 10)
        changes = {"state": state, "spent_device_seconds": 1000.0, **more}
        return self.ledger.update(number, **changes)

    def run_folder(self, number: int) -> Path:
        return Path(self.store) / "runs" / f"demo-{number:04d}"

    def noted(self, number: int, segment: str, **entries: list[float]) -> None:
        """KL per group by images seen, in a segment of the journal of a trial's run."""
        folder = self.run_folder(number) / "journal"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            encode(Entry("metrics", 1, {"at": int(at[1:]), "values": kl_values(values)}))
            for at, values in entries.items()
        ]
        (folder / segment).write_bytes(b"".join(lines))

    def page(self) -> str:
        return Path(write_report(self.store, "demo")).read_text()


def kl_values(values: list[float]) -> dict[str, float]:
    return {f"validation/kl_nats/group_{group:02d}": value for group, value in enumerate(values)}


def spectral(value: float) -> dict[str, float]:
    return {SPECTRAL.name: value}


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Searched:
    """A search in which everything has happened."""
    found = Searched(
        tmp_path_factory.mktemp("search"),
        *(SPECTRAL, BALANCING, WARMUP, GROUPS),
        max_cost=10.0,
        price_per_device_hour=3.6,
    )

    def drawn(value: float, groups: list[int], warmup: float | None = None) -> dict:
        conditional = {} if warmup is None else {WARMUP.name: warmup}
        return {
            **spectral(value),
            BALANCING.name: warmup is not None,
            **conditional,
            GROUPS.name: groups,
        }

    found.trial(drawn(1e-3, [1, 1, 1], 0.2), scores=(3.1, 2.6, 2.2), spent_device_seconds=1200.0, starts=2)
    found.trial(drawn(1e-2, [1, 2, 3], 0.4), scores=(3.0, 2.4, 2.1), model="models:/nvae-demo/2")
    found.trial(drawn(1e-1, [2, 2, 2]), "pruned", (3.4, 2.9), reason="among the worse")
    found.trial(drawn(1.0, [2, 2, 2]), "pruned", (3.9,), reason="among the worse")
    found.trial(
        drawn(1e-4, [1, 2, 3]),
        "failed",
        (4.0,),
        reason="</td><script>alert('$x$')</script>\nsee https://me:geheim@host/?X-Amz-Signature=abc \ud800",
    )
    found.trial(drawn(0.5, [1, 2, 3], 0.3), "diverged", (math.nan,), reason="nan")
    found.trial(drawn(0.2, [1, 2, 3]), "infeasible", (), reason="41 GiB of 24 GiB", spent_device_seconds=0.0)
    found.trial(drawn(0.3, [1, 1, 1]), "running", (3.3,), spent_device_seconds=0.0)
    found.trial(drawn(0.4, [1, 1, 1]), "pending", (), spent_device_seconds=0.0)
    found.noted(1, "001-00000.jsonl", _9000=[5.0, 4.0, 3.0])
    found.noted(2, "001-00000.jsonl", _9000=[7.0, 6.0, 5.0, 4.0, 3.0, 2.0])
    (found.run_folder(2) / "pictures").mkdir()
    (found.run_folder(2) / "pictures" / "samples-000000003000.png").write_bytes(b"older")
    (found.run_folder(2) / "pictures" / "samples-000000009000.png").write_bytes(PNG)
    return found


@pytest.fixture(scope="module")
def html(searched: Searched) -> str:
    return searched.page()


@pytest.fixture(scope="module")
def parsed(html: str) -> Parsed:
    return Parsed(html)


# -- the page -----------------------------------------------------------------------------


def test_a_page_asks_for_nothing_outside_of_itself(html, parsed):
    assert {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object", "embed", "base"} == set()
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "action", "poster"):
                assert value.startswith("data:image/png;base64," if tag == "img" else "#")
            assert not name.startswith("on")
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "@import" not in html
    policy = next(each for tag, each in parsed.tags if "http-equiv" in each)
    assert policy["content"].startswith("default-src 'none'")


def test_the_figures_of_a_page_share_no_names_and_lack_none(parsed):
    names = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(names)) == len(names)
    written = " ".join(value for _, attributes in parsed.tags for value in attributes.values() if value)
    used = set(re.findall(r"url\(#(.*?)\)", written))
    used |= {each["xlink:href"][1:] for _, each in parsed.tags if "xlink:href" in each}
    assert used and used <= set(names)


def test_every_colour_of_a_figure_is_one_of_the_page_in_light_and_dark(html):
    styles = re.findall(r":root\{(--.*?)\}", html)
    assert len(styles) == 2
    figures = "".join(re.findall(r"<svg .*?</svg>", html, re.DOTALL))
    used = set(re.findall(r"var\(--([\w-]+)\)", figures))
    for style in styles:
        assert used <= set(re.findall(r"--([\w-]+):#\w{6}", style))
    assert set(re.findall(r"#0100\w\w\b", figures)) == set()


def test_text_is_escaped_wherever_it_enters_a_page():
    text = page("<t>", element("p", "<&>", title='"><b>'), "<i>").decode()
    assert "<title>&lt;t&gt;</title>" in text
    assert '<p title="&quot;&gt;&lt;b&gt;">&lt;&amp;&gt;</p>&lt;i&gt;' in text


@given(
    low=st.floats(1e-6, 1e6),
    factor=st.floats(1.001, 1e6),
    log=st.booleans(),
    whole=st.booleans(),
)
def test_ticks_lie_on_their_axis_in_order_and_are_never_crowded(low, factor, log, whole):
    ends = (math.ceil(low), math.ceil(low * factor) + 1) if whole else (low, low * factor)
    ticks = Axis("", "", ends, log=log).ticks(5)
    places = [place for place, _ in ticks]
    assert 1 <= len(ticks) <= 8
    assert places == sorted(set(places))
    assert all(-1e-6 <= place <= 1 + 1e-6 for place in places)


# -- what it says -------------------------------------------------------------------------


def test_the_ranking_is_that_of_the_search_with_the_numbers_of_the_ledger(searched, parsed):
    rows = parsed.table("rank")
    ranked = rank(searched.ledger.trials, "images")
    assert [int(row[1]) for row in rows] == [each.trial.number for each in ranked]
    assert [row[0] for row in rows] == [str(place) for place in range(1, 10)]
    for row, each in zip(rows, ranked, strict=True):
        trial = each.trial
        assert row[2] == ("-" if each.bits_per_dim is None else f"{each.bits_per_dim:.4f}")
        assert row[3] == ("-" if each.images_seen is None else f"{each.images_seen:,}")
        assert row[4] == trial.state
        assert row[5] == ", ".join(map(str, trial.settings[GROUPS.name]))
        assert float(row[6]) == trial.drawn[SPECTRAL.name]
        assert row[8] == (f"{trial.drawn[WARMUP.name]:.4g}" if WARMUP.name in trial.drawn else "-")
        last = trial.last.device_seconds if trial.last else 0.0
        assert float(row[10]) == pytest.approx(max(trial.spent_device_seconds, last) / 3600, abs=5e-4)
        assert int(row[11]) == trial.starts
        assert row[12] == "" or trial.reason.startswith(row[12])


def test_the_best_trial_is_named_with_its_command_settings_and_newest_picture(parsed):
    assert "trial 2: 2.1000 bits/dim at 9,000 images" in parsed.text
    assert "in full, to 90,000 images: nvae train --from-trial demo/2" in parsed.text
    settings = {row[0]: row[1] for row in parsed.table("searched setting")}
    assert settings == {
        SPECTRAL.name: "0.01",
        BALANCING.name: "True",
        WARMUP.name: "0.4",
        GROUPS.name: "[1, 2, 3]",
    }
    images = [attributes["src"] for tag, attributes in parsed.tags if tag == "img"]
    assert images == [f"data:image/png;base64,{base64.b64encode(PNG).decode()}"]
    assert "There are no reconstructions of trial 2 in the store." in parsed.text


def test_a_hostile_reason_is_shown_as_text_and_without_its_passwords(html, parsed):
    [row] = [row for row in parsed.table("trial") if row[1] == "failed"]
    assert row[5].startswith("</td><script>alert('$x$')</script>\nsee https://host/?X-Amz-Signature=***")
    assert "geheim" not in html and "=abc" not in html


def test_every_failed_trial_is_listed_with_its_reason(parsed):
    rows = {int(row[0]): (row[1], row[2]) for row in parsed.table("trial")}
    assert rows == {5: ("failed", "1,000"), 6: ("diverged", "1,000"), 7: ("infeasible", "-")}


def test_a_page_stands_alone_with_the_definition_of_its_search(parsed):
    facts = {row[0]: row[1] for rows in parsed.tables for row in rows if len(row) == 2}
    assert facts["rungs"] == "1,000, 3,000, the end at 9,000 images"
    assert facts["data hash"] == "c0ffee"
    assert facts["MLflow"] == "https://mlflow.example, run 4711"
    assert (facts["search.searcher"], facts["search.seed"]) == ("tpe", "1")
    assert [WARMUP.name, f"uniform [0.1, 0.5] when {BALANCING.name} is in [True]"] in parsed.tables[-2]
    # Of the searched ones only what holds where a condition does not.
    assert (facts["model.latent_channels"], facts[WARMUP.name]) == ("8", "0.3")
    assert {SPECTRAL.name, GROUPS.name}.isdisjoint(row[0] for row in parsed.tables[-1])


def test_kl_is_that_of_the_best_and_the_worst_that_finished(parsed):
    assert "Trial 2, the best that finished, at 9,000 images: 27.0 nats" in parsed.text
    assert "Trial 1, the worst that finished, at 9,000 images: 12.0 nats" in parsed.text
    assert [parsed.texts.count(side) for side in ("4x4", "8x8", "16x16")] == [2, 2, 2]


def test_kl_is_read_from_the_newest_evaluation(tmp_path):
    search = Searched(tmp_path)
    assert kl_per_group(str(search.run_folder(1))) is None
    search.noted(1, "001-00000.jsonl", _1000=[9.0, 9.0], _3000=[8.0, 8.0])
    search.noted(1, "002-00000.jsonl", _9000=[2.0, 1.0])
    assert kl_per_group(str(search.run_folder(1))) == (9000, [2.0, 1.0])


# -- what mattered ------------------------------------------------------------------------


def grid_of_trials(*parameters: Parameter, values: dict[str, list]) -> list[Trial]:
    combinations: list[dict] = [{}]
    for parameter in parameters:
        combinations = [
            {**known, parameter.name: value} for known in combinations for value in values[parameter.name]
        ]
    return [Trial(number, drawn, {}, "finished") for number, drawn in enumerate(combinations, start=1)]


def test_the_setting_that_alone_decides_has_all_of_the_importance(tmp_path):
    definition = Searched(tmp_path, SPECTRAL, RATE, TOTAL, BALANCING).definition
    values = {
        SPECTRAL.name: [1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        RATE.name: [1e-3, 1e-2, 1e-1],
        TOTAL.name: [3, 12],
        BALANCING.name: [True, False],
    }
    trials = grid_of_trials(*definition.space.parameters, values=values)
    scores = [2 + abs(math.log10(trial.drawn[SPECTRAL.name]) + 3) for trial in trials]
    found = importance(definition, trials, scores)
    assert {count for _, count in found.values()} == {60}
    assert found[SPECTRAL.name][0] > 0.95
    assert max(share for name, (share, _) in found.items() if name != SPECTRAL.name) < 0.02


def test_a_logarithmic_range_matters_as_much_at_its_lower_end(tmp_path):
    """Weighed by plain values, what happens below a hundredth of the range would not exist."""
    definition = Searched(tmp_path, SPECTRAL, BALANCING).definition
    values = {SPECTRAL.name: [10 ** (-4 + place / 4) for place in range(17)], BALANCING.name: [True, False]}
    trials = grid_of_trials(SPECTRAL, BALANCING, values=values)
    scores = [2 + (trial.drawn[SPECTRAL.name] < 1e-2) + 0.2 * trial.drawn[BALANCING.name] for trial in trials]
    found = importance(definition, trials, scores)
    assert found[SPECTRAL.name][0] > 0.9 > 0.1 > found[BALANCING.name][0]


def test_a_setting_with_a_condition_is_judged_among_the_trials_that_drew_it(tmp_path):
    definition = Searched(tmp_path, BALANCING, WARMUP).definition
    trials = [Trial(n, {BALANCING.name: True, WARMUP.name: 0.1 * n}, {}) for n in range(1, 6)]
    trials += [Trial(n, {BALANCING.name: False}, {}) for n in range(6, 9)]
    scores = [2 + trial.drawn.get(WARMUP.name, 0.3) for trial in trials]
    found = importance(definition, trials, scores)
    assert found[WARMUP.name] == (pytest.approx(1.0), 5)
    assert found[BALANCING.name][1] == 8


def test_nothing_is_told_of_settings_that_did_not_change_or_that_too_few_drew(tmp_path):
    definition = Searched(tmp_path, SPECTRAL, BALANCING, WARMUP).definition
    trials = [Trial(n, {**spectral(0.1), BALANCING.name: n > 3}, {}) for n in range(1, 7)]
    trials += [Trial(7, {**spectral(0.1), BALANCING.name: True, WARMUP.name: 0.3}, {})]
    found = importance(definition, trials, [float(n) for n in range(7)])
    assert list(found) == [BALANCING.name]


# -- cost ---------------------------------------------------------------------------------


def test_what_was_spent_and_saved_equals_a_calculation_by_hand(parsed):
    """Trained: two to 9,000 images, one to 3,000, four to 1,000, at 0.1 device-seconds an image.

    Of the last only that of trial 8 counts as 100 s in all, since its start has not ended. To the
    end the pruned ones had 6,000 and 8,000 images to go: 1,400 s. A device costs 0.001 a second.
    """
    rows = {row[0]: row[1:] for row in parsed.table("between rungs")}
    beside = (1200 - 900) + (1000 - 900) + (1000 - 300) + 3 * (1000 - 100)
    expected = {
        "0 to 1,000 images": (7, 700),
        "1,000 to 3,000 images": (3, 600),
        "from 3,000 images on": (2, 1200),
        "starts, lost work, work not evaluated": (6, beside),
        "all together": (9, 1200 + 5 * 1000 + 100),
        "of that, by trials that failed": (3, 2000),
        "saved by pruning (estimate)": (2, 1400),
    }
    assert rows.keys() == expected.keys()
    for label, (count, seconds) in expected.items():
        assert int(rows[label][0]) == count
        assert float(rows[label][1]) == pytest.approx(seconds / 3600, abs=6e-4)
        assert float(rows[label][2]) == pytest.approx(seconds / 1000, abs=6e-3)


def test_what_is_saved_goes_by_each_trials_own_speed():
    slow = Trial(1, {}, {}, "pruned", evaluations=(Evaluation(1000, 3.0, 500.0, 0),))
    fast = Trial(2, {}, {}, "pruned", evaluations=(Evaluation(3000, 3.0, 300.0, 1),))
    finished = Trial(3, {}, {}, "finished", evaluations=(Evaluation(9000, 3.0, 900.0, 2),))
    blind = Trial(4, {}, {}, "pruned")
    assert saved_device_seconds([slow, fast, finished, blind], 9000) == 8000 * 0.5 + 6000 * 0.1


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 500), max_size=5), st.floats(0, 100), st.floats(0.01, 3)),
        max_size=6,
    ),
    st.lists(st.integers(1, 1000), unique=True, max_size=4).map(sorted),
    st.booleans(),
)
def test_whatever_the_rungs_the_stages_add_up_to_all_that_was_spent(histories, rungs, by_time):
    trials = []
    for number, (steps, more, speed) in enumerate(histories, start=1):
        seen = [sum(steps[: place + 1]) for place in range(len(steps))]
        evaluations = tuple(Evaluation(images, 2.0, images * speed, 0) for images in seen)
        spent = more + (evaluations[-1].device_seconds if evaluations else 0.0)
        trials.append(Trial(number, {}, {}, evaluations=evaluations, spent_device_seconds=spent))
    stages = spending(trials, rungs, by_time=by_time)
    assert sum(each.device_seconds for each in stages) == pytest.approx(
        sum(each.spent_device_seconds for each in trials)
    )
    assert all(each.device_seconds >= -1e-9 for each in stages)


# -- what is missing ----------------------------------------------------------------------


def nothing(search: Searched) -> None:
    """No trial yet."""


def one_finished(search: Searched) -> None:
    search.trial(spectral(0.1))


def none_finished(search: Searched) -> None:
    for place in range(4):
        search.trial(spectral(10.0**-place), "pruned", (3.0 + place,))


def halved(search: Searched) -> None:
    for place in range(8):
        search.trial(spectral(10.0 ** (-place / 4)), "pruned", (3.0 + place, 2.9 + place)[: 1 + place % 2])


def none_evaluated(search: Searched) -> None:
    search.trial(spectral(0.1), "running", ())
    search.trial(spectral(0.1), "pruned", ())


def none_finite(search: Searched) -> None:
    search.trial(spectral(0.1), scores=(math.nan, math.inf))
    search.trial(spectral(0.2), "diverged", (math.nan,))


def none_feasible(search: Searched) -> None:
    search.trial(spectral(0.1), "infeasible", (), spent_device_seconds=0.0)


def all_alike(search: Searched) -> None:
    for place in range(5):
        search.trial(spectral(10.0**-place))


@pytest.mark.parametrize(
    ("happened", "said", "figures"),
    [
        (nothing, ["No trial has been drawn yet", "there is no best one", "Nothing has been used"], 0),
        (one_finished, ["Too few scores", "trial 1 (only) has no KL", "no samples of trial 1"], 4),
        (
            none_finished,
            ["there is no best one", "4 trials that were evaluated at 1,000 images", "chance has a part"],
            5,
        ),
        (halved, ["4 trials that were evaluated at 3,000", "8 trials that were evaluated at 1,000"], 6),
        (none_evaluated, ["No trial has a score", "evaluated with a finite score", "cannot be estimated"], 1),
        (none_finite, ["No trial has a score", "evaluated with a finite score", "Too few scores"], 1),
        (none_feasible, ["No trial has a score", "No trial has finished", "infeasible"], 0),
        (all_alike, ["are all the same", "trial 1 (best) has no KL", "trial 5 (worst) has no KL"], 4),
    ],
)
def test_a_page_says_in_words_what_is_missing(happened, said, figures, tmp_path):
    search = Searched(tmp_path)
    happened(search)
    found = Parsed(search.page())
    for words in said:
        assert words in found.text
    assert sum(tag == "svg" for tag, _ in found.tags) == figures


def test_a_search_by_time_has_its_rungs_and_curves_in_device_hours(tmp_path):
    search = Searched(tmp_path, compare="device_seconds", first_rung_device_seconds=72.0)
    for place in range(3):
        search.trial(spectral(10.0**-place), scores=(3.0, 2.5, 2.0 + place / 10))
    found = Parsed(search.page())
    assert "0.02 device-hours, 0.06 device-hours, 0.18 device-hours, the end at 9,000 images" in found.text
    assert "device-hours (logarithmic)" in found.text
    rows = {row[0]: float(row[2]) for row in found.table("between rungs")}
    assert rows["0.06 to 0.18 device-hours"] == pytest.approx(3 * 0.12)


def test_settings_of_a_single_value_are_no_axis(tmp_path):
    search = Searched(tmp_path, Parameter(GROUPS.name, "choice", ([1, 2, 3],)))
    search.trial({GROUPS.name: [1, 2, 3]})
    found = Parsed(search.page())
    assert found.text.count("Every searched setting has a single value.") == 2


def test_a_search_that_is_not_there_has_no_report(tmp_path):
    with pytest.raises(RunError, match=r"There is no search 'other'.*demo"):
        write_report(Searched(tmp_path).store, "other")
