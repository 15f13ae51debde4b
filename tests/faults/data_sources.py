"""D5-D7, D9, D11: images, shards and indexes that are not what they should be."""

import contextlib
import itertools
import subprocess
import time
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.data import shards, verification
from pipeline.data.index import TRAIN, ShardError, load_index
from pipeline.data.indexing import index_tars
from pipeline.data.sidecar import make_sidecar
from pipeline.errors import InputError
from tests.faults.injection import Place, Row, Tally, assert_exact, environment_of_child, noise, plan_of, read
from tests.pipeline.data.data_set import build, config
from tests.pipeline.data.foreign_tars import image_file, write_tar
from tests.pipeline.data.hostile_indexes import GOOD_TAR, good_rows, write_data_set
from tests.pipeline.data.hostile_tars import END, FIRST, LAST, member
from tests.pipeline.data.test_damage import odd_files
from tests.pipeline.data.test_shards import samples, write_images
from tests.tiny_run import NVAE, YAML

MISSING_SECONDS = 10


def odd_images(place: Place) -> Row:
    """D5: each kind of broken and odd image, and broken ones around the limit."""
    tally, odd = Tally(), odd_files()
    source = write_images(place.folder / "in", 4)
    for name, (content, _) in odd.items():
        (source / name).write_bytes(content)
    options = {"image_size": 16, "validation_count": 0}
    report = shards.build(str(source), str(place.folder / "out"), max_rejected=1, **options)
    found, rejected = samples(report.index, TRAIN), {each.name for each in report.rejected}
    for name, (_, usable) in odd.items():
        with tally.attempt(name):
            assert (name in rejected) == (not usable)
            assert (Path(name).stem in found) == usable
    with tally.attempt("counts"):
        assert report.index.rejected == len(rejected) == sum(not usable for _, usable in odd.values())
        assert report.index.num_samples(TRAIN) == 4 + len(odd) - len(rejected)
        assert verification.verify(report.index.root) == []
    broken = b"\xff\xd8\xff and no more"
    whole = 99 if place.short else 999
    for count, passes in ((1, True), (whole // 99, True), (whole // 99 + 1, False)):
        with tally.attempt(f"{count} broken of {whole + count}"):
            source = write_images(place.folder / f"in{count}", whole)
            for number in range(count):
                (source / f"broken{number}.jpg").write_bytes(broken + bytes([number]))
            target = place.folder / f"out{count}"
            if passes:
                built = shards.build(str(source), str(target), **options).index
                assert (built.rejected, built.num_samples(TRAIN)) == (count, whole)
            else:
                with pytest.raises(ShardError, match="broken"):
                    shards.build(str(source), str(target), **options)
                assert not (target / "index.json").exists()
    return tally.row(
        "D5",
        "CMYK, grey, palette, 16-bit, 1x1, 20k x 20k, rotated, cut, empty, no image; 0.1% and 1% broken",
        f"{len(odd) - len(rejected)} kinds used, {len(rejected)} left out and named; stops above 1%",
    )


def missing_shard(place: Place) -> Row:
    """D6: a shard that is not there, as whoever types `nvae train` sees it."""
    tally, seconds = Tally(), []
    local = build(place.folder, str(place.folder / "set"))
    (place.folder / "tiny.yaml").write_text(YAML)
    gone = local.shards(TRAIN)[1]
    for where in ("disk", "bucket"):
        for name in (gone.name, gone.sidecar_name):
            index = build(place.folder / f"{where}-{name}", str(place.folder / f"{where}-{name}/set"))
            if where == "bucket":
                index = place.uploaded(index, name)
            storage.delete(f"{index.root}/{name}")
            command = [NVAE, "train", str(place.folder / "tiny.yaml"), f"data.root={index.root}", "--local"]
            begun = time.monotonic()
            ended = subprocess.run(
                [*command, "--name", "gone", "--store", str(place.folder / "store")],
                capture_output=True,
                text=True,
                env=environment_of_child(),
                cwd=place.folder,
                check=False,
            )
            seconds.append(time.monotonic() - begun)
            with tally.attempt(f"{name} in a {where}"):
                assert ended.returncode == 2, ended.stderr
                assert "Traceback" not in ended.stderr
                assert f"{name}" in ended.stderr, ended.stderr
                assert "is missing" in ended.stderr, ended.stderr
                assert seconds[-1] < MISSING_SECONDS, f"{seconds[-1]:.1f} s"
    return tally.row(
        "D6",
        "a missing shard or sidecar, on a disk and in a bucket",
        f"exit code 2 with its name after {min(seconds):.1f}-{max(seconds):.1f} s, process start included",
    )


def few_shards(place: Place) -> Row:
    """D7: fewer shards than ranks x workers; prime numbers of everything."""
    tally, found_shards, read_samples = Tally(), [], 0
    threads = itertools.cycle((1, 2, 3))
    worlds = (2, 13) if place.short else (2, 3, 5, 7, 11, 13, 16)
    for number, shard_bytes in enumerate((2**20, 45_000, 22_000, 13_000, 6_000, 1)):
        folder = place.folder / str(number)
        index = noise(folder, 53, 8, shard_bytes)
        found_shards.append(len(index.shards(TRAIN)))
        alone = config(batch_size=12, lanes=12)
        clean, planned = read(alone, index, epochs=2), plan_of(index, alone, epochs=2)
        for world in worlds:
            settings = config(batch_size=world + 3, lanes=12, decode_threads=next(threads))
            with tally.attempt(f"{found_shards[-1]} shards, {world} ranks"):
                found = read(settings, index, world, epochs=2)
                assert_exact(found, clean, planned)
                read_samples += len(found.samples)
    return tally.row(
        "D7",
        "shards < ranks x workers; prime counts",
        f"{', '.join(map(str, found_shards))} shards on up to {max(worlds)} ranks: equal steps, "
        f"{read_samples:,} samples exact",
    )


def equal_names(place: Place) -> Row:
    """D9: the same file names in two folders, behind one cache; the same keys in two tars."""
    tally, settings = Tally(), {}
    cached = config(lanes=12, cache_folder=str(place.folder / "cache"))
    plain = config(lanes=12)
    sets = {}
    for number in range(2):
        local = noise(place.folder / str(number), 40, 8, 13_000, seed=number)
        sets[number] = (place.uploaded(local, f"{number}/same"), read(plain, local), plan_of(local, plain))
        settings[number] = [shard.name for shard in local.shards(TRAIN)]
    assert settings[0] == settings[1]
    transferred = []
    for turn in range(4):
        for number, (remote, clean, planned) in sets.items():
            with tally.attempt(f"data set {number}, reading {turn}"):
                found = read(cached, remote)
                assert_exact(found, clean, planned)
                transferred.append(found.transferred_bytes)
    with tally.attempt("equal keys in tars of equal names"):
        for number in range(2):
            files = {f"{key}.png": image_file(10 * number + key) for key in range(5)}
            write_tar(place.folder / f"foreign/{number}/part.tar", files)
        tars = [str(place.folder / f"foreign/{number}/part.tar") for number in range(2)]
        index = index_tars(tars, validation_fraction=0).index
        found = read(config(lanes=5, batch_size=5), index)
        assert len(found.samples) == len({digest for _, _, digest in found.samples}) == 10
    return tally.row(
        "D9",
        "equal file names in two data sets with one cache; equal keys in two folders",
        f"ids and pixels exact; {transferred[0]:,} B transferred first, at last {transferred[-1]:,} B",
    )


def too_much_promised(place: Place) -> Row:
    """D11: the index says more samples than the shards hold."""
    tally = Tally()
    one = member("first.png", FIRST)
    long_key = "a-key-that-is-long-enough-for-two-rows-of-columns"
    variants = {
        "the index counts one more than sidecar and tar": {"samples": 3},
        "the index counts one more than the sidecar": {
            "sidecar": make_sidecar([(0, 1024, 0, long_key)]).to_bytes(),
            "samples": 2,
        },
        "index and sidecar list one more than the tar": {"tar": one + END, "rows": good_rows()},
        "the sidecar's last sample is the tar's end": {"tar": one + bytes(4096), "rows": good_rows()},
        "a larger tar is vouched for": {"tar": one + END, "rows": good_rows(), "bytes": len(GOOD_TAR)},
        "the last sample is another": {
            "tar": one + member("other.png", LAST) + END,
            "rows": good_rows(),
        },
    }
    for number, (what, arguments) in enumerate(variants.items()):
        with tally.attempt(what):
            folder = place.folder / str(number)
            folder.mkdir()
            write_data_set(folder, **arguments)
            with pytest.raises(InputError):
                read(config(lanes=1, batch_size=2), load_index(str(folder)))
            with contextlib.suppress(ShardError):
                assert verification.verify(str(folder))
    with tally.attempt("a shard is replaced by one with a sample fewer"):
        index = build(place.folder, str(place.folder / "set"))
        first = Path(index.root) / index.shards(TRAIN)[0].name
        fewer = list(samples(index, TRAIN).items())[: index.shards(TRAIN)[0].samples - 1]
        write_tar(first, {f"{key}.png": data for key, data in fewer})
        with pytest.raises(InputError, match=first.name):
            read(config(lanes=12), index)
        assert verification.verify(index.root)
    return tally.row(
        "D11", "the index promises a sample that no shard holds", "refused by reader and `verify`"
    )
