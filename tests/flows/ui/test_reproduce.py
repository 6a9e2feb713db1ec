"""prefect.yaml as it is, on a real server, pool and worker: a run makes what DVC calls stale, or fails in a line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.ui import repro, reproduce
from flows.ui.repro import BusyError, only_one
from storage.sources import PACKAGES
from tests.clone import ROOT, Clone
from tests.settings import tiny_values

STAGES = {"one": {"cmd": "echo 1 > one", "outs": ["one"]}, "two": {"cmd": "echo 2 > two", "outs": ["two"]}}


def test_the_deployment_runs_on_a_worker_of_its_pool(tmp_path: Path) -> None:
    """Server, pool and deployment are made as the file's comment says."""
    for name in (*PACKAGES, "prefect.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}), encoding="utf-8")
    (tmp_path / "params.yaml").write_text(json.dumps(tiny_values()), encoding="utf-8")
    clone = Clone(tmp_path)
    clone.must("dvc", "init", "--no-scm", "-q")
    url = clone.must("flows.server", "start").out.split()[-1] + "/api"
    try:
        user = Clone(tmp_path, {"PREFECT_API_URL": url, "PREFECT_HOME": str(tmp_path / "home"), "PWD": str(tmp_path)})
        user.must("prefect", "work-pool", "create", "puzzle", "--type", "process")
        user.must("prefect", "--no-prompt", "deploy", "--all")
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name("reproduce/puzzle").id
            right = client.create_flow_run_from_deployment(deployment, parameters={"stages": ["two"]})
            user.must("prefect", "worker", "start", "--pool", "puzzle", "--run-once")
            assert _end(client, right) == ("COMPLETED", "made two")
            wrong = client.create_flow_run_from_deployment(deployment, parameters={"stages": ["--force"]})
            user.must("prefect", "worker", "start", "--pool", "puzzle", "--run-once")
            state, message = _end(client, wrong)
        assert (state, message.startswith("unknown stage '--force'")) == ("FAILED", True)
        assert (tmp_path / "two").read_text() == "2\n"
        assert not (tmp_path / "one").exists()
    finally:
        clone.must("flows.server", "stop")


def test_dvc_is_asked_while_no_other_run_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one it answers that it is busy."""
    asked: list[tuple[str, ...]] = []

    def would_run(*stages: str) -> list[str]:
        with pytest.raises(BusyError), only_one("repro", wait=False):
            pass
        asked.append(stages)
        return ["one", "two"]

    ran: list[list[str]] = []
    monkeypatch.setattr(repro, "HOME", tmp_path)
    monkeypatch.setattr(reproduce, "load", lambda: None)
    monkeypatch.setattr(reproduce, "would_run", would_run)
    monkeypatch.setattr(reproduce, "run_dvc", lambda arguments, ahead: ran.append(arguments))
    assert reproduce.reproduce.fn(("two",)).message == "made two"
    assert (asked, ran) == ([(), ("two",)], [["repro", "two"]])


def _end(client: Any, run: FlowRun) -> tuple[str, str]:
    state = client.read_flow_run(run.id).state
    return state.type.name, state.message or ""
