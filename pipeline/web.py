"""Reading over https with the standard library alone.

Shards and presets may lie behind a web server; they are never written there. urllib is
enough for whole files and byte ranges, and leaves redirections in our hands: each one is
checked like a URL that the user gave, so that a server cannot send us to an address inside
the cluster. fsspec's HTTP file system was not taken because it follows redirections itself.
"""

import base64
import http.client
import urllib.error
import urllib.request
from urllib.parse import unquote, urlsplit, urlunsplit

from pipeline.urls import normalize

_NOT_THERE = (404, 410)


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        return super().redirect_request(req, fp, code, msg, headers, normalize(newurl))


_opener = urllib.request.build_opener(_CheckedRedirects)


def read(url: str, start: int | None, end: int | None, timeout_seconds: float) -> bytes:
    """Bytes [start, end) of the file at `url`.

    Raises FileNotFoundError, PermissionError or another OSError.
    """
    with _open(url, "GET", start, end, timeout_seconds) as response:
        data: bytes = response.read()
        whole = response.status != http.HTTPStatus.PARTIAL_CONTENT
    # A server without ranges answers with the whole file.
    return data[start:end] if whole else data


def size(url: str, timeout_seconds: float) -> int:
    """Bytes of the file at `url`. Raises like `read`."""
    with _open(url, "HEAD", None, None, timeout_seconds) as response:
        length = response.headers.get("Content-Length")
    if length is None:
        raise OSError("the server does not say how long the file is")
    return int(length)


def _open(
    url: str, method: str, start: int | None, end: int | None, timeout_seconds: float
) -> http.client.HTTPResponse:
    address, authorization = _without_user(url)
    request = urllib.request.Request(address, method=method)
    if authorization:
        request.add_unredirected_header("Authorization", authorization)
    if start is not None or end is not None:
        last = "" if end is None else end - 1
        request.add_header("Range", f"bytes={start or 0}-{last}")
    try:
        response: http.client.HTTPResponse = _opener.open(request, timeout=timeout_seconds)
    except urllib.error.HTTPError as error:
        if error.code in _NOT_THERE:
            raise FileNotFoundError("the server has no such file") from error
        if error.code in (401, 403):
            raise PermissionError(f"the server refuses access (HTTP {error.code})") from error
        raise OSError(f"the server answers HTTP {error.code}") from error
    except http.client.HTTPException as error:
        raise OSError(f"the connection broke ({type(error).__name__})") from error
    return response


def _without_user(url: str) -> tuple[str, str | None]:
    """The URL without `user:password@`, and the header that carries them instead."""
    parts = urlsplit(url)
    if parts.username is None:
        return url, None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host)), "Basic " + base64.b64encode(pair.encode()).decode()
