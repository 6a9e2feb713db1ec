"""Pieces on processes of this machine: the same bytes as on threads, one error where a worker is killed, no orphans."""

import importlib.util
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import stage, workers
from flows.report import report
from flows.workers import take_devices, workers_of
from storage.files import InputError
from tests.piece_stages import begun, closed, finished, library_on_threads, made, stage_folder
from tests.settings import tiny_params, tiny_values
from tests.ui_runs import ended_tasks

PROCESSES = {"runner": "processes"}


def test_processes_make_the_bytes_of_threads_and_the_ui_has_their_course(tmp_path: Path) -> None:
    """On the clone's own server, which nothing in the environment names."""
    expected = library_on_threads(tmp_path)
    folder = tmp_path / "processes"
    shutil.copytree(tmp_path / "inputs", folder / "artifacts")
    clone = stage_folder(folder, PROCESSES, {})
    try:
        ended = clone.run("library")
        assert (ended.code, ended.out, ended.err) == (0, "", "")
        url = clone.must("flows.server", "start").out.split()[-1] + "/api"
        assert ended_tasks(url, "library") >= {"cache_shards", "train_block", "score_jobs"}
    finally:
        clone.must("flows.server", "stop")
    assert made(folder) == expected


def test_gpus_are_chosen_before_anything_asks_for_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask starts CUDA, which then shows the process all of them."""
    (tmp_path / "params.yaml").write_text(json.dumps(tiny_values()), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(stage, "take_devices", lambda _: asked.append("devices"))

    def check(*_: object) -> None:
        asked.append("memory")
        raise InputError("it does not fit")

    monkeypatch.setattr(stage, "_check_memory", check)
    with pytest.raises(InputError, match="it does not fit"):
        stage.run_stage(report, None)
    assert asked == ["devices", "memory"]


def test_a_killed_worker_is_one_error_a_killed_stage_leaves_no_orphans_and_a_rerun_goes_on(
    tmp_path: Path, address: str
) -> None:
    environment = {"PREFECT_API_URL": address}
    ended = stage_folder(tmp_path, PROCESSES, {**environment, "KILLED": "3"}).run("light")
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert "a worker process was killed, for want of memory perhaps; run the same command again" in ended.err
    assert {state for task, state in _states(address)} <= {"COMPLETED", "CRASHED"}  # the killed one's is not running
    first = finished(tmp_path)
    assert "3" not in first

    gate, before = closed(tmp_path), len(begun(tmp_path))
    again = stage_folder(tmp_path, PROCESSES, environment)
    again.kill_when(lambda: len(begun(tmp_path)) >= before + 2, "light")
    orphans = {int(process) for _, process, _ in begun(tmp_path)[before:]}
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{process}").exists() for process in orphans) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{process}").exists() for process in orphans)

    before = len(begun(tmp_path))
    gate.unlink()
    again.must("light")
    assert sorted(piece for piece, _, _ in begun(tmp_path)[before:]) == sorted(set(map(str, range(8))) - first)
    assert finished(tmp_path) == set(map(str, range(8)))


def _states(url: str) -> set[tuple[str, str]]:
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        return {(task.name, task.state.type.name) for task in client.read_task_runs() if task.state}


def test_a_wrong_input_in_a_worker_process_is_its_own_error(tmp_path: Path, address: str) -> None:
    (tmp_path / "damaged0").touch()
    ended = stage_folder(tmp_path, PROCESSES, {"PREFECT_API_URL": address}).run("light")
    assert (ended.code, ended.out, ended.err) == (4, "", "error: piece 0 is damaged\n")


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else object())
    params = tiny_params(execution={"runner": "ray", "address": "127.0.0.1:6379"})
    with (
        pytest.raises(InputError, match=r"ray, which is not installed; run `pip install .*\[ray\]'`"),
        workers_of(params),
    ):
        pass


def test_processes_take_the_gpus_of_devices_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run.workers` for each GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(workers, "present_gpus", lambda: tuple(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    execution = {"runner": "processes", "devices": ["cuda:3", "cuda:1"]}
    params = tiny_params(run={"workers": 2, "device": "cuda"}, execution=execution)
    take_devices(params)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7,5"
    with workers_of(params) as found:
        assert isinstance(found, workers.RunnerWorkers)
        runner: Any = found.runner
        assert (runner._max_workers, runner._initargs) == (4, (("7", "5"),))


def test_threads_say_that_other_gpus_idle(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(workers, "present_gpus", lambda: ("0", "1"))
    with workers_of(tiny_params(run={"device": "cuda"})):
        assert "one of 2 GPUs computes; execution.runner: processes takes all of them" in caplog.text
