"""The model card: what it says, and that nothing in it can be made to say more."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config_file
from pipeline.models.card import MAX_CHARACTERS, write_card
from pipeline.models.lineage import Lineage

LINEAGE = Lineage(
    "faces",
    "0" * 32,
    1_234_567,
    "d1" * 32,
    "0.1.0+abc",
    data_licence="CC BY-NC-SA 4.0",
    world_size=8,
    parent="models:/nvae-old/3",
)
METRICS = {
    "validation/bits_per_dim": 0.7012,
    "validation/nelbo_nats": 95_000.5,
    "validation/images": 7000.0,
    "validation/corrupt_images": 2.0,
}


def card(
    lineage: Lineage = LINEAGE, metrics: dict[str, float] | None = None, root: str = "s3://b/ffhq"
) -> str:
    config = config_file.load("ffhq256", ["data.root=s3://b/ffhq"])
    return write_card("nvae-faces", config, lineage, METRICS if metrics is None else metrics, root)


def test_a_card_says_what_the_model_is_was_trained_on_and_how_to_use_it():
    text = card()
    for said in [
        "256x256 RGB images, 5 bits per colour value",
        "4 of 8x8, 4 of 16x16, 4 of 32x32, 8 of 64x64, 16 of 128x128",
        "`s3://b/ffhq`, content hash `d1d1",
        "`CC BY-NC-SA 4.0`",
        "7,000 images of the validation split, beside 2 that could not be read",
        "| bits/dim | 0.7012 |",
        "not with 8-bit ones",
        "nvae sample models:/nvae-faces@best",
        "to 1,234,567 images, 8 workers",
        "`models:/nvae-old/3`",
    ]:
        assert said in text, said


def test_a_card_without_a_licence_note_or_metrics_says_so():
    text = card(replace(LINEAGE, data_licence="", parent=None), {})
    assert "no note was kept with the data set" in text
    assert "Nothing was measured" in text
    assert "began with" not in text


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "a\n# Heading", "`[x](http://evil)`", "|||\n|---|"]
)
def test_a_name_of_somebody_else_stays_a_name(hostile):
    lineage = replace(LINEAGE, run_name=hostile, data_licence=hostile, trial=hostile, code_version=hostile)
    assert_harmless(card(lineage, root=hostile))


@given(st.text(max_size=400))
def test_no_text_leaves_its_line_or_its_quotes(text):
    lineage = replace(LINEAGE, run_name=text, data_licence=text, trial=text, parent=text, code_version=text)
    assert_harmless(card(lineage, root=text))


def assert_harmless(text: str) -> None:
    assert re.findall(r"^#+ .*$", text, re.M) == re.findall(r"^#+ .*$", card(), re.M).copy()
    quoted = re.sub(r"`[^`\n]*`", "", text.replace("```", ""))
    assert "<" not in quoted
    assert "`" not in quoted
    assert len(text) <= MAX_CHARACTERS
