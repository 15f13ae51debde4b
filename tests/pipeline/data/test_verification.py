"""What is not as the index says is found: before a run, by `verify`, and by a training's reader."""

import functools
import http.server
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import verification
from pipeline.data.index import TRAIN, VALIDATION, Index, Shard, ShardError, load_index, read_sidecar
from pipeline.data.indexing import index_tars
from pipeline.data.loader import evaluation_batches
from pipeline.data.sidecar import make_sidecar, parse_sidecar
from pipeline.errors import InputError
from pipeline.storage import StoreError
from tests.pipeline.data.foreign_tars import by_shard_writer, image_file, write_tar
from tests.pipeline.data.hostile_indexes import GOOD_TAR, write_data_set
from tests.pipeline.data.test_loader import config


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """A foreign tar of three samples with a gap before and behind each."""
    files = {}
    for number in range(3):
        files |= {f"{number}.json": b"{}", f"{number}.png": image_file(number), f"{number}.txt": b"caption"}
    write_tar(tmp_path / "0.tar", files)
    return index_tars([str(tmp_path)], validation_fraction=0).index


def read_all(index: Index) -> list[str]:
    batches = evaluation_batches(config(), index, rank=0, world_size=1, split=TRAIN, batch_size=2)
    return [key for batch in batches for key in batch.keys]


def cuts(index: Index) -> dict[str, int]:
    """Where the tar is cut, each within or before the second sample."""
    sidecar = read_sidecar(index, index.shards(TRAIN)[0])
    second, size = int(sidecar.offsets[1]), int(sidecar.sizes[1])
    places = {"boundary": second, "header": second + 100, "data": second + 600, "padding": second + size - 1}
    return places | {"empty": 0, "one byte": 1}


@pytest.mark.parametrize("place", ["boundary", "header", "data", "padding", "empty", "one byte"])
def test_a_tar_that_was_cut_is_named_with_the_place_by_verify_and_by_the_reader(place, index):
    path, cut = Path(index.root) / "0.tar", cuts(index)[place]
    sidecar = read_sidecar(index, index.shards(TRAIN)[0])
    lost = 1 if cut > 1 else 0
    path.write_bytes(path.read_bytes()[:cut])
    says = f"sample '{lost}' at byte {int(sidecar.offsets[lost]):,}"
    problems = verification.verify(index.root)
    assert {problem.shard for problem in problems} == {"0.tar"}
    text = " ".join(problem.what for problem in problems)
    assert f"{cut:,} bytes instead of {index.shards(TRAIN)[0].bytes:,}" in text
    assert f"{says} is cut short" in text
    assert [problem.shard for problem in verification.missing_shards(index)] == ["0.tar"]
    with pytest.raises(InputError) as raised:
        read_all(index)
    # Samples are fetched by several threads; any that is lost may be the first to be missed.
    named = re.search(r"0\.tar: sample '(\d)' at byte ([\d,]+): the shard ends", str(raised.value))
    assert named is not None, raised.value
    assert int(named[1]) >= lost
    assert int(named[2].replace(",", "")) == int(sidecar.offsets[int(named[1])])


def test_a_change_in_a_gap_is_found_by_verify_and_harms_no_sample(index):
    path = Path(index.root) / "0.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"caption", b"Caption", 1))
    assert [problem.what for problem in verification.verify(index.root)] == [
        "has another SHA-256 than the index says"
    ]
    assert read_all(index) == ["0", "1", "2"]
    path.write_bytes(data + bytes(512))
    found = " ".join(problem.what for problem in verification.verify(index.root))
    assert f"{len(data) + 512:,} bytes instead of {len(data):,}" in found


def test_of_a_shard_that_was_swapped_five_samples_are_named_and_the_others_counted(tmp_path):
    by_shard_writer(tmp_path, shards=2, per_shard=12)
    root = index_tars([str(tmp_path)], validation_fraction=0).index.root
    shutil.copyfile(tmp_path / "part-0000.tar", tmp_path / "part-0001.tar")
    found = [problem.what for problem in verification.verify(root) if problem.shard == "part-0001.tar"]
    assert ["is damaged" in what for what in found] == [True] * 5 + [False] * 2
    assert found[5:] == ["and 7 more of its 12 samples", "has another SHA-256 than the index says"]
    assert len(found) == len(verification.verify(root))


def test_verify_does_not_advise_to_verify_and_a_reader_does(index):
    path = Path(index.root) / "0.idx"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    problems = [problem.what for problem in verification.verify(index.root)]
    assert len(problems) == 1 and "It was replaced or damaged" in problems[0]
    assert "shards verify" not in problems[0]
    with pytest.raises(ShardError, match=r"replaced or damaged; run `nvae shards verify .* everything"):
        read_sidecar(index, index.shards(TRAIN)[0])


def test_a_bucket_that_is_missing_is_told_apart_from_a_data_set_that_is(s3):
    with pytest.raises(StoreError, match=r"no-such-bucket/a: the bucket does not exist"):
        load_index("s3://no-such-bucket/a")
    with pytest.raises(ShardError, match="there is no data set"):
        load_index(f"{s3}/no-such-folder")


def test_an_index_that_counts_one_sample_more_than_the_sidecar_is_refused(tmp_path):
    write_data_set(tmp_path, samples=2)
    sidecar = (tmp_path / "0.idx").read_bytes()
    one = make_sidecar([(0, 1024, 0, "a-key-that-is-long-enough-for-two-rows-of-columns")]).to_bytes()
    assert len(one) > len(sidecar) - 32
    index = write_data_set(tmp_path, sidecar=one, samples=2, bytes=len(GOOD_TAR))
    problems = [problem.what for problem in verification.verify(str(tmp_path))]
    assert any("lists 1 samples, index.json 2" in what for what in problems)
    with pytest.raises(ShardError, match=r"0\.idx: .*lists 1 samples, index\.json 2"):
        read_all(index)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Index]:
    """Tars behind a web server, which lists nothing."""
    by_shard_writer(tmp_path, shards=5, per_shard=2)
    index_tars([str(tmp_path)])
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield load_index(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_files_that_a_web_server_lacks_are_named_before_a_run(served, tmp_path):
    assert verification.missing_shards(served) == []
    assert verification.verify(served.root) == []
    (tmp_path / "part-0002.tar").unlink()
    (tmp_path / "part-0003.idx").write_bytes(b"short")
    (tmp_path / "part-0001.tar").write_bytes(b"short")
    found = {problem.shard: problem.what for problem in verification.missing_shards(served)}
    assert set(found) == {"part-0001.tar", "part-0002.tar", "part-0003.tar"}
    assert found["part-0002.tar"] == "is missing"
    assert found["part-0001.tar"].startswith("has 5 bytes instead of")
    assert found["part-0003.tar"].startswith("its sidecar part-0003.idx has 5 bytes instead of")
    verification.check_complete(served, (VALIDATION,))
    with pytest.raises(ShardError, match=r"(?s)part-0002\.tar is missing.*nvae shards verify http://127"):
        verification.check_complete(served)
    # A cut shard may be the loader's to judge; what is missing, or no sidecar, never is.
    with pytest.raises(ShardError) as raised:
        verification.check_complete(served, cut_is_corrupt=True)
    assert "part-0001.tar" not in str(raised.value)
    assert "part-0002.tar" in str(raised.value) and "part-0003.idx" in str(raised.value)


def test_a_shard_of_any_number_of_samples_is_verified_in_pieces(tmp_path, monkeypatch):
    """With pieces smaller than a sample, and of every size, nothing changes."""
    by_shard_writer(tmp_path, shards=2, per_shard=5)
    index = index_tars([str(tmp_path)], validation_fraction=0).index
    for piece in (1000, 4097, 2**22):
        monkeypatch.setattr("pipeline.data.streams.PIECE_BYTES", piece)
        assert verification.verify(index.root, threads=2) == []
    path = tmp_path / "part-0001.tar"
    data = bytearray(path.read_bytes())
    sidecar = read_sidecar(index, index.shards(TRAIN)[1])
    data[int(sidecar.offsets[3]) + 600] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr("pipeline.data.streams.PIECE_BYTES", 1000)
    assert [(problem.shard, problem.what) for problem in verification.verify(index.root)] == [
        ("part-0001.tar", f"sample 'sample00008' at byte {int(sidecar.offsets[3]):,} is damaged"),
        ("part-0001.tar", "has another SHA-256 than the index says"),
    ]


# --- indexes of any size ----------------------------------------------------------------------


def test_an_index_and_a_sidecar_come_back_as_they_were(tmp_path):
    random = np.random.default_rng(0)
    rows = [(1024 * n, 1024, int(random.integers(2**32)), f"ordner/schlüssel-{n}") for n in range(2000)]
    sidecar = parse_sidecar(make_sidecar(rows).to_bytes(), 2000 * 1024)
    assert list(sidecar.keys) == [row[3] for row in rows]
    assert list(sidecar.keys[3:7:2]) == [rows[3][3], rows[5][3]]
    assert sidecar.keys[-1] == rows[-1][3]
    assert np.array_equal(sidecar.checksums, [row[2] for row in rows])
    with pytest.raises(IndexError):
        sidecar.keys[2000]
    shards = tuple(
        Shard(f"train-{n:06d}.tar", 1000, 2**25, f"{n:064x}", 24 + 32 * 1000 + 9000, f"{n:064x}")
        for n in range(3000)
    )
    index = Index(str(tmp_path), 256, 3, "made up", None, {}, 0, 0, {TRAIN: shards, VALIDATION: shards[:0]})
    (tmp_path / "index.json").write_bytes(index.to_json())
    assert load_index(str(tmp_path)) == index
    assert replace(index, splits={TRAIN: shards[::-1], VALIDATION: ()}).content_hash != index.content_hash
