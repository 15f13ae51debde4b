"""One self-contained HTML page: what reports of runs, model versions and searches are made of.

A page is to be read years later, from a bucket, out of a mail, behind a firewall. So everything is
inside the one file, and the page itself forbids the browser to load or to run anything else.

What is not Markup is text and is escaped where it enters the page: nobody has to remember it.

Figures are drawn by matplotlib as SVG (by Figure objects: pyplot keeps a list of them for the whole
process). They are drawn in stand-in colours that are exchanged for those of the page's style, so
that one drawing serves light and dark screens. Rejected: libraries that draw in the browser, which
put megabytes of script into each page.
"""

import base64
import html
import io
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, WIDEST = 8.2, 9.7
"""Of figures, in inches of 72 points; the page is as wide as the widest."""

# -- HTML ---------------------------------------------------------------------------------


class Markup(str):
    """HTML as it stands; whatever is in it from outside has been escaped."""

    __slots__ = ()


def escaped(content: object) -> Markup:
    """Content for the page: Markup as it is, anything else as text."""
    return content if isinstance(content, Markup) else Markup(html.escape(str(content)))


def element(tag: str, *content: object, **attributes: object) -> Markup:
    """One element; a trailing `_` of an attribute's name is left out, as of `class_`."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
    )
    return Markup(f"<{tag}{written}>{''.join(map(escaped, content))}</{tag}>")


def paragraph(*content: object) -> Markup:
    return element("p", *content)


def note(*content: object) -> Markup:
    """A paragraph in small print; also what is said where there is nothing to show."""
    return element("p", *content, class_="note")


def command(text: str) -> Markup:
    """Something to be copied into a terminal."""
    return element("pre", element("code", text))


def section(title: str, *content: object) -> Markup:
    return element("section", element("h2", title), *content)


def folded(title: str, *content: object) -> Markup:
    """What few will want to see, behind its title."""
    return element("details", element("summary", title), *content)


def facts(values: Mapping[str, object]) -> Markup:
    """Names and what they are."""
    rows = (
        element("tr", element("th", name, scope="row"), element("td", value))
        for name, value in values.items()
    )
    return element("div", element("table", *rows, class_="facts"), class_="wide")


def table(
    header: Sequence[object],
    rows: Iterable[Sequence[object]],
    numbers: Collection[int] = (),
    words: Collection[int] = (),
) -> Markup:
    """`numbers` are the columns that are set flush right, `words` those of sentences."""
    classes = {**dict.fromkeys(numbers, "number"), **dict.fromkeys(words, "words")}

    def cells(tag: str, row: Iterable[object], **more: object) -> Iterable[Markup]:
        for column, content in enumerate(row):
            of = {"class_": classes[column]} if column in classes else {}
            yield element(tag, content, **more, **of)

    head = element("thead", element("tr", *cells("th", map(_breakable, header), scope="col")))
    body = element("tbody", *(element("tr", *cells("td", row)) for row in rows))
    return element("div", element("table", head, body), class_="wide")


def _breakable(name: object) -> Markup:
    """A heading that may be broken behind the points and underscores of a setting's name."""
    return Markup(re.sub(r"(?<=[._])(?=\w)", "<wbr>", escaped(name)))


def picture(png: bytes, alt: str, caption: object) -> Markup:
    """A PNG inside of the page."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    image = Markup(f'<img src="{source}" alt="{html.escape(alt)}">')
    return element("figure", image, element("figcaption", caption))


def page(title: str, *content: object) -> bytes:
    """The file. What UTF-8 cannot hold, as half of a pair of surrogates, shows as a mark of its own."""
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    )
    body = "".join(map(escaped, (element("h1", title), *content)))
    text = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body><main>{body}</main></body></html>\n'
    return text.encode("utf-8", "xmlcharrefreplace")


# -- Colours ------------------------------------------------------------------------------

_SHADES = 7
_LIGHT = {
    "ink": "#1c2024",
    "faint": "#667079",
    "line": "#d5dade",
    "page": "#ffffff",
    "panel": "#f3f5f7",
    "best": "#c2410c",
    **{
        f"shade-{place}": colour
        for place, colour in enumerate(
            ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#9bd13c")
        )
    },
}
"""Shades are viridis, which colour-blind readers can tell apart; 0, the best, stands out most."""
_DARK = {
    "ink": "#e6e8ea",
    "faint": "#98a2ab",
    "line": "#3a4148",
    "page": "#15181b",
    "panel": "#1f2428",
    "best": "#ff9f5a",
    **{
        f"shade-{place}": colour
        for place, colour in enumerate(
            ("#fde725", "#a0da39", "#4ac16d", "#1fa187", "#277f8e", "#3a6698", "#51449a")
        )
    },
}
_STAND_INS = {name: f"#0100{place:02x}" for place, name in enumerate(_LIGHT)}
_INK, _FAINT, _LINE, _PAGE, _PANEL, _BEST = list(_STAND_INS.values())[:6]
_BAR = _STAND_INS["shade-2"]


def _variables(colours: Mapping[str, str]) -> str:
    return ":root{" + "".join(f"--{name}:{colour};" for name, colour in colours.items()) + "}"


_STYLE = (
    _variables(_LIGHT)
    + "@media (prefers-color-scheme: dark){"
    + _variables(_DARK)
    + "}"
    + """
:root{color-scheme:light dark}
body{margin:0;background:var(--page);color:var(--ink);
  font:16px/1.5 system-ui,"Segoe UI",Roboto,Arial,sans-serif}
main{max-width:66rem;margin:0 auto;padding:1.5rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0 1rem}
h2{font-size:1.2rem;margin:2.5rem 0 .6rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.5rem 0 .4rem}
p{max-width:46rem;margin:.6rem 0}
.note,figcaption{color:var(--faint);font-size:.875rem}
.wide{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .65rem .25rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{color:var(--faint);font-weight:600;vertical-align:bottom;overflow-wrap:break-word}
.facts th{color:var(--faint);font-weight:400;white-space:nowrap}
td{overflow-wrap:break-word;max-width:30rem}
.number{text-align:right}
td.number{white-space:nowrap}
td.words{min-width:13rem;overflow-wrap:anywhere;white-space:pre-line}
pre{background:var(--panel);padding:.6rem .8rem;border-radius:4px;
  font-size:.875rem;white-space:pre-wrap;overflow-wrap:anywhere}
figure{margin:1rem 0}
figure svg,figure img{display:block;max-width:100%;height:auto}
figure img{image-rendering:auto;border-radius:4px}
figure svg text{font-family:system-ui,"Segoe UI",Roboto,Arial,sans-serif!important}
figcaption{max-width:46rem;margin-top:.3rem}
summary{cursor:pointer;color:var(--faint)}
@media print{main{max-width:none;padding:0}section{break-inside:avoid-page}}
"""
)

# -- Figures ------------------------------------------------------------------------------


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

    def paint(figure: "Figure") -> None:
        plot = figure.subplots()
        plot.set_axis_off()
        plot.set(xlim=(-0.4, len(axes) + 0.3), ylim=(-0.2, 1.42))
        for subject, values in subjects:
            ends = [axis.place(values[axis.name]) if axis.name in values else _ABSENT for axis in axes]
            plot.plot(range(len(axes) + 1), [*ends, scale.place(subject)], **scale.line(subject))
        for at, axis in enumerate(axes):
            incomplete = any(axis.name not in values for _, values in subjects)
            _upright(
                plot, at, axis.label, axis.ticks(), letters, *([(_ABSENT, "not drawn")] if incomplete else [])
            )
        _upright(
            plot,
            len(axes),
            "bits/dim",
            scale.ticks(),
            letters,
            *([(_FAILED, "failed")] if scale.has_failed else []),
        )

    return _drawn(name, width, 3.7, paint, f"{caption} {scale.remark}")


_ABSENT, _FAILED = -0.13, 1.12
"""Places of what has no value on an axis from 0 to 1."""


def _upright(
    plot: "Axes",
    at: float,
    label: str,
    ticks: Iterable[tuple[float, str]],
    letters: int,
    *others: tuple[float, str],
) -> None:
    """An axis with its name in lines of so many letters, and what lies beside its range."""
    plot.plot([at, at], [0, 1], color=_FAINT, linewidth=1, zorder=8)
    box = {"facecolor": _PAGE, "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
    for place, text in [*ticks, *others]:
        plot.plot([at - 0.02, at], [place, place], color=_FAINT, linewidth=1, zorder=8)
        plot.text(at - 0.04, place, text, ha="right", va="center", fontsize=8, bbox=box, zorder=9)
    plot.text(at, 1.19, _wrapped(label, letters), ha="center", va="bottom", fontsize=8)


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
    return _drawn(name, width, 2.7 * rows, paint, f"{caption} {scale.remark}")


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
            plot.axvline(axis.place(mark), color=_FAINT, linewidth=1, linestyle=(0, (2, 3)))
        for subject, points in subjects:
            places = [axis.place(x) for x, _ in points], [scale.height(y) for _, y in points]
            plot.plot(*places, **scale.line(subject))
            plot.plot(places[0][-1:], places[1][-1:], **scale.dot(subject))
            if subject.best:
                end = places[0][-1], places[1][-1]
                plot.annotate(
                    subject.name, end, (0, -16), textcoords="offset points", ha="right", color=_BEST, zorder=9
                )
        _ticks(plot, "x", axis.ticks(7))
        _ticks(plot, "y", scale.ticks())
        plot.set(xlabel=axis.label, ylabel="bits/dim", xlim=(-0.02, 1.02), ylim=(-0.12, 1.05))

    return _drawn(name, WIDTH, 3.6, paint, f"{caption} {scale.remark}")


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
                facecolor=_PAGE if bar.supposed else _BAR,
                hatch="////" if bar.supposed else None,
                edgecolor=_BAR,
            )
            plot.annotate(
                bar.text, (bar.value, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5
            )
        plot.set_yticks(places, [bar.label for bar in rows])
        # Room for the texts: a letter takes about a seventieth of the width.
        room = max(bar.value / max(1 - len(bar.text) / 70 - 0.03, 0.3) for bar in rows)
        plot.set(xlabel=unit, xlim=(0, room or 1), ylim=(len(rows) - 0.4, -0.6))

    return _drawn(name, WIDTH, 0.75 + 0.3 * len(rows), paint, caption)


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
            plot.bar(range(len(panel.values)), panel.values, 0.7, color=_BAR)
            began = 0
            for number, (label, count) in enumerate(panel.stretches):
                if number % 2 == 0:
                    plot.axvspan(began - 0.5, began + count - 0.5, color=_PANEL, zorder=0)
                plot.text(
                    began + (count - 1) / 2,
                    0.97,
                    label,
                    ha="center",
                    va="top",
                    fontsize=8,
                    color=_FAINT,
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

    return _drawn(name, WIDTH, 2.2 * len(panels), paint, caption)


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
            return _BEST
        if subject.score is None:
            return _FAINT
        share = min((subject.score - self._low) / (self._high - self._low), 1.0)
        return _STAND_INS[f"shade-{round(share * (_SHADES - 1))}"]

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
            "markerfacecolor": colour if subject.kind == "whole" else _PAGE,
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


_LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched and is drawn in the page's letters
    "text.parse_math": False,  # a dollar sign is one
    "font.size": 9.0,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.7,
    "xtick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.color": _FAINT,
    "ytick.labelcolor": _INK,
}


def _drawn(name: str, width: float, height: float, paint: Callable[["Figure"], None], caption: str) -> Markup:
    """The figure that `paint` draws, as SVG inside of the page; `name` is its own there."""
    import matplotlib
    from matplotlib.figure import Figure

    written = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**_LOOK, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    svg = written.getvalue()
    svg = re.sub(r"<[^>]*>", lambda tag: _fitted(tag.group(), name), svg[svg.index("<svg") :])
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg \1 width="{width * 96:.0f}" height="{height * 96:.0f}" role="img" '
        rf'xmlns:xlink="http://www.w3.org/1999/xlink" aria-label="{html.escape(caption)}">',
        svg,
        count=1,
    )
    return element("figure", Markup(svg), element("figcaption", caption.strip()))


def _fitted(tag: str, name: str) -> str:
    """A tag of a figure with names that are unique on the page, in the colours of the page."""
    for before in ('id="', 'href="#', "url(#"):
        tag = tag.replace(before, f"{before}{name}-")
    for variable, colour in _STAND_INS.items():
        tag = tag.replace(colour, f"var(--{variable})")
    return tag
