"""Curves and heat maps of reports as SVG, written directly.

A page of curves is made at the end of every training, by the process that trained: matplotlib (figures.py)
takes two to three seconds for a dozen of them, this takes milliseconds. What a browser shows of a
curve is at most a point for each pixel: longer ones are thinned to the lowest and the highest value
of each stretch, so that no spike is lost.
"""

import base64
import html
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.models.palette import LIGHT, SHADES
from pipeline.models.report import Markup, element

Point = tuple[float, float]

_WIDTH, _HEIGHT = 500, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 24, 34
_STRETCHES = 300
_COLOURS = ("shade-2", "best", "shade-5", "faint")


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    label: str
    points: Sequence[Point]
    """By their x. What is not finite is a gap."""
    dots: bool = False
    """Few values, each of them shown."""


@dataclass(frozen=True)
class Mark:
    """A moment that is marked in every curve."""

    x: float
    words: str
    strong: bool = False


@dataclass(frozen=True)
class _Scale:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def chart(
    title: str, lines: Sequence[Line], end: float, marks: Sequence[Mark] = (), *, log: bool = False
) -> Markup:
    """Curves over the images seen, from 0 to `end`; on a logarithmic scale where the values suit one."""
    shown = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not shown:
        return _figure(title, [_text(_WIDTH / 2, _HEIGHT / 2, "not measured", anchor="middle", faint=True)])
    values = [y for line in shown for _, y in line.points if math.isfinite(y)]
    # Over less than one power of ten, it would have hardly a round value.
    log = log and min(values) > 0 and max(values) > 10 * min(values)
    low, high, above = _limits(values, log)
    x = _Scale(0, end or 1, _LEFT, _WIDTH - _RIGHT)
    y = _Scale(low, high, _HEIGHT - _BOTTOM, _TOP, log)
    parts = [*_axes(x, y), *_marks(marks, x), *_legend(shown)]
    for line, colour in zip(shown, _COLOURS, strict=False):
        parts += _curve(line, colour, x, y)
    if above > high:
        said = f"highest: {_written(above)}, drawn at the edge"
        parts.append(_text(_WIDTH - _RIGHT, _TOP + 11, said, anchor="end", faint=True))
    return _figure(title, parts)


def heat_map(
    title: str,
    rows: Sequence[tuple[str, Sequence[Point]]],
    end: float,
    marks: Sequence[Mark],
    unit: str,
    low: float,
) -> Markup:
    """One row of colours for each name, over the images seen, the first on top; on a logarithmic scale.

    Values up to `low` have the darkest colour. What is not known is left blank.
    """
    values = [y for _, points in rows for _, y in points if math.isfinite(y)]
    if not values:
        return _figure(title, [_text(_WIDTH, _HEIGHT / 2, "not measured", anchor="middle", faint=True)], 2)
    width, high = 2 * _WIDTH, max(max(values), low * 10)
    height = 14 * max(len(rows), 6) + _TOP + _BOTTOM
    right = width - 90
    x = _Scale(0, end or 1, _LEFT + 30, right)
    scale = _Scale(low, high, 0, 1, log=True)
    inner = height - _TOP - _BOTTOM
    pixels = _coloured(np.array([_stretched(points, end) for _, points in rows]), scale)
    bar = _coloured(np.geomspace(high, low, 64)[:, None], scale)
    parts = [_image(pixels, x.start, _TOP, right - x.start, inner), _image(bar, right + 20, _TOP, 12, inner)]
    parts += _x_axis(x, height)
    step = inner / len(rows)
    every = math.ceil(11 / step)
    for number, (name, _) in enumerate(rows):
        if number % every == 0:
            parts.append(_text(x.start - 6, _TOP + (number + 0.5) * step + 4, name, anchor="end"))
    ticks = [low, *(each for each in _log_ticks(low, high) if each > 1.5 * low)]
    for value in ticks:
        at = _TOP + inner * (1 - scale(value))
        text = f"≤ {_written(value)}" if value == low else _written(value)
        parts.append(_text(right + 36, at + 4, text))
    parts += _marks(marks, x, height)
    parts.append(_text(right + 20, _TOP - 8, unit, faint=True))
    return _figure(title, parts, 2, height)


def _figure(title: str, parts: Sequence[str], columns: int = 1, height: float = _HEIGHT) -> Markup:
    width = columns * _WIDTH
    heading = _text(0, 12, title, strong=True)
    svg = (
        f'<svg viewBox="0 0 {width} {height:g}" width="{width}" height="{height:g}" role="img" '
        f'aria-label="{html.escape(title)}" font-size="11">{heading}{"".join(parts)}</svg>'
    )
    return element("figure", Markup(svg), class_="chart")


# -- axes -----------------------------------------------------------------------------------


def _limits(values: Sequence[float], log: bool) -> tuple[float, float, float]:
    """Of the axis, and the highest value; the highest may lie beyond, where few are far above the others."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[math.ceil(0.95 * (len(ordered) - 1))]
    if not log and len(ordered) > 20 and high - low > 4 * (usual - low) > 0:
        high = low + 1.5 * (usual - low)
    if log:
        return low / 1.2, high * 1.2, ordered[-1]
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return (low if low == 0 else low - room), high + room, ordered[-1]


def _axes(x: _Scale, y: _Scale) -> Iterator[str]:
    ticks = _log_ticks(y.low, y.high) if y.log else _ticks(y.low, y.high, 5)
    for value in ticks:
        at = y(value)
        yield f'<path d="M{x.start} {at:.1f}H{x.end}" stroke="var(--line)" stroke-width=".7"/>'
        yield _text(x.start - 6, at + 4, _written(value), anchor="end")
    yield from _x_axis(x, _HEIGHT)


def _x_axis(x: _Scale, height: float) -> Iterator[str]:
    bottom = height - _BOTTOM
    yield f'<path d="M{x.start} {bottom}H{x.end}" stroke="var(--faint)"/>'
    for value in _ticks(0, x.high, 5):
        yield f'<path d="M{x(value):.1f} {bottom}v4" stroke="var(--faint)"/>'
        yield _text(x(value), bottom + 16, _written(value), anchor="middle")
    yield _text(x.end, bottom + 30, "images", anchor="end", faint=True)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round values between: at most so many steps of 1, 2 or 5."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [digit * 10.0**power for power in powers for digit in digits]
        found = [value for value in found if low <= value <= high]
        if len(found) <= 6:
            return found or [low, high]
    return found[:: math.ceil(len(found) / 6)]


def _written(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return "0" if abs(value) < 1e-12 else f"{value:.3g}"


# -- what is drawn ------------------------------------------------------------------------


def _curve(line: Line, colour: str, x: _Scale, y: _Scale) -> Iterator[str]:
    pieces: list[list[str]] = [[]]
    for at, value in thinned(line.points, x.high):
        if not math.isfinite(value):
            pieces.append([])
            continue
        pieces[-1].append(f"{x(at):.1f} {max(y(min(max(value, y.low), y.high)), _TOP - 2):.1f}")
    # A value between two gaps is a point of its own.
    path = "".join(f"M{'L'.join(piece if len(piece) > 1 else piece * 2)}" for piece in pieces if piece)
    yield (
        f'<path d="{path}" fill="none" stroke="var(--{colour})" stroke-width="1.6" '
        'stroke-linejoin="round" stroke-linecap="round"/>'
    )
    if line.dots or len(line.points) == 1:
        for at, value in line.points:
            if math.isfinite(value):
                said = f"{line.label}: {value:.6g} at {at:,.0f} images"
                yield (
                    f'<circle cx="{x(at):.1f}" cy="{y(min(max(value, y.low), y.high)):.1f}" r="2.6" '
                    f'fill="var(--{colour})"><title>{html.escape(said)}</title></circle>'
                )


def thinned(points: Sequence[Point], end: float) -> Iterator[Point]:
    """The points; of many, the lowest and the highest of each stretch, as they came. Gaps stay."""
    if len(points) <= 4 * _STRETCHES:
        yield from points
        return
    stretches: dict[int, list[Point]] = {}
    for point in points:
        stretches.setdefault(int(point[0] / (end or 1) * _STRETCHES), []).append(point)
    for stretch in stretches.values():
        finite = [point for point in stretch if math.isfinite(point[1])]
        chosen = {*stretch[:1], *stretch[-1:]}
        if finite:
            chosen |= {min(finite, key=lambda each: each[1]), max(finite, key=lambda each: each[1])}
        gap = next((point for point in stretch if not math.isfinite(point[1])), None)
        yield from sorted(chosen | ({gap} if gap else set()), key=lambda each: each[0])


def _marks(marks: Sequence[Mark], x: _Scale, height: float = _HEIGHT) -> Iterator[str]:
    for mark in marks:
        colour, dashes = ("best", "") if mark.strong else ("faint", ' stroke-dasharray="2 3"')
        yield (
            f'<path d="M{x(mark.x):.1f} {_TOP}V{height - _BOTTOM}" stroke="var(--{colour})"{dashes}>'
            f"<title>{html.escape(mark.words)}</title></path>"
        )


def _legend(lines: Sequence[Line]) -> Iterator[str]:
    if len(lines) == 1 and not lines[0].label:
        return
    at = _WIDTH - _RIGHT
    for line, colour in reversed(list(zip(lines, _COLOURS, strict=False))):
        words = html.escape(line.label)
        yield f'<text x="{at}" y="12" text-anchor="end" fill="var(--{colour})">{words}</text>'
        at -= 6 * len(line.label) + 14


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", faint: bool = False, strong: bool = False
) -> str:
    weight = ' font-weight="600"' if strong else ""
    colour = "faint" if faint else "ink"
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="var(--{colour})"{weight}>'
        f"{html.escape(words)}</text>"
    )


def _stretched(points: Sequence[Point], end: float) -> NDArray[np.float64]:
    """The mean in each stretch; where there is no point, what was before, up to the last one."""
    sums, counts = np.zeros(_STRETCHES), np.zeros(_STRETCHES)
    for at, value in points:
        if math.isfinite(value):
            stretch = min(int(at / (end or 1) * _STRETCHES), _STRETCHES - 1)
            sums[stretch] += value
            counts[stretch] += 1
    known = np.flatnonzero(counts)
    means = np.full(_STRETCHES, np.nan)
    if len(known):
        means[known] = sums[known] / counts[known]
        # A point stands for the images that led to it.
        following = np.searchsorted(known, np.arange(known[-1] + 1))
        means[: known[-1] + 1] = means[known[following]]
    return means


def _coloured(values: NDArray[np.float64], scale: _Scale) -> NDArray[np.uint8]:
    """(rows, columns) as RGBA, of the page's shades; transparent where unknown."""
    shades = [[int(LIGHT[f"shade-{place}"][at : at + 2], 16) for at in (1, 3, 5)] for place in range(SHADES)]
    known = np.isfinite(values)
    ratios = np.clip(np.where(known, values, scale.low), scale.low, scale.high) / scale.low
    places = np.log(ratios) / np.log(scale.high / scale.low) * (SHADES - 1)
    channels = [np.interp(places, range(SHADES), colours) for colours in zip(*shades, strict=True)]
    return np.stack([*channels, 255 * known], axis=-1).round().astype(np.uint8)


def _image(pixels: NDArray[np.uint8], x: float, y: float, width: float, height: float) -> str:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    source = base64.b64encode(data.getvalue()).decode()
    return (
        f'<image x="{x}" y="{y}" width="{width:g}" height="{height:g}" preserveAspectRatio="none" '
        f'class="pixels" href="data:image/png;base64,{source}"/>'
    )
