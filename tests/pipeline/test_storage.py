"""The store: what is refused, what is atomic, what a user reads when something is wrong."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.storage import MissingError, StoreError
from pipeline.storage_errors import explain

REFUSED = [
    "pipe:touch marker",
    "pipe:cat /etc/passwd",
    "s3://bucket/$(touch marker).tar",
    "s3://bucket/`id`",
    "s3://bucket/a;b",
    "s3://bucket/a|b",
    "s3://bucket/a*",
    "s3://bucket/a?versionId=1",
    "s3://bucket/../other",
    "s3://bucket/a//b",
    "s3://bucket/a\nb",
    "s3://key:secret@bucket/a",
    "s3:///a",
    "s3:bucket/a",
    "gs://bucket/[a]",
    "http://169.254.169.254/latest/meta-data",
    "http://example.org/a",
    "https:///a",
    "ftp://host/a",
    "hf://datasets/a",
    "file://otherhost/a",
    "memory://a",
    "github://a:b@c",
    "data:text/plain,a",
    "javascript:alert(1)",
    "simplecache::s3://bucket/a",
    "filecache::https://host/a",
    "pipe:curl -s https://host/a | tee marker",
    "PIPE:touch marker",
    "s3://bucket/a&&touch marker",
    "s3://bucket/a>marker",
    "s3://bucket/<(touch marker)",
    "s3://bucket/{a,b}",
    "s3://bucket/a\\b",
    "s3://$(touch marker)/a",
    "s3://169.254.169.254:80/a?x",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://[fd00:ec2::254]/latest/meta-data",
    "http://127.0.0.1.example.org/a",
    "http://127.0.0.1@169.254.169.254/a",
    "http://2852039166/latest/meta-data",
    "http:///etc/passwd",
    "https://host/a b",
    "https://host/a\nHost: other",
    "file://169.254.169.254/a",
    "gopen:marker",
    "htar:marker",
    "ais://bucket/a",
    "ssh://host/touch marker",
    "sftp://host/a",
    "smb://host/a",
    "webhdfs://host/a",
    "zip://a.png::s3://bucket/a.zip",
    "reference://a",
    "dir::s3://bucket",
    "store:name",
    "",
    "a\0b",
]


@pytest.mark.parametrize("url", REFUSED)
def test_a_place_that_is_not_one_of_ours_is_refused_before_anything_is_opened(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (storage.read_bytes, storage.exists, storage.list_dir, storage.delete):
        with pytest.raises(StoreError):
            use(url)
    with pytest.raises(StoreError):
        storage.write_bytes(url, b"")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "/x", "a/../../x", "..", "a/..", "a/../b", "/etc/passwd", "//host/x"),
        *("s3://b/x", "https://host/x", "file:///etc/passwd", "pipe:x", "pipe:touch marker", "C:x"),
        *("", ".", "a/./b", "a//b", "/"),
        *(
            "a*",
            "a?b",
            "[a]",
            "{a,b}",
            "a|b",
            "a;b",
            "$(a)",
            "`a`",
            "a>b",
            "a\\b",
            "a\nb",
            "a\0b",
            'a"b',
            "a#b",
        ),
    ],
)
def test_no_name_leads_out_of_the_folder_it_is_joined_to(name):
    with pytest.raises(StoreError):
        storage.join("s3://bucket/folder", name)


def test_a_name_inside_an_index_is_bound_by_the_same_rule():
    for name in ("../x.tar", "/x.tar", "pipe:x.tar", "s3://other/x.tar", "$(x).tar"):
        with pytest.raises(StoreError, match="relative"):
            storage.check_relative(name)


def test_the_environment_cannot_rewrite_a_place(tmp_path, monkeypatch):
    """WebDataset's own opener applies regular expressions of GOPEN_REWRITE to every URL."""
    (tmp_path / "there").write_bytes(b"there")
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=pipe:touch {tmp_path}/marker; cat {tmp_path}")
    assert storage.read_bytes(str(tmp_path / "there")) == b"there"
    assert storage.read_bytes(f"file://{tmp_path}/there") == b"there"
    assert storage.list_dir(str(tmp_path)) == ["there"]


@pytest.mark.parametrize(
    ("url", "spelt"),
    [
        ("file:///a/b/", "/a/b"),
        ("file://localhost/a", "/a"),
        ("/a/../b", "/b"),
        ("s3://bucket/a/", "s3://bucket/a"),
        ("S3://bucket", "s3://bucket"),
        ("http://127.0.0.1:80/x", "http://127.0.0.1:80/x"),
        ("http://[::1]/x", "http://[::1]/x"),
    ],
)
def test_a_place_has_one_spelling(url, spelt):
    assert storage.normalize(url) == spelt


def test_secrets_in_a_url_never_reach_a_message():
    url = "https://user:hunter2@127.0.0.1:1/a?X-Amz-Signature=hunter2#hunter2"
    with pytest.raises(StoreError) as caught:
        storage.read_bytes(url)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(StoreError) as caught:
        storage.normalize("s3://AKIA:hunter2@bucket/a")
    assert "hunter2" not in str(caught.value)


# --- every store does the same ----------------------------------------------------------------


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of each kind of store that can be written."""
    if request.param == "local":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_what_was_written_is_read_in_whole_and_in_parts(folder):
    url = storage.join(folder, "a/b.bin")
    storage.write_bytes(url, b"0123456789")
    assert storage.read_bytes(url) == b"0123456789"
    assert storage.read_bytes(url, 2, 5) == b"234"
    assert storage.read_bytes(url, 7) == b"789"
    assert storage.read_bytes(url, 3, 3) == b""
    assert storage.size(url) == 10
    storage.write_bytes(url, b"new")
    assert storage.read_text(url) == "new"
    storage.write_bytes(url, b"")
    assert storage.read_bytes(url) == b""


def test_a_range_beyond_the_end_is_an_error_and_never_a_short_answer(folder):
    url = storage.join(folder, "short")
    storage.write_bytes(url, b"0123456789")
    for start, end in [(5, 11), (10, 12), (50, 60)]:
        with pytest.raises(StoreError, match="cut short"):
            storage.read_bytes(url, start, end)


def test_folders_are_listed_and_deleted_with_all_below_them(folder):
    for name in ("x", "deep/y", "deep/er/z"):
        storage.write_bytes(storage.join(folder, name), name.encode())
    assert storage.list_dir(folder) == ["deep", "x"]
    assert storage.list_sizes(folder) == {"x": 1}
    assert storage.exists(storage.join(folder, "deep"))
    assert not storage.exists(storage.join(folder, "dee"))
    storage.delete(storage.join(folder, "deep"), recursive=True)
    assert storage.list_dir(folder) == ["x"]
    storage.delete(storage.join(folder, "x"))
    storage.delete(storage.join(folder, "x"))
    assert storage.list_dir(folder) == []


def test_a_listing_shows_what_another_process_wrote_meanwhile(folder):
    storage.write_bytes(storage.join(folder, "one"), b"")
    assert storage.list_dir(folder) == ["one"]
    code = "import sys; from pipeline import storage; storage.write_bytes(sys.argv[1], b'')"
    subprocess.run([sys.executable, "-c", code, storage.join(folder, "two")], check=True)
    assert storage.list_dir(folder) == ["one", "two"]


def test_what_is_not_there_is_said_to_be_missing(folder):
    url = storage.join(folder, "nothing")
    for ask in (storage.read_bytes, storage.size):
        with pytest.raises(MissingError, match="nothing"):
            ask(url)
    assert not storage.exists(url)
    assert storage.list_dir(url) == []


def test_many_threads_may_read_at_once(folder):
    for number in range(8):
        storage.write_bytes(storage.join(folder, f"{number}"), bytes([number]) * 1000)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda n: storage.read_bytes(storage.join(folder, f"{n % 8}")), range(64)))
    assert read == [bytes([number % 8]) * 1000 for number in range(64)]


# --- local files ------------------------------------------------------------------------------


def test_a_reader_never_sees_a_part_of_a_file_that_is_replaced(tmp_path):
    url = str(tmp_path / "file")
    storage.write_bytes(url, b"a" * 100_000)
    done = threading.Event()

    def replace() -> None:
        for letter in b"bcdefghij" * 3:
            storage.write_bytes(url, bytes([letter]) * 100_000)
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(replace)
        while not done.is_set() and not writing.done():
            content = storage.read_bytes(url)
            assert len(content) == 100_000
            assert len(set(content)) == 1
        writing.result()
    assert storage.list_dir(str(tmp_path)) == ["file"]


def test_a_writer_that_is_killed_leaves_the_old_file_and_nothing_in_listings(tmp_path):
    url = str(tmp_path / "file")
    storage.write_bytes(url, b"old")
    code = (
        "import os, sys; from pathlib import Path; from pipeline.local_files import written_atomically\n"
        "with written_atomically(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'new'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, url]).returncode == -9
    assert storage.read_bytes(url) == b"old"
    assert storage.list_dir(str(tmp_path)) == ["file"]


def test_what_a_killed_writer_left_is_swept_a_day_later_and_nothing_else(tmp_path):
    old, fresh, other = (
        tmp_path / name
        for name in (
            ".file.0123456789ab.partial",
            ".file.ba9876543210.partial",
            ".file2.0123456789ab.partial",
        )
    )
    for part in (old, fresh, other):
        part.write_bytes(b"part")
    for part in (old, other):
        os.utime(part, (time.time() - 90_000,) * 2)
    storage.write_bytes(str(tmp_path / "file"), b"new")
    assert sorted(tmp_path.iterdir()) == sorted([fresh, other, tmp_path / "file"])


def test_a_target_below_a_file_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="is a file, not a folder"):
        storage.write_bytes(str(tmp_path / "file" / "x"), b"")


def test_a_disk_that_cannot_be_written_is_named():
    # /proc refuses new files even to root.
    for path in ("/proc/nvae", "/proc/nvae/x"):
        with pytest.raises(StoreError, match=rf"{path}: cannot be written .*another place") as caught:
            storage.write_bytes(path, b"")
        assert not isinstance(caught.value, MissingError)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_called_full():
    with pytest.raises(OSError) as caught:
        Path("/dev/full").write_bytes(b"x")
    assert "no space is left" in str(explain(caught.value, "/data/x"))


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.EACCES, "permission denied"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota")],
)
def test_every_refusal_of_a_disk_says_what_to_do(number, says):
    assert says in str(explain(OSError(number, os.strerror(number)), "/data/x"))


def test_a_whole_store_is_never_deleted():
    for url in ("/", "s3://bucket"):
        with pytest.raises(StoreError, match="whole store"):
            storage.delete(url, recursive=True)


# --- S3's refusals ----------------------------------------------------------------------------


def test_a_bucket_that_does_not_exist_is_named_for_reading_and_writing(s3):
    for use in (
        storage.read_bytes,
        storage.list_dir,
        storage.exists,
        lambda url: storage.write_bytes(url, b""),
    ):
        with pytest.raises(StoreError, match="the bucket does not exist"):
            use("s3://no-such-bucket-here/x")


def test_a_wrong_secret_is_refused_with_the_variables_to_set(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    for use in (storage.read_bytes, lambda url: storage.write_bytes(url, b"")):
        with pytest.raises(StoreError, match="AWS_SECRET_ACCESS_KEY") as caught:
            use(f"{s3}/x")
        assert "hunter2" not in str(caught.value)


def test_missing_credentials_are_called_missing(s3, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreError, match="no credentials were found"):
        storage.read_bytes(f"{s3}/x")


def test_an_endpoint_that_never_answered_is_given_up_within_seconds(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    started = time.monotonic()
    with pytest.raises(StoreError, match=f"{endpoint} cannot be reached"):
        storage.read_bytes("s3://bucket/x")
    assert time.monotonic() - started < 15
