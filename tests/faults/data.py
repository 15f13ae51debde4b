"""The faults of the data path and its hostile inputs as real injections, a line each.

    make faults-data
    python -m tests.faults.data --only D1,D3 --seed 7 --short

A line says what was injected, how often, and how often what is promised came true: no sample
lost, repeated or changed, an error that names what is wrong, nothing of a stranger's run. It
ends with 1 if any line has survived less often than tried, and says what did not.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults import data_corruption as corruption
from tests.faults import data_resources as resources
from tests.faults import data_secrets as secrets
from tests.faults import data_security as security
from tests.faults import data_sources as sources
from tests.faults import data_transport as transport
from tests.faults.campaign import command
from tests.faults.injection import Place, Row, places

ROWS: dict[str, Callable[[Place], Row]] = {
    "D1": transport.errors,
    "D2": transport.stalls,
    "D2b": transport.breaks,
    "D3": corruption.at_rest,
    "D3t": transport.wrong_bytes,
    "D3s": corruption.skipping,
    "D4": corruption.cut_tars,
    "D5": sources.odd_images,
    "D6": sources.missing_shard,
    "D7": sources.few_shards,
    "D8": resources.cache_disks,
    "D9": sources.equal_names,
    "D10": resources.starts,
    "D11": sources.too_much_promised,
    "S1": security.places_refused,
    "S2": security.checkpoints,
    "S3": security.tars,
    "S4": security.registered_models,
    "S5": secrets.left_behind,
    "S6": security.configurations,
    "S7": secrets.modes,
}


def run(names: Sequence[str], seed: int, short: bool) -> list[Row]:
    """Make the injections of the rows `names`; print each row as soon as it is there."""
    rows = []
    print(f"{'id':4} {'tried':>6} {'survived':>8} {'seconds':>7}  fault: measured", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="nvae-faults-") as folder,
        places(Path(folder), seed, short) as each,
    ):
        for name, place in zip(names, each, strict=False):
            begun = time.monotonic()
            row = ROWS[name](place)
            assert row.id == name
            seconds = time.monotonic() - begun
            print(
                f"{row.id:4} {row.tried:6,} {row.survived:8,} {seconds:7.1f}  {row.fault}: {row.measured}",
                flush=True,
            )
            for what in row.broken:
                print(f"     NOT SURVIVED: {what}", flush=True)
            rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(command("tests.faults.data", __doc__, ROWS, run, sys.argv[1:]))
