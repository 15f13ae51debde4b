"""What went wrong in a store, in words that say what to mend.

The libraries below raise a dozen unrelated exceptions with the decisive part, S3's error
code, buried in a cause. Here each becomes one StoreError. Exceptions that we do not know
are named by their type and text, never swallowed.
"""

import errno
import os

from pipeline.urls import MissingError, StoreError, scheme, shown

_CREDENTIALS = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN for temporary ones), "
    "or AWS_PROFILE; for a store other than AWS also AWS_ENDPOINT_URL_S3."
)
_BY_CODE = {
    "NoSuchBucket": "the bucket does not exist. Create it, or correct the name; buckets of another "
    "store are found through AWS_ENDPOINT_URL_S3.",
    "InvalidBucketName": "that is no valid bucket name.",
    "InvalidAccessKeyId": f"the store does not know the access key. {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key does not fit the access key. {_CREDENTIALS}",
    "InvalidToken": f"the session token is not valid. {_CREDENTIALS}",
    "ExpiredToken": f"the credentials have expired. {_CREDENTIALS}",
    "RequestTimeTooSkewed": "the clocks of this machine and of the store differ too much; set this one.",
    "AccessDenied": f"access is denied with the present credentials. {_CREDENTIALS}",
    "403": f"access is denied with the present credentials. {_CREDENTIALS}",
    "PermanentRedirect": "the bucket lies in another region; set AWS_DEFAULT_REGION to it.",
    "301": "the bucket lies in another region; set AWS_DEFAULT_REGION to it.",
    "AuthorizationHeaderMalformed": "the region is wrong; set AWS_DEFAULT_REGION to the bucket's.",
    "IllegalLocationConstraintException": "the bucket lies in another region; set AWS_DEFAULT_REGION.",
    "InvalidRange": "ends before the bytes asked for. It was cut short or replaced; write it again.",
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
_TRUST = ("SSLError", "SSLCertVerificationError", "ClientConnectorCertificateError")


def is_final(error: BaseException) -> bool:
    """Whether trying again is pointless: the store has answered, and the answer is no."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotImplementedError):
        return True
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    return _code(error) in _BY_CODE or type(error).__name__ in {*_BY_TYPE, *_TRUST}


def explain(error: BaseException, url: str) -> StoreError:
    """The StoreError that tells a user what `error` means for `url`."""
    where, code, kind = shown(url), _code(error), type(error).__name__
    if code in _BY_CODE:
        return StoreError(f"{where}: {_BY_CODE[code]}")
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{where}: is not there.")
    if kind in _BY_TYPE:
        return StoreError(f"{where}: {_BY_TYPE[kind]}")
    if kind in _TRUST:
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
    return StoreError(f"{where}: {kind}: {shown(str(error)) or 'no further details'}")


def explain_write(error: BaseException, path: str) -> StoreError:
    """As `explain`, for a file that was to be written: that it is not there is no news then."""
    if isinstance(error, FileNotFoundError):
        return StoreError(
            f"{path}: cannot be written ({error.strerror}: {error.filename}). Choose another place."
        )
    return explain(error, path)


def _code(error: BaseException) -> str | None:
    """The error code of S3's answer, from the exception or from what caused it."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            code = response.get("Error", {}).get("Code")
            return None if code is None else str(code)
        seen = seen.__cause__
    return None


def _endpoint(url: str) -> str:
    if scheme(url) != "s3":
        return "the server"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f"the S3 endpoint {shown(endpoint)}" if endpoint else "AWS S3"


def _reachability_hint(url: str) -> str:
    if scheme(url) == "s3":
        return "Is it running, and is AWS_ENDPOINT_URL_S3 right?"
    return "Is the name right, and is there a network?"


def _credentials_hint(url: str) -> str:
    return _CREDENTIALS if scheme(url) == "s3" else "Check the account that the environment provides."
