"""Curves as SVG: what a reader could measure off them."""

import base64
import io
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.models.chart import Line, Mark, chart, heat_map, thinned

numbers = st.floats(-1e9, 1e9, allow_nan=False) | st.just(math.nan)
curves = st.lists(st.tuples(st.integers(0, 10**6), numbers), max_size=60, unique_by=lambda point: point[0])


def svg(markup: str) -> ElementTree.Element:
    """Raises if it is not well-formed."""
    return ElementTree.fromstring(markup)


def drawn_paths(markup: str) -> list[str]:
    return re.findall(r'<path d="([^"]*)" fill="none"', markup)


@settings(deadline=None)
@given(st.lists(curves.map(sorted), min_size=1, max_size=3), st.booleans())
def test_any_curves_are_drawn_within_the_picture(found, log):
    lines = [Line(f"curve {number}", points, dots=number == 1) for number, points in enumerate(found)]
    markup = chart("any", lines, 10**6, [Mark(5, "start")], log=log)
    svg(markup)
    places = [float(each) for path in drawn_paths(markup) for each in re.findall(r"-?[\d.]+", path)]
    assert all(0 <= x <= 500 for x in places[::2])
    assert all(20 <= y <= 250 for y in places[1::2])
    assert "nan" not in markup
    assert "inf" not in markup


def test_heights_are_the_values_on_the_scale_that_is_written_beside():
    markup = chart("straight", [Line("", [(0, 0.0), (50, 5.0), (100, 10.0)])], 100)
    (path,) = drawn_paths(markup)
    heights = [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", path)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    ticks = {
        float(text.text): float(text.get("y"))
        for text in svg(markup).iter("text")
        if text.get("text-anchor") == "end" and re.fullmatch(r"[\d.]+", text.text or "")
    }
    # The text stands 4 pixels below its line.
    assert ticks[10.0] - 4 == pytest.approx(heights[2], abs=0.2)
    assert ticks[0.0] - 4 == pytest.approx(heights[0], abs=0.2)


def test_what_is_not_finite_is_a_gap():
    points = [(0, 1.0), (10, 2.0), (20, math.nan), (30, 3.0), (40, 2.0), (50, math.inf), (60, 1.0)]
    (path,) = drawn_paths(chart("gaps", [Line("", points)], 60))
    assert path.count("M") == 3


def test_a_curve_of_nothing_says_so():
    assert "not measured" in chart("nothing", [Line("a", []), Line("b", [(1, math.nan)])], 10)
    assert "not measured" in heat_map("nothing", [("1.1", [])], 10, [], "nats", 0.1)


def test_a_spike_far_above_is_drawn_at_the_edge_and_told():
    points = [(at, 5000.0 if at == 50 else 1 + at / 1000) for at in range(100)]
    markup = chart("spike", [Line("", points)], 100)
    assert "highest: 5k, drawn at the edge" in markup


@given(st.integers(0, 10**6), st.integers(1201, 5000))
def test_thinned_curves_keep_the_ends_the_extremes_and_the_gaps(seed, count):
    draw = np.random.default_rng(seed)
    values = draw.normal(size=count)
    values[draw.integers(count)] = 1e6
    values[draw.integers(count)] = -1e6
    gap = int(draw.integers(count))
    values[gap] = math.nan
    points = list(enumerate(values.tolist()))
    found = list(thinned(points, count))
    assert len(found) <= 5 * 301
    assert [at for at, _ in found] == sorted({at for at, _ in found})
    assert found[0][0] == 0
    assert found[-1][0] == count - 1
    shown = [value for _, value in found if math.isfinite(value)]
    assert (min(shown), max(shown)) == (np.nanmin(values), np.nanmax(values))
    assert any(math.isnan(value) for _, value in found)


def test_words_from_outside_are_text():
    evil = '"><script>alert(1)</script>'
    markup = chart(evil, [Line(evil, [(0, 1.0), (1, 2.0)], dots=True)], 1, [Mark(0.5, evil)])
    markup += heat_map(evil, [(evil, [(0, 1.0)])], 1, [Mark(0.5, evil)], evil, 0.1)
    assert "<script" not in markup


def test_a_heat_map_is_as_bright_as_its_values_and_blank_where_nothing_is_known():
    rows = [("1.1", [(50, 100.0)]), ("1.2", [(50, 0.01)])]
    image = re.search(r'base64,([^"]*)', heat_map("heat", rows, 100, [], "nats", 0.1))
    assert image is not None
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(image[1]))))
    assert pixels.shape[0] == 2
    middle, width = pixels.shape[1] // 2, pixels.shape[1]
    # Viridis: from violet to yellow-green; a point stands for the images that led to it.
    assert pixels[0, middle].tolist() == pixels[0, 0].tolist() == [155, 209, 60, 255]
    assert pixels[1, middle].tolist() == [68, 1, 84, 255]
    assert pixels[:, width - 1, 3].tolist() == [0, 0]
