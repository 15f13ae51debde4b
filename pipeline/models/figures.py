"""Figures of reports: SVG inside the page, for light and dark screens alike.

They are drawn by matplotlib (by Figure objects: pyplot keeps a list of them for the whole process).
Rejected: libraries that draw in the browser, which put megabytes of script into each page.
"""

import math
import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.models.palette import BAR, BEST, FAINT, PAGE, PANEL, SHADES, STAND_INS
from pipeline.models.report import Markup
from pipeline.models.svg import drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, WIDEST = 8.2, 9.7
"""Of figures, in inches of 72 points; the page is as wide as the widest."""


@dataclass(frozen=True)
class Axis:
    """One quantity that subjects have, and where its values lie on a line from 0 to 1."""

    name: str
    """The key of a subject's value."""
    label: str
    values: tuple[Any, ...]
    """The lowest and the highest; or each, if they are `listed`."""
    listed: bool = False
    log: bool = False

    def place(self, value: Any) -> float:
        if self.listed:
            return (self.values.index(value) + 0.5) / len(self.values)
        low, high, value = (math.log(each) if self.log else each for each in (*self.values, value))
        return 0.5 if low == high else (value - low) / (high - low)

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        """Places, and what is written there."""
        if self.listed:
            return [(self.place(value), _written(value)) for value in self.values]
        return [(self.place(value), _written(value)) for value in self._round_values(most)]

    def _round_values(self, most: int) -> list[float]:
        from matplotlib.ticker import MaxNLocator

        low, high = self.values
        if low == high:
            return [low]
        if not self.log:
            whole = isinstance(low, int) and isinstance(high, int)
            steps = MaxNLocator(most, integer=whole, steps=[1, 2, 5, 10]).tick_values(low, high)
            return [float(value) for value in steps if low <= value <= high]
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [digit * 10.0**power for power in powers for digit in digits]
            found = [value for value in found if low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)]
            if len(found) <= most:
                return found or [low, high]
        return found[:: math.ceil(len(found) / most)]


def _written(value: Any) -> str:
    """A value as a tick has it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return textwrap.shorten(str(value), 24, placeholder="…")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


@dataclass(frozen=True)
class Subject:
    """One of those that figures compare, such as a trial; the lower its score, the better."""

    name: str
    score: float | None
    kind: Literal["whole", "part", "failed"] = "whole"
    """Whether the score is that of the end, of an earlier moment, or counts for nothing."""
    best: bool = False


@dataclass(frozen=True)
class Bar:
    """One of several lengths."""

    label: str
    value: float
    text: str
    """Written behind it."""
    supposed: bool = False
    """Not measured."""


def parallel(
    name: str, axes: Sequence[Axis], subjects: Sequence[tuple[Subject, Mapping[str, Any]]], caption: str
) -> Markup:
    """A line for each subject through its value on every axis; coloured by its score, the last axis."""
    scale = _Scale([subject for subject, _ in subjects])
    width = min(WIDEST, 1.6 * (len(axes) + 1.7))
    letters = int(width * 72 / (len(axes) + 1.7) / 4.8)
    absent = {axis.name for axis in axes for _, values in subjects if axis.name not in values}
    lines = max(_wrapped(axis.label, letters).count("\n") + 1 for axis in axes)
    names_at = _FAILED + 0.07 if scale.has_failed else 1.06
    low, high = _ABSENT - 0.07 if absent else -0.05, names_at + 0.07 * lines

    def paint(figure: "Figure") -> None:
        plot = figure.subplots()
        plot.set_axis_off()
        plot.set(xlim=(-0.4, len(axes) + 0.3), ylim=(low, high))
        for subject, values in subjects:
            ends = [axis.place(values[axis.name]) if axis.name in values else _ABSENT for axis in axes]
            plot.plot(range(len(axes) + 1), [*ends, scale.place(subject)], **scale.line(subject))
        for at, axis in enumerate(axes):
            others = [(_ABSENT, "not drawn")] if axis.name in absent else []
            _upright(plot, at, [*axis.ticks(), *others])
            plot.text(at, names_at, _wrapped(axis.label, letters), ha="center", va="bottom", fontsize=8)
        _upright(plot, len(axes), [*scale.ticks(), *([(_FAILED, "failed")] if scale.has_failed else [])])
        plot.text(len(axes), names_at, "bits/dim", ha="center", va="bottom", fontsize=8)

    return drawn(name, width, 2.3 * (high - low), paint, f"{caption} {scale.remark}")


_ABSENT, _FAILED = -0.13, 1.12
"""Places of what has no value on an axis from 0 to 1."""


def _upright(plot: "Axes", at: float, ticks: Iterable[tuple[float, str]]) -> None:
    """An axis from 0 to 1, with what it says there and beside it."""
    plot.plot([at, at], [0, 1], color=FAINT, linewidth=1, zorder=8)
    box = {"facecolor": PAGE, "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
    for place, text in ticks:
        plot.plot([at - 0.02, at], [place, place], color=FAINT, linewidth=1, zorder=8)
        plot.text(at - 0.04, place, text, ha="right", va="center", fontsize=8, bbox=box, zorder=9)


def _wrapped(label: str, width: int) -> str:
    """A setting's name in lines that end behind its points and underscores."""
    lines = [""]
    for part in re.split(r"(?<=[._ ])", label):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def scatter(
    name: str, axes: Sequence[Axis], subjects: Sequence[tuple[Subject, Mapping[str, Any]]], caption: str
) -> Markup:
    """The score over each axis, one panel each."""
    scale = _Scale([subject for subject, _ in subjects])
    columns = len(axes) if len(axes) < 3 else 3
    rows = math.ceil(len(axes) / columns)

    def paint(figure: "Figure") -> None:
        panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
        for number, (panel, axis) in enumerate(zip(panels, axes, strict=False)):
            for subject, values in subjects:
                if axis.name in values:
                    panel.plot([axis.place(values[axis.name])], [scale.place(subject)], **scale.dot(subject))
            _ticks(panel, "x", axis.ticks(), slanted=axis.listed)
            _ticks(panel, "y", [*scale.ticks(), *([(_FAILED, "failed")] if scale.has_failed else [])])
            panel.set(xlabel=axis.label, xlim=(-0.05, 1.05), ylim=(-0.07, 1.2 if scale.has_failed else 1.07))
            panel.set_ylabel("" if number % columns else "bits/dim")
        for panel in panels[len(axes) :]:
            panel.set_visible(False)

    width = WIDTH if columns > 1 else WIDTH / 2
    return drawn(name, width, 2.7 * rows, paint, f"{caption} {scale.remark}")


def curves(
    name: str,
    axis: Axis,
    subjects: Sequence[tuple[Subject, Sequence[tuple[float, float]]]],
    marks: Sequence[float],
    caption: str,
) -> Markup:
    """Scores over what `axis` measures, with vertical lines at `marks`; the best ones bear their names."""
    scale = _Scale([subject for subject, _ in subjects], [y for _, points in subjects for _, y in points])

    def paint(figure: "Figure") -> None:
        plot = figure.subplots()
        for mark in marks:
            plot.axvline(axis.place(mark), color=FAINT, linewidth=1, linestyle=(0, (2, 3)))
        for subject, points in subjects:
            places = [axis.place(x) for x, _ in points], [scale.height(y) for _, y in points]
            plot.plot(*places, **scale.line(subject))
            plot.plot(places[0][-1:], places[1][-1:], **scale.dot(subject))
            if subject.best:
                end = places[0][-1], places[1][-1]
                plot.annotate(
                    subject.name, end, (0, -16), textcoords="offset points", ha="right", color=BEST, zorder=9
                )
        _ticks(plot, "x", axis.ticks(7))
        _ticks(plot, "y", scale.ticks())
        plot.set(xlabel=axis.label, ylabel="bits/dim", xlim=(-0.02, 1.02), ylim=(-0.12, 1.05))

    return drawn(name, WIDTH, 3.6, paint, f"{caption} {scale.remark}")


def bars(name: str, rows: Sequence[Bar], unit: str, caption: str) -> Markup:
    """Lengths below each other, the first on top."""

    def paint(figure: "Figure") -> None:
        plot = figure.subplots()
        places = range(len(rows))
        for place, bar in zip(places, rows, strict=True):
            plot.barh(
                place,
                bar.value,
                0.6,
                facecolor=PAGE if bar.supposed else BAR,
                hatch="////" if bar.supposed else None,
                edgecolor=BAR,
            )
            plot.annotate(
                bar.text, (bar.value, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5
            )
        plot.set_yticks(places, [bar.label for bar in rows])
        # Room for the texts: a letter takes about a seventieth of the width.
        room = max(bar.value / max(1 - len(bar.text) / 70 - 0.03, 0.3) for bar in rows)
        plot.set(xlabel=unit, xlim=(0, room or 1), ylim=(len(rows) - 0.4, -0.6))

    return drawn(name, WIDTH, 0.75 + 0.3 * len(rows), paint, caption)


@dataclass(frozen=True)
class Panel:
    """Columns side by side, in named stretches."""

    title: str
    values: Sequence[float]
    stretches: Sequence[tuple[str, int]]
    """Names, and how many columns each has."""


def columns(name: str, panels: Sequence[Panel], unit: str, place: str, caption: str) -> Markup:
    """Panels below each other, all to one scale; `place` is what the columns' numbers count."""

    def paint(figure: "Figure") -> None:
        plots = figure.subplots(len(panels), 1, sharey=True, squeeze=False).flat
        for plot, panel in zip(plots, panels, strict=True):
            plot.bar(range(len(panel.values)), panel.values, 0.7, color=BAR)
            began = 0
            for number, (label, count) in enumerate(panel.stretches):
                if number % 2 == 0:
                    plot.axvspan(began - 0.5, began + count - 0.5, color=PANEL, zorder=0)
                plot.text(
                    began + (count - 1) / 2,
                    0.97,
                    label,
                    ha="center",
                    va="top",
                    fontsize=8,
                    color=FAINT,
                    transform=plot.get_xaxis_transform(),
                )
                began += count
            plot.set(xlim=(-0.5, max(len(panel.values), began) - 0.5), ylabel=unit)
            plot.set_title(panel.title, loc="left", fontsize=9)
            plot.margins(y=0.2)
            plot.grid(False, axis="x")
            step = math.ceil(len(panel.values) / 20)
            plot.set_xticks(range(0, len(panel.values), step))
        plot.set_xlabel(place)

    return drawn(name, WIDTH, 2.2 * len(panels), paint, caption)


class _Scale:
    """Scores from 0, the best, to 1; how subjects look by theirs.

    One that is far above all others would press these together: it lies at the upper end.
    """

    def __init__(self, subjects: Iterable[Subject], all_scores: Iterable[float] = ()) -> None:
        scores = [subject.score for subject in subjects]
        self.has_failed = None in scores
        known = sorted(score for score in scores if score is not None)
        self._low, self._high = _limits(known)
        drawn = sorted(all_scores) or known
        self._floor, self._ceiling = _limits(drawn)
        self.remark = (
            f"Scores above {self._ceiling:.3g} are drawn at the upper edge."
            if drawn and drawn[-1] > self._ceiling
            else ""
        )

    def height(self, score: float) -> float:
        return min((score - self._floor) / (self._ceiling - self._floor), 1.0)

    def place(self, subject: Subject) -> float:
        return _FAILED if subject.score is None else self.height(subject.score)

    def ticks(self) -> list[tuple[float, str]]:
        return Axis("", "", (self._floor, self._ceiling)).ticks(6)

    def _colour(self, subject: Subject) -> str:
        if subject.best:
            return BEST
        if subject.score is None:
            return FAINT
        share = min((subject.score - self._low) / (self._high - self._low), 1.0)
        return STAND_INS[f"shade-{round(share * (SHADES - 1))}"]

    def line(self, subject: Subject) -> dict[str, Any]:
        """How its line is drawn: what is better lies above."""
        width = 2.6 if subject.best else 1.5 if subject.kind == "whole" else 0.9
        above = 0.0 if subject.score is None else 2.0 - self.height(subject.score)
        dashes: Any = (0, (4, 3)) if subject.kind == "failed" else "solid"
        order = 7.0 if subject.best else 3.0 + above
        return {"color": self._colour(subject), "linewidth": width, "linestyle": dashes, "zorder": order}

    def dot(self, subject: Subject) -> dict[str, Any]:
        """A dot is full at the end, hollow at an earlier moment, a cross of what failed."""
        colour = self._colour(subject)
        return {
            "marker": "x" if subject.kind == "failed" else "o",
            "markersize": 7 if subject.best else 5,
            "markeredgecolor": colour,
            "markerfacecolor": colour if subject.kind == "whole" else PAGE,
            "linestyle": "none",
            "zorder": 7.5 if subject.best else 6,
            "clip_on": False,
        }


def _limits(scores: Sequence[float]) -> tuple[float, float]:
    """Of the axis for these, in order: wide enough for all that are not far above the better half."""
    if not scores:
        return 0.0, 1.0
    low, high = scores[0], scores[-1]
    limit = low + 4 * (statistics.median(scores) - low)
    if low < limit < high:
        high = low + 1.1 * (max(score for score in scores if score <= limit) - low)
    if low == high:
        return low - 0.5, high + 0.5
    return low, high


def _ticks(
    plot: "Axes", which: Literal["x", "y"], ticks: Sequence[tuple[float, str]], slanted: bool = False
) -> None:
    places, texts = [place for place, _ in ticks], [text for _, text in ticks]
    if which == "y":
        plot.set_yticks(places, texts)
    elif slanted and sum(map(len, texts)) > 24:
        plot.set_xticks(places, texts, rotation=30, ha="right", rotation_mode="anchor")
    else:
        plot.set_xticks(places, texts)
