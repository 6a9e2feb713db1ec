"""Pieces on a real Ray cluster, each node in processes of its own: same bytes, nodes that die and join, errors."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray

from flows import ray_workers
from flows.ray_workers import RayWorkers, _join, needed
from storage.files import InputError
from tests.clone import ROOT
from tests.piece_stages import begun, closed, finished, library_on_threads, made, stage_folder
from tests.settings import tiny_params
from tests.ui_runs import ended_tasks

ALL = set(map(str, range(8)))
_SECONDS = 300
_PATIENT = {"RAY_worker_register_timeout_seconds": "600"}
_OPEN = {"RAY_AUTH_MODE": "disabled"}
_CLOSED = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}


@dataclass
class Cluster:
    """A Ray cluster of this machine: the head's address, who is let in, and the process group of each node by name."""

    address: str
    access: dict[str, str] = field(default_factory=lambda: _OPEN)
    nodes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def execution(self) -> dict[str, Any]:
        """Return the section of params that computes on it."""
        return {"runner": "ray", "address": self.address}

    def add(self, name: str) -> None:
        """Start a node of one CPU, the head if it is called so, and wait until it is one.

        Where the machine is so busy that it does not come up within the 30 s that Ray gives it, it is started again.
        """
        deadline = time.monotonic() + _SECONDS
        while not self._start(name):
            assert time.monotonic() < deadline, f"{name} did not start"

    def _start(self, name: str) -> bool:
        head = ("--head", f"--port={self.address.rpartition(':')[2]}", f"--ray-client-server-port={_free_port()}")
        where = (*head, "--include-dashboard=false") if name == "head" else (f"--address={self.address}",)
        folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets lie in it, whose paths must be short
        with (folder / "log").open("wb") as log:
            node = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where, "--num-cpus=1"),
                    *("--object-store-memory=100000000", "--disable-usage-stats"),
                    *((f"--temp-dir={folder}",) if name == "head" else ()),
                ],
                env={**os.environ, **_PATIENT, **self.access, "PYTHONPATH": str(ROOT), "NODE": name},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.nodes[name] = node
        wait_until(lambda: "Ray runtime started" in (folder / "log").read_text() or node.poll() is not None)
        if node.poll() is None:
            return True
        self.kill(name)
        return False

    def kill(self, name: str) -> None:
        """Kill a node with all its processes."""
        node = self.nodes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()


def wait_until(is_time: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + _SECONDS
    while not is_time():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _cluster(*names: str, access: dict[str, str] = _OPEN) -> Iterator[Cluster]:
    before = set(Path("/tmp").glob("ray-*"))
    cluster = Cluster(f"127.0.0.1:{_free_port()}", access)
    try:
        for name in names:
            cluster.add(name)
        yield cluster
    finally:
        for name in list(cluster.nodes):
            cluster.kill(name)
        for folder in set(Path("/tmp").glob("ray-*")) - before:
            shutil.rmtree(folder, ignore_errors=True)


def test_two_nodes_make_the_bytes_of_threads_and_a_wrong_input_there_is_one_error(tmp_path: Path, address: str) -> None:
    expected = library_on_threads(tmp_path)
    folder = tmp_path / "ray"
    shutil.copytree(tmp_path / "inputs", folder / "artifacts")
    with _cluster("head", "second") as cluster:
        ended = stage_folder(folder, cluster.execution, {"PREFECT_API_URL": address, **_OPEN}).run("library")
        assert (ended.code, ended.out, ended.err) == (0, "", "")
        assert made(folder) == expected
        (folder / "damaged0").touch()
        damaged = stage_folder(folder, cluster.execution, {"PREFECT_API_URL": address, **_OPEN}).run("light")
    assert ended_tasks(address, "library") >= {"cache_shards", "train_block", "score_jobs"}
    assert (damaged.code, damaged.out, damaged.err) == (4, "", "error: piece 0 is damaged\n")
    assert not list((folder / ".prefect").glob("shared.*"))


def test_a_node_that_joins_late_is_used_and_where_it_dies_the_run_goes_on(tmp_path: Path, address: str) -> None:
    """What was finished is not computed twice."""
    gate = closed(tmp_path)
    with _cluster("head") as cluster:
        stage = stage_folder(tmp_path, cluster.execution, {"PREFECT_API_URL": address, **_OPEN}).start("light")
        try:
            cluster.add("second")
            wait_until(lambda: {node for _, _, node in begun(tmp_path)} == {"head", "second"})
            process = next(process for _, process, node in begun(tmp_path) if node == "second")
            cluster.kill("second")
            wait_until(lambda: not Path(f"/proc/{process}").exists())  # a worker may outlive its node for a moment
            gate.unlink()
            out, err = stage.communicate(timeout=_SECONDS)
        finally:
            stage.kill()
    assert (stage.returncode, out) == (0, "")
    assert "WARNING: light goes on: 1 of 8 pieces (piece) were lost with their workers: " in err
    assert finished(tmp_path) == ALL
    lost = [piece for piece, _, node in begun(tmp_path) if node == "second"]
    assert len(lost) == 1
    assert sorted(piece for piece, _, _ in begun(tmp_path)) == sorted([*ALL, *lost])


def test_a_worker_that_is_killed_costs_its_piece_alone(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece that kills its worker a second time ends the stage, with all others finished once."""
    monkeypatch.setenv("KILLED", "3")  # of the cluster's processes
    with _cluster("head") as cluster:
        ended = stage_folder(tmp_path, cluster.execution, {"PREFECT_API_URL": address, **_OPEN}).run("light")
    assert ended.code == 2
    assert not ended.out or "(raylet)" in ended.out  # where the worker died, in words of Ray's
    warning, error = ended.err.splitlines()
    assert warning.startswith("WARNING: light goes on: 1 of 8 pieces (piece) were lost with their workers: ")
    assert error.startswith("error: 1 of 1 pieces (piece) were lost with their workers: ")
    assert finished(tmp_path) == ALL - {"3"}
    assert sorted(piece for piece, _, _ in begun(tmp_path)) == sorted([*ALL, "3"])


def test_a_head_that_dies_is_one_error_and_a_rerun_goes_on(tmp_path: Path, address: str) -> None:
    gate = closed(tmp_path, 2)
    with _cluster("head") as cluster:
        clone = stage_folder(tmp_path, cluster.execution, {"PREFECT_API_URL": address, **_OPEN})
        stage = clone.start("light")
        try:
            wait_until(lambda: len(begun(tmp_path)) == 3)
            cluster.kill("head")
            out, err = stage.communicate(timeout=_SECONDS)
        finally:
            stage.kill()
        assert (stage.returncode, out) == (2, "")
        assert err.startswith(f"error: the head of the Ray cluster at {cluster.address} no longer answers (")
        assert err.count("\n") == 1
        gate.unlink()
        kept = {piece for piece, _, _ in begun(tmp_path)[:2]}  # Ray takes pieces in an order of its own
        assert finished(tmp_path) == kept
        cluster.add("head")
        clone.must("light")
    assert finished(tmp_path) == ALL
    assert sorted(piece for piece, _, _ in begun(tmp_path)[3:]) == sorted(ALL - kept)


def test_a_cluster_with_a_token_takes_who_has_it_and_others_get_one_error(tmp_path: Path, address: str) -> None:
    with _cluster("head", access=_CLOSED) as cluster:
        ended = stage_folder(tmp_path, cluster.execution, {"PREFECT_API_URL": address, **_OPEN}).run("light")
        assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
        assert ended.err.startswith(f"error: Ray at {cluster.address} does not take this process (")
        assert "RAY_AUTH_MODE and token" in ended.err and not begun(tmp_path)
        stage_folder(tmp_path, cluster.execution, {"PREFECT_API_URL": address, **_CLOSED}).must("light")
    assert finished(tmp_path) == ALL


def test_a_wrong_address_is_one_error_before_any_work(tmp_path: Path, address: str) -> None:
    nobody = f"127.0.0.1:{_free_port()}"
    clone = stage_folder(tmp_path, {"runner": "ray", "address": nobody}, {"PREFECT_API_URL": address, **_OPEN})
    ended = clone.run("light")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: no Ray cluster answers at execution.address = {nobody} (")
    assert ended.err.count("\n") == 1
    assert not begun(tmp_path)


@pytest.mark.parametrize("host", ["a..b", ".", "x" * 64])
def test_a_host_that_no_name_server_takes_is_one_error(host: str) -> None:
    with pytest.raises(InputError, match=r"^no Ray cluster answers at execution.address = .* \(.*label"):
        _join(f"{host}:6379")


@pytest.mark.parametrize(("error", "shown"), [(KeyError("node_ip"), "'node_ip'"), (AssertionError(), "AssertionError")])
def test_an_error_of_any_kind_while_joining_is_shown(
    error: Exception, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"^Ray at {address} does not take this process \({shown}\);"):
            _join(address)


@pytest.mark.parametrize(
    ("run", "execution", "expected"),
    [
        ({"threads": 2}, {}, {"CPU": 2}),
        ({"device": "cuda", "workers": 2}, {}, {"CPU": 1, "GPU": 0.5}),
        ({"device": "cuda"}, {"cpus": 8, "gpus": 2, "memory_gib": 1.5}, {"CPU": 8, "GPU": 2, "memory": 1.5 * 2**30}),
        ({"device": "cuda"}, {"gpus": 0}, {"CPU": 1}),
    ],
)
def test_a_piece_needs_what_params_say(
    run: dict[str, Any], execution: dict[str, Any], expected: dict[str, float]
) -> None:
    assert needed(tiny_params(run=run, execution={"runner": "ray", "address": "head:6379", **execution})) == expected


def test_a_piece_that_no_node_can_hold_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would wait for ever. A node that is dead counts nothing."""
    sizes = [{"CPU": 8.0, "memory": 2.0**31}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0, "memory": 2.0**40}]
    alive = [{"Alive": number < 2, "Resources": size} for number, size in enumerate(sizes)]
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    runner: Any = None
    RayWorkers(runner, "head:6379", {"CPU": 8, "memory": 2.0**30}).must_hold_a_piece()
    with pytest.raises(InputError, match=r"a piece of 2 CPU, 1 GPU; nodes: 8 CPU, 0 GPU; 1 CPU, 1 GPU; see cpus"):
        RayWorkers(runner, "head:6379", {"CPU": 2, "GPU": 1}).must_hold_a_piece()


def test_a_node_without_the_clone_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """There even the arguments of a piece cannot be read."""
    unreadable = ray.exceptions.RayTaskError("make", "…\nModuleNotFoundError: No module named 'tasks.puzzle'", None)

    class Future:
        def result(self) -> None:
            raise unreadable

    future: Any = Future()
    runner: Any = None
    with pytest.raises(InputError, match=r"a Ray node does not see the package 'tasks' of .*No module named"):
        ray_workers.RayWorkers(runner, "head:6379", {}).result(future)
