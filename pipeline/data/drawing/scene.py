"""What is behind and below the face: backdrop, shoulders, neck."""

from pipeline.data.drawing.canvas import Canvas, bump, ellipse, mixed, noise, scaled, smoothstep
from pipeline.data.drawing.person import Person
from pipeline.data.randomness import uniform

# All functions paint in place. `picture` has the picture's own coordinates, `head` those of the
# head: origin between the eyes and the mouth, x along the eyes.


def backdrop(picture: Canvas, person: Person) -> None:
    """A gradient between two colours with a few spots of light out of focus."""
    across, down = person.backdrop_slope
    share = smoothstep(0.5 + 0.35 * (across * picture.x + down * picture.y))
    near, far = person.backdrop
    for channel in range(3):
        picture.pixels[channel] = near[channel] + (far[channel] - near[channel]) * share
    spots = uniform(24, "spots", person.seed).tolist()
    for number in range(6):
        x, y, size, strength = spots[4 * number : 4 * number + 4]
        radius = 0.12 + 0.45 * size * size
        x, y = 2.4 * x - 1.2, 2.0 * y - 1.1
        part = picture.part(x - radius, y - radius, x + radius, y + radius)
        spot = bump(part.x - x, part.y - y, radius, radius)
        part.paint(mixed(far, (1, 0.97, 0.9), 0.6), spot * (0.5 * strength * strength))
    picture.tint((0.62, 0.62, 0.66), smoothstep(0.55 * (picture.x**2 + picture.y**2) - 0.35))


def shoulders(picture: Canvas, person: Person) -> None:
    """Clothes from the lower edge up, with the light on one shoulder."""
    part = picture.part(-1, 0.62, 1, 1)
    x, y = part.x - person.centre[0], part.y
    width = 0.78 + 0.35 * person.width
    body = ellipse(x, y - 1.30, width, 0.56)
    mask = part.cover(body)
    folds = noise(1.5 * x, 0.4 * y, 4, "folds", person.seed)
    side = smoothstep(0.5 + 0.6 * x * person.light.x)
    shade = (0.62 + 0.38 * side) * (0.86 + 0.28 * folds) - 0.35 * bump(x, y - 0.72, 0.42, 0.22)
    part.paint([shade * level for level in person.clothes], mask)
    if person.collar == "shirt":
        for sign in (-1.0, 1.0):
            flap = ellipse(sign * x - 0.17 + 0.35 * (y - 0.86), y - 0.90, 0.075, 0.20)
            part.paint(scaled(mixed(person.clothes, (1, 1, 1), 0.35), 0.95), part.cover(flap) * mask)


def neck(picture: Canvas, person: Person) -> None:
    """The neck down to the collar, in the shadow of the chin."""
    part = picture.part(person.centre[0] - 0.5, 0.2, person.centre[0] + 0.5, 1)
    x, y = part.x - person.centre[0], part.y
    half = 0.56 * person.width + 0.10 * smoothstep((y - 0.62) * 2.5)
    column = abs(x) - half
    opening = ellipse(x, y - 0.70, 0.36, 0.24)
    if person.collar == "v":
        opening = abs(x) * 0.95 + (y - 1.06)
    mask = part.cover(column) * part.cover(-(y - 0.25)) * part.cover(opening)
    round_side = 1 - 0.9 * (x * (1 / 0.42)) ** 2 + 0.5 * x * person.light.x
    chin_shadow = smoothstep(1.35 - 1.9 * (y - 0.45)) * 0.42
    shade = 0.80 + 0.18 * round_side - chin_shadow
    red, green, blue = person.skin
    part.paint((shade * red, shade * (green * 0.95), shade * (blue * 0.92)), mask)
    hem = smoothstep(1 - abs(opening) * 28) * part.cover(column - 0.02) * part.cover(-(y - 0.7))
    part.tint((0.72, 0.72, 0.74), hem * 0.6)
