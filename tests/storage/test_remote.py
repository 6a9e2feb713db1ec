"""Local and S3 addresses, against a real S3 server."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import s3fs

from storage.files import InputError
from storage.remote import expand, fetch, fingerprint


@pytest.fixture
def store(bucket: str) -> s3fs.S3FileSystem:
    """Return the server through s3fs, with a few files in it."""
    store = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    for name, data in {"a.txt": b"first", "b.txt": b"second", "c.json": b"{}", "deep/d.txt": b"x" * 70_000}.items():
        store.pipe(f"{bucket}/folder/{name}", data)
    return store


def test_a_local_path_is_returned_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    assert fetch(str(tmp_path), tmp_path / "unused") == tmp_path
    assert fetch(str(tmp_path / "file"), tmp_path / "unused") == tmp_path / "file"
    assert not (tmp_path / "unused").exists()


def test_local_patterns_are_sorted_and_hidden_files_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.txt", ".hidden.txt", "c.json", "sub/e.txt", "x[1].txt", "x1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert expand(f"{tmp_path}/*.txt") == [f"{tmp_path}/{name}" for name in ("a.txt", "b.txt", "x1.txt", "x[1].txt")]
    assert expand(f"{tmp_path}/x[1].txt") == [f"{tmp_path}/x[1].txt"], "a name that exists is not a pattern"
    monkeypatch.chdir(tmp_path)
    assert expand("**/*.txt")[-1] == "x[1].txt"
    assert "sub/e.txt" in expand("**/*.txt")


def test_a_part_of_a_local_pattern_that_exists_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data[1]/a.txt", "data1/b.txt", "a*.txt", "ab.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    assert expand("data[1]/*.txt") == ["data[1]/a.txt"]
    assert expand("data?/*.txt") == ["data1/b.txt"]
    assert expand("a*.txt") == ["a*.txt"]


@pytest.mark.parametrize("address", ["a**.txt", "~nobody-of-this-name/a.txt", "x" * 300, "s3://", "s3://*/a.txt"])
def test_addresses_that_no_file_can_have_are_errors(address: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be looked up|names no bucket"):
        expand(address)


@pytest.mark.parametrize("address", ["missing.txt", "*.parquet", "", "."])
def test_nothing_that_matches_is_an_error(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no file matches"):
        expand(address)


def test_missing_local_path_and_unknown_scheme_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        fetch(str(tmp_path / "missing"), tmp_path)
    with pytest.raises(InputError, match="gs:// addresses cannot be read"):
        expand("gs://bucket/file")


def test_a_file_comes_from_s3(bucket: str, store: s3fs.S3FileSystem, tmp_path: Path) -> None:
    file = fetch(f"{bucket}/folder/a.txt", tmp_path)
    assert file == tmp_path / "a.txt"
    assert file.read_bytes() == b"first"


def test_a_folder_comes_from_s3_with_all_below_it(bucket: str, store: s3fs.S3FileSystem, tmp_path: Path) -> None:
    folder = fetch(f"{bucket}/folder/", tmp_path)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert files == {"a.txt": 5, "b.txt": 6, "c.json": 2, "deep/d.txt": 70_000}


def test_patterns_on_s3(bucket: str, store: s3fs.S3FileSystem) -> None:
    assert expand(f"{bucket}/folder/*.txt") == [f"{bucket}/folder/a.txt", f"{bucket}/folder/b.txt"]
    assert expand(f"{bucket}/folder/**/*.txt")[-1] == f"{bucket}/folder/deep/d.txt"
    assert expand(f"{bucket}/folder/c.json") == [f"{bucket}/folder/c.json"]


def test_a_key_of_s3_that_exists_is_a_name(bucket: str, store: s3fs.S3FileSystem, tmp_path: Path) -> None:
    for name in ("odd/[1].txt", "odd/1.txt", "odd/a*.txt", "odd/ab.txt", "odd/q?.txt", "data[1]/x.txt", "data1/y.txt"):
        store.pipe(f"{bucket}/{name}", name.encode())
    for name in ("odd/[1].txt", "odd/a*.txt", "odd/q?.txt"):
        assert expand(f"{bucket}/{name}") == [f"{bucket}/{name}"]
        assert fetch(f"{bucket}/{name}", tmp_path).read_bytes() == name.encode()
        assert fingerprint(f"{bucket}/{name}") != fingerprint(f"{bucket}/odd/1.txt")
    assert expand(f"{bucket}/data[1]/*.txt") == [f"{bucket}/data[1]/x.txt"]
    assert expand(f"{bucket}/data?/*.txt") == [f"{bucket}/data1/y.txt"]


@pytest.mark.parametrize("address", ["/folder/missing.txt", "/folder/*.parquet", "-that-is-not-there/a.txt", "/folder"])
def test_nothing_on_s3_is_an_error(address: str, bucket: str, store: s3fs.S3FileSystem) -> None:
    with pytest.raises(InputError, match=r"no file matches|does not exist"):
        expand(bucket + address)


def test_fetching_nothing_leaves_nothing(bucket: str, store: s3fs.S3FileSystem, tmp_path: Path) -> None:
    for address in (f"{bucket}/missing", f"{bucket}-missing/a"):
        with pytest.raises(InputError, match="does not exist"):
            fetch(address, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_follows_the_content(bucket: str, store: s3fs.S3FileSystem, tmp_path: Path) -> None:
    before = fingerprint(f"{bucket}/folder/a.txt")
    assert fingerprint(f"{bucket}/folder/a.txt") == before
    store.pipe(f"{bucket}/folder/a.txt", b"other")
    assert fingerprint(f"{bucket}/folder/a.txt") != before
    (tmp_path / "a").write_bytes(b"1")
    local = fingerprint(str(tmp_path / "a"))
    (tmp_path / "a").write_bytes(b"2")
    assert fingerprint(str(tmp_path / "a")) != local


def test_wrong_keys_are_refused_and_never_shown(
    bucket: str, store: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    with pytest.raises(InputError, match="access is denied") as caught:
        fetch(f"{bucket}/folder/a.txt", tmp_path)
    assert "a-wrong-secret" not in str(caught.value)
    assert caught.value.__suppress_context__, "the store's own message stays out of the traceback"
    with pytest.raises(InputError, match="access is denied"):
        expand(f"{bucket}/folder/*.txt")


def test_no_keys_are_an_error(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(InputError, match="no S3 credentials"):
        expand(f"{bucket}/*")


@pytest.mark.parametrize("address", ["s3cret:9000", "http://[::1", "http://"])
def test_an_endpoint_that_is_no_url_is_an_error(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    for read in (expand, fingerprint, lambda url: fetch(url, tmp_path)):
        with pytest.raises(InputError, match="the store's address is no URL, expected http://HOST:PORT") as caught:
            read("s3://bucket/a.txt")
        assert "s3cret" not in str(caught.value)


class OldStore(BaseHTTPRequestHandler):
    """A store with one object that knows no checksums: it refuses a request with a header that it has not heard of."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if [name for name in self.headers if "checksum" in name.lower()]:
            self._answer(400, b"<Error><Code>InvalidArgument</Code><Message>unknown header</Message></Error>")
        elif "list-type" in self.path:
            info = "<Key>a.txt</Key><Size>5</Size><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
            listing = f"<ListBucketResult><Name>old</Name><Contents>{info}</Contents></ListBucketResult>"
            self._answer(200, listing.encode())
        elif self.path.endswith("/a.txt"):
            self._answer(200, b"first")
        else:
            self._answer(404, b"")

    def log_message(self, *_: object) -> None:
        """Write nothing to the terminal."""

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def test_a_store_that_knows_no_checksums_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore names them in every request by default, since 1.36."""
    with ThreadingHTTPServer(("127.0.0.1", 0), OldStore) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "puzzle")
        with pytest.raises(OSError, match=r"unknown header|Bad Request"):
            s3fs.S3FileSystem(skip_instance_cache=True).cat_file("old/a.txt")
        assert fetch("s3://old/a.txt", tmp_path).read_bytes() == b"first"
        assert expand("s3://old/a.txt") == ["s3://old/a.txt"]
        assert fingerprint("s3://old/a.txt")
        server.shutdown()
