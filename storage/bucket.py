"""Objects in a bucket of S3, each named by the sha256 of its bytes: written once, read in parts, with retries.

In: `s3://bucket/folder`, files and digests. S3 shows an object when its last part has come, so one that is there is
whole, and nobody changes it: a second writer of the same bytes leaves it alone (If-None-Match). What may pass (a server
that restarts or is overloaded, a timeout, a cut connection) is tried again for about a minute; what may not (a right
that lacks, credentials that expired, a bucket that is not there) is one message at once.

S3 is reached through s3fs. Endpoint, region and keys come only from the environment that every S3 tool reads
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, ...); no message repeats a value of them.
"""

import errno
import functools
import hashlib
import logging
import os
import random
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import s3fs
from aiohttp import ClientError as HttpError
from botocore.exceptions import (
    BotoCoreError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from botocore.exceptions import ClientError as RefusedError
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync

from storage.files import InputError

S3 = "s3://"
_ENDPOINT = "AWS_ENDPOINT_URL"
_FILE = "~/.aws/config"
_SETTINGS = "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
_AGAIN = "and run the same command again: finished pieces stay"
_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 4
_CONNECTIONS = 64
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 16.0, 16.0)
"""The longest waits between attempts; each is shortened at random, so that many workers do not ask all at once."""
_OUR_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_PASSING_CODES = frozenset(("RequestTimeout", "ConditionalRequestConflict", "OperationAborted", "IncompleteBody"))
_PASSING_STATUS = frozenset((408, 429, 500, 502, 503, 504))
_EXPIRED_CODES = frozenset(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"))
_KEY_CODES = frozenset(("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthorizationHeaderMalformed"))
_EMPTY = hashlib.sha256().hexdigest()
_ERRORS = (BotoCoreError, RefusedError, ResponseParserError, HttpError, OSError)
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Bucket:
    """The objects under `url`, which is s3://bucket/folder without a final slash."""

    url: str

    def address(self, digest: str) -> str:
        """Return the address of an object."""
        return f"{self.url}/{digest}"

    def size(self, digest: str) -> int | None:
        """Return the bytes of an object, None if there is none; raises InputError as :meth:`put`."""
        bucket, _, key = self.address(digest).removeprefix(S3).partition("/")

        def listed() -> int | None:  # a refused listing says why, where HEAD would say 400, 403 or 404
            answer = _client().call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
            return next((int(entry["Size"]) for entry in answer.get("Contents", ()) if entry["Key"] == key), None)

        return _tried(self.address(digest), listed)

    def read(self, digest: str, start: int, stop: int) -> tuple[bytes, int] | None:
        """Read bytes start .. stop-1 of an object, fewer where it ends before; raises InputError as :meth:`put`.

        Returns them and the bytes of the whole object, None if there is none.
        """
        bucket, _, key = self.address(digest).removeprefix(S3).partition("/")

        def read() -> tuple[bytes, int] | None:
            client = _client()
            try:
                answer = client.call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
            except OSError as error:
                if _code(error) == "InvalidRange":  # of an empty object
                    return b"", start
                if _code(error) == "NoSuchKey":
                    return None
                raise
            try:
                data: bytes = sync(client.loop, answer["Body"].read)
            finally:
                answer["Body"].close()
            return data, int(answer["ContentRange"].rpartition("/")[2])

        return _tried(self.address(digest), read)

    def put(self, path: Path, digest: str) -> None:
        """Write a file under its digest, in parts; an object that is there is left alone.

        Raises:
            InputError: the store refuses, or cannot be reached for a minute.
        """
        if self.size(digest) is None:
            parts = {"chunksize": max(_PART_BYTES, path.stat().st_size // 9_000), "max_concurrency": _PARTS_AT_ONCE}
            self._create(digest, lambda address: _client().put_file(str(path), address, mode="create", **parts))

    def check_writable(self) -> None:
        """Write the empty object, so that a right that lacks shows before any work; raises InputError as `put`."""
        self.size(_EMPTY)
        self._create(_EMPTY, lambda address: _client().pipe_file(address, b"", mode="create"))

    def remove(self, digest: str) -> None:
        """Delete an object; raises InputError as :meth:`put`."""
        bucket, _, key = self.address(digest).removeprefix(S3).partition("/")
        delete = functools.partial(_client().call_s3, "delete_object", Bucket=bucket, Key=key)
        _tried(self.address(digest), delete, writes=True)

    def _create(self, digest: str, create: Callable[[str], Any]) -> None:
        def created() -> None:
            try:
                create(self.address(digest))
            except OSError as error:
                if not isinstance(error, FileExistsError) and _code(error) != "PreconditionFailed":
                    raise

        _tried(self.address(digest), created, writes=True)


def _tried(address: str, action: Callable[[], T], writes: bool = False) -> T:
    """Do something with the store, again and again while its errors may pass.

    Raises:
        InputError: they did not pass, or cannot.
    """
    for number, wait_s in enumerate((*_WAITS_S, None)):
        try:
            return action()
        except _ERRORS as error:
            if isinstance(error, OSError) and error.errno in _OUR_DISK:
                raise
            if wait_s is None or not _may_pass(error):
                raise _explained(address, error, writes) from None
            if number == 1:  # the first happens every day
                _log.warning("%s: %s; trying again for about a minute", address, _named(error))
            time.sleep(wait_s * random.uniform(0.5, 1.0))
    raise AssertionError("the last attempt returns or raises")


def _client() -> Any:
    """Return the file system of this process for the settings that its environment has now."""
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _connected(os.getpid(), settings)


@functools.lru_cache(maxsize=4)
def _connected(_process: int, _settings: tuple[tuple[str, str], ...]) -> Any:
    """Return a file system that remembers no listings, and asks for checksums only where an operation needs them."""
    config: dict[str, Any] = {"connect_timeout": 10, "retries": {"max_attempts": 0}}
    config |= {"max_pool_connections": _CONNECTIONS}
    config |= dict.fromkeys(("request_checksum_calculation", "response_checksum_validation"), "when_required")
    store = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
    store.retries = 1  # one policy alone, ours: s3fs's waits are the same for all workers
    try:
        store.connect()
    except (BotoCoreError, ValueError) as error:
        raise _misconfigured(error) from None
    if bundle := store.session.get_config_variable("ca_bundle"):
        _check_certificates(bundle)
    return store


def _check_certificates(bundle: str) -> None:
    """Raise InputError where a request would fail at the certificates to trust, as if the connection had."""
    try:
        ssl.create_default_context(cafile=bundle)
    except OSError as error:
        reason = "it holds none" if isinstance(error, ssl.SSLError) else error.strerror
        raise InputError(
            f"S3 cannot be used: AWS_CA_BUNDLE (or ca_bundle in {_FILE}) has to name a file of certificates "
            f"({reason}); correct or unset it"
        ) from None


def _misconfigured(error: BotoCoreError | ValueError) -> InputError:
    """Return the message about a setting with which no request can be made, by the variable whose value is quoted."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_") and value}
    quoted = [name for name, value in settings.items() if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", str(error))]
    name = max(quoted, key=lambda name: len(settings[name]), default="")
    if name.startswith(_ENDPOINT) or not (name or isinstance(error, BotoCoreError)):
        name = name or _ENDPOINT
        return InputError(f"the store's address is no URL, expected http://HOST:PORT or https://HOST; correct {name}")
    cure = f"correct or unset {name}" if name else f"look at {', '.join(sorted(settings))} and {_FILE}"
    return InputError(f"S3 cannot be used ({type(error).__name__}); {cure}")


def _answer(error: BaseException) -> dict[str, Any]:
    """Return the store's answer behind an error, empty where none came."""
    answer: dict[str, Any] | None = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return answer or {}


def _code(error: BaseException) -> str:
    return str(_answer(error).get("Error", {}).get("Code", ""))


def _named(error: BaseException) -> str:
    return _code(error) or type(error).__name__


def _may_pass(error: BaseException) -> bool:
    """Tell whether the same request may be answered a little later."""
    if answer := _answer(error):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _PASSING_STATUS or _code(error) in _PASSING_CODES
    passing = (NoConnectionError, HTTPClientError, ResponseParserError, HttpError, ConnectionError, TimeoutError)
    return isinstance(error, passing)


def _explained(address: str, error: BaseException, writes: bool) -> InputError:
    """Return the message for people about an error of the store."""
    code, bucket = _code(error), address.removeprefix(S3).partition("/")[0]
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return InputError(f"{address}: there are no S3 credentials; set {_SETTINGS}")
    if code in _EXPIRED_CODES:
        return InputError(f"{address}: the S3 credentials have expired ({code}); renew them, {_AGAIN}")
    if code == "NoSuchBucket":
        return InputError(f"{address}: there is no bucket {bucket}; create it or correct storage.root, {_AGAIN}")
    if code in _KEY_CODES:
        return InputError(f"{address}: the store refuses the S3 credentials ({code}); check {_SETTINGS}, {_AGAIN}")
    if isinstance(error, PermissionError):
        right = "written" if writes else "read"
        return InputError(
            f"{address} may not be {right} with these S3 credentials ({code or 'access denied'}); give them that right "
            f"on bucket {bucket} or set storage.root to one of yours, {_AGAIN}"
        )
    if _may_pass(error):
        return InputError(
            f"{address} could not be reached for about a minute ({_named(error)}); look after the store, check "
            f"{_SETTINGS}, {_AGAIN}"
        )
    if isinstance(error, BotoCoreError) and not isinstance(error, ParamValidationError):  # no request was made
        return _misconfigured(error)
    return InputError(f"{address}: the store refuses the request ({_named(error)}: {error}); check storage.root")
