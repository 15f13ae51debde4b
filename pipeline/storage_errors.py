"""What went wrong in a store, in words that say what to mend.

The libraries below raise a dozen unrelated exceptions with the decisive part, S3's error
code, buried in a cause. Here each becomes one StoreError. Exceptions that we do not know
are named by their type and text, never swallowed.
"""

import errno
import os
from collections.abc import Iterator
from urllib.error import HTTPError

from pipeline.urls import CutError, MissingError, StoreError, scheme, shown

_CREDENTIALS = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN for temporary ones), "
    "or AWS_PROFILE; for a store other than AWS also AWS_ENDPOINT_URL_S3."
)
# No answer of a network.
_MISTAKES = (TypeError, AttributeError, NameError, AssertionError, ImportError)

_BY_CODE = {
    "NoSuchBucket": "the bucket does not exist. Create it, or correct the name; buckets of another "
    "store are found through AWS_ENDPOINT_URL_S3.",
    "InvalidBucketName": "that is no valid bucket name.",
    "InvalidAccessKeyId": f"the store does not know the access key. {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key does not fit the access key. {_CREDENTIALS}",
    "InvalidToken": f"the session token is not valid. {_CREDENTIALS}",
    "RequestExpired": f"the credentials have expired. {_CREDENTIALS}",
    "ExpiredToken": f"the credentials have expired. {_CREDENTIALS}",
    "RequestTimeTooSkewed": "the clocks of this machine and of the store differ too much; set this one.",
    "AccessDenied": f"access is denied with the present credentials. {_CREDENTIALS}",
    "403": f"access is denied with the present credentials. {_CREDENTIALS}",
    "PermanentRedirect": "the bucket lies in another region; set AWS_DEFAULT_REGION to it.",
    "301": "the bucket lies in another region; set AWS_DEFAULT_REGION to it.",
    "AuthorizationHeaderMalformed": "the region is wrong; set AWS_DEFAULT_REGION to the bucket's.",
    "IllegalLocationConstraintException": "the bucket lies in another region; set AWS_DEFAULT_REGION.",
    "QuotaExceeded": "the store's quota is used up.",
    "EntityTooLarge": "the store does not take files of this size.",
}
_BY_TYPE = {
    "NoCredentialsError": f"no credentials were found. {_CREDENTIALS}",
    "PartialCredentialsError": f"the credentials are incomplete. {_CREDENTIALS}",
    "CredentialRetrievalError": f"the credentials could not be fetched. {_CREDENTIALS}",
    "TokenRetrievalError": f"the credentials could not be refreshed. {_CREDENTIALS}",
    "ProfileNotFound": "AWS_PROFILE names a profile that does not exist.",
    "InvalidEndpointURLError": "AWS_ENDPOINT_URL_S3 is no URL.",
    "ParamValidationError": "the store's client refuses the name.",
}
_BY_ERRNO = {
    errno.ENOSPC: "no space is left on the disk. Free some, or choose another place.",
    errno.EDQUOT: "the disk quota is used up. Free some, or choose another place.",
    errno.EACCES: "permission denied. Choose a place that you may write to, or change its permissions.",
    errno.EPERM: "permission denied. Choose a place that you may write to, or change its permissions.",
    errno.EROFS: "the file system is read-only. Choose another place.",
    errno.ENOTDIR: "a part of the path is a file, not a folder.",
    errno.EEXIST: "a part of the path is a file, not a folder.",
    errno.EISDIR: "is a folder, not a file.",
    errno.ENAMETOOLONG: "the name is too long.",
    errno.EMFILE: "too many files are open (see ulimit -n).",
}
_UNREACHABLE = ("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError", "URLError")
# S3 answers these with a status that would else be final.
_PASSING = {
    "BandwidthLimitExceeded",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestThrottled",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
_RANGE_NOT_SATISFIABLE = 416
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504, 507, 509)
_CREDENTIAL_CODES = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestExpired",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_CREDENTIAL_TYPES = {
    "CredentialRetrievalError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "TokenRetrievalError",
}


_SILENT = ("AioReadTimeoutError", "FSTimeoutError", "ReadTimeoutError", "TimeoutError")


CUT_REMEDY = "It was cut short or replaced; write it again."


class BrokenError(OSError):
    """An answer that broke off, or a connection that hardly moves."""


class AnswerError(OSError):
    """An answer that does not fit the request."""


def is_mistake(error: BaseException) -> bool:
    """Whether this is what mistakes in programs look like, ours or a library's."""
    return isinstance(error, _MISTAKES)


def is_final(error: BaseException) -> bool:
    """Whether trying again is pointless: the store has answered, and the answer is no."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotImplementedError):
        return True
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    if type(error).__name__ in _BY_TYPE or _is_distrust(error):
        return True
    code, status = code_of(error), _status(error)
    if code in _PASSING or status in _PASSING_STATUS:
        return False
    return code in _BY_CODE or _is_beyond_the_end(error) or (status is not None and status >= 300)


def about_credentials(error: BaseException) -> bool:
    """Whether the store refused the credentials themselves; of good ones it means that they expired."""
    return code_of(error) in _CREDENTIAL_CODES or type(error).__name__ in _CREDENTIAL_TYPES


def is_unexplained(error: BaseException) -> bool:
    """Whether this is a refusal that gives no reason, as the answers to HEAD do."""
    return code_of(error) in ("400", "401", "403")


def retry_after(error: BaseException) -> float | None:
    """Seconds after which the store wants to be asked again, if it says so."""
    for each in _causes(error):
        response = getattr(each, "response", None)
        headers = (
            response.get("ResponseMetadata", {}).get("HTTPHeaders", {}) if isinstance(response, dict) else {}
        )
        said = headers.get("retry-after") or (
            each.headers.get("Retry-After") if isinstance(each, HTTPError) else None
        )
        if said and said.isdecimal():
            return float(said)
    return None


def _is_distrust(error: BaseException) -> bool:
    """Whether a certificate was refused; other TLS errors are broken connections."""
    # botocore and aiohttp wrap the standard library's error without making it a cause.
    return any("CERTIFICATE_VERIFY_FAILED" in str(each) for each in _causes(error))


def _is_beyond_the_end(error: BaseException) -> bool:
    """Whether the store says that a file ends before the first byte asked for."""
    return code_of(error) == "InvalidRange" or _status(error) == _RANGE_NOT_SATISFIABLE


def explain(error: BaseException, url: str) -> StoreError:
    """The StoreError that tells a user what `error` means for `url`."""
    where, code, kind = shown(url), code_of(error), type(error).__name__
    if _is_beyond_the_end(error):
        return CutError(f"{where}: ends before the bytes asked for. {CUT_REMEDY}")
    if code in _BY_CODE:
        return StoreError(f"{where}: {_BY_CODE[code]}")
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{where}: is not there.")
    if kind in _BY_TYPE:
        return StoreError(f"{where}: {_BY_TYPE[kind]}")
    if _is_distrust(error):
        return StoreError(
            f"{where}: the server's certificate is not trusted. For a private certificate authority "
            f"set AWS_CA_BUNDLE (for https:// SSL_CERT_FILE) to its file."
        )
    if kind in _UNREACHABLE or isinstance(error, ConnectionError):
        return StoreError(f"{where}: {_endpoint(url)} cannot be reached. {_reachability_hint(url)}")
    if isinstance(error, PermissionError) and scheme(url) != "file":
        return StoreError(f"{where}: access is denied with the present credentials. {_credentials_hint(url)}")
    if isinstance(error, OSError) and error.errno in _BY_ERRNO:
        return StoreError(f"{where}: {_BY_ERRNO[error.errno]}")
    if isinstance(error, BrokenError):
        return StoreError(f"{where}: the connection to {_endpoint(url)} keeps breaking: {error}.")
    if isinstance(error, AnswerError):
        return StoreError(f"{where}: the answers of {_endpoint(url)} do not fit what is asked: {error}.")
    if kind in _SILENT:
        return StoreError(f"{where}: {_endpoint(url)} does not answer in time. {_reachability_hint(url)}")
    if code in _PASSING or _status(error) in _PASSING_STATUS:
        return StoreError(
            f"{where}: {_endpoint(url)} is overloaded or broken: it keeps answering {_said(error)}."
        )
    return StoreError(f"{where}: {kind}: {shown(str(error)) or 'no further details'}")


def explain_write(error: BaseException, path: str) -> StoreError:
    """As `explain`, for a file that was to be written: that it is not there is no news then."""
    if isinstance(error, FileNotFoundError):
        return StoreError(
            f"{path}: cannot be written ({error.strerror}: {error.filename}). Choose another place."
        )
    return explain(error, path)


def code_of(error: BaseException) -> str | None:
    """The error code of S3's answer, from the exception or from what caused it."""
    for each in _causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            code = response.get("Error", {}).get("Code")
            return None if code is None else str(code)
    return None


def _status(error: BaseException) -> int | None:
    """The HTTP status of the answer, from the exception or from what caused it."""
    for each in _causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return None if status is None else int(status)
        if isinstance(each, HTTPError):
            return each.code
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__


def _endpoint(url: str) -> str:
    if scheme(url) != "s3":
        return "the server"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f"the S3 endpoint {shown(endpoint)}" if endpoint else "AWS S3"


def _said(error: BaseException) -> str:
    code, status = code_of(error), _status(error)
    return " ".join(str(part) for part in (status, None if code == str(status) else code) if part)


def _reachability_hint(url: str) -> str:
    if scheme(url) == "s3":
        return "Is it running, and is AWS_ENDPOINT_URL_S3 right?"
    return "Is the name right, and is there a network?"


def _credentials_hint(url: str) -> str:
    return _CREDENTIALS if scheme(url) == "s3" else "Check the account that the environment provides."
