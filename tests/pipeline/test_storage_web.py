"""Shards behind a web server: ranges, faults, redirections, passwords, certificates."""

import http.server
import random
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from pipeline import storage, web
from pipeline.config import StorageConfig
from pipeline.storage import StoreError
from tests.fault_proxy import FaultProxy
from tests.http_faults import Cut, Fail, Reset, Stall, Trickle

MB = 1_000_000
LONG = random.Random(0).randbytes(3 * MB)
FORBIDDEN = [
    "http://169.254.169.254/latest/meta-data",
    "http://10.0.0.1/secret",
    "http://metadata.google.internal/computeMetadata/v1/",
    "file:///etc/passwd",
    "ftp://127.0.0.1/secret",
    "data:text/plain,secret",
    "gopher://127.0.0.1/secret",
    "s3://bucket/secret",
    "pipe:touch marker",
    "//169.254.169.254/secret",
]


class _Handler(http.server.BaseHTTPRequestHandler):
    """`/file` and `/long` with ranges, `/stubborn` without, `/endless` without a length, `/locked`
    with a password, `/to/N` a redirection, `/round` one to itself."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        locked = self.path == "/locked" and self.headers.get("Authorization") != "Basic dXNlcjpodW50ZXIy"
        files = {"/file": b"0123456789", "/locked": b"0123456789", "/long": LONG, "/stubborn": LONG}
        if self.path.startswith("/to/"):
            self._refuse(302, FORBIDDEN[int(self.path.removeprefix("/to/"))])
        elif self.path == "/round":
            self._refuse(302, "/round")
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"0123456789")
            self.close_connection = True
        elif locked:
            self._refuse(401)
        elif self.path in files:
            self._send(files[self.path])
        else:
            self._refuse(404)

    def _refuse(self, status: int, location: str = "") -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes) -> None:
        wanted = self.headers.get("Range", "") if self.path != "/stubborn" else ""
        total = len(content)
        self.send_response(206 if wanted else 200)
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1 if last else None]
            end = int(first) + len(content)
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{total}")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, *_: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is expected here."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def patient() -> Iterator[None]:
    settings = {"read_timeout_seconds": 0.6, "retry_seconds": 30, "longest_pause_seconds": 0.1}
    storage.configure(StorageConfig.model_validate(settings))
    yield
    storage.configure(StorageConfig())


def test_a_web_server_is_read_in_whole_and_in_parts_and_never_written(server, tmp_path):
    url = f"http://{server}/file"
    assert storage.read_bytes(url) == b"0123456789"
    assert storage.read_bytes(url, 2, 5) == b"234"
    assert storage.size(url) == 10
    assert storage.exists(url)
    assert not storage.exists(f"http://{server}/none")
    for refuse in (
        lambda: storage.write_bytes(url, b""),
        lambda: storage.delete(url),
        lambda: storage.list_dir(url),
    ):
        with pytest.raises(StoreError):
            refuse()


@pytest.mark.parametrize(
    "fault",
    [
        Fail(503),
        Fail(429),
        Reset(),
        Reset(after=MB),
        Stall(60),
        Stall(60, after=MB),
        Cut(after=MB),
        Trickle(bytes=100, seconds=0.2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("path", ["long", "stubborn"])
def test_a_web_server_that_stumbles_is_asked_for_the_rest(fault, path, server, tmp_path):
    with FaultProxy(f"http://{server}") as proxy:
        rule = proxy.add(fault, lambda request: request.method == "GET", times=1)
        assert storage.read_bytes(f"{proxy.url}/{path}") == LONG
        assert storage.read_bytes(f"{proxy.url}/{path}", MB, 2 * MB) == LONG[MB : 2 * MB]
        assert rule.struck == 1
        # Where the server knows ranges, what has arrived is not asked for again.
        if path == "long" and fault == Cut(after=MB):
            assert proxy.requests[1].range == (MB, 3 * MB)


def test_a_range_beyond_the_end_and_a_file_without_a_length_are_refused(server):
    with pytest.raises(StoreError, match="cut short"):
        storage.read_bytes(f"http://{server}/file", 5, 20)
    with pytest.raises(StoreError, match="does not say how long"):
        storage.read_bytes(f"http://{server}/endless")


@pytest.mark.parametrize("number", range(len(FORBIDDEN)), ids=FORBIDDEN.__getitem__)
def test_a_redirection_to_a_forbidden_place_is_not_followed(number, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError) as caught:
        storage.read_bytes(f"http://{server}/to/{number}")
    assert "root:" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_redirection_in_a_circle_ends(server):
    with pytest.raises(StoreError):
        storage.read_bytes(f"http://{server}/round")


def test_no_server_outside_sends_us_to_this_machine():
    request = urllib.request.Request("https://example.org/shard.tar")
    with pytest.raises(StoreError, match="not followed"):
        web.CheckedRedirects().redirect_request(request, None, 302, "", {}, "http://127.0.0.1:8080/secret")


def test_a_password_in_a_web_url_is_used_but_not_shown(server):
    assert storage.read_bytes(f"http://user:hunter2@{server}/locked") == b"0123456789"
    with pytest.raises(StoreError) as caught:
        storage.read_bytes(f"http://user:hunter3@{server}/locked")
    assert "hunter3" not in str(caught.value)


def test_a_private_authority_is_trusted_if_it_is_named_and_else_its_variable_is(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    with FaultProxy(f"http://{server}", tls=tls) as proxy:
        with pytest.raises(StoreError, match=r"certificate is not trusted.*SSL_CERT_FILE"):
            storage.read_bytes(f"{proxy.url}/file")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        proxy.add(Reset(after=MB), times=1)
        assert storage.read_bytes(f"{proxy.url}/long") == LONG
