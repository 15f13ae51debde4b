"""The colours of reports, on light and on dark screens.

Figures are drawn in stand-ins, one for each name, which the page exchanges for variables of its
style: so one drawing serves both.
"""

from collections.abc import Mapping

SHADES = 7
LIGHT = {
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
DARK = {
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
STAND_INS = {name: f"#0100{place:02x}" for place, name in enumerate(LIGHT)}
INK, FAINT, LINE, PAGE, PANEL, BEST = list(STAND_INS.values())[:6]
BAR = STAND_INS["shade-2"]


def variables(colours: Mapping[str, str]) -> str:
    """The colours as variables of a style sheet."""
    return ":root{" + "".join(f"--{name}:{colour};" for name, colour in colours.items()) + "}"
