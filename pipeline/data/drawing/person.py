"""Who is drawn: the traits of one person, and how the light falls."""

import math
from dataclasses import dataclass

from pipeline.data.drawing.canvas import Colour, mixed, scaled
from pipeline.data.randomness import uniform

SKINS: tuple[Colour, ...] = (
    (0.98, 0.84, 0.76),
    (0.94, 0.76, 0.65),
    (0.87, 0.67, 0.54),
    (0.75, 0.54, 0.41),
    (0.59, 0.40, 0.29),
    (0.44, 0.29, 0.21),
    (0.34, 0.22, 0.17),
)
HAIRS: tuple[Colour, ...] = (
    (0.09, 0.08, 0.08),
    (0.17, 0.12, 0.10),
    (0.28, 0.18, 0.12),
    (0.42, 0.27, 0.16),
    (0.58, 0.29, 0.14),
    (0.74, 0.55, 0.32),
    (0.88, 0.74, 0.50),
    (0.62, 0.61, 0.60),
    (0.87, 0.86, 0.84),
)
EYES: tuple[Colour, ...] = (
    (0.22, 0.12, 0.07),
    (0.36, 0.22, 0.11),
    (0.44, 0.38, 0.20),
    (0.30, 0.44, 0.30),
    (0.30, 0.46, 0.62),
    (0.46, 0.52, 0.56),
)
CLOTHES: tuple[Colour, ...] = (
    (0.13, 0.15, 0.20),
    (0.86, 0.86, 0.84),
    (0.58, 0.15, 0.17),
    (0.17, 0.32, 0.53),
    (0.18, 0.38, 0.30),
    (0.78, 0.61, 0.23),
    (0.46, 0.31, 0.47),
    (0.40, 0.40, 0.42),
)
BACKDROPS: tuple[Colour, ...] = (
    (0.62, 0.71, 0.78),
    (0.28, 0.37, 0.42),
    (0.80, 0.73, 0.62),
    (0.42, 0.53, 0.36),
    (0.58, 0.44, 0.37),
    (0.19, 0.21, 0.27),
    (0.87, 0.87, 0.85),
    (0.48, 0.57, 0.73),
)
SHORT_STYLES = ("bald", "cropped", "short", "swept", "curly")
LONG_STYLES = ("short", "swept", "bob", "long", "curly", "bun")


@dataclass(frozen=True)
class Light:
    """Where the light comes from: a unit vector to the right, down, and towards the viewer."""

    x: float
    y: float
    z: float
    ambient: float
    """Light that comes from everywhere."""


@dataclass(frozen=True)
class Person:
    """Everything that is drawn, in units of half the picture's side unless said otherwise."""

    seed: int
    light: Light
    # Pose
    centre: tuple[float, float]
    scale: float
    tilt: float
    """Slope of the line through the eyes."""
    turn: float
    """To the side, from -1 to 1."""
    # Head
    skin: Colour
    width: float
    height: float
    jaw: float
    """How much narrower the face is at the chin, from 0."""
    cheeks: float
    """Strength of the red of the cheeks."""
    freckles: float
    age: float
    # Features
    eye_colour: Colour
    eye_distance: float
    eye_width: float
    eye_opening: float
    eye_slant: float
    gaze: tuple[float, float]
    brow_weight: float
    brow_arch: float
    brow_slope: float
    nose_width: float
    nose_length: float
    mouth_width: float
    lips: float
    lip_colour: Colour
    smile: float
    teeth: float
    """How far the mouth is open."""
    beard: float
    """From 0 (none) over stubble to 1 (full)."""
    glasses: bool
    # Hair and clothes
    hair: Colour
    hair_style: str
    hairline: float
    parting: float
    clothes: Colour
    collar: str
    backdrop: tuple[Colour, Colour]
    backdrop_slope: tuple[float, float]


class _Draw:
    """Random traits, one after the other, under one seed."""

    def __init__(self, seed: int) -> None:
        self._numbers = iter(uniform(256, "portrait", seed).tolist())

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(next(self._numbers))

    def near(self, middle: float, spread: float) -> float:
        """Mostly close to `middle`, never further than `spread` from it."""
        return middle + spread * (self.between(-1, 1) + self.between(-1, 1)) / 2

    def happens(self, probability: float) -> bool:
        return self.between(0, 1) < probability

    def one_of(self, choices: tuple[str, ...]) -> str:
        return choices[min(int(self.between(0, len(choices))), len(choices) - 1)]

    def blend(self, colours: tuple[Colour, ...]) -> Colour:
        """A colour between two neighbours of a scale."""
        place = self.between(0, len(colours) - 1)
        number = min(int(place), len(colours) - 2)
        return mixed(colours[number], colours[number + 1], place - number)


def imagine(seed: int) -> Person:
    """The person with this number."""
    draw = _Draw(seed)
    skin = draw.blend(SKINS)
    dark = 1 - (skin[0] - 0.34) / 0.64
    # Fair hair and light eyes are rare with dark skin.
    hair = draw.blend(HAIRS[: 3 if dark > 0.55 else 7])
    age = draw.between(0, 1)
    if age > 0.75:
        hair = mixed(hair, HAIRS[-2 if age < 0.9 else -1], draw.between(0.3, 1))
    eye_colour = draw.blend(EYES[: 2 if dark > 0.55 else 6])
    feminine = draw.between(0, 1)
    styles = LONG_STYLES if feminine > 0.5 else SHORT_STYLES
    bearded = feminine < 0.42 and draw.happens(0.55)
    smile = draw.between(0, 1)
    lip_red = draw.between(0, 0.55 if feminine > 0.5 else 0.12)
    return Person(
        seed=seed,
        light=_light(draw),
        centre=(draw.near(0, 0.06), draw.near(0.10, 0.04)),
        scale=draw.near(1.17, 0.08),
        tilt=draw.near(0, 0.14),
        turn=draw.near(0, 0.8),
        skin=skin,
        width=draw.near(0.445 - 0.02 * feminine, 0.04),
        height=draw.near(0.60, 0.04),
        jaw=draw.near(0.22 + 0.12 * feminine, 0.12),
        cheeks=draw.between(0, 1),
        freckles=draw.between(0.3, 1) if dark < 0.3 and draw.happens(0.25) else 0.0,
        age=age,
        eye_colour=eye_colour,
        eye_distance=draw.near(0.192, 0.016),
        eye_width=draw.near(0.094 + 0.008 * feminine, 0.012),
        eye_opening=draw.near(0.50 + 0.06 * feminine, 0.14),
        eye_slant=draw.near(0.06, 0.14),
        gaze=(draw.near(0, 0.5), draw.near(0, 0.25)),
        brow_weight=draw.near(1.15 - 0.45 * feminine, 0.35),
        brow_arch=draw.near(0.035, 0.025),
        brow_slope=draw.near(0.10, 0.14),
        nose_width=draw.near(0.092 + 0.03 * dark, 0.018),
        nose_length=draw.near(0.27, 0.03),
        mouth_width=draw.near(0.165, 0.025) + 0.025 * max(smile, 0),
        lips=draw.near(0.040 + 0.016 * dark + 0.006 * feminine, 0.014),
        lip_colour=mixed(scaled(mixed(skin, (0.72, 0.30, 0.30), 0.5), 0.9), (0.72, 0.10, 0.16), lip_red),
        smile=smile,
        teeth=draw.between(0.3, 1) if smile > 0.5 and draw.happens(0.6) else 0.0,
        beard=draw.between(0.15, 1) if bearded else 0.0,
        glasses=draw.happens(0.14),
        hair=hair,
        hair_style=draw.one_of(styles),
        hairline=draw.near(-0.36 - 0.10 * age * (1 - feminine), 0.05),
        parting=draw.near(0, 0.9),
        clothes=scaled(draw.blend(CLOTHES), draw.between(0.7, 1.1)),
        collar=draw.one_of(("round", "shirt", "v")),
        backdrop=(draw.blend(BACKDROPS), draw.blend(BACKDROPS)),
        backdrop_slope=(draw.between(-1, 1), draw.between(-1, 1)),
    )


def _light(draw: _Draw) -> Light:
    x, y, z = draw.between(-0.75, 0.75), draw.between(-0.75, -0.15), draw.between(0.55, 1.0)
    length = math.sqrt(x * x + y * y + z * z)
    return Light(x / length, y / length, z / length, draw.between(0.34, 0.62))
