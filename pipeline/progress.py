"""What a user sees while something runs: status lines, progress bars, tables. The door to `rich`.

Status goes to standard error, results (tables, JSON) to standard output, so that a listing can
be piped while its progress is watched. Where standard error is no terminal, as in a file, in
continuous integration or in a Ray worker, whose output is forwarded line by line, there are no
bars: they would be cut to pieces there. Training shows one aligned line per log interval instead.
"""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.errors import printable

Item = TypeVar("Item")

_PLAIN_SECONDS = 10.0
"""Between two plain lines about the same work."""


def say(message: str) -> None:
    """One status line, as it is: brackets and long URLs are left alone.

    Nobody may be there to read it: Ctrl-C ends the `tee` behind `2>&1 |` first, and a log's disk gets
    full. That is no reason to end what it tells of.
    """
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Pass the items on and show how many have passed, of `total` or of `len(items)` if known."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    console = Console(stderr=True)
    shown = _bar if console.is_terminal else _lines
    return shown(items, description, total, console)


def training_line(metrics: Mapping[str, float], images_seen: int, total_images: int) -> str:
    """The status line of one log interval; its columns stand below each other, in 100 characters.

    Reads `train/bits_per_dim`, `speed/images_per_second`, of which the remaining time follows,
    `data/wait_fraction`, and the memory that the fullest rank needs: of its GPU, or of its process.
    What is absent is a dash. Skipped updates, corrupt samples, requests to the store that were tried
    again and checkpoints that are not there are told behind, where there are any.
    """
    rate = metrics.get("speed/images_per_second")
    remaining = (total_images - images_seen) / rate if rate else None
    memory = metrics.get("memory/reserved_gib/max", metrics.get("memory/process_gib/max"))
    columns = [
        f"{images_seen:>{len(f'{total_images:,}')},} images {images_seen / total_images:4.0%}",
        f"{_number(metrics.get('train/bits_per_dim'), '6.3f')} bits/dim",
        f"{_number(rate, '7.1f')} images/s",
        f"{_number(metrics.get('data/wait_fraction'), '4.0%')} data wait",
        f"{_number(memory, '5.1f')} GiB",
        f"{duration(remaining):>7} left",
    ]
    for name, what, became in (
        ("train/skipped_updates", "update", "skipped"),
        ("data/corrupt_samples", "corrupt sample", "skipped"),
        ("data/store_retries", "request", "tried again"),
        ("checkpoint/left_out", "checkpoint", "left out"),
        ("checkpoint/failed", "checkpoint", "not written"),
    ):
        if metrics.get(name):
            columns.append(f"{counted(metrics[name], what)} {became}")
    return "  ".join(columns)


def evaluation_line(scores: Mapping[str, float], images_seen: int) -> str:
    """The status line of one evaluation on the validation split."""
    line = (
        f"Validation at {images_seen:,} images: "
        f"{_number(scores.get('validation/bits_per_dim'), '.3f')} bits/dim, "
        f"{_number(scores.get('validation/nelbo_nats'), '.1f')} nats NELBO, "
        f"{_number(scores.get('validation/kl_nats'), '.1f')} of them KL"
    )
    weighted = scores.get("validation/importance_weighted_bits_per_dim")
    if weighted is not None:
        line += f"; importance-weighted {weighted:.3f} bits/dim"
    corrupt = scores.get("validation/corrupt_images")
    return f"{line}; {counted(corrupt, 'corrupt image')} left out" if corrupt else line


def counted(number: float, what: str) -> str:
    """`1 worker`, `1,200 workers`."""
    return f"{number:,.0f} {what}" + ("" if round(number) == 1 else "s")


def duration(seconds: float | None) -> str:
    """Two units at most: "7s", "3m 07s", "2h 05m", "4d 03h"; a dash if unknown."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    for size, unit, smaller_size, smaller in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // smaller_size:02}{smaller}"
    return f"{whole}s"


def table(rows: Iterable[Mapping[str, object]], columns: Mapping[str, str]) -> None:
    """Print rows to standard output; `columns` maps their keys to headings.

    A terminal gets a table of its width, anything else tab-separated lines, complete.
    """
    console, rows = Console(), list(rows)
    cells = [[_cell(row.get(key)) for key in columns] for row in rows]
    if not console.is_terminal:
        for line in [list(columns.values()), *cells]:
            print("\t".join(" ".join(cell.split("\n")).replace("\t", " ") for cell in line))
        return
    console.print(_grid(rows, columns, cells), markup=False)


def _grid(
    rows: Sequence[Mapping[str, object]], columns: Mapping[str, str], cells: Iterable[Sequence[str]]
) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for key, heading in columns.items():
        numbers = all(isinstance(row.get(key), int | float | None) for row in rows)
        grid.add_column(heading, justify="right" if numbers else "left", overflow="fold")
    for line in cells:
        grid.add_row(*(Text(cell) for cell in line))
    return grid


class LiveTable:
    """A table that changes while something runs, on standard error; a context manager.

    A terminal shows it in place; anything else gets its rows that changed, as lines.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        """`columns` maps the rows' keys to headings; the first names the row."""
        self._columns = columns
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._shown: dict[str, list[str]] = {}

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, rows: Iterable[Mapping[str, object]], whole: bool = False) -> None:
        """These are the rows now; of more than a terminal holds the last, unless it is to be `whole`."""
        rows = list(rows)
        if self._live is not None:
            room = None if whole else self._console.height - 1
            self._live.vertical_overflow = "visible" if whole else "crop"
            self._live.update(self._fitting(rows, room), refresh=True)
            return
        for row in rows:
            line = self._cells(row)
            if self._shown.get(line[0]) != line:
                self._shown[line[0]] = line
                named = zip(self._columns.values(), line, strict=True)
                say("  ".join(f"{heading.lower()} {cell}" for heading, cell in named if cell != "-"))

    def _fitting(self, rows: Sequence[Mapping[str, object]], room: int | None) -> Table:
        """A table of the last rows that fit into so many lines; of one at least."""
        first = 0 if room is None else max(len(rows) - max(room - 1, 1), 0)
        while True:
            shown = rows[first:]
            grid = _grid(shown, self._columns, map(self._cells, shown))
            over = 0 if room is None else len(self._console.render_lines(grid, pad=False)) - room
            if over <= 0 or len(shown) <= 1:
                return grid
            # A row may have several lines.
            first = min(first + max(over // 4, 1), len(rows) - 1)

    def _cells(self, row: Mapping[str, object]) -> list[str]:
        return [_cell(row.get(key)) for key in self._columns]

    def say(self, message: str) -> None:
        """A line above the table."""
        if self._live is None:
            say(message)
        else:
            self._console.print(message, markup=False, highlight=False)


def _bar(items: Iterable[Item], description: str, total: int | None, console: Console) -> Iterator[Item]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        yield from progress.track(items, total=total, description=description)


def _lines(items: Iterable[Item], description: str, total: int | None, _: Console) -> Iterator[Item]:
    """A line every few seconds, and one at the end."""
    of_total = "" if total is None else f" of {total}"
    last, done = time.monotonic(), 0
    for item in items:
        yield item
        done += 1
        if time.monotonic() - last > _PLAIN_SECONDS:
            last = time.monotonic()
            say(f"{description}: {done}{of_total}")
    say(f"{description}: {done}{of_total}, done")


def _number(value: float | None, form: str) -> str:
    width = form.partition(".")[0]
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"


def _cell(value: object) -> str:
    """A value in words: no brackets, no quotes, and a dash for nothing."""
    if isinstance(value, Mapping):
        value = [f"{key} {_cell(each)}" for key, each in value.items()]
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value)) or "-"
    if value is None:
        return "-"
    return _digits(value) if isinstance(value, float) else printable(str(value))


def _digits(value: float) -> str:
    """Five significant digits, and tenths in any case; an exponent at unusual sizes only."""
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.5g}"
    decimals = max(1, 4 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}".rstrip("0").rstrip(".")
