"""Where things may lie: the schemes we read and write, and how a place is written in a message.

Five kinds of place are known: a plain path, `file://`, `s3://`, `gs://` and, for reading,
`https://` (`http://` to this machine only). Everything else is refused before anything is
opened; above all `pipe:`, behind which other readers of shards run a shell.

Characters that mean something to a shell or to a glob are refused in remote names, because
a `*` in a name that is to be deleted would delete its neighbours. A password or a signature
inside a URL never reaches a message: `shown` replaces it.
"""

import ipaddress
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.errors import InputError


class StoreError(InputError):
    """Something in a store cannot be read or written; says what to mend."""


class MissingError(StoreError):
    """What was asked for is not there."""


class CutError(StoreError):
    """A file ends before the bytes that were asked for."""


_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
_SECRET_PARTS = re.compile(r"//[^/@\s]*@|[?#].*$", re.DOTALL)
_FORBIDDEN_IN_REMOTE_NAMES = set("*?[]{}|<>`$;\\\"'#") | {chr(code) for code in range(32)} | {"\x7f"}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
BUCKET_SCHEMES = ("s3", "gs")
WEB_SCHEMES = ("https", "http")


def scheme(url: str) -> str:
    """The scheme of `url` in lower case; "file" for a plain path."""
    match = _SCHEME.match(url)
    return match.group(1).lower() if match else "file"


def shown(url: str) -> str:
    """`url` for a message: without user, password, query and fragment."""
    if scheme(url) == "file":
        return url

    def veil(match: re.Match[str]) -> str:
        return "//***@" if match.group().startswith("//") else match.group()[0] + "***"

    return _SECRET_PARTS.sub(veil, url)


def normalize(url: str) -> str:
    """The one spelling of a place: an absolute path, or `scheme://...` without trailing slash.

    Raises StoreError if the scheme is not one of ours or the name could not be meant.
    """
    kind = scheme(url)
    if not url or "\0" in url:
        raise StoreError(f"{shown(url)!r} names no place: give a path or a URL such as s3://bucket/folder.")
    if kind == "file":
        return _local_path(url)
    if kind in BUCKET_SCHEMES:
        return _bucket_url(url, kind)
    if kind in WEB_SCHEMES:
        return _web_url(url, kind)
    raise StoreError(
        f"{shown(url)}: `{kind}:` is not a place that can be read. Known are plain paths, file://, s3://, "
        f"gs:// and, for reading, https://. (A file whose name holds a colon: ./{shown(url)})"
    )


def join(url: str, *parts: str) -> str:
    """`url` with relative names appended; no part can lead out of `url`.

    Raises StoreError if a part is absolute, has a scheme or contains `..`.
    """
    base = normalize(url)
    if scheme(base) in WEB_SCHEMES and ("?" in base or "#" in base):
        raise StoreError(f"{shown(url)}: a URL with a query is a single file, nothing lies below it.")
    for part in parts:
        check_relative(part)
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def check_relative(name: str) -> None:
    """Raises StoreError unless `name` stays below whatever it is appended to."""
    pieces = name.split("/")
    if (
        not name.strip("/")
        or name.startswith("/")
        or _SCHEME.match(name)
        or any(piece in ("", ".", "..") for piece in [*pieces[:-1], pieces[-1] or "x"])
        or any(character in _FORBIDDEN_IN_REMOTE_NAMES for character in name)
    ):
        raise StoreError(
            f"{shown(name)!r} is not a name below a folder: it must be relative and hold no `..`."
        )


def is_local(url: str) -> bool:
    """Whether `url` lies in this machine's file system."""
    return scheme(url) == "file"


def _local_path(url: str) -> str:
    path = url
    if _SCHEME.match(url):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise StoreError(f"{shown(url)}: write file:///absolute/path, with three slashes.")
        path = url.split(":", 1)[1]
        path = path.removeprefix("//localhost") if parts.netloc else path
        path = "/" + path.lstrip("/")
    return os.path.normpath(Path(path).expanduser().absolute())


def _bucket_url(url: str, kind: str) -> str:
    rest = url.split(":", 1)[1]
    bucket, _, key = rest.removeprefix("//").partition("/")
    if not rest.startswith("//") or "@" in bucket or not _BUCKET.fullmatch(bucket):
        raise StoreError(
            f"{shown(url)}: write {kind}://BUCKET/FOLDER. Credentials do not belong into a URL: they are "
            f"taken from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL_S3)."
        )
    key = key.strip("/")
    if key:
        check_relative(key)
    return f"{kind}://{bucket}/{key}" if key else f"{kind}://{bucket}"


def _web_url(url: str, kind: str) -> str:
    host = urlsplit(url).hostname
    if not host or any(character.isspace() or ord(character) < 32 for character in url):
        raise StoreError(f"{shown(url)}: not a valid {kind} URL.")
    if kind == "http" and not is_loopback(host):
        raise StoreError(f"{shown(url)}: plain http is read from this machine only; use https.")
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
