"""Procedural portraits: a data set of faces for which nobody has to be asked.

The quickstart, the tests and the benchmarks need images with the nature of real faces (aligned
eyes and mouths, smooth shading, varied skin, hair, light and backdrops) without a download, a
licence or a person's likeness. Everything about a portrait follows from one number, and it is
the same picture, byte by byte, on every machine.
"""

from pipeline.data.drawing import face, hair, scene
from pipeline.data.drawing.canvas import Canvas
from pipeline.data.drawing.person import imagine
from pipeline.data.images import Pixels


def portrait(seed: int, size: int = 256) -> Pixels:
    """(size, size, 3) pixels of the portrait with the number `seed`."""
    person = imagine(seed)
    picture = Canvas.blank(size)
    head = picture.turned(person.centre, person.scale, person.tilt)
    scene.backdrop(picture, person)
    hair.behind(head, person)
    scene.neck(picture, person)
    scene.shoulders(picture, person)
    face.ears(head, person)
    face.skin(head, person)
    if person.beard:
        face.beard(head, person)
    face.nose(head, person)
    face.mouth(head, person)
    face.eyes(head, person)
    face.brows(head, person)
    hair.on_top(head, person)
    if person.glasses:
        face.glasses(head, person)
    return picture.to_uint8()
