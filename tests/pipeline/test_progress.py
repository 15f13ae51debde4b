"""What a user sees: complete where it is piped, aligned where it is read."""

import io
import os
import re
import sys

import pytest
from rich.console import Console

from pipeline import progress
from pipeline.progress import LiveTable, duration, evaluation_line, say, table, track, training_line


def test_work_outside_a_terminal_is_told_in_plain_lines(capsys):
    assert list(track([1, 2, 3], "Writing [shards]")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "Writing [shards]: 3 of 3, done\n")


def test_status_lines_are_left_as_they_are_and_apart_from_results(capsys):
    say("[bold]s3://bucket/" + "x" * 200)
    assert capsys.readouterr() == ("", "[bold]s3://bucket/" + "x" * 200 + "\n")


def test_a_piped_table_is_complete_and_separated_by_tabs(capsys):
    rows = [{"name": "n" * 200, "bits": 0.690123}, {"name": "[b]", "bits": None}]
    table(rows, {"name": "NAME", "bits": "BITS/DIM"})
    assert capsys.readouterr().out.splitlines() == ["NAME\tBITS/DIM", "n" * 200 + "\t0.69012", "[b]\t-"]


def test_a_table_in_a_terminal_has_its_numbers_on_the_right_and_its_words_on_the_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "Console", lambda: Console(force_terminal=True, no_color=True, width=60))
    rows = ({"name": name, "bits": bits} for name, bits in (("[b]", 0.5), ("longest", None), ("x", 12.25)))
    table(rows, {"name": "NAME", "bits": "BITS/DIM"})
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()]
    assert lines == [
        "NAME     BITS/DIM",
        "[b]           0.5",
        "longest         -",
        "x           12.25",
    ]


def frames(monkeypatch, *shown, height=8):
    """What a terminal of a few lines is given for each list of rows: the visible lines."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, no_color=True, width=30, height=height)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    found = []
    with LiveTable({"number": "NUMBER", "words": "WORDS"}) as live:
        for rows, whole in shown:
            output.seek(0)
            output.truncate()
            live.show(rows, whole)
            text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output.getvalue()).replace("\r", "")
            found.append([line.split() for line in text.split("\n") if line.strip()])
    return found


def test_a_live_table_shows_the_last_rows_that_fit_and_all_in_the_end(monkeypatch):
    rows = [{"number": number, "words": "short"} for number in range(20)]
    some, every = frames(monkeypatch, (rows, False), (rows, True))
    assert [line[0] for line in some] == ["NUMBER", *map(str, range(14, 20))]
    assert [line[0] for line in every] == ["NUMBER", *map(str, range(20))]


def test_rows_of_several_lines_push_out_others_and_never_the_last(monkeypatch):
    rows = [{"number": number, "words": f"many words of the row {number}, in lines"} for number in range(20)]
    [shown] = frames(monkeypatch, (rows, False))
    assert len(shown) <= 7 and [line[0] for line in shown if line[0].isdigit()] == ["17", "18", "19"]
    [alone] = frames(monkeypatch, (rows, False), height=2)
    assert [line[0] for line in alone if line[0].isdigit()] in ([], ["19"])


def test_a_live_table_that_is_piped_tells_what_changed(capsys):
    with LiveTable({"number": "NUMBER", "words": "WORDS"}) as live:
        live.show([{"number": 1, "words": "a"}, {"number": 2, "words": None}])
        live.show([{"number": 1, "words": "a"}, {"number": 2, "words": "b"}])
    assert capsys.readouterr().err.splitlines() == ["number 1  words a", "number 2", "number 2  words b"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (17810.3, "17810.3"),
        (-123456.78, "-123456.8"),
        (2.5, "2.5"),
        (0.0012345678, "0.0012346"),
        (0.0, "0"),
        (48.0, "48"),
        (3e-9, "3e-09"),
        (float("nan"), "nan"),
        (None, "-"),
        ([], "-"),
        ([4, 4, 0.25], "4, 4, 0.25"),
        ({"host": "here", "workers": 2}, "host here, workers 2"),
    ],
)
def test_values_are_shown_without_exponents_and_brackets(capsys, value, text):
    table([{"value": value}], {"value": "VALUE"})
    assert capsys.readouterr().out == f"VALUE\n{text}\n"


def test_training_lines_stand_below_each_other():
    first = training_line({"train/bits_per_dim": 12.3456, "speed/images_per_second": 9.5}, 160, 4800)
    last = training_line({"train/bits_per_dim": 2.1, "speed/images_per_second": 118.04}, 4800, 4800)
    assert first == (
        "  160 images   3%  12.346 bits/dim      9.5 images/s     - data wait      - GiB   8m 08s left"
    )
    assert last == (
        "4,800 images 100%   2.100 bits/dim    118.0 images/s     - data wait      - GiB       0s left"
    )


def test_the_longest_run_has_lines_of_100_columns():
    busy = {
        "train/bits_per_dim": 0.69,
        "speed/images_per_second": 2345.6,
        "data/wait_fraction": 1.0,
        "memory/process_gib/max": 12.34,
        "memory/reserved_gib/max": 123.45,
    }
    line = training_line(busy, 1_000_000, 60_000_000)
    assert line == (
        " 1,000,000 images   2%   0.690 bits/dim   2345.6 images/s  100% data wait  123.5 GiB   6h 59m left"
    )
    assert len(line) <= 100


@pytest.mark.parametrize(
    ("name", "one", "several"),
    [
        ("train/skipped_updates", "1 update skipped", "3 updates skipped"),
        ("data/corrupt_samples", "1 corrupt sample skipped", "3 corrupt samples skipped"),
        ("data/store_retries", "1 request tried again", "3 requests tried again"),
        ("checkpoint/left_out", "1 checkpoint left out", "3 checkpoints left out"),
        ("checkpoint/failed", "1 checkpoint not written", "3 checkpoints not written"),
    ],
)
def test_training_lines_end_with_what_went_wrong(name, one, several):
    assert training_line({name: 1.0}, 160, 4800).endswith(f" left  {one}")
    assert training_line({name: 3.0}, 160, 4800).endswith(f" left  {several}")
    assert training_line({name: 0.0}, 160, 4800).endswith(" left")


def test_the_line_of_an_evaluation_tells_the_bound_apart_from_the_estimate():
    scores = {"validation/bits_per_dim": 2.5, "validation/nelbo_nats": 900.0, "validation/kl_nats": 100.0}
    weighted = scores | {"validation/importance_weighted_bits_per_dim": 2.25}
    line = "Validation at 4,800 images: 2.500 bits/dim, 900.0 nats NELBO, 100.0 of them KL"
    assert evaluation_line(scores, 4800) == line
    assert evaluation_line(weighted, 4800) == f"{line}; importance-weighted 2.250 bits/dim"
    for count, told in ((1.0, "1 corrupt image"), (3.0, "3 corrupt images")):
        corrupt = scores | {"validation/corrupt_images": count}
        assert evaluation_line(corrupt, 4800) == f"{line}; {told} left out"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0s"), (59.6, "1m 00s"), (187, "3m 07s"), (7500, "2h 05m"), (356_400, "4d 03h")],
)
def test_durations_have_two_units_at_most(seconds, text):
    assert duration(seconds) == text


def test_nobody_reads_and_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind `2>&1 | tee log`, where Ctrl-C reaches tee, too."""
    reader, writer = os.pipe()
    os.close(reader)
    nowhere = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stderr", nowhere)
    say("one")
    say("two")
    with pytest.raises(BrokenPipeError):
        nowhere.flush()
    with pytest.raises(BrokenPipeError):
        nowhere.close()
