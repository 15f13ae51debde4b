"""Reading over https with the standard library alone.

Shards and presets may lie behind a web server; they are never written there. urllib is
enough for whole files and byte ranges, and leaves redirections in our hands: each one is
checked like a URL that the user gave, so that a server cannot send us to an address inside
the cluster. fsspec's HTTP file system was not taken because it follows redirections itself.
A private certificate authority is named by SSL_CERT_FILE, as for every Python program.
"""

import base64
import http.client
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from pipeline.limits import limits
from pipeline.storage_errors import BrokenError
from pipeline.transfer import Answer, described
from pipeline.urls import StoreError, is_loopback, normalize, shown

_NOT_THERE = (404, 410)
_CHUNK_BYTES = 256 << 10


class CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows to places that a user could have named, and never from outside to this machine."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        target = normalize(newurl)
        inside, outside = (urlsplit(each).hostname or "" for each in (target, req.full_url))
        if is_loopback(inside) and not is_loopback(outside):
            raise StoreError(
                f"{shown(req.full_url)}: leads to this machine's {shown(target)}; it is not followed."
            )
        return super().redirect_request(req, fp, code, msg, headers, target)


def _with_read_timeout(connection: Any) -> None:
    connection.sock.settimeout(limits().read_timeout_seconds)


class _HTTPConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _with_read_timeout(self)


class _HTTPSConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _with_read_timeout(self)


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPConnection, req)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def __init__(self) -> None:
        self._trusted = ssl.create_default_context()
        super().__init__(context=self._trusted)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPSConnection, req, context=self._trusted)


@cache
def _opener(_authorities: tuple[str | None, str | None]) -> urllib.request.OpenerDirector:
    """Opens URLs, trusting the authorities that these values of SSL_CERT_FILE and SSL_CERT_DIR name.

    Without urllib's handlers of ftp:, file: and data:, which a redirection could name.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        _HTTPHandler(),
        _HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        CheckedRedirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def open_file(url: str, start: int, end: int | None) -> Answer:
    """Ask for the bytes [start, end) of the file at `url`, or for all from `start` on.

    Raises FileNotFoundError, PermissionError or another OSError.
    """
    response = _open(url, "GET", start, end)
    headers = {name.lower(): value for name, value in response.headers.items()}
    if "content-length" not in headers and not response.chunked:
        response.close()
        raise StoreError(f"{shown(url)}: the server does not say how long the file is.")

    def blocks() -> Iterator[bytes]:
        while True:
            try:
                # What one system call gives: of a longer read a time-out would lose the beginning.
                block = response.read1(_CHUNK_BYTES)
            except http.client.HTTPException as error:
                raise BrokenError(f"the connection broke ({type(error).__name__})") from error
            if not block:
                return
            yield block

    return described(response.status, headers, blocks(), response.close)


def size(url: str) -> int:
    """Bytes of the file at `url`. Raises like `open_file`."""
    with _open(url, "HEAD", 0, None) as response:
        length = response.headers.get("Content-Length", "")
    if not length.isdecimal():
        raise StoreError(f"{shown(url)}: the server does not say how long the file is.")
    return int(length)


def _open(url: str, method: str, start: int, end: int | None) -> http.client.HTTPResponse:
    address, authorization = _without_user(url)
    request = urllib.request.Request(address, method=method)
    if authorization:
        request.add_unredirected_header("Authorization", authorization)
    if start or end is not None:
        request.add_header("Range", f"bytes={start}-{'' if end is None else end - 1}")
    try:
        opener = _opener((os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")))
        response: http.client.HTTPResponse = opener.open(request, timeout=limits().connect_timeout_seconds)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in _NOT_THERE:
            raise FileNotFoundError("the server has no such file") from error
        if error.code in (401, 403):
            raise PermissionError(f"the server refuses access (HTTP {error.code})") from error
        raise OSError(f"the server answers HTTP {error.code}") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, OSError):
            raise error.reason from error
        raise
    except http.client.HTTPException as error:
        raise BrokenError(f"the connection broke ({type(error).__name__})") from error
    return response


def _without_user(url: str) -> tuple[str, str | None]:
    """The URL without `user:password@`, and the header that carries them instead."""
    parts = urlsplit(url)
    if parts.username is None:
        return url, None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host)), "Basic " + base64.b64encode(pair.encode()).decode()
