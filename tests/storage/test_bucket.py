"""Objects of a bucket against a real S3 server: written once, retried where that helps, one message where not."""

import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from storage import bucket as module
from storage.bucket import Bucket
from storage.files import InputError
from tests.s3_server import FaultyProxy, S3Server, cut, refuse

DATA = bytes(range(256)) * 50_000
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def objects(bucket: str, tmp_path: Path) -> Bucket:
    """Return a folder of the real bucket that no other test has."""
    return Bucket(f"{bucket}/{tmp_path.name}")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file of 12.8 MB with the digest DIGEST."""
    (tmp_path / "file").write_bytes(DATA)
    return tmp_path / "file"


@pytest.fixture
def proxy(s3: S3Server, objects: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Stand in front of the server; waits are short."""
    monkeypatch.setattr(module, "_WAITS_S", (0.01,) * 8)
    with FaultyProxy(s3.environment["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def whole(objects: Bucket) -> bytes:
    """Read the object DIGEST in parts."""
    return b"".join(part(objects, start, start + 5_000_000) for start in range(0, len(DATA), 5_000_000))


def part(objects: Bucket, start: int, stop: int) -> bytes:
    read = objects.read(DIGEST, start, stop)
    assert read is not None
    assert read[1] == len(DATA)
    return read[0]


@pytest.mark.parametrize("part_bytes", [5 << 20, 16 << 20])
def test_a_file_is_written_in_parts_and_read_again(
    part_bytes: int, objects: Bucket, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PART_BYTES", part_bytes)
    assert objects.size(DIGEST) is None
    assert objects.read(DIGEST, 0, 1) is None
    objects.put(file, DIGEST)
    assert objects.size(DIGEST) == len(DATA)
    assert whole(objects) == DATA
    objects.remove(DIGEST)
    assert objects.size(DIGEST) is None


@pytest.mark.parametrize("part_bytes", [5 << 20, 16 << 20])
def test_an_object_that_is_there_is_left_alone(
    part_bytes: int, objects: Bucket, file: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another process writes it between the look and the upload: If-None-Match."""
    monkeypatch.setattr(module, "_PART_BYTES", part_bytes)
    objects.put(file, DIGEST)
    proxy.requests.clear()
    objects.put(file, DIGEST)
    assert [request.split()[0] for request in proxy.requests] == ["GET"], "it looks, and uploads nothing"
    file.write_bytes(DATA[::-1])
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "size", lambda *_: None)
        objects.put(file, DIGEST)
    assert part(objects, 0, 1000) == DATA[:1000]


def test_an_object_without_bytes_is_read(objects: Bucket, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    digest = hashlib.sha256(b"").hexdigest()
    objects.put(tmp_path / "empty", digest)
    assert objects.size(digest) == 0
    assert objects.read(digest, 0, 1000) == (b"", 0)


FAULTS: dict[str, Callable[[BaseHTTPRequestHandler], bool]] = {
    "500": lambda request: refuse(request, 500, "InternalError"),
    "503": lambda request: refuse(request, 503, "SlowDown"),
    "429": lambda request: refuse(request, 429, "TooManyRequests"),
    "timeout": lambda request: refuse(request, 400, "RequestTimeout"),
    "cut": cut,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_tried_again(fault: str, objects: Bucket, file: Path, proxy: FaultyProxy) -> None:
    """Every request fails twice, the third is answered."""
    counts: dict[str, int] = {}

    def twice(request: BaseHTTPRequestHandler) -> bool:
        key = f"{request.command} {request.path} {request.headers['Range']}"
        counts[key] = counts.get(key, 0) + 1
        return counts[key] % 3 != 0 and FAULTS[fault](request)

    proxy.before = twice
    objects.put(file, DIGEST)
    assert whole(objects) == DATA
    assert set(counts.values()) >= {3}


def test_an_answer_that_is_cut_in_its_middle_is_read_again(objects: Bucket, file: Path, proxy: FaultyProxy) -> None:
    objects.put(file, DIGEST)
    cuts = iter(range(3))

    def half(request: BaseHTTPRequestHandler, body: bytes) -> bytes:
        if "Range" in request.headers and next(cuts, None) is not None:
            request.send_response_only(206)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body[: len(body) // 2])
            raise ConnectionResetError
        return body

    proxy.body = half
    assert whole(objects) == DATA
    assert next(cuts, None) is None


def test_a_slow_store_is_waited_for(objects: Bucket, file: Path, proxy: FaultyProxy) -> None:
    def slow(_: BaseHTTPRequestHandler) -> bool:
        time.sleep(0.3)
        return False

    proxy.before = slow
    objects.put(file, DIGEST)
    assert whole(objects) == DATA


def test_a_store_that_stays_away_is_one_message(objects: Bucket, file: Path, proxy: FaultyProxy) -> None:
    proxy.before = FAULTS["503"]
    with pytest.raises(InputError, match=r"could not be reached for about a minute \(SlowDown\).*finished pieces stay"):
        objects.put(file, DIGEST)
    assert len(proxy.requests) == 9


REFUSALS = [
    (403, "AccessDenied", r"may not be read with these S3 credentials \(AccessDenied\)"),
    (400, "ExpiredToken", r"the S3 credentials have expired \(ExpiredToken\); renew them"),
    (403, "InvalidAccessKeyId", r"refuses the S3 credentials \(InvalidAccessKeyId\)"),
    (501, "NotImplemented", "refuses the request"),
]


@pytest.mark.parametrize(("status", "code", "message"), REFUSALS)
def test_what_cannot_pass_is_one_message_at_once(
    status: int, code: str, message: str, objects: Bucket, file: Path, proxy: FaultyProxy
) -> None:
    proxy.before = lambda request: refuse(request, status, code)
    with pytest.raises(InputError, match=message) as caught:
        objects.put(file, DIGEST)
    assert len(proxy.requests) == 1
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_credentials_that_expire_between_the_parts_of_a_file_leave_nothing(
    objects: Bucket, file: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PART_BYTES", 5 << 20)
    proxy.before = lambda request: "partNumber=2" in request.path and refuse(request, 400, "ExpiredToken")
    with pytest.raises(InputError, match="have expired"):
        objects.put(file, DIGEST)
    assert objects.size(DIGEST) is None
    proxy.before = lambda _: False
    objects.put(file, DIGEST)
    assert whole(objects) == DATA


PUTTING = """
import sys
from pathlib import Path
from storage import bucket

bucket._PART_BYTES = 5 << 20
bucket.Bucket(sys.argv[1]).put(Path(sys.argv[2]), sys.argv[3])
"""


def test_a_process_that_is_killed_between_the_parts_of_a_file_leaves_nothing(
    s3: S3Server, objects: Bucket, file: Path, proxy: FaultyProxy
) -> None:
    hangs = threading.Event()

    def hang(request: BaseHTTPRequestHandler) -> bool:
        if is_second := "partNumber=2" in request.path:
            hangs.set()
            time.sleep(3)
        return is_second

    proxy.before = hang
    process = subprocess.Popen([sys.executable, "-c", PUTTING, objects.url, str(file), DIGEST])
    assert hangs.wait(600)
    process.kill()
    process.wait()
    name = objects.address(DIGEST).removeprefix("s3://puzzle/")
    uploads = s3.client().call_s3("list_multipart_uploads", Bucket=s3.bucket, Prefix=name)["Uploads"]
    assert [upload["Key"] for upload in uploads] == [name], "the first part waits for the others"
    assert objects.size(DIGEST) is None
    proxy.before = lambda _: False
    objects.put(file, DIGEST)
    assert whole(objects) == DATA


def test_wrong_keys_are_refused_and_never_shown(objects: Bucket, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    with pytest.raises(InputError, match=r"refuses the S3 credentials \(SignatureDoesNotMatch\)") as caught:
        objects.put(file, DIGEST)
    assert "a-wrong-secret" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_one_message(bucket: str, file: Path) -> None:
    missing = Bucket(f"{bucket}-missing/folder")
    actions: tuple[Callable[[], object], ...] = (
        missing.check_writable,
        lambda: missing.put(file, DIGEST),
        lambda: missing.size(DIGEST),
    )
    for action in actions:
        with pytest.raises(InputError, match=r"there is no bucket puzzle-missing; create it or correct storage\.root"):
            action()


def test_a_bucket_that_may_only_be_read(
    s3: S3Server, objects: Bucket, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.put(file, DIGEST)
    objects.check_writable()
    objects.check_writable()
    for name, value in s3.reader.items():
        monkeypatch.setenv(name, value)
    assert whole(objects) == DATA
    objects.put(file, DIGEST)
    actions: tuple[Callable[[], object], ...] = (
        objects.check_writable,
        lambda: objects.remove(DIGEST),
        lambda: objects.put(file, "0" * 64),
    )
    for action in actions:
        with pytest.raises(InputError, match="may not be written with these S3 credentials"):
            action()
    assert objects.size("0" * 64) is None


def test_a_server_that_is_killed_and_started_again(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of reading; what it had stays, and readers do not notice."""
    monkeypatch.setattr(module, "_WAITS_S", (0.2,) * 200)
    (tmp_path / "server").mkdir()
    with S3Server(tmp_path / "server") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        objects = Bucket(f"s3://{server.bucket}/folder")
        objects.put(file, DIGEST)
        first = part(objects, 0, 5_000_000)
        server.kill()
        starting = threading.Timer(1.0, server.start)
        starting.start()
        rest = part(objects, 5_000_000, len(DATA))
        starting.join()
        assert first + rest == DATA
        server.kill()
        starting = threading.Timer(1.0, server.start)
        starting.start()
        objects.put(file, "0" * 64)
        starting.join()
        assert objects.size("0" * 64) == len(DATA)


@pytest.mark.parametrize("address", ["s3cret:9000", "http://[::1", "ftp://s3cret:1", "http://s3cret:99999"])
def test_an_endpoint_that_is_no_url_is_an_error(address: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(InputError, match=r"address is no URL.*; correct AWS_ENDPOINT_URL$") as caught:
        Bucket(bucket).size(DIGEST)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AWS_PROFILE", "s3cret", "S3 cannot be used (ProfileNotFound); correct or unset AWS_PROFILE"),
        ("AWS_DEFAULT_REGION", "s3cret s3cret", "(InvalidRegionError); correct or unset AWS_DEFAULT_REGION"),
        ("AWS_RETRY_MODE", "s3cret", "S3 cannot be used (InvalidRetryModeError); correct or unset AWS_RETRY_MODE"),
        ("AWS_METADATA_SERVICE_TIMEOUT", "s3cret", "(ValueError); correct or unset AWS_METADATA_SERVICE_TIMEOUT"),
        ("AWS_CONFIG_FILE", "s3cret.txt", "S3 cannot be used (ConfigParseError); correct or unset AWS_CONFIG_FILE"),
        ("AWS_CA_BUNDLE", "s3cret.pem", "a file of certificates (No such file or directory); correct or unset it"),
        ("AWS_CA_BUNDLE", "s3cret.txt", "a file of certificates (it holds none); correct or unset it"),
    ],
)
def test_a_setting_that_no_request_can_be_made_with_is_named_at_once(
    name: str, value: str, message: str, objects: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3cret.txt").write_text("[", encoding="utf-8")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "_WAITS_S", ())
    with pytest.raises(InputError) as caught:
        objects.size(DIGEST)
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)
