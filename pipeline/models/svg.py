"""What matplotlib draws, as SVG inside a page, in the page's own colours."""

import html
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.models.palette import FAINT, INK, LINE, STAND_INS
from pipeline.models.report import Markup, element

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched and is drawn in the page's letters
    "text.parse_math": False,  # a dollar sign is one
    "font.size": 9.0,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.7,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}


def drawn(name: str, width: float, height: float, paint: Callable[["Figure"], None], caption: str) -> Markup:
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
    for variable, colour in STAND_INS.items():
        tag = tag.replace(colour, f"var(--{variable})")
    return tag
