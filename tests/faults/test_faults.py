"""A fixed sample of every campaign of `make faults`, run as its script runs: nothing wrong, no traceback, no hang."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clone import ROOT


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for the clone that damages and kills share."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize(
    ("campaign", "count"), [("params_files", 50), ("checkpoints", 25), ("damages", 8), ("kills", 2)]
)
def test_a_sample_of_faults_ends_right(campaign: str, count: int, scratch: Path) -> None:
    command = [sys.executable, "-m", f"tests.faults.{campaign}", "--short", "--seed", "1", "--count", str(count)]
    ended = subprocess.run([*command, "--scratch", str(scratch)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout, ended.stderr
    record = json.loads(ended.stdout.splitlines()[-1])
    assert record["failures"] == []
    assert (record["count"], record["right"]) == (count, count)
    assert ended.returncode == 0, ended.stderr
