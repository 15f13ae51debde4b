"""Queries for models, beside an oracle that evaluates the tree which a text was written from."""

import contextlib
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.evaluation_record import Evaluation
from pipeline.models.query import MAX_CHARACTERS, QueryError, parse
from tests.pipeline.models.versions import version

BEST = version(
    7,
    aliases=("best", "champion"),
    metrics={"validation/bits_per_dim": 0.61, "validation/kl_nats/group_00": 3.5},
    settings={
        "objective.spectral_coefficient": 0.1,
        "model.groups_per_scale": [4, 4, 8],
        "model.residual_posterior": True,
        "train.precision": "bf16",
    },
    evaluations=(Evaluation("d2" * 32, 7000, 100, 0, {"validation/nelbo_nats": 90.5}),),
    trial="groups/7",
    world_size=8,
    images_seen=2_000_000,
)


@pytest.mark.parametrize(
    "query",
    [
        "",
        "data=ffhq256 and validation.bits_per_dim < 0.75 and objective.spectral_coefficient <= 0.1",
        "data=s3://bucket/ffhq256",
        "data=d1d1d1d1",
        "model=nvae-faces and version=7",
        "alias=champion",
        "not alias=production",
        "alias != production",
        "validation/bits_per_dim==0.61",
        "validation.kl_nats.group_00 > 3",
        "evaluation.nelbo_nats < 91 and evaluation.draws = 100",
        "model.groups_per_scale = [4,4, 8]",
        "model.residual_posterior = true",
        "train.precision = bf16",
        "train.precision = 'bf16'",
        "trial ~ GROUPS",
        "run=other or run=faces",
        "run=other or run=faces and version=7",
        "(run=other or run=faces) and world_size >= 8",
        "created >= 2026-11 and created < 2026-12",
        "images_seen = 2_000_000",
        "NOT (alias = x OR alias = y)",
    ],
)
def test_a_version_that_fulfils_the_query_is_found(query):
    assert parse(query).matches(BEST)


@pytest.mark.parametrize(
    "query",
    [
        "data=ffhq25",
        "data=d1",  # six digits are needed, so that no short name is taken for a hash
        "data!=ffhq256",
        "alias!=best",
        "validation.bits_per_dim > 0.61",
        "parent = anything",
        "parent != anything",  # it has none: no comparison is fulfilled
        "validation.nelbo_nats != 1",
        "model.residual_posterior = 1",
        "model.groups_per_scale = [4, 4]",
        "train.precision = 16",
        "not run=faces",
        "run=faces and (run=other or version=8)",
    ],
)
def test_any_other_version_is_not(query):
    assert not parse(query).matches(BEST)


def test_a_figure_that_is_not_finite_is_no_figure():
    diverged = version(metrics={"validation/bits_per_dim": math.nan})
    assert not parse("validation.bits_per_dim < 9").matches(diverged)
    assert not parse("validation.bits_per_dim != 9").matches(diverged)
    assert parse("not validation.bits_per_dim < 9").matches(diverged)


@pytest.mark.parametrize(
    ("query", "message", "at"),
    [
        ("validation.bits_per_dim < fast", "is a number, fast is none", "fast"),
        ("objective.spectral_coeficient < 1", "Did you mean objective.spectral_coefficient?", "objective"),
        ("alis = best", "Did you mean alias?", "alis"),
        ("data=ffhq256 validation.bits_per_dim < 1", "expected `and`, `or` or the end", "validation"),
        ("(data=x and run=y", "never closed", "("),
        ("data", "expected =, !=", None),
        ("data =", "expected a value", None),
        ("data = x and", "expected a name", None),
        ("train.precision < high", "< compares numbers", "high"),
        ("run = [a]", "run is no list", "[a]"),
        ("run = 'open", "not understood", "'"),
        ("__import__('os').system('x')", "nothing that models are looked up by", "__import__"),
        ("name = 1 OR 1=1; DROP TABLE x", "nothing that models", "name"),
    ],
)
def test_a_mistake_is_pointed_at(query, message, at):
    with pytest.raises(QueryError) as refused:
        parse(query)
    reason, shown, caret = str(refused.value).split("\n")
    assert message in reason
    if at is not None:
        assert shown[caret.index("^") :].startswith(at)


@pytest.mark.parametrize(
    "query", ["(" * 100_000, "not " * 2000 + "run=x", "run=x and " * 1200, "(" * 900 + "run=x"]
)
def test_a_query_without_end_is_refused_and_not_recursed_into(query):
    with pytest.raises(QueryError, match=f"at most {MAX_CHARACTERS:,}|levels"):
        parse(query)


@given(st.text(max_size=80))
def test_whatever_is_typed_is_a_query_or_a_mistake(text):
    with contextlib.suppress(QueryError):
        parse(text).matches(BEST)


# -- against an oracle --------------------------------------------------------------------

NAMES = {"images_seen": "images_seen", "world_size": "world_size", "bits": "validation.bits_per_dim"}
figures = st.integers(0, 4)
comparisons = st.tuples(
    st.sampled_from(sorted(NAMES)), st.sampled_from(["=", "!=", "<", "<=", ">", ">="]), figures
)
trees: st.SearchStrategy[Any] = st.recursive(
    comparisons,
    lambda parts: st.one_of(
        st.tuples(st.just("not"), parts),
        st.tuples(st.sampled_from(["and", "or"]), st.lists(parts, min_size=2, max_size=3)),
    ),
    max_leaves=8,
)


def written(tree: Any) -> str:
    """The tree as a query, with every bracket there could be."""
    if tree[0] == "not":
        return f"not ({written(tree[1])})"
    if tree[0] in ("and", "or"):
        return f" {tree[0]} ".join(f"({written(part)})" for part in tree[1])
    name, sign, value = tree
    return f"{NAMES[name]}{sign}{value}"


def expected(tree: Any, facts: dict[str, int | None]) -> bool:
    if tree[0] == "not":
        return not expected(tree[1], facts)
    if tree[0] in ("and", "or"):
        answers = [expected(part, facts) for part in tree[1]]
        return all(answers) if tree[0] == "and" else any(answers)
    name, sign, value = tree
    found = facts[name]
    if found is None:
        return False
    order = (found > value) - (found < value)
    return order in {"=": (0,), "!=": (-1, 1), "<": (-1,), "<=": (-1, 0), ">": (1,), ">=": (0, 1)}[sign]


@given(trees, st.fixed_dictionaries({name: figures | st.none() for name in NAMES}))
def test_a_query_means_what_its_tree_means(tree, facts):
    facts["images_seen"] = facts["images_seen"] or 0
    bits = facts["bits"]
    found = version(
        images_seen=facts["images_seen"],
        world_size=facts["world_size"],
        metrics={} if bits is None else {"validation/bits_per_dim": float(bits)},
    )
    assert parse(written(tree)).matches(found) == expected(tree, facts), json.dumps(tree)


@given(
    st.lists(comparisons, min_size=3, max_size=6),
    st.lists(st.sampled_from(["and", "or"]), min_size=5, max_size=5),
)
def test_and_binds_more_tightly_than_or(parts, words):
    found = version(images_seen=2, world_size=1)
    flat = written(parts[0]) + "".join(
        f" {word} {written(part)}" for word, part in zip(words, parts[1:], strict=False)
    )
    alternatives = [re.split(r" and ", part) for part in flat.split(" or ")]
    oracle = any(all(parse(each).matches(found) for each in alternative) for alternative in alternatives)
    assert parse(flat).matches(found) == oracle
