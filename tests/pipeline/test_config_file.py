"""Configurations: every mistake at once, each with its place; what is written reads back the same."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config_yaml
from pipeline.config import RunConfig
from pipeline.config_file import (
    ConfigError,
    changed,
    explain,
    from_mapping,
    identity_changes,
    leaves,
    load,
    to_mapping,
    to_yaml,
    without_secrets,
)
from pipeline.settings import flatten, nearest, schema, settings

COMPLETE = """\
data: {root: /shards}
train:
  total_images: 1000
  batch_size: 10
cadence: {log_images: 100, evaluate_images: 500, checkpoint_images: 500}
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def problems(source: str, *overrides: str) -> dict[str, str]:
    """Dotted path -> "place: message" of each problem."""
    with pytest.raises(ConfigError) as caught:
        load(source, overrides)
    return {problem.path: f"{problem.origin}: {problem.message}" for problem in caught.value.problems}


def test_every_mistake_is_reported_at_once_with_its_place(tmp_path):
    path = write(
        tmp_path,
        """\
data: {root: /shards, lanes: 0}
trian: {batch_size: 10}
train:
  total_images: 1000
  batch_size: 10
  precision: fp16
  micro_batch_size: 11
model:
  image_size: 100
  flow_pairs: true
objective: 7
cadence: {log_images: 100, evaluate_images: 500}
""",
    )
    found = problems(
        path, "optimizer.warmup_images=1001", "spectral_coefficient=1", "train.seed=-1", "nothing"
    )
    assert found == {
        "data.lanes": f"{path}:1: must be a whole number >= 1 or null, not 0",
        "trian.batch_size": f"{path}:2: there is no such setting; did you mean train.batch_size?",
        "train.precision": f"{path}:6: must be one of fp32, bf16, not 'fp16'",
        "train.micro_batch_size": f"{path}:7: 11 is more than train.batch_size, 10",
        "model.flow_pairs": f"{path}:10: must be a whole number from 0 to 100, not True",
        "objective": f"{path}:11: is a section, not a setting; it cannot be 7",
        "cadence.checkpoint_images": f"{path}: is missing; it must be a whole number >= 1. "
        "Images between two checkpoints.",
        "optimizer.warmup_images": "optimizer.warmup_images=1001: a warm-up of 1001 images is longer "
        "than the training, train.total_images = 1000",
        "spectral_coefficient": "spectral_coefficient=1: there is no such setting; "
        "did you mean objective.spectral_coefficient?",
        "train.seed": "train.seed=-1: must be a whole number >= 0 and <= 4294967295, not -1",
        "": ": 'nothing' sets nothing; write KEY=VALUE, as in train.batch_size=32 (null for none)",
    }


def test_the_message_names_every_problem(tmp_path):
    with pytest.raises(
        ConfigError, match=r"(?s)3 problems.*data\.root.*train\.total.*train\.batch"
    ) as caught:
        load(write(tmp_path, "cadence: {log_images: 1, evaluate_images: 1, checkpoint_images: 1}"))
    assert len(str(caught.value).splitlines()) == 4


def test_shapes_that_do_not_fit_are_blamed_on_the_last_word(tmp_path):
    path = write(tmp_path, COMPLETE + "model: {image_size: 36}")
    assert problems(path, "model.image_size=30")["model.image_size"].startswith(
        "model.image_size=30: 30 cannot be halved"
    )


@pytest.mark.parametrize(
    ("overrides", "blamed"),
    [
        (["train.total_images=5"], "train.total_images"),
        (["optimizer.minimum_learning_rate=0.1"], "optimizer.minimum_learning_rate"),
        (["objective.kl_constant_fraction=0.8"], "objective.kl_warmup_fraction"),
        (
            ["objective.spectral_coefficient=0", "objective.spectral_coefficient_initial=1"],
            "objective.spectral_coefficient_initial",
        ),
        (["optimizer.learning_rate=.inf"], "optimizer.learning_rate"),
        (["optimizer.learning_rate=.nan"], "optimizer.learning_rate"),
        (["train.batch_size=true"], "train.batch_size"),
        (["train.batch_size=2.5"], "train.batch_size"),
        (["train.batch_size=[1]"], "train.batch_size"),
        (["train.batch_size={}"], "train.batch_size"),
        (["registry.name=a/b"], "registry.name"),
        (["model.groups_per_scale=4"], "model.groups_per_scale"),
        (["model.groups_per_scale=[4, 0]"], "model.groups_per_scale"),
        (["model.likelihood=bernoulli"], "model.image_channels"),
    ],
)
def test_a_value_out_of_its_range_is_refused(tmp_path, overrides, blamed):
    assert set(problems(write(tmp_path, COMPLETE), *overrides)) == {blamed}


def test_numbers_and_lists_in_overrides_are_yaml(tmp_path):
    config = load(
        write(tmp_path, COMPLETE),
        [
            "optimizer.learning_rate=1e-2",
            "model.groups_per_scale=[4,4]",
            "train.total_images=25e3",
            "train={seed: 5}",
        ],
    )
    assert config.optimizer.learning_rate == 0.01
    assert config.model.groups_per_scale == (4, 4)
    assert (config.train.total_images, config.train.seed) == (25_000, 5)


def test_the_last_override_of_a_setting_holds(tmp_path):
    config = load(write(tmp_path, COMPLETE), ["train.seed=2", "train.seed=3"])
    assert config.train.seed == 3


def test_a_file_overrides_its_base_and_overrides_both(tmp_path):
    write(tmp_path, COMPLETE + "optimizer: {learning_rate: 1e-3, weight_decay: 0}", "base.yaml")
    child = write(tmp_path, "base: base.yaml\noptimizer: {learning_rate: 2e-3}\n", "child.yaml")
    config = load(child, ["train.seed=9"])
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, config.train.seed) == (2e-3, 0.0, 9)


def test_a_preset_can_be_a_base(tmp_path):
    path = write(tmp_path, "base: ffhq256\ntrain: {batch_size: 24}\n")
    assert changed(load("ffhq256"), load(path)) == [("train.batch_size", 96, 24)]


def test_a_base_of_a_base_is_refused(tmp_path):
    write(tmp_path, "base: quickstart\n", "parent.yaml")
    path = write(tmp_path, "base: parent.yaml\n" + COMPLETE)
    assert problems(path) == {
        "base": f"{tmp_path}/parent.yaml:1: this file is a base itself and cannot have one"
    }


def test_a_file_that_is_its_own_base_is_refused(tmp_path):
    assert "base" in problems(write(tmp_path, "base: run.yaml\n" + COMPLETE))


def test_a_base_that_cannot_be_read_is_told_with_its_place_and_the_other_mistakes(tmp_path):
    path = write(tmp_path, "base: quickstrat.yaml\ntrain: {batch_size: 0}\n")
    found = problems(path, "spectral_coefficient=1")
    base = found.pop("base")
    assert base.startswith(f"{path}:1: {tmp_path}/quickstrat.yaml: is neither a file nor one of the presets")
    assert base.endswith("did you mean quickstart?")
    assert found.keys() == {"train.batch_size", "spectral_coefficient"}


def test_settings_that_an_unreadable_base_may_have_given_are_not_held_against_the_others(tmp_path):
    text = "base: [nope]\noptimizer: {minimum_learning_rate: 0.1}\n"
    assert problems(write(tmp_path, text)).keys() == {"base"}


def test_a_setting_given_twice_is_refused(tmp_path):
    path = write(tmp_path, COMPLETE + "train.batch_size: 20\n")
    assert problems(path) == {"train.batch_size": f"{path}:6: is given already at {path}:4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [\n", "2: expected the node content"),
        ("a: &bomb [1, 2]\n", "1: anchors and aliases are not supported"),
        ("data: !!python/object/apply:os.system [echo]\n", "1: tags are not supported"),
        ("data: !!set {a, b}\n", "1: tags are not supported"),
        ("x: " + "[" * 100_000, "1: is nested too deeply"),
        ("[1, 2]", "1: must be a mapping"),
        ("5", "1: must be a mapping"),
        ("? [a, b]\n: 1", "1: a key must be one word"),
        ("a: 1\n---\nb: 2\n", "2: but found another document"),
        ("# " + "x" * 300_000, "has 300002 characters"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_anything_but_plain_yaml_is_refused(tmp_path, text, message):
    found = problems(write(tmp_path, text))
    assert message in found.pop("")
    assert found == {}  # what is missing is not known


@pytest.mark.parametrize(
    "text", [f"train: {{seed: {'9' * 10**5}}}", f"? {'k' * 10**5}\n: 1", f"x: !{'t' * 10**5} 1"]
)
def test_a_message_stays_short_whatever_was_written(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    assert len(str(caught.value)) < 5000


def test_a_file_that_cannot_be_parsed_does_not_hide_the_mistakes_of_overrides(tmp_path):
    path = write(tmp_path, "train:\n\tseed: 1\n")
    assert problems(path, "train.seed=-1").keys() == {"", "train.seed"}


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in problems(str(path))[str(path)]


def test_a_misspelt_preset_is_suggested():
    assert "did you mean ffhq256?" in problems("fhq256")["fhq256"]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("objective.spectral_coeficient", "objective.spectral_coefficient"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("batch_size", "train.batch_size"),
        ("model.groups", "model.groups_per_scale"),
        ("sound.volume", None),
    ],
)
def test_the_nearest_setting_is_suggested_if_one_is_near(wrong, right):
    assert nearest(wrong) == right


@given(
    seed=st.integers(0, 2**32 - 1),
    rate=st.floats(1e-4, 1e3),
    decay=st.floats(0, 1e-300),
    root=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"])),
    groups=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    clip=st.none() | st.floats(1e-9, 1e9),
)
def test_a_written_configuration_reads_back_the_same(seed, rate, decay, root, groups, clip):
    config = from_mapping(
        {
            "data": {"root": root},
            "model": {"groups_per_scale": groups, "image_size": 64},
            "optimizer": {"learning_rate": rate, "weight_decay": decay, "gradient_clip_norm": clip},
            "train": {"total_images": 10, "batch_size": 2, "seed": seed},
            "cadence": {"log_images": 1, "evaluate_images": 1, "checkpoint_images": 1},
        }
    )
    read = {entry.path: entry.value for entry in config_yaml.read(to_yaml(config))}
    assert read == leaves(config)
    assert from_mapping(to_mapping(config)) == from_mapping(read) == config


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=6,
    )
)
def test_any_value_reads_back_as_it_was_written(value):
    assert [entry.value for entry in config_yaml.read(config_yaml.write(value), "key")] == [value]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-2", 0.01),
        ("010", "010"),
        ("12:30", "12:30"),
        ("no", "no"),
        ("1_000", 1000),
        ("~", None),
        ("-3", -3),
    ],
)
def test_plain_words_are_what_they_look_like(word, value):
    [entry] = config_yaml.read(f"key: {word}")
    assert entry.value == value and type(entry.value) is type(value)


def test_changes_of_identity_are_told_from_resumable_ones(tmp_path):
    old = load(write(tmp_path, COMPLETE))
    new = load(
        write(tmp_path, COMPLETE), ["train.batch_size=20", "model.latent_channels=4", "data.root=/other"]
    )
    assert changed(old, new) == [
        ("data.root", "/shards", "/other"),
        ("model.latent_channels", 20, 4),
        ("train.batch_size", 10, 20),
    ]
    assert identity_changes(old, new) == [("model.latent_channels", 20, 4)]


def test_a_password_or_signature_of_the_data_is_not_written_down(tmp_path):
    root = "https://user:hunter2@host/set?X-Amz-Signature=hunter2"
    config = load(write(tmp_path, COMPLETE), [f"data.root={root}"])
    assert config.data.root == root
    written = without_secrets(config)
    assert "hunter2" not in to_yaml(written)
    assert identity_changes(config, written) == []
    assert without_secrets(load(write(tmp_path, COMPLETE), [])).data.root == "/shards"


def test_explain_says_what_a_setting_means_and_which_presets_set_it_to_what():
    [explanation] = explain("objective.spectral_coefficient")
    assert explanation.presets["ffhq256"] == 0.1
    assert "Weight lambda" in str(explanation) and "a number >= 0" in str(explanation)
    assert [item.setting.path for item in explain("checkpoint")] == ["checkpoint.keep"]
    with pytest.raises(ConfigError, match=r"did you mean objective.kl_balancing"):
        explain("objective.kl_balance")


def test_the_schema_describes_every_setting_with_its_range():
    document = schema()
    for path in settings():
        section, name = path.split(".")
        reference = document["properties"][section]["$ref"].rpartition("/")[2]
        assert document["$defs"][reference]["properties"][name]["description"]
    assert document["$defs"]["NVAEConfig"]["properties"]["image_size"]["maximum"] == 4096


def test_leaves_are_exactly_the_settings(tmp_path):
    config = load(write(tmp_path, COMPLETE))
    assert list(leaves(config)) == list(settings()) == [path for path, _ in flatten(to_mapping(config))]
    assert RunConfig.model_validate(to_mapping(config)) == config


def test_a_mistake_on_the_command_line_is_named_as_it_was_written(tmp_path):
    path = write(tmp_path, COMPLETE)
    with pytest.raises(ConfigError, match=r"^train\.seed=-1: must be a whole number .*, not -1$"):
        load(path, ["train.batch_size=8", "train.seed=-1"])
    with pytest.raises(ConfigError, match=r"^train=\{seed: -1\}: train\.seed: must be "):
        load(path, ["train={seed: -1}"])
    with pytest.raises(ConfigError) as caught:
        load(path, ["data.rooot=https://me:secret@host/x?token=secret"])
    assert "secret" not in str(caught.value)
