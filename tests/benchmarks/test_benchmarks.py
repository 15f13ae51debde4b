"""The benchmarks run, with parameters so small that their figures mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import data, formats, outages
from tests.benchmarks.data_contenders import CONTENDERS, PROCESSES, STOCK
from tests.benchmarks.data_places import FORMATS

ROOT = Path(__file__).parents[2]
SMALL = ("--images=8", "--size=32", "--batch=4", "--shards=2", "--pairs=1", "--threads=1")


def test_every_format_and_decoder_gives_back_the_pixels_and_has_a_row():
    found = formats.measure(formats.pictures_of(None, 1), rounds=1) | {"source": "procedural portraits"}
    names = {(row["format"], row["decoder"]) for row in found["rows"]}
    assert names >= {("PNG", "Pillow"), ("WebP lossless 0", "Pillow"), ("raw (PPM)", "numpy")}
    assert formats.table(found).count("\n| ") == len(found["rows"])


def test_a_decoder_of_other_pixels_is_refused():
    format = formats.Format("PNG", formats.built_as("png"), {"wrong": lambda data: formats.pillow(data) ^ 1})
    picture = formats.pictures_of(None, 1)[0]
    row = formats.Row(format, "wrong", [formats.built_as("png")(picture)])
    with pytest.raises(ValueError, match="other pixels"):
        formats.check(row, [picture])


@pytest.mark.parametrize("format", FORMATS)
def test_every_contender_delivers_images_of_every_format(format, monkeypatch):
    # Processes are left to the benchmark itself: their start takes seconds.
    for name in (STOCK[0], PROCESSES):
        monkeypatch.delitem(CONTENDERS, name)
    found = data.run(data.parse([*SMALL, "--source=local", f"--format={format}"]), in_process=True)
    rows = found["places"]["local"]
    assert set(CONTENDERS) < set(rows)
    assert all(row["images_per_second"]["median"] > 0 for row in rows.values())
    assert data.table(found).count("\n| local |") == len(rows)


@pytest.mark.parametrize(
    ("requests", "faults", "fault", "why"),
    [
        (0, 0, True, "nothing was asked"),
        (0, 0, False, "nothing was asked"),
        (7, 0, True, "none of 7 requests met the fault"),
        (7, 2, False, "2 of 7 requests met a fault in a window without"),
    ],
)
def test_a_window_of_an_outage_that_is_not_what_it_is_called_has_no_figure(requests, faults, fault, why):
    with pytest.raises(RuntimeError, match=why):
        outages.check(requests, faults, fault)
    outages.check(7, 7 if fault else 0, fault)


def test_all_outages_are_compared_in_twenty_minutes():
    assert outages.Timing().estimate([*outages.BOUNDS], outages.PAIRS) <= 20 * 60


@pytest.mark.campaign
@pytest.mark.parametrize("kind", outages.BOUNDS)
def test_an_outage_is_met_and_caught_up_with_in_every_pair(kind):
    words = [f"--only={kind}", "--pairs=2", "--short"]
    command = [sys.executable, "-m", "tests.benchmarks.outages", *words]
    ended = subprocess.run(command, check=True, timeout=600, cwd=ROOT, capture_output=True, text=True)
    assert f"{kind:8} 2 pairs: " in ended.stdout


@pytest.mark.campaign
def test_the_whole_benchmark_runs_in_processes_from_disk_and_bucket(tmp_path):
    # A process of its own: its bucket's settings are in its environment.
    file = tmp_path / "found.json"
    words = [*SMALL, "--source=both", f"--json={file}"]
    subprocess.run([sys.executable, "-m", "tests.benchmarks.data", *words], check=True, timeout=300, cwd=ROOT)
    found = json.loads(file.read_text())["places"]
    assert set(found["local"]) >= set(CONTENDERS)
    assert set(found["s3"]) >= set(CONTENDERS) - {PROCESSES}
