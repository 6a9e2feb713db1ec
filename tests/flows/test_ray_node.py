"""What keeps a node from computing: another folder at the path, other code, a Prefect server that it does not reach."""

import os
import socket
from pathlib import Path

import pytest

from flows.ray_node import Home, code_here, enter, problems
from storage.files import InputError

HOST = socket.gethostname()


def _home(folder: Path, monkeypatch: pytest.MonkeyPatch, **changed: str) -> Home:
    """Return the home of a stage on this machine, whose Prefect server answers."""
    (folder / "mark").touch()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (folder / "mark").open())
    values = {"mark": "mark", "api": "http://127.0.0.1:1/api", "host": HOST, **changed}
    return Home(folder=folder, code=code_here(), **values)


def test_a_node_that_sees_the_clone_goes_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setenv("PUZZLE_ENTERED", "")
    home = _home(tmp_path, monkeypatch)
    enter(home)
    assert Path.cwd() == tmp_path
    (tmp_path / "mark").unlink()
    enter(home)  # it looks once a process
    assert os.environ["PUZZLE_ENTERED"] == f"{tmp_path}/mark"


def test_another_folder_at_the_path_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = _home(tmp_path, monkeypatch, mark="made-elsewhere", host="driver")
    monkeypatch.setenv("PUZZLE_ENTERED", "")
    with pytest.raises(InputError, match=f"the Ray node {HOST} does not see {tmp_path} as driver does; put the clone"):
        enter(home)


def test_other_code_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = _home(tmp_path, monkeypatch)
    there = {**home.code, "the code": "1234567890ab", "torch": "2.12.0"}
    (problem,) = problems(home, HOST, there)
    expected = (
        f"the code 1234567890ab for {home.code['the code']}, torch 2.12.0 for {home.code['torch']}; start Ray there"
    )
    assert f"computes with other code than {HOST}: {expected}" in problem


@pytest.mark.parametrize(
    ("api", "node", "is_reached"),
    [
        ("http://127.0.0.1:4200/api", HOST, True),
        ("http://127.0.0.1:4200/api", "another machine", False),  # whatever listens there is another server
        ("http://localhost:4200/api", "another machine", False),
        ("http://prefect.example:4200/api", "another machine", True),
    ],
)
def test_a_server_of_this_machine_is_out_of_reach_elsewhere(
    api: str, node: str, is_reached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = _home(tmp_path, monkeypatch, api=api)
    found = list(problems(home, node, home.code))
    assert [f"does not reach the Prefect server at {api}" in problem for problem in found] == [True] * (not is_reached)


def test_a_server_that_does_not_answer_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = _home(tmp_path, monkeypatch)
    monkeypatch.undo()
    (problem,) = problems(home, HOST, home.code)
    assert "PREFECT_API_URL" in problem
