"""A search's file: what it gives, and one message for each mistake, with its place."""

import pytest

from pipeline.config_draft import ConfigError, presets
from pipeline.search.definition import Definition, changes
from pipeline.search.reading import load
from pipeline.search.space import GROUPS

YAML = """
run: quickstart
settings:
  train: {total_images: 2_400}
  cadence: {evaluate_images: 400}
search:
  searcher: random
  scheduler: asha
  first_rung_images: 800
  reduction_factor: 2
space:
  objective.kl_balancing: {choice: [true, false]}
  objective.kl_warmup_fraction: {uniform: [0.1, 0.3], when: {objective.kl_balancing: [true]}}
  objective:
    spectral_coefficient: {log_uniform: [1.0e-4, 1]}
  model.groups_per_scale: {total: {integer: [3, 9]}, skew: {uniform: [0, 2]}}
"""


@pytest.fixture
def read(tmp_path):
    def read(text=YAML, *overrides):
        file = tmp_path / "search.yaml"
        file.write_text(text)
        return load(str(file), overrides)

    return read


def problems(read, text=YAML, *overrides):
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    return [str(problem).replace("\n", " ") for problem in caught.value.problems]


def test_a_file_gives_the_run_what_is_searched_and_how(read):
    definition = read()
    assert definition.base.train.total_images == 2_400
    assert definition.base.model.groups_per_scale == (1, 2, 3)
    assert definition.first_rung == 800 and definition.search.reduction_factor == 2
    names = [parameter.name for parameter in definition.space.parameters]
    assert names == [
        "objective.kl_balancing",
        "objective.kl_warmup_fraction",
        "objective.spectral_coefficient",
        f"{GROUPS}.total",
        f"{GROUPS}.skew",
        f"{GROUPS}.minimum",
    ]


def test_plain_overrides_are_settings_and_others_parts_of_the_search(read):
    definition = read(YAML, "train.batch_size=4", "search.seed=7", f"space.{GROUPS}.total.integer=[4, 5]")
    assert definition.base.train.batch_size == 4
    assert definition.search.seed == 7
    total = next(each for each in definition.space.parameters if each.name == f"{GROUPS}.total")
    assert total.values == (4, 5)


@pytest.mark.parametrize("name", presets("tune"))
def test_every_search_that_comes_with_the_package_is_sound(name):
    assert load(name).warnings() == []


@pytest.mark.parametrize(
    ("line", "place", "message"),
    [
        ("objective.spectral: {choice: [1]}", ":17", "did you mean objective.spectral_coefficient"),
        ("optimizer.learning_rate: {uniform: [0.1, 0.01]}", ":17", "must begin with the lower end"),
        ("optimizer.learning_rate: {log_uniform: [0, 1]}", ":17", "must lie above 0"),
        ("optimizer.learning_rate: {log_uniform: [-1, 1]}", ":17", "must lie above 0"),
        ("optimizer.learning_rate: {uniform: [0.1]}", ":17", r"must be two numbers"),
        ("optimizer.learning_rate: {choice: 0.1}", ":17", "must be a list of values"),
        ("optimizer.learning_rate: {choice: [0.1, 0.1]}", ":17", "names a value twice"),
        ("optimizer.learning_rate: 0.1", ":17", "say what to choose from"),
        ("optimizer.learning_rate: {loguniform: [1, 2]}", ":17", "did you mean log_uniform"),
        ("optimizer.learning_rate: {choice: [fast]}", ":17", "must be a number > 0, not 'fast'"),
        ("train.batch_size: {uniform: [4, 8]}", ":17", "must be a whole number"),
        ("train.batch_size: {integer: [0, 8]}", ":17", "must be a whole number >= 1"),
        ("optimizer.ema_decay: {uniform: [0.9, 1.0]}", ":17", "must be a number >= 0 and < 1"),
        ("train.seed: {choice: [1, 2]}", ":17", "could not be compared"),
        ("data.root: {choice: [a, b]}", ":17", "could not be compared"),
        ("train.batch_size: {choice: [4], when: {train.precision: [fp32]}}", ":17", "stands above"),
        (
            "train.batch_size: {choice: [4], when: {objective.kl_balancing: [maybe]}}",
            ":17",
            "'maybe' is none of its values",
        ),
        ("objective.kl_constant_fraction: {uniform: [0.1, 0.9]}", ":17", "would never reach 1"),
    ],
)
def test_a_mistake_in_the_space_is_named_with_its_line(read, line, place, message):
    found = problems(read, f"{YAML}  {line}\n")
    assert any(place in each and message in each for each in found), found


def test_all_mistakes_are_reported_at_once(read):
    text = YAML.replace("spectral_coefficient", "spectral").replace("total_images", "totl_images")
    found = problems(read, text.replace("first_rung_images: 800", "first_rung: 800"))
    assert len(found) == 3
    assert "did you mean search.first_rung_images" in " ".join(found)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ("{skew: {uniform: [0, 2]}}", "needs a total"),
        ("{minimum: 2}", "needs a total"),
        ("{total: {integer: [1, 6]}}", "need 3, not 1"),
        ("{total: {integer: [3, 6]}, minimum: 2}", "need 6, not 3"),
        ("{total: {integer: [3, 6]}, foo: 1}", "total, skew, minimum"),
    ],
)
def test_a_mistake_in_a_structure_is_named_whatever_part_is_left_out(read, structure, message):
    text = f"run: quickstart\nsearch: {{scheduler: none}}\nspace:\n  model.groups_per_scale: {structure}\n"
    [problem] = problems(read, text)
    assert ":4" in problem and message in problem


def test_a_wrong_name_hides_no_wrong_value(read):
    text = "run: quickstart\nsearch: {shceduler: none}\nspace:\n"
    text += "  objective.kl_balancing: {choice: [true, maybe]}\n"
    found = problems(read, text + "  optimizer.learning_rat: {uniform: [0.1, 0.2]}\n")
    assert len(found) == 3 and any("'maybe'" in each for each in found)


def test_a_structure_that_has_no_room_for_its_minimum_is_refused(read):
    (found,) = problems(read, YAML, f"space.{GROUPS}.minimum=2")
    assert "3 scales of at least 2 groups need 6, not 3" in found


def test_a_setting_cannot_be_given_and_searched(read):
    (found,) = problems(read, YAML, "objective.spectral_coefficient=0.1")
    assert "is searched here and given a value at objective.spectral_coefficient=0.1" in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.first_rung_images=700", "no multiple of cadence.evaluate_images, 400"),
        ("search.first_rung_images=2_400", "nothing is left to stop early"),
        ("search.searcher=grid", "grid needs lists; objective.kl_warmup_fraction is uniform"),
        ("search.max_cost=5", "needs price_per_device_hour"),
        ("search.compare=device_seconds", "is needed to compare by device_seconds"),
        ("search.searcher=bayes", "must be one of tpe, random, grid, not 'bayes'"),
    ],
)
def test_a_search_that_could_not_work_is_refused(read, override, message):
    assert any(message in each for each in problems(read, YAML, override))


def test_a_first_rung_inside_the_kl_warm_up_is_warned_of(read):
    assert read().warnings() == []
    (warning,) = read(YAML, "search.first_rung_images=400").warnings()
    assert "The first rung, 400 images, lies inside the KL warm-up, which lasts until 720" in warning


def test_a_definition_comes_back_from_its_record_and_knows_what_changed(read):
    definition = read()
    again = Definition.from_plain(definition.as_plain())
    assert changes(definition, again) == []
    other = read(YAML, "search.seed=7", "train.batch_size=4", f"space.{GROUPS}.total.integer=[4, 5]")
    assert [path for path, _, _ in changes(definition, other)] == [
        "settings.train.batch_size",
        "search.seed",
        f"space.{GROUPS}.total",
    ]


def test_budgets_and_the_place_of_the_data_may_change(read):
    other = read(YAML, "search.max_device_hours=5", "search.max_restarts=0", "data.root=/elsewhere")
    assert changes(read(), other) == []


def test_in_full_a_trial_is_trained_as_long_as_the_run_itself(read):
    definition = Definition.from_plain(read().as_plain())
    full = definition.in_full({"objective.spectral_coefficient": 0.5}, ["train.batch_size=4"])
    assert full.train.total_images == 5_600 and full.cadence.evaluate_images == 2_800
    assert full.objective.spectral_coefficient == 0.5 and full.train.batch_size == 4


def test_a_run_that_does_not_exist_is_one_problem(read):
    (found,) = problems(read, YAML.replace("run: quickstart", "run: quikstart"))
    assert "quikstart" in found and "did you mean quickstart" in found
