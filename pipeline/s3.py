"""Requests to S3, through the client that s3fs holds: each is small enough to be tried again.

s3fs's own functions on files are not used. They begin a broken read from nothing, ask for
sizes that the answer states anyway, lose a listing of a thousand pages with one of them and
wait without limit for a server that stops taking an upload. Here each page, part and read
is a request of its own, under our patience.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.buckets import system
from pipeline.limits import limits
from pipeline.patience import patiently
from pipeline.storage_errors import code_of, is_unexplained
from pipeline.transfer import Answer, described

_BLOCK_BYTES = 4 << 20
_CHUNK_BYTES = 1 << 20
PART_BYTES = 16 << 20
"""Files from twice this size on are uploaded in parts."""
_MOST_PARTS = 10_000
_PARTS_AT_ONCE = 4
_SLOWEST_UPLOAD_BYTES_PER_SECOND = 64 << 10
_KEYS_PER_DELETION = 1000


def _place(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def _ask(url: str, method: str, body_bytes: int = 0, **arguments: Any) -> Any:
    """One request, no second try. The limit is for what the client's own time-outs do not see."""
    now = limits()
    upload_seconds = body_bytes / _SLOWEST_UPLOAD_BYTES_PER_SECOND
    # Waiting for one of the connections counts, too: others may use them for an answer each.
    limit = 2 * (now.connect_timeout_seconds + now.read_timeout_seconds) + upload_seconds
    return system(url).call_s3(method, timeout=limit, Bucket=_place(url)[0], **arguments)


# --- reading ----------------------------------------------------------------------------------


def open_object(url: str, start: int, end: int | None) -> Answer:
    """Ask for the bytes [start, end) of an object, or for all from `start` on."""
    part: dict[str, Any] = (
        {} if start == 0 and end is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
    )
    response = _ask(url, "get_object", Key=_place(url)[1], **part)
    about, body, loop = response["ResponseMetadata"], response["Body"], system(url).loop

    def close() -> None:
        # A connection belongs to its loop's thread.
        loop.call_soon_threadsafe(body.close)

    return described(about["HTTPStatusCode"], about["HTTPHeaders"], _blocks(loop, body), close)


def _blocks(loop: Any, body: Any) -> Iterator[bytes]:
    """The bytes of an answer as they come, those that came before an error included."""
    from fsspec.asyn import sync

    patience_seconds = limits().read_timeout_seconds

    async def fill(pieces: list[bytes]) -> bool:
        """Take a block, or what comes within one time-out; whether there may be more."""
        give_back, taken = loop.time() + patience_seconds, 0
        while taken < _BLOCK_BYTES and loop.time() < give_back:
            piece = await body.read(_CHUNK_BYTES)
            if not piece:
                return False
            pieces.append(piece)
            taken += len(piece)
        return True

    more = True
    while more:
        pieces: list[bytes] = []
        try:
            more = sync(loop, fill, pieces)
        finally:
            yield from pieces


def size(url: str) -> int:
    """Bytes of an object. Raises FileNotFoundError, also for a folder."""
    key = _place(url)[1]
    try:
        return int(_ask(url, "head_object", Key=key)["ContentLength"])
    except Exception as error:
        if not is_unexplained(error):
            raise
        # The answer to HEAD has no body to say why it refuses; that to GET does, or is no refusal.
        answer = open_object(url, 0, None)
        answer.close()
        if answer.total is None:
            raise
        return answer.total


def exists(url: str) -> bool:
    """Whether there is an object `url`, or one below it. Raises if there is no such bucket."""
    key = _place(url)[1]
    try:
        if key:
            size(url)
            return True
    except FileNotFoundError:
        pass  # A folder, perhaps; and only a listing's answer tells a missing bucket.
    page = _ask(url, "list_objects_v2", Prefix=f"{key}/" if key else "", MaxKeys=1)
    return not key or bool(page.get("Contents"))


def entries(url: str) -> dict[str, int | None]:
    """Size of each object directly in the folder `url` by name; None for folders."""
    found: dict[str, int | None] = {}
    prefix = _prefix(url)
    for page in _pages(url, Delimiter="/"):
        found |= {each["Prefix"].removeprefix(prefix)[:-1]: None for each in page.get("CommonPrefixes", [])}
        found |= {each["Key"].removeprefix(prefix): int(each["Size"]) for each in page.get("Contents", [])}
    found.pop("", None)  # Some clients write an object that stands for the folder itself.
    return found


def times(url: str) -> dict[str, int]:
    """When each object directly in the folder `url` was written, in nanoseconds since 1970, by name."""
    prefix = _prefix(url)
    pages = _pages(url, Delimiter="/")
    objects = (each for page in pages for each in page.get("Contents", []))
    return {
        each["Key"].removeprefix(prefix): int(each["LastModified"].timestamp()) * 10**9 for each in objects
    }


def _prefix(url: str) -> str:
    key = _place(url)[1]
    return f"{key}/" if key else ""


def _pages(url: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    while True:
        page: dict[str, Any] = patiently(
            lambda: _ask(url, "list_objects_v2", Prefix=_prefix(url), **arguments), url
        )
        yield page
        if not page.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


# --- writing ----------------------------------------------------------------------------------


def write(url: str, data: bytes | memoryview) -> None:
    """Put an object of these bytes, under our patience."""
    view, key = memoryview(data), _place(url)[1]
    if len(data) < 2 * PART_BYTES:
        patiently(lambda: _ask(url, "put_object", len(data), Key=key, Body=bytes(view)), url)
        return
    upload_id = patiently(lambda: _ask(url, "create_multipart_upload", Key=key), url)["UploadId"]
    try:
        parts = _put_parts(url, upload_id, view)
        _complete(url, upload_id, parts, len(data))
    except BaseException:
        _abort(url, key, upload_id)
        raise


def _put_parts(url: str, upload_id: str, view: memoryview) -> list[dict[str, Any]]:
    length = max(PART_BYTES, math.ceil(len(view) / _MOST_PARTS))

    def put(number: int) -> dict[str, Any]:
        data = bytes(view[(number - 1) * length : number * length])
        arguments = {"Key": _place(url)[1], "UploadId": upload_id, "PartNumber": number, "Body": data}
        answer = patiently(lambda: _ask(url, "upload_part", len(data), **arguments), url)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    numbers = range(1, math.ceil(len(view) / length) + 1)
    with ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="upload") as pool:
        futures = [pool.submit(put, number) for number in numbers]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _complete(url: str, upload_id: str, parts: Sequence[dict[str, Any]], total: int) -> None:
    key = _place(url)[1]

    def complete() -> None:
        try:
            _ask(
                url,
                "complete_multipart_upload",
                Key=key,
                UploadId=upload_id,
                MultipartUpload={"Parts": list(parts)},
            )
        except FileNotFoundError as error:
            # The answer to an earlier try was lost: the upload is gone because it is complete.
            if code_of(error) != "NoSuchUpload" or size(url) != total:
                raise

    patiently(complete, url)


def delete(url: str) -> None:
    """Delete one object. Nothing there: no error."""
    patiently(lambda: _ask(url, "delete_object", Key=_place(url)[1]), url)


def delete_below(url: str) -> int:
    """Delete the objects below a folder; returns how many the store refused to delete."""
    refused = 0
    keys = [each["Key"] for page in _pages(url) for each in page.get("Contents", [])]
    for start in range(0, len(keys), _KEYS_PER_DELETION):
        objects = [{"Key": key} for key in keys[start : start + _KEYS_PER_DELETION]]
        arguments: dict[str, Any] = {"Delete": {"Objects": objects, "Quiet": True}}
        answer = patiently(lambda: _ask(url, "delete_objects", **arguments), url)  # noqa: B023
        refused += len(answer.get("Errors", []))
    return refused


def drop_uploads(url: str, of: Callable[[str], bool]) -> int:
    """Give up the uploads in parts below a folder of whose path below it `of` is true; how many."""
    prefix, found = _prefix(url), []
    after: dict[str, Any] = {}

    def next_page() -> Any:
        return _ask(url, "list_multipart_uploads", Prefix=prefix, **after)

    while True:
        page = patiently(next_page, url)
        found += [each for each in page.get("Uploads", []) if of(each["Key"].removeprefix(prefix))]
        if not page.get("IsTruncated"):
            break
        after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
    for each in found:
        _abort(url, each["Key"], each["UploadId"])
    return len(found)


def _abort(url: str, key: str, upload_id: str) -> None:
    def abort() -> None:
        try:
            _ask(url, "abort_multipart_upload", Key=key, UploadId=upload_id)
        except FileNotFoundError as error:
            # It has ended meanwhile, or the answer to an earlier try was lost.
            if code_of(error) != "NoSuchUpload":
                raise

    patiently(abort, url)
