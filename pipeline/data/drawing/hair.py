"""Hair: what hangs behind the head, and what lies on it.

Both are one mask each, painted with the same strands: streaks along the way the hair falls,
with a band of light where the head is round. Paints in place on `head` (see face.py).
"""

import numpy as np

from pipeline.data.drawing.canvas import Canvas, Plane, bump, ellipse, mixed, noise, scaled, smoothstep, wave
from pipeline.data.drawing.face import outline, shift
from pipeline.data.drawing.person import Person

_BEHIND = {"bob": (1.24, 0.60), "long": (1.30, 1.6), "curly": (1.52, 1.0)}
_VOLUME = {
    "cropped": 0.020,
    "short": 0.055,
    "swept": 0.085,
    "bob": 0.085,
    "long": 0.075,
    "curly": 0.15,
    "bun": 0.05,
}


_SIDES_DOWN_TO = {
    "cropped": 0.02,
    "short": 0.03,
    "swept": 0.02,
    "bob": 0.62,
    "long": 0.95,
    "curly": 0.34,
    "bun": -0.04,
}


def behind(head: Canvas, person: Person) -> None:
    """Hair that is seen beside and below the face."""
    style = person.hair_style
    if style == "bun":
        top = head.part(-0.4, -1.05, 0.4, -0.5)
        knot = ellipse(top.x - 0.09 * person.parting, top.y + 0.74, 0.20, 0.17)
        _strands(top, person, top.cover(knot), 0.9)
    if style not in _BEHIND:
        return
    wide, low = _BEHIND[style]
    head = head.part(-0.95, -0.95, 0.95, low * person.height + 0.1)
    half = person.width * wide
    crown = ellipse(head.x, head.y + 0.12, half, person.height * 1.02)
    curtain = np.maximum(np.abs(head.x) - half * (1.0 + 0.05 * head.y), -(head.y + 0.12))
    end = head.y - low * person.height - 0.04 * wave(head.x * 3.1)
    fall = np.maximum(np.minimum(crown, curtain), end)
    if style == "curly":
        fall = np.minimum(crown, ellipse(head.x, head.y - 0.05, half * 1.04, 0.56)) + _curls(head, person)
    _strands(head, person, head.cover(fall, 0.02), 0.62)


def on_top(head: Canvas, person: Person) -> None:
    """Hair from the hairline up."""
    style = person.hair_style
    if style == "bald":
        _shaven(head, person)
        return
    volume, low = _VOLUME[style], _SIDES_DOWN_TO[style] * person.height
    head = head.part(-0.72, -0.9, 0.72, low + 0.1)
    x, y = head.x, head.y
    scalp = ellipse(x, y + 0.06, person.width + 0.012 + volume, 0.93 * person.height + volume * 0.8)
    if style == "curly":
        scalp = scalp + _curls(head, person)
    line = _hairline(head, person)
    # The temples: hair comes down in front of the ears, wider apart the lower it is.
    temple = person.width * (0.90 - 0.28 * np.maximum(-(y + 0.10), 0)) - np.abs(x - 0.3 * shift(person))
    sides = np.maximum(temple, y - low)
    mask = head.cover(np.maximum(scalp, np.minimum(y - line, sides)), 0.012 if style != "cropped" else 0.03)
    # A soft shadow on the skin below the hair.
    shadow = head.cover(np.minimum(y - line, sides) - 0.03, 0.09) * head.cover(outline(head, person))
    head.tint((0.74, 0.66, 0.64), shadow * 0.55)
    _strands(head, person, mask, 1.0)


def _hairline(head: Canvas, person: Person) -> Plane:
    """Height of the lower edge of the hair over the forehead, for each pixel."""
    x = head.x - 0.5 * shift(person)
    style = person.hair_style
    line = person.hairline + 0.55 * x * x
    if style in ("swept", "bob", "long") and person.parting > -0.45:
        # Parted: two curtains that rise towards the parting.
        aside = x - 0.22 * person.parting
        line = person.hairline - 0.10 + np.minimum(1.5 * np.abs(aside), 0.20 + 0.9 * aside * aside)
    elif style in ("bob", "long", "swept"):
        # A fringe.
        line = person.hairline + 0.17 + 0.10 * x * person.parting - 0.1 * x * x
        line = line + 0.022 * wave(x * 9) * noise(x, x * 0, 8, "fringe", person.seed)
    elif style == "short":
        line = line + 0.035 * (noise(x, x * 0, 9, "fringe", person.seed) - 0.5) + 0.06 * x * person.parting
    elif style == "curly":
        line = line + 0.09 * (noise(x, x * 0, 7, "fringe", person.seed) - 0.3)
    return line


def _curls(head: Canvas, person: Person) -> Plane:
    """Uneven edge of curly hair."""
    return 0.07 * (noise(head.x, head.y, 8, "curls", person.seed) - 0.5) + 0.03 * (
        noise(head.x, head.y, 18, "small curls", person.seed) - 0.5
    )


def _strands(head: Canvas, person: Person, mask: Plane, brightness: float) -> None:
    """Paint hair where `mask` is not 0."""
    x, y = head.x, head.y
    if person.hair_style == "curly":
        streak = noise(x, y, 16, "strands", person.seed) * 0.6 + 0.4 * noise(x, y, 34, "fine", person.seed)
    else:
        # Hair falls away from the parting; streaks run along curves of equal `across`.
        away = x - 0.22 * person.parting
        across = away / (1.05 + 0.75 * np.minimum(y, 0.6))
        streak = noise(across * 1.6, y * 0.25, 26, "strands", person.seed) * 0.65
        streak = streak + 0.35 * noise(across * 1.9, y * 0.3, 30, "fine", person.seed)
    light = person.light
    u, v = x * (1 / 0.62), (y + 0.10) * (1 / 0.78)
    z = np.sqrt(np.maximum(1 - u * u - v * v, 0.05))
    diffuse = np.maximum(u * light.x + v * light.y + z * light.z, 0)
    band = bump(x - 0.30 * light.x, y + 0.50, 0.42, 0.15) + 0.5 * bump(np.abs(x) - 0.50, y - 0.10, 0.10, 0.40)
    shade = (light.ambient + 0.22 + 0.55 * diffuse) * (0.66 + 0.62 * streak) * brightness
    gleam = band * (0.10 + 0.34 * streak) * light.z * brightness
    tone = mixed(person.hair, (1.0, 0.95, 0.88), 0.45)
    colour = [shade * base + gleam * shine * 0.55 for base, shine in zip(person.hair, tone, strict=True)]
    head.paint(colour, mask)


def _shaven(head: Canvas, person: Person) -> None:
    """A bald head has a shine, and a shadow where hair would grow."""
    crown = head.cover(outline(head, person))
    stubble = smoothstep((person.hairline - 0.02 - head.y + 0.6 * head.x * head.x) * 7)
    sides = smoothstep((np.abs(head.x) - 0.34) * 9) * smoothstep((0.05 - head.y) * 8)
    tone = mixed(scaled(person.hair, 0.8), person.skin, 0.5)
    head.paint(tone, crown * np.maximum(0.20 * stubble, 0.42 * sides))
    shine = bump(head.x - 0.25 * person.light.x, head.y + 0.42, 0.22, 0.10)
    head.paint((1.0, 0.98, 0.95), crown * shine * (0.30 * person.light.z))
