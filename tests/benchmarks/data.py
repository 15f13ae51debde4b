"""Images/s of our loader beside stock WebDataset and beside what the machine allows.

    make bench-data
    python -m tests.benchmarks.data --faces FOLDER --format png --source s3

One run builds a data set of procedural portraits (so that anybody can repeat it) and reads it
from the local disk and from a real S3 server on this machine. It is just large enough for our
lanes (as many as a batch has images) to have whole windows of 128 samples, as they have in every
data set that anybody trains on: 16 x 128 = 1,024 portraits x 2. In each round every contender
(data_contenders.py) starts anew, delivers half of the data set off the clock, and then as many
images as it has, by the clock; the order turns from round to round. A ratio is made of two
figures of the same round; the table has medians, with the lowest and highest.

Every contender has `--threads` threads or processes that decode; by default as many as there are
cores. Neither our loader nor stock WebDataset can be faster than these bounds, whose smallest is
the tightest:

- decode: the same decoder on the same bytes from memory, and nothing else;
- transfer: whole shards by plain reads or GETs, and nothing else;
- cores: the processor time of both, and of the S3 server, spread evenly over all cores. The server
  is on the same machine: what it computes for a GET, nobody can use for decoding meanwhile.

Processor time is read from /proc, so it runs on Linux only.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.data.index import TRAIN, load_index
from pipeline.data.reader import FETCH_THREADS
from tests.benchmarks.data_contenders import (
    CONTENDERS,
    DECODE,
    OURS,
    PROCESSES,
    STOCK,
    TRANSFER,
    Measurement,
    Task,
    measure,
)
from tests.benchmarks.data_places import FORMATS, places

CORES, TIGHTEST = "all cores", "the tightest bound"
BOUNDS = (DECODE, TRANSFER, CORES)
Round = dict[str, Measurement]


def rounds_at(task: Task, pairs: int, names: Sequence[str], *, in_process: bool = False) -> list[Round]:
    """`pairs` rounds of the contenders at one place, in processes of their own unless `in_process`.

    Stock WebDataset forks its workers, so no client of a bucket may live in that process before.
    """
    if in_process:
        return [{name: measure(name, task) for name in names} for _ in range(pairs)]
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        groups = [*STOCK, "others"]
        pools = {group: stack.enter_context(ProcessPoolExecutor(1, context)) for group in groups}
        found = []
        for number in range(pairs):
            first = number % len(names)
            measured = {}
            for name in [*names[first:], *names[:first]]:
                measured[name] = pools.get(name, pools["others"]).submit(measure, name, task).result()
            found.append(measured)
    return found


def summary(rounds: Sequence[Round], cores: int) -> dict[str, Any]:
    """Of one place: each contender and bound, our ratio to it, and the ratios that matter."""
    rates = {name: [each[name].images_per_second for each in rounds] for name in rounds[0]}
    rates[CORES] = [cores_bound(each, cores) for each in rounds]
    rates[TIGHTEST] = [min(rates[bound][number] for bound in BOUNDS) for number in range(len(rounds))]
    found: dict[str, Any] = {}
    for name, values in rates.items():
        ratios = [ours / other for ours, other in zip(rates[OURS], values, strict=True)]
        found[name] = {"images_per_second": spread(values), "ours": spread(ratios)}
    for name in rounds[0]:
        found[name]["cpu_ms"] = statistics.median(each[name].cpu for each in rounds) * 1e3
        found[name]["server_cpu_ms"] = statistics.median(each[name].server_cpu for each in rounds) * 1e3
    return found


def cores_bound(measured: Round, cores: int) -> float:
    """Images/s if all cores did nothing but decode, transfer and serve, without ever waiting."""
    decode, transfer = measured[DECODE], measured[TRANSFER]
    cpu = decode.cpu + transfer.cpu + transfer.server_cpu
    # Processor time is counted in hundredths of a second, of which a few images take none.
    return cores / cpu if cpu else math.inf


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| from | what | images/s | ours to it | CPU ms/image | S3 server |",
        "|---|---|---|---|---|---|",
    ]
    for place, rows in found["places"].items():
        for name, row in rows.items():
            rate, ours = row["images_per_second"], row["ours"]
            cells = [
                place,
                name,
                f"{rate['median']:,.0f} ({rate['lowest']:,.0f}-{rate['highest']:,.0f})",
                "" if name == OURS else f"{ours['median']:.2f} ({ours['lowest']:.2f}-{ours['highest']:.2f})",
                f"{row['cpu_ms']:.2f}" if "cpu_ms" in row else "",
                f"{row['server_cpu_ms']:.2f}" if row.get("server_cpu_ms") else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{found['images']:,} {found['of']}, {found['bytes']:,} bytes each ({found['format']}), "
        f"{found['shards']} shards, batches of {found['batch']}, {found['threads']} threads, "
        f"{found['connections']} connections, {found['pairs']} rounds: medians (lowest-highest). "
        f"{found['cores']} cores, Python {found['python']}.",
    ]
    return "\n".join(lines)


def run(arguments: argparse.Namespace, *, in_process: bool = False) -> dict[str, Any]:
    """Everything that is printed, by name."""
    sources = ["local", "s3"] if arguments.source == "both" else [arguments.source]
    of = str(arguments.faces or f"portraits:{arguments.images}")
    cores = len(os.sched_getaffinity(0))
    found: dict[str, Any] = {}
    with places(
        sources,
        of,
        size=arguments.size,
        format=arguments.format,
        num_shards=arguments.shards,
        copies=arguments.copies,
    ) as at:
        for place in at:
            task = Task(
                root=place.root,
                batch_size=arguments.batch,
                threads=arguments.threads,
                connections=arguments.connections,
                server=place.server,
            )
            names = [name for name in CONTENDERS if name != PROCESSES or place.server is None]
            found[place.name] = summary(rounds_at(task, arguments.pairs, names, in_process=in_process), cores)
        rows = load_index(at[0].root).shards(TRAIN)
    images = sum(row.samples for row in rows)
    return {
        "places": found,
        "images": images,
        "of": "real faces" if arguments.faces else "procedural portraits",
        "bytes": sum(row.bytes for row in rows) // images,
        "format": arguments.format,
        "shards": len(rows),
        "batch": arguments.batch,
        "threads": arguments.threads,
        "connections": arguments.connections,
        "pairs": arguments.pairs,
        "cores": cores,
        "python": platform.python_version(),
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1024, help="procedural portraits")
    parser.add_argument("--copies", type=int, default=2, help="of each image in the data set")
    parser.add_argument("--faces", type=Path, help="read the images of this folder instead")
    parser.add_argument("--size", type=int, default=256, help="height and width of the images")
    parser.add_argument("--format", choices=FORMATS, default="webp")
    parser.add_argument("--source", choices=("local", "s3", "both"), default="both")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--connections", type=int, default=FETCH_THREADS, help="of the bare transfer")
    parser.add_argument("--pairs", type=int, default=10, help="rounds of all contenders at each place")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    found = run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
