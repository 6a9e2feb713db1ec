"""Every line of the check on a GPU runs on a CPU, on a tiny parent."""

import json
import subprocess
import sys

from tests.clone import ROOT


def test_all_parts_run_on_a_cpu() -> None:
    command = [sys.executable, "-m", "tests.gpu.check_gpu", "--device", "cpu", "--sizes", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *table, line = done.stdout.splitlines()
    rows = json.loads(line)["rows"]
    parts = [row["part"] for row in rows]
    assert parts[1:4] == ["cache_activations", "BLD of two blocks", "scores of two blocks"]
    assert parts[-2:] == ["GKD, killed once", "GKD, 20 steps"]
    assert len(table) == 2 + len(parts)
    assert all(row["seconds"] > 0 and 0 <= row["waiting"] < 1 for row in rows)
    by_part = {row["part"]: row for row in rows}
    assert by_part["cache_activations"]["planned_seconds"] > 0 and 0 < by_part["GKD, 20 steps"]["utilisation"] < 1
