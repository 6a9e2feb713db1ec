"""`make serve` against a real server: runs that the API creates really run, in a clone with a short pipeline.

The clone's flows, forms and parent are the real ones; behind prepare_parent its dvc.yaml has stand-ins that take a
moment, so that what is tested is the way from the form to DVC and back. Tests follow each other in one clone.
"""

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from storage.paths import Paths
from tests.clone import Clone, make_clone, tiny_documents, tiny_parent, tiny_run_params
from tests.report_run import write_run

DVC_YAML = """
stages:
  prepare_parent:
    cmd: python -m flows.prepare_parent
    params: [prepare_parent]
    outs: [artifacts/parent]
  search_architecture:
    foreach: ${targets}
    do:
      cmd: python stand_in.py search ${key}
      params: ["targets.${key}"]
      deps: [artifacts/parent/puzzle_parent.json]
      outs:
        - artifacts/children/${key}/architecture.json: {persist: true}
  evaluate_child:
    foreach: ${targets}
    do:
      cmd: python stand_in.py evaluate ${key}
      deps: ["artifacts/children/${key}/architecture.json"]
      outs: ["artifacts/children/${key}/evaluation.json"]
  report:
    cmd: python stand_in.py report
    deps: [artifacts/children/small/evaluation.json, artifacts/children/fast/evaluation.json]
    outs: [artifacts/report]
"""
STAND_IN = """
import json, os, sys, time
from pathlib import Path
import yaml
from storage.files import read_sealed, write_sealed

stage, target = (*sys.argv[1:], "")[:2]
folder = Path("artifacts/children") / target
if stage == "search":
    constraints = yaml.safe_load(Path("params.yaml").read_text())["targets"][target]["constraints"]
    memory = constraints.get("memory", {}).get("at_most_ratio")
    if memory == 0.01:
        sys.exit(f"error: no child of {target} exists\\n  memory: 0.01 is out of reach")
    if constraints.get("kv", {}).get("at_most_ratio") == 0.5:  # the stage that somebody cancels
        Path(os.environ["WHERE"], "pid").write_text(str(os.getpid()))
        time.sleep(600)
    chosen = read_sealed(Path("made_up/architecture.json"), "the fixture")
    names = ("PREFECT_API_URL", "PUZZLE_RUNNING")
    chosen |= {"typed": constraints, "server": [os.environ[name] for name in names]}  # readers ignore these
    folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / "architecture.json", chosen)
elif stage == "evaluate":
    constraints = json.loads((folder / "architecture.json").read_text())["typed"]
    limits = [
        {"name": name, "metric": limit["metric"], "kind": "at_most", "limit": limit.get("at_most_ratio") or 9.0,
         "predicted": 0.1, "relative": True, "measured": None, "unit": "x"}
        for name, limit in constraints.items()
    ]
    evaluation = read_sealed(Path("made_up/evaluation.json"), "the fixture")
    evaluation |= {"label": target.title(), "constraints": limits, "speed": None, "speeds": []}
    write_sealed(folder / "evaluation.json", evaluation)
else:
    Path("artifacts/report").mkdir()
    Path("artifacts/report/Frontier_1.png").write_bytes(b"\\x89PNG...")
"""
_SECONDS = 240  # until a run that hangs fails its test
_NEVER = "86400"


@dataclass(frozen=True)
class Served:
    """A clone, its server, and the process of `python -m flows.ui.serve`."""

    clone: Clone
    api: str
    process: "subprocess.Popen[str]"

    def end(self) -> None:
        """Send Ctrl-C, once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        self.process.communicate(timeout=60)

    def ask(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        """Send GET, or POST with a token if there is a body, as the UI does."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if body is not None:
            token = self.ask("/csrf-token?client=tests")["token"]
            headers |= {"Prefect-Csrf-Client": "tests", "Prefect-Csrf-Token": token}
        request = urllib.request.Request(f"{self.api}{path}", data, headers, method=method)
        for attempt in range(10):
            try:
                with urllib.request.urlopen(request) as reply:
                    return json.loads(reply.read() or b"null")
            except urllib.error.HTTPError as error:  # a busy server says so, and Prefect's own clients ask again
                if error.code != 503 or attempt == 9:
                    raise
                time.sleep(0.5)
        return None

    def active(self) -> set[str]:
        """Return deployments that are not paused."""
        deployments = self.ask("/deployments/filter", {})
        return {deployment["name"] for deployment in deployments if not deployment["paused"]}

    def create(self, **parameters: Any) -> str:
        """Create a run of `compress`, as the form's Submit creates it; return its id."""
        deployment = self.ask("/deployments/name/compress/compress")["id"]
        run: str = self.ask(f"/deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]
        return run

    def ended(self, run: str) -> dict[str, Any]:
        """Return the run's final state."""
        final = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
        _until(lambda: self.ask(f"/flow_runs/{run}")["state"]["type"] in final, f"run {run} ends")
        state: dict[str, Any] = self.ask(f"/flow_runs/{run}")["state"]
        return state

    def artifacts(self, run: str) -> dict[str, dict[str, Any]]:
        """Return the run's artifacts by key."""
        artifacts = self.ask("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
        return {artifact["key"]: artifact for artifact in artifacts}

    def logged(self, run: str) -> set[str]:
        """Return the run's log lines."""
        lines = self.ask("/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}})
        return {line["message"] for line in lines}

    def reruns(self, *states: str) -> list[dict[str, Any]]:
        """Return the runs of rerun-on-change whose state has one of these names, oldest first."""
        body = {"flows": {"name": {"any_": ["rerun-on-change"]}}, "sort": "START_TIME_ASC"}
        return [run for run in self.ask("/flow_runs/filter", body) if run["state"]["name"] in states]


def _until(is_so: Callable[[], Any], event: str) -> None:
    end = time.monotonic() + _SECONDS
    while not is_so():
        assert time.monotonic() < end, f"waited in vain until {event}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """Yield a clone with the short pipeline, a server of its own and dvc.lock in git."""
    root = tmp_path_factory.mktemp("serve")
    tiny_parent(root / "parent")
    tiny_documents(root / "documents")
    params = tiny_run_params(root / "parent", root / "documents")
    params["measure_costs"]["timings"] = []  # nobody has timed a machine for this clone
    params["targets"]["small"]["constraints"]["decode"] |= {"hardware": "h100-sxm", "engine": "roofline"}
    made = make_clone(root / "clone", params)
    (made.folder / "dvc.yaml").write_text(DVC_YAML, encoding="utf-8")
    (made.folder / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    write_run(Paths(root / "made_up"))
    (made.folder / "made_up").mkdir()
    for name in ("architecture.json", "evaluation.json"):
        shutil.copyfile(Paths(root / "made_up").child("small") / name, made.folder / "made_up" / name)
    shutil.rmtree(made.folder / "params")  # the project's own profiles
    (made.folder / "params").mkdir()
    profile = {"targets": {"small": {"constraints": {"block_params": {"at_most_ratio": 0.55}}}}, "run": {"workers": 1}}
    (made.folder / "params/tight.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    _commit(made)
    clone = Clone(made.folder, {"WHERE": str(root)})
    try:
        yield clone
    finally:
        clone.must("flows.server", "stop")


def _commit(clone: Clone) -> None:
    author = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
    for command in (("add", "-A"), (*author, "commit", "-q", "-m", "more")):
        subprocess.run(["git", *command], cwd=clone.folder, check=True)


def _serve(clone: Clone, interval: str) -> Served:
    """Start `python -m flows.ui.serve`; it finds a server, so that it leaves that one running in the end."""
    address = clone.must("flows.server", "start").out.split()[-1]
    served = Served(clone, f"{address}/api", clone.start("flows.ui.serve", "--interval", interval))
    try:
        assert served.process.stdout is not None
        assert served.process.stdout.readline().split()[:3] == ["Prefect", "UI:", f"{address}/deployments"]
        _until(lambda: served.active() == {"compress", "rerun-on-change"}, "both deployments are there")
    except BaseException:
        served.end()
        raise
    return served


@pytest.fixture(scope="module")
def served(clone: Clone) -> Iterator[Served]:
    started = _serve(clone, _NEVER)
    try:
        yield started
    finally:
        started.end()


def test_the_form_has_choices_and_typed_fields_with_units(served: Served) -> None:
    schema = served.ask("/deployments/name/compress/compress")["parameter_openapi_schema"]
    form = schema["properties"]
    assert form["targets"]["items"]["enum"] == ["small", "fast"]
    assert form["profile"]["enum"] == ["none", "tight"]
    fields = schema["definitions"]["Constraints"]["properties"]
    numbers = {"block_params_ratio", "kv_bytes_ratio", "memory_gib", "throughput_ratio", "decode_throughput_ratio"}
    assert {fields[name]["type"] for name in (*numbers, "latency_ms")} == {"number"}
    assert "GiB" in fields["memory_gib"]["title"]
    assert fields["kv_bytes_ratio"]["maximum"] == 1


@pytest.mark.parametrize(
    "parameters", [{"targets": ["smal"]}, {"profile": "tigt"}, {"constraints": {"kv_bytes_ratio": 1.5}}], ids=str
)
def test_the_server_refuses_what_the_form_does_not_offer(served: Served, parameters: dict[str, Any]) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        served.create(**parameters)
    assert refused.value.code == 409


def test_a_run_from_the_api_builds_everything_and_shows_it(served: Served) -> None:
    run = served.create()
    state = served.ended(run)
    assert (state["type"], state["message"]) == ("COMPLETED", "built small, fast")
    assert served.clone.stale() == set()
    shown = served.artifacts(run)
    assert (shown["progress"]["data"], shown["progress"]["description"]) == (100.0, "6/6 stages, done")
    table = shown["closing-table"]["data"]
    rows = [line for line in table.splitlines() if " M " in line]  # parameters in millions
    assert [*dict.fromkeys(row.split()[0] for row in rows)] == ["parent", "Small", "Fast"]
    assert shown["picture-frontier-1"]["data"].startswith("data:image/png;base64,")
    expected = "Running stage 'search_architecture@fast':"
    _until(lambda: expected in served.logged(run), "dvc's lines are in the log")  # Prefect sends it after the state


def test_stages_use_the_server_of_the_run_and_its_record_of_runs(served: Served) -> None:
    running = served.clone.folder / ".prefect/running"
    assert served.clone.json("children/small/architecture.json")["server"] == [served.api, str(running)]
    assert served.ask("/flow_runs/count", {"flows": {"name": {"any_": ["prepare_parent"]}}}) == 1


def _contents(clone: Clone) -> dict[str, bytes]:
    files = ["params.yaml", "dvc.lock"]
    files += [f"artifacts/children/{target}/architecture.json" for target in ("small", "fast")]
    return {file: (clone.folder / file).read_bytes() for file in files}


def test_what_cannot_work_ends_with_one_message_before_any_work(served: Served) -> None:
    """Two runs at once: constraints of no target, and an experiment without dvc.lock in git."""
    of_no_target = served.create(constraints={"kv_bytes_ratio": 0.5})
    without_lock = served.create(targets=["fast"], constraints={"memory_gib": 1.0, "context": 9})
    expected = {
        of_no_target: "belong to one target; choose one of small, fast",
        without_lock: "run `git add dvc.lock`",
    }
    for run, message in expected.items():
        state = served.ended(run)
        assert state["type"] == "FAILED"
        assert message in state["message"]
        assert served.artifacts(run) == {}


def test_typed_constraints_and_a_profile_are_an_experiment_that_touches_nothing(served: Served) -> None:
    _commit(served.clone)
    before = _contents(served.clone)
    run = served.create(
        targets=["small"],
        profile="tight",
        constraints={
            "kv_bytes_ratio": 0.75,
            "latency_ms": 9,
            "hardware": "h100-sxm, roofline, float32 (modelled)",
            "scenario": "8/8",
        },
    )
    state = served.ended(run)
    assert state["type"] == "COMPLETED", state["message"]
    assert _contents(served.clone) == before
    table = served.artifacts(run)["closing-table"]["data"]
    assert "kv_bytes (kv)                <=  0.750" in table
    assert "block_params (block_params)  <=  0.550" in table
    assert "latency_ms (latency_ms)      <=  9.000" in table
    name = state["message"].split()[-1]
    assert f"dvc exp apply {name}" in table
    assert "  artifacts/children/small/" in table
    assert name in served.clone.must("dvc", "exp", "list", "--name-only").out.split()
    assert served.ask("/flow_runs/count", {"flows": {"name": {"any_": ["prepare_parent"]}}}) == 1


def test_cancelling_ends_dvc_and_its_stage(served: Served) -> None:
    run = served.create(targets=["small"], constraints={"kv_bytes_ratio": 0.5})
    file = Path(served.clone.environment["WHERE"], "pid")
    _until(file.exists, "the stage runs")
    stage = int(file.read_text())
    group = os.getpgid(stage)
    assert served.artifacts(run)["progress"]["data"] < 100
    served.ask(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    assert served.ended(run)["type"] == "CANCELLED"
    _until(lambda: not _alive(group), "dvc and its stage have ended")
    assert not list((served.clone.folder / ".dvc/tmp/exps/standalone").glob("tmp*"))


def _alive(group: int) -> bool:
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return any(int(row[0]) == group and not row[1].startswith("Z") for row in rows)


def test_a_deployment_that_somebody_changed_is_refused_and_none_of_it_runs(served: Served) -> None:
    deployment = served.ask("/deployments/name/compress/compress")["id"]
    trace = Path(served.clone.environment["WHERE"], "somebody-was-here")
    (served.clone.folder / "theirs.py").write_text(f"open({str(trace)!r}, 'w')\n")
    script = {"prefect.deployments.steps.run_shell_script": {"script": f"touch {trace}"}}
    served.ask(f"/deployments/{deployment}", {"pull_steps": [script], "entrypoint": "theirs.py:compress"}, "PATCH")
    state = served.ended(served.create())
    assert state["type"] == "FAILED"
    assert "no longer as `make serve` made it" in state["message"]
    assert "theirs.py:compress" in state["message"]
    assert "run_shell_script" in state["message"]
    assert not trace.exists()


def test_a_clone_is_served_once(served: Served) -> None:
    again = served.clone.run("flows.ui.serve")
    assert (again.code, again.err.count("\n")) == (2, 1), again
    assert "serve.lock" in again.err


@pytest.fixture(scope="module")
def watched(served: Served) -> Iterator[Served]:
    """Serve anew, now looking every few seconds."""
    served.end()
    started = _serve(served.clone, "3")
    try:
        yield started
    finally:
        started.end()


def test_a_changed_constraint_rebuilds_its_target_and_nothing_else(watched: Served) -> None:
    """Without a hand. The cause stands on the run. `make serve` has made anew what somebody had changed."""
    assert not watched.ask("/deployments/name/compress/compress")["pull_steps"]
    small_child = _contents(watched.clone)["artifacts/children/small/architecture.json"]
    _until(lambda: watched.reruns("Unchanged"), "it has looked")
    watched.clone.set_params(
        lambda params: params["targets"]["fast"]["constraints"]["memory"].update(at_most_ratio=0.7)
    )
    _until(lambda: watched.reruns("Completed"), "it has rebuilt")
    (run,) = watched.reruns("Completed")
    assert run["state"]["message"] == "rebuilt: search_architecture@fast (targets.fast modified)"
    assert run["name"] == "search_architecture@fast: targets.fast modified"
    assert "| `search_architecture@fast` | targets.fast modified |" in watched.artifacts(run["id"])["cause"]["data"]
    assert watched.artifacts(run["id"])["progress"]["description"] == "3/3 stages, done"
    limits = watched.clone.json("children/fast/evaluation.json")["constraints"]
    assert [limit["limit"] for limit in limits if limit["name"] == "memory"] == [0.7]
    assert _contents(watched.clone)["artifacts/children/small/architecture.json"] == small_child
    assert watched.clone.stale() == set()


def test_a_cause_that_failed_stops_nobody_else_and_is_not_tried_again(watched: Served) -> None:
    def change(params: dict[str, Any]) -> None:
        params["targets"]["fast"]["constraints"]["memory"]["at_most_ratio"] = 0.01
        params["targets"]["small"]["constraints"]["kv"]["at_most_ratio"] = 0.9

    watched.clone.set_params(change)
    _until(lambda: watched.reruns("Failed"), "it has failed")
    looked = len(watched.reruns("Unchanged"))
    assert watched.clone.json("children/small/evaluation.json")["constraints"][1]["limit"] == 0.9
    _until(lambda: len(watched.reruns("Unchanged")) > looked, "it has looked again")
    (failed,) = watched.reruns("Failed")
    assert "memory: 0.01 is out of reach" in failed["state"]["message"]
    assert "search_architecture@fast" in watched.reruns("Unchanged")[-1]["state"]["message"]
