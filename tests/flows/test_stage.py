"""What every stage's main() shares: pieces on workers, results in order, quiet progress, errors as one line."""

import fcntl
import json
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
import yaml
from httpx import ConnectError
from prefect.client.orchestration import get_client
from prefect.events.clients import PrefectCloudEventsClient, PrefectEventsClient
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, PREFECT_CLOUD_API_URL, temporary_settings

from flows import distill_blocks, prepare_parent, refine_child, score_blocks, stage
from storage.files import InputError
from storage.paths import Paths
from storage.pipeline import read_seconds
from tests.clone import ROOT, Clone, Ended
from tests.settings import tiny_params, tiny_values

# The pieces that end first are the last ones; 2 is a wrong input, or our own mistake.
STAGE = """
import fcntl, json, os, signal, time
from contextlib import suppress
from pathlib import Path
from flows.stage import main, run_pieces
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from storage.files import DamagedFileError

@task(cache_policy=NO_CACHE)
def make(piece, target, paths):
    if target == "loses" and piece == 1 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(json.loads(Path(".prefect/server.json").read_text())["pid"], signal.SIGKILL)
    if target == "ordered":
        with open(".prefect/pieces@ordered.stage") as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise AssertionError("the stage that runs does not hold its lock")
        assert {path.name for path in paths.root.iterdir()} == set(map(str, range(piece + 1, 4)))
    time.sleep(0.2 * piece)
    if piece == 2 and target in ("fails", "breaks"):
        raise DamagedFileError("piece 2 is damaged") if target == "fails" else RuntimeError("our mistake")
    (paths.root / str(piece)).touch()
    return 10 * piece

@flow(name="pieces")
def pieces(params, paths, target):
    paths.root.mkdir(exist_ok=True)
    made = run_pieces(make, [3, 2, 1, 0], target, paths, unit="piece", in_order=target == "ordered")
    (paths.root / "results").write_text(json.dumps(made))
    (paths.root / "seconds.json").write_text('{"a stage": 1.0, "anoth')

if __name__ == "__main__":
    main(pieces)
"""


def _folder(folder: Path) -> Clone:
    """Make a folder with params.yaml and the stage above; the code is this checkout's."""
    folder.mkdir(exist_ok=True)
    target = tiny_values()["targets"]["small"]
    values = tiny_values(run={"workers": 4}) | {
        "targets": {name: {**target, "label": name} for name in ("works", "ordered", "fails", "breaks", "loses")}
    }
    (folder / "params.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    (folder / "pieces.py").write_text(STAGE, encoding="utf-8")
    return Clone(folder, {"PYTHONPATH": str(ROOT)})


def _run(folder: Path, address: str, target: str) -> Ended:
    clone = _folder(folder)
    return Clone(folder, {**clone.environment, "PREFECT_API_URL": address}).run("pieces", "--target", target)


@pytest.mark.parametrize("target", ["works", "ordered"])
def test_results_come_in_the_order_of_the_pieces_and_nothing_is_said(target: str, tmp_path: Path, address: str) -> None:
    """`ordered`: a piece starts when the one before it has ended, though there are four workers.

    The record of seconds, which the stage finds damaged in the end, fails nobody's finished work.
    """
    ended = _run(tmp_path, address, target)
    assert (ended.code, ended.out, ended.err) == (0, "", "")  # progress is for terminals
    assert json.loads((tmp_path / "artifacts/results").read_text()) == [30, 20, 10, 0]
    assert read_seconds(tmp_path / "artifacts/seconds.json").keys() == {f"pieces@{target}"}


def test_a_wrong_input_in_a_piece_is_one_error_and_finished_pieces_stay(tmp_path: Path, address: str) -> None:
    ended = _run(tmp_path, address, "fails")
    assert (ended.code, ended.out, ended.err) == (4, "", "error: piece 2 is damaged\n")
    assert {"0", "1"} <= {path.name for path in (tmp_path / "artifacts").iterdir()} <= {"0", "1", "3"}


def test_a_stage_that_runs_already_is_left_alone(tmp_path: Path, address: str) -> None:
    """A second one deletes whatever is no finished piece, also what the first has under way."""
    lock = tmp_path / ".prefect/pieces@works.stage"
    lock.parent.mkdir()
    with lock.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        ended = _run(tmp_path, address, "works")
        error = f"error: pieces@works runs in {tmp_path} already; wait for its end, or stop it\n"
        assert (ended.code, ended.out, ended.err) == (2, "", error)
        assert not (tmp_path / "artifacts").exists()
        assert _run(tmp_path, address, "ordered").code == 0
    assert _run(tmp_path, address, "works").code == 0


@pytest.mark.parametrize("is_temporary", [False, True])
def test_a_run_that_was_killed_is_marked_when_the_next_stage_starts(
    is_temporary: bool, tmp_path: Path, address: str
) -> None:
    """Also one that `dvc exp run --temp` started for the UI, in a folder that DVC then removes."""
    clone = Clone(tmp_path, {**_folder(tmp_path).environment, "PREFECT_API_URL": address})
    running = tmp_path / ".prefect/running"
    killed_in = clone
    if is_temporary:
        environment = {**clone.environment, "PUZZLE_RUNNING": str(running)}
        killed_in = Clone(_folder(tmp_path / "temporary").folder, environment)
    killed_in.kill_when(killed_in.artifacts.exists, "pieces", "--target", "ordered")
    shutil.rmtree(killed_in.folder if is_temporary else killed_in.artifacts)
    killed = UUID(next(running.glob("*.lock")).stem)
    (running / "no run.lock").touch()
    with temporary_settings({PREFECT_API_URL: address}), get_client(sync_client=True) as client:
        before = client.read_flow_run(killed).state
        clone.must("pieces", "--target", "works")
        after = client.read_flow_run(killed).state
    assert before is not None
    assert before.is_running()
    assert after is not None
    assert after.is_crashed()
    assert list(running.iterdir()) == [running / "no run.lock"]


def test_a_stage_whose_server_dies_gets_another_one_and_does_its_work(tmp_path: Path) -> None:
    """It took three minutes to fail: each request was tried for a minute, each event for seven seconds."""
    clone = _folder(tmp_path)
    try:
        ended = clone.run("pieces", "--target", "loses")
        assert (ended.code, ended.out, ended.err) == (0, "", "")
        assert (tmp_path / "killed").exists()
        assert json.loads((tmp_path / "artifacts/results").read_text()) == [30, 20, 10, 0]
        port = json.loads((tmp_path / ".prefect/server.json").read_text())["port"]
        address = {PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}
        with temporary_settings(address), get_client(sync_client=True) as client:
            states = [run.state.type.name for run in client.read_flow_runs() if run.state]
        assert sorted(states) == ["COMPLETED", "CRASHED"]
    finally:
        clone.must("flows.server", "stop")


def test_a_stage_whose_server_of_elsewhere_dies_ends_with_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: object) -> None:
        raise ConnectError("refused")

    monkeypatch.chdir(_folder(tmp_path).folder)
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere.example/api")
    monkeypatch.setattr(stage, "ensure", lambda: ("http://elsewhere.example/api", False))
    monkeypatch.setattr(stage, "_run_tracked", lose)
    with pytest.raises(InputError, match=r"elsewhere.example/api no longer answers \(refused\); run the same command"):
        stage.run_stage(prepare_parent.prepare_parent, None)


@pytest.mark.parametrize(
    ("url", "client"),
    [
        (f"{PREFECT_CLOUD_API_URL.value()}/accounts/a/workspaces/b", PrefectCloudEventsClient),
        ("http://127.0.0.1:4200/api", PrefectEventsClient),
    ],
)
def test_events_go_by_the_client_of_their_server(url: str, client: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect Cloud knows its users by another handshake than a server of ours."""
    chosen: list[type] = []
    monkeypatch.setattr(EventsWorker, "set_client_override", lambda client, **_: chosen.append(client))
    for name in ("close_orphans", "release"):
        monkeypatch.setattr(stage, name, lambda: None)
    quiet: Any = SimpleNamespace(with_options=lambda **_: lambda **_: None)
    stage._run_tracked(quiet, tiny_params(), {}, url)
    assert chosen == [client]


def test_dvcs_copies_of_what_a_stage_wrote_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Path] = []
    monkeypatch.chdir(_folder(tmp_path).folder)
    shutil.copyfile(ROOT / "dvc.yaml", "dvc.yaml")
    monkeypatch.setattr(stage, "ensure", lambda: ("http://elsewhere.example/api", False))
    monkeypatch.setattr(stage, "_run_tracked", lambda *_: None)
    monkeypatch.setattr(stage, "have_cached_copy_checked", checked.append)
    stage.run_stage(refine_child.refine_child, "works")
    child = Paths().child("works")
    assert checked == [child / "refined", child / "refine.json"]


def test_our_own_mistake_is_not_dressed_up_as_a_wrong_input(tmp_path: Path, address: str) -> None:
    ended = _run(tmp_path, address, "breaks")
    assert ended.code == 1
    assert "Traceback" in ended.err
    assert ended.err.rstrip().endswith("RuntimeError: our mistake")


@pytest.mark.parametrize("mode", ["materialised", "rolling"])
@pytest.mark.parametrize("module", [distill_blocks, score_blocks])
def test_stages_that_roll_through_the_parent_do_so_in_order(
    module: ModuleType, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers would delete each other's windows."""
    orders: list[bool] = []
    for name in ("plan_blocks", "plan_groups"):
        monkeypatch.setattr(module.tasks, name, lambda *_: ["a piece"], raising=False)
    for name in ("scores_of_removals", "plan_removals", "write_library_index", "write_score_table"):
        monkeypatch.setattr(module.tasks, name, lambda *_: None, raising=False)
    monkeypatch.setattr(module, "run_pieces", lambda *_, in_order, **__: orders.append(in_order))
    flow = getattr(module, module.__name__.rpartition(".")[2])
    flow.fn(tiny_params(run={"workers": 2}, cache_activations={"mode": mode}), Paths(tmp_path))
    assert orders == [mode == "rolling"]


def test_params_and_target_are_checked_before_a_server_starts(tmp_path: Path) -> None:
    unknown = _folder(tmp_path).run("pieces", "--target", "work")
    assert (unknown.code, unknown.out) == (2, "")
    assert unknown.err.startswith("error: unknown target 'work', did you mean works?")
    values = yaml.safe_load((tmp_path / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(json.dumps(values | {"targts": {}}), encoding="utf-8")
    misspelt = _folder(tmp_path / "other").folder / "params.yaml"
    misspelt.write_text((tmp_path / "params.yaml").read_text(), encoding="utf-8")
    ended = Clone(misspelt.parent, {"PYTHONPATH": str(ROOT)}).run("pieces", "--target", "works")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "unknown key targts, did you mean targets?" in ended.err
    assert not list(tmp_path.rglob("server.json"))


def test_a_wrong_port_stops_a_stage_with_one_error(tmp_path: Path) -> None:
    clone = _folder(tmp_path)
    ended = Clone(tmp_path, {**clone.environment, "PUZZLE_PORT": "many"}).run("pieces", "--target", "works")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "error: PUZZLE_PORT is 'many': expected a port: a number from 1 to 65535, or 0 for any\n"
    assert not (tmp_path / "artifacts").exists()
