"""Drawing with numpy: shapes as signed distances, painted with smooth edges.

Only operations that IEEE 754 rounds in one way are used: + - * / sqrt, minimum, maximum,
floor and comparisons, no sine and no exponential. So a drawing has the same bytes on every
machine, and the data sets made of it have the same hashes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.randomness import uniform

# H, W height and width of a canvas in pixels. Colours are (red, green, blue) in [0, 1].
# Planes are float32; numpy's stubs take a product with a Python float for float64.
Plane = NDArray[Any]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Canvas:
    """A picture, or a rectangle of one, with the coordinates of each pixel."""

    pixels: Plane
    """(3, H, W), painted in place."""
    x: Plane
    """(H, W), growing to the right; the whole picture spans about 2 units."""
    y: Plane
    """(H, W), growing downwards."""
    pixel: float
    """Side of a pixel in these units."""

    @classmethod
    def blank(cls, size: int) -> "Canvas":
        """A black square with coordinates from -1 to 1."""
        line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
        x, y = np.broadcast_to(line, (size, size)), np.broadcast_to(line[:, None], (size, size))
        return cls(np.zeros((3, size, size), np.float32), x, y, 2 / size)

    def turned(self, centre: tuple[float, float], scale: float, slope: float) -> "Canvas":
        """The same picture in coordinates about `centre`, enlarged by `scale`, tilted by `slope`."""
        norm = math.sqrt(1 + slope * slope) * scale
        x, y = self.x - centre[0], self.y - centre[1]
        turned_x = (x + y * slope) * (1 / norm)
        turned_y = (y - x * slope) * (1 / norm)
        return Canvas(self.pixels, turned_x, turned_y, self.pixel / scale)

    def part(self, left: float, top: float, right: float, bottom: float) -> "Canvas":
        """The smallest rectangle of the picture that holds this region of the coordinates."""
        inside = (self.x >= left) & (self.x <= right) & (self.y >= top) & (self.y <= bottom)
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if not len(rows):
            return Canvas(self.pixels[:, :0, :0], self.x[:0, :0], self.y[:0, :0], self.pixel)
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        return Canvas(self.pixels[:, *box], self.x[box], self.y[box], self.pixel)

    def cover(self, distance: Plane, softness: float = 0.0) -> Plane:
        """How much of each pixel lies inside a shape (distance < 0); `softness` blurs its edge."""
        width = max(1.2 * self.pixel, softness)
        return smoothstep(0.5 - distance * (1 / width))

    def paint(self, colour: Sequence[float] | Sequence[Plane], mask: Plane) -> None:
        """Lay a colour, one for all pixels or three planes, over the picture where `mask` is not 0."""
        for channel in range(3):
            plane = self.pixels[channel]
            plane += mask * (colour[channel] - plane)

    def tint(self, factor: Colour, mask: Plane) -> None:
        """Multiply the picture by a colour where `mask` is 1, less where it is less."""
        for channel in range(3):
            self.pixels[channel] *= 1 + mask * (factor[channel] - 1)

    def to_uint8(self) -> NDArray[np.uint8]:
        """(H, W, 3) pixels."""
        levels = np.floor(np.clip(self.pixels, 0, 1) * 255 + 0.5)
        return np.ascontiguousarray(levels.astype(np.uint8).transpose(1, 2, 0))


def smoothstep(t: Plane) -> Plane:
    """0 below 0, 1 above 1, smooth between."""
    inside: Plane = np.clip(t, 0, 1)
    smooth: Plane = inside * inside * (3 - 2 * inside)
    return smooth


def bump(x: Plane, y: Plane, width: float | Plane, height: float) -> Plane:
    """A soft spot about the origin: 1 in the middle, 0 from the ellipse on."""
    rest = np.maximum(1 - (x * (1 / width)) ** 2 - (y * (1 / height)) ** 2, 0)
    return rest * rest


def ellipse(x: Plane, y: Plane, width: float | Plane, height: float | Plane) -> Plane:
    """Signed distance to an ellipse about the origin with these half axes, good near its edge."""
    u, v = x / width, y / height
    length = np.sqrt(u * u + v * v)
    u, v = u / width, v / height
    slope = np.sqrt(u * u + v * v) + 1e-6
    distance: Plane = length * (length - 1) / slope
    return distance


def lens(x: Plane, y: Plane, width: float, above: float, below: float) -> Plane:
    """Signed distance to a shape between two arcs that meet at x = -width and x = width."""
    arc = 1 - (x * (1 / width)) ** 2
    steep = 1 + np.abs(x) * ((above + below) / width**2)
    return np.maximum(-y - arc * above, y - arc * below) / steep


def wave(t: Plane) -> Plane:
    """A smooth periodic function of period 1 between 0 and 1."""
    return smoothstep(np.abs(2 * (t - np.floor(t)) - 1))


def noise(x: Plane, y: Plane, cells: int, *key: int | str) -> Plane:
    """Smooth random values in [0, 1] with `cells` grid cells per unit, for |x|, |y| < 2."""
    side = 4 * cells + 2
    grid = uniform(side * side, *key).astype(np.float32)
    across, down = (x + 2) * cells, (y + 2) * cells
    column = np.clip(np.floor(across), 0, side - 2)
    row = np.clip(np.floor(down), 0, side - 2)
    right, lower = smoothstep(across - column), smoothstep(down - row)
    corner = (row * side + column).astype(np.int32)
    top, bottom = grid[corner], grid[corner + side]
    top += (grid[corner + 1] - top) * right
    bottom += (grid[corner + side + 1] - bottom) * right
    blended: Plane = top + (bottom - top) * lower
    return blended


def mixed(one: Colour, other: Colour, share: float) -> Colour:
    """`share` of the other colour in the first."""
    return (
        one[0] + share * (other[0] - one[0]),
        one[1] + share * (other[1] - one[1]),
        one[2] + share * (other[2] - one[2]),
    )


def scaled(colour: Colour, factor: float) -> Colour:
    """A darker or lighter shade."""
    return (min(colour[0] * factor, 1.0), min(colour[1] * factor, 1.0), min(colour[2] * factor, 1.0))
