"""A run's pictures inside of its page: samples over time, the last ones larger, the last reconstructions.

A page is mailed and kept: what does not fit into `PICTURE_BYTES` as it is, is scaled down and becomes a
JPEG, so that a page has 2 MB at most.
"""

import io
from collections.abc import Iterator, Sequence

from PIL import Image, UnidentifiedImageError

from pipeline import storage
from pipeline.models import report
from pipeline.models.report import Markup, note, section
from pipeline.run_report.history import History
from pipeline.training.journal import StoredJournal

PICTURE_BYTES = 200_000
OVER_TIME = 6
_LARGE, _SMALL = 1000, 330
"""Pixels of the longer side, where a picture has to become smaller."""
_QUALITIES = (85, 70, 50, 30)


def pictures(journal: StoredJournal, history: History) -> Iterator[Markup]:
    """The sections of a run's pictures."""
    samples = history.pictures.get("samples", ())
    yield section("Samples", *_samples(journal, samples))
    pairs = history.pictures.get("reconstructions", ())
    words = "Validation images, each beside its reconstruction, at {:,} images."
    shown = [_shown(journal, *each, _LARGE, words) for each in pairs[-1:]]
    yield section("Reconstructions", *(shown or [note("None were drawn.")]))


def _samples(journal: StoredJournal, samples: Sequence[tuple[int, str]]) -> Iterator[Markup]:
    if not samples:
        yield note("None were drawn.")
        return
    *earlier, last = samples
    before = [_shown(journal, *each, _SMALL, "At {:,} images.") for each in spread(earlier)]
    yield report.beside(*before, _shown(journal, *last, _LARGE, "At {:,} images, the last ones."))


def spread(all_of_them: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """The first and the last of them, and as many as there is place for at even distances between."""
    if len(all_of_them) <= OVER_TIME:
        return list(all_of_them)
    last = len(all_of_them) - 1
    return [all_of_them[round(place * last / (OVER_TIME - 1))] for place in range(OVER_TIME)]


def _shown(journal: StoredJournal, images: int, path: str, side: int, words: str) -> Markup:
    caption = words.format(images)
    try:
        data = fitted(journal.read_file(path), side)
    except storage.MissingError:
        return note(f"{caption} It is gone from the store: {path}")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        return note(f"{caption} It cannot be read: {path} ({error})")
    return report.picture(data, caption, caption)


def fitted(png: bytes, side: int) -> bytes:
    """The picture as it is, or as a JPEG of at most `side` pixels each way, with at most PICTURE_BYTES.

    Raises OSError or ValueError of Pillow's if it is damaged.
    """
    with Image.open(io.BytesIO(png)) as opened:
        opened.load()
        if len(png) <= PICTURE_BYTES:
            return png
        image = opened.convert("RGB")
    image.thumbnail((side, side))
    for quality in _QUALITIES:
        data = io.BytesIO()
        image.save(data, "JPEG", quality=quality)
        if data.tell() <= PICTURE_BYTES:
            break
    return data.getvalue()
