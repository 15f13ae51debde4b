"""The face: head and skin, then eyes, brows, nose, mouth, ears, beard and glasses.

All functions paint in place on `head`, whose coordinates are those of the head: the origin is
the middle of the face, x runs along the eyes, the chin is at y = height. Turning the head shifts
the features to one side, the nose most.
"""

import numpy as np

from pipeline.data.drawing.canvas import (
    Canvas,
    Colour,
    Plane,
    bump,
    ellipse,
    lens,
    mixed,
    noise,
    scaled,
    smoothstep,
    wave,
)
from pipeline.data.drawing.person import Person

EYE_LEVEL = -0.055
SIDES = (-1.0, 1.0)


def shift(person: Person) -> float:
    """How far the features are off the middle."""
    return 0.075 * person.turn


def outline(head: Canvas, person: Person) -> Plane:
    """Signed distance to the face: an ellipse above, narrower towards the chin."""
    lower = np.maximum(head.y, 0) * (1 / person.height)
    width = person.width * (1 - person.jaw * lower * lower + 0.10 * person.jaw * lower)
    height = np.where(head.y > 0, np.float32(person.height), np.float32(0.93 * person.height))
    return ellipse(head.x, head.y, width, height)


def skin(head: Canvas, person: Person) -> None:
    """The face's surface: lit like an egg, red where blood is near, with freckles and folds."""
    head = head.part(-0.56, -0.68, 0.56, 0.72)
    mask = head.cover(outline(head, person))
    shade = _relief(head, person)
    mottle = 0.985 + 0.03 * noise(head.x, head.y, 12, "skin", person.seed)
    red, green, blue = person.skin
    # Shadows of skin are redder than its light.
    warmth = np.maximum(0.85 - shade, 0)
    head.paint(
        (
            red * shade * mottle * (1 + 0.10 * warmth),
            green * shade * mottle * (1 - 0.10 * warmth),
            blue * shade * mottle * (1 - 0.16 * warmth),
        ),
        mask,
    )
    for side in SIDES:
        cheek = bump(head.x - side * 0.25 - shift(person), head.y - 0.17, 0.22, 0.19)
        head.tint((1.03, 0.86, 0.86), cheek * mask * (0.35 + 0.55 * person.cheeks))
    nose_red = bump(head.x - 1.7 * shift(person), head.y - 0.16, 0.12, 0.10)
    head.tint((1.02, 0.90, 0.90), nose_red * (0.3 + 0.4 * person.cheeks))
    if person.freckles:
        _freckles(head, person)


def _relief(head: Canvas, person: Person) -> Plane:
    """Brightness of the bare face, about 1 where the light falls straight on."""
    light = person.light
    u = (head.x - 0.5 * shift(person)) * (1 / (person.width * 1.12))
    v = (head.y + 0.04) * (1 / (person.height * 1.16))
    z = np.sqrt(np.maximum(1 - u * u - v * v, 0.0))
    diffuse = np.maximum(u * light.x + v * light.y + z * light.z, 0)
    shade = light.ambient + 0.26 + (0.92 - light.ambient) * 0.92 * diffuse
    x = head.x - shift(person)
    for side in SIDES:
        socket = bump(x - side * person.eye_distance, head.y - EYE_LEVEL + 0.035, 0.17, 0.105)
        bone = bump(x - side * 0.30, head.y - 0.10, 0.16, 0.09)
        fold = bump(
            x - side * (0.155 + 0.10 * (head.y - 0.18)), head.y - 0.26, 0.045 + 0.02 * person.age, 0.16
        )
        shade = shade - 0.13 * socket + 0.05 * bone * (1 + side * light.x)
        shade = shade - (0.05 + 0.09 * max(person.smile, 0) + 0.06 * person.age) * fold
        if person.age > 0.45:
            bag = bump(x - side * person.eye_distance, head.y - EYE_LEVEL - 0.085, 0.11, 0.04)
            shade = shade - 0.13 * (person.age - 0.35) * bag
    if person.age > 0.55:
        lines = wave((head.y + 0.02 * head.x * head.x) * 17) * bump(x, head.y + 0.31, 0.30, 0.11)
        shade = shade - 0.14 * (person.age - 0.5) * lines
    chin = bump(x, head.y - 0.50, 0.13, 0.10)
    under_lip = bump(x, head.y - 0.425, 0.13, 0.05)
    forehead = bump(x + 0.1 * light.x, head.y + 0.28, 0.34, 0.20)
    return shade + 0.05 * chin - 0.10 * under_lip + 0.06 * forehead


def _freckles(head: Canvas, person: Person) -> None:
    spots = smoothstep(4.5 * noise(head.x, head.y, 30, "freckles", person.seed) - 3.1)
    place = bump(head.x - shift(person), head.y - 0.10, 0.42, 0.20)
    head.tint((0.80, 0.66, 0.58), spots * place * (0.8 * person.freckles))


def ears(head: Canvas, person: Person) -> None:
    """Behind the face's edge; the one on the far side of a turned head is hidden."""
    for side in SIDES:
        near = person.width + 0.018 - 0.035 * max(side * person.turn, 0)
        part = head.part(side * near - 0.09, -0.14, side * near + 0.09, 0.2)
        x, y = side * part.x - near, part.y - 0.03
        ear = ellipse(x - 0.12 * y, y, 0.062, 0.125)
        mask = part.cover(ear)
        lit = person.light.ambient + 0.30 + 0.22 * side * person.light.x
        shade = lit - 0.34 * bump(x + 0.005, y, 0.045, 0.085)
        red, green, blue = person.skin
        part.paint((shade * red, shade * (green * 0.90), shade * (blue * 0.88)), mask)


def eyes(head: Canvas, person: Person) -> None:
    """Both eyes, looking the same way."""
    for side in SIDES:
        # The eye on the far side of a turned head is seen at an angle.
        narrower = 1 - 0.14 * max(side * person.turn, 0)
        middle = side * person.eye_distance * (1 - 0.06 * side * person.turn) + shift(person)
        reach = 1.9 * person.eye_width
        part = head.part(middle - reach, EYE_LEVEL - reach, middle + reach, EYE_LEVEL + reach)
        x = (part.x - middle) * (1 / narrower)
        _eye(part, x, part.y - EYE_LEVEL + person.eye_slant * side * x, person)


def _eye(part: Canvas, x: Plane, y: Plane, person: Person) -> None:
    width = person.eye_width
    above, below = width * person.eye_opening * 1.05, width * person.eye_opening * 0.62
    shape = lens(x, y, width, above, below)
    mask = part.cover(shape)
    lid_shadow = smoothstep((y + above * (1 - (x * (1 / width)) ** 2)) * (1 / (0.62 * above)))
    white = 0.62 + 0.30 * lid_shadow - 0.14 * (x * (1 / width)) ** 2
    part.paint((white, white * 0.965, white * 0.94), mask)
    _iris(part, x, y, mask, lid_shadow, person)
    # Lashes along the upper lid, a fold above it, a faint edge below.
    arc = 1 - (x * (1 / width)) ** 2
    inside = part.cover(np.abs(x) - width * 1.04)
    upper = np.abs(y + arc * above + 0.004) - 0.0085 * (0.7 + 0.5 * arc)
    part.paint(mixed(scaled(person.hair, 0.5), (0.10, 0.06, 0.05), 0.6), 0.88 * part.cover(upper) * inside)
    fold = np.abs(y + arc * (above + 0.024) + 0.012) - 0.006
    part.tint((0.66, 0.56, 0.53), 0.75 * part.cover(fold, 0.012) * inside)
    lower = np.abs(y - arc * below - 0.003) - 0.003
    part.tint((0.60, 0.46, 0.44), 0.55 * part.cover(lower, 0.008) * inside)
    corner = bump(np.abs(x) - width * 0.93, y, 0.022, 0.015)
    part.tint((0.92, 0.62, 0.60), corner * mask)


def _iris(part: Canvas, x: Plane, y: Plane, mask: Plane, lid_shadow: Plane, person: Person) -> None:
    radius = 0.049
    iris_x = x - person.gaze[0] * 0.035
    iris_y = y - person.gaze[1] * 0.02 + 0.008
    distance = np.sqrt(iris_x * iris_x + iris_y * iris_y) * (1 / radius)
    rays = 0.88 + 0.24 * noise(iris_x * 9, iris_y * 9, 5, "iris", person.seed)
    ring = (1.30 - 0.62 * smoothstep(2.4 * distance - 1.35)) * rays * (0.45 + 0.55 * lid_shadow)
    glow = 1 + 0.5 * bump(iris_x + 0.02 * person.light.x, iris_y - 0.02, 0.05, 0.04)
    inside = part.cover((distance - 1) * radius) * mask
    part.paint([ring * glow * level for level in person.eye_colour], inside)
    pupil = part.cover((distance - 0.44) * radius) * mask
    part.paint((0.03, 0.025, 0.03), pupil)
    spark = bump(iris_x - 0.020 * person.light.x, iris_y + 0.016, 0.0145, 0.0145)
    part.paint((1.0, 1.0, 0.98), np.minimum(2.2 * spark, 1) * mask)


def brows(head: Canvas, person: Person) -> None:
    """Two tapering arcs of short hairs."""
    colour = mixed(scaled(person.hair, 0.78), (0.16, 0.11, 0.09), 0.35)
    for side in SIDES:
        middle = side * (person.eye_distance + 0.008) + 1.1 * shift(person)
        part = head.part(middle - 0.17, -0.34, middle + 0.17, -0.05)
        # t runs from -1 at the nose to 1 at the temple.
        t = side * (part.x - middle) * (1 / 0.128)
        ridge = EYE_LEVEL - 0.112 - 0.5 * person.eye_opening * 0.06 - person.brow_arch * (1 - (t - 0.35) ** 2)
        y = part.y - ridge - person.brow_slope * 0.14 * t
        thickness = 0.0175 * person.brow_weight * (1.05 - 0.55 * smoothstep(0.6 * t + 0.3))
        hairs = 0.62 + 0.38 * wave((part.x * side * 1.0 - 0.75 * y) * 42)
        band = part.cover(np.abs(y) - thickness, 0.016) * part.cover((np.abs(t) - 1) * 0.12, 0.03)
        part.paint(colour, band * hairs * min(0.72 + 0.25 * person.brow_weight, 1.0))


def nose(head: Canvas, person: Person) -> None:
    """A bridge lit from one side, wings, nostrils, and the shadow below."""
    tip_y = EYE_LEVEL + person.nose_length
    part = head.part(-0.35, -0.25, 0.35, tip_y + 0.12)
    along = smoothstep((part.y + 0.13) * (1 / (tip_y + 0.13)))
    axis = shift(person) * (1 + 0.9 * along)
    x, y = part.x - axis, part.y - tip_y
    light, width = person.light, person.nose_width
    bridge = bump(x, y + 0.15, 0.045 + 0.03 * along, 0.24)
    part.tint((1.13, 1.12, 1.11), bridge * (0.75 * light.z))
    dark_side = 1.0 if light.x < 0 else -1.0
    flank = bump(x - dark_side * (0.045 + 0.03 * along), y + 0.11, 0.055, 0.22)
    part.tint((0.82, 0.74, 0.71), flank * (0.25 + 0.75 * abs(light.x)))
    for side in SIDES:
        wing = bump(x - side * width * 0.98, y - 0.0, 0.030, 0.045)
        part.tint((0.80, 0.68, 0.64), wing * 0.85)
        nostril = ellipse(x - side * width * 0.50, y - 0.030 + 0.10 * side * x, width * 0.27, 0.0135)
        part.tint((0.42, 0.28, 0.26), part.cover(nostril, 0.014) * 0.85)
    under = bump(x, y - 0.050, width * 1.25, 0.040)
    part.tint((0.80, 0.70, 0.67), under * 0.75)
    tip = bump(x - 0.012 * light.x, y + 0.022, 0.052, 0.050)
    part.tint((1.14, 1.12, 1.11), tip)
    shine = bump(x - 0.018 * light.x, y + 0.030, 0.020, 0.018)
    part.paint((1.0, 0.97, 0.94), shine * (0.30 * light.z))


def mouth(head: Canvas, person: Person) -> None:
    """Two lips along a curve; teeth between them when the mouth is open."""
    part = head.part(-0.36, 0.18, 0.36, 0.54)
    width = person.mouth_width
    x = part.x - 1.15 * shift(person)
    t = np.clip(x * (1 / width), -1.25, 1.25)
    arc = np.maximum(1 - t * t, 0)
    y = part.y - 0.340 + person.smile * 0.042 * (t * t - 0.45)
    gap = 0.036 * person.teeth * arc
    bow = 1 - 0.34 * bump(t, t * 0, 0.30, 1.0)
    rise = person.lips * 0.80 * np.sqrt(arc) * bow
    fall = person.lips * 1.12 * np.sqrt(arc) * (0.55 + 0.45 * arc)
    upper = np.maximum(-(y + rise), y + gap * 0.2)
    lower = np.maximum(-(y - gap), y - gap - fall)
    ends = part.cover(np.abs(x) - width)
    if person.teeth:
        _teeth(part, t, y, gap, ends)
    lit = 0.80 + 0.22 * person.light.z
    for shape, shade in ((upper, 0.84), (lower, 1.0)):
        body = part.cover(shape, 0.010) * ends
        part.paint(scaled(person.lip_colour, shade * lit), 0.86 * body)
    shine = bump(x - 0.02 * person.light.x, y - gap - 0.45 * fall, 0.55 * width, 0.018)
    part.tint((1.20, 1.17, 1.17), shine)
    line = np.abs(y) - 0.0045
    part.tint((0.42, 0.26, 0.26), part.cover(line, 0.009) * ends * (0.85 if not person.teeth else 0.3))
    for side in SIDES:
        corner = bump(x - side * width * 1.0, y, 0.030, 0.022)
        part.tint((0.66, 0.50, 0.47), corner)


def _teeth(part: Canvas, t: Plane, y: Plane, gap: Plane, ends: Plane) -> None:
    opening = part.cover(np.maximum(-y, y - gap), 0.006) * ends
    part.paint((0.24, 0.08, 0.08), opening)
    row = part.cover(y - 0.75 * gap, 0.006) * opening * part.cover((np.abs(t) - 0.80) * 0.15, 0.02)
    between = 1 - 0.16 * smoothstep(1 - 9 * np.abs(wave(t * 4.0) - 0.0))
    side = 1 - 0.45 * t * t
    part.paint((0.93 * between * side, 0.91 * between * side, 0.86 * between * side), row)


def beard(head: Canvas, person: Person) -> None:
    """Hair on chin, cheeks and upper lip; thin beards are only a shadow."""
    part = head.part(-0.6, 0.05, 0.6, 0.75)
    x = part.x - 0.9 * shift(person)
    jaw = smoothstep((part.y - 0.14 - 0.85 * np.maximum(0.36 - np.abs(x), 0)) * 9)
    moustache = smoothstep(1.6 - 14 * np.abs(part.y - 0.275 + 0.10 * np.abs(x))) * smoothstep(
        3 - 15 * np.abs(x)
    )
    chin = smoothstep(1.9 - 6 * np.abs(x)) * smoothstep((part.y - 0.415) * 22)
    bare = bump(x, part.y - 0.345, person.mouth_width * 1.25, 0.075)
    mask = np.maximum(np.maximum(jaw, moustache), chin) * (1 - smoothstep(2 * bare))
    strands = 0.55 + 0.45 * noise(part.x * 1.6, part.y * 0.8, 34, "beard", person.seed)
    inside = part.cover(outline(part, person) - 0.012 * person.beard, 0.03)
    colour: Colour = mixed(scaled(person.hair, 0.85), person.skin, 0.12)
    part.paint(colour, mask * strands * inside * (0.30 + 0.62 * person.beard))


def glasses(head: Canvas, person: Person) -> None:
    """A thin dark frame, with a reflection on each glass."""
    part = head.part(-0.55, -0.3, 0.55, 0.2)
    frame: Colour = (0.10, 0.09, 0.09)
    x = part.x - shift(person)
    for side in SIDES:
        eye_x, eye_y = x - side * (person.eye_distance + 0.008), part.y - EYE_LEVEL - 0.018
        # Between an ellipse and a rectangle.
        rim = ellipse(eye_x * np.abs(eye_x) * 6, eye_y * np.abs(eye_y) * 8, 0.115, 0.075) * 0.6
        part.tint((0.95, 0.96, 0.98), part.cover(rim))
        glare = part.cover(np.abs(eye_x + 0.7 * eye_y + 0.03) - 0.016, 0.02) * part.cover(rim + 0.02)
        part.paint((1, 1, 1), glare * 0.16)
        part.paint(frame, part.cover(np.abs(rim) - 0.0085) * 0.92)
        temple = np.maximum(np.abs(eye_y + 0.03) - 0.008, 0.12 - side * eye_x)
        part.paint(frame, part.cover(temple) * part.cover(side * part.x - person.width) * 0.9)
    bridge = np.maximum(np.abs(part.y - EYE_LEVEL + 0.005 - x * x * 0.5) - 0.007, np.abs(x) - 0.085)
    part.paint(frame, part.cover(bridge) * 0.92)
