"""The stage's own ranks: what is seen of them, one message when one ends, none left behind, and torchrun by hand."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from storage.checkpoints import Checkpoint, CheckpointWriter
from storage.files import DamagedFileError, DiskFullError, InputError
from storage.params import Params
from storage.paths import Paths
from storage.sections import Storage
from tasks import distill_child
from tasks.gkd import launch
from tests.clone import ROOT
from tests.settings import tiny_params
from tests.stages import make_child, prepare
from tests.tasks.test_distill_child import with_settings

_SECONDS = 120


@pytest.fixture
def case(case: tuple[Params, Paths]) -> tuple[Params, Paths]:
    """Return a child that is ready for GKD on two ranks, which the test may change."""
    return with_settings(case[0], ranks=2), case[1]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list["subprocess.Popen[str]"]:
    """Return a list that gets every rank's process."""
    processes, start = list["subprocess.Popen[str]"](), launch._start

    def starting(*arguments: Any) -> "subprocess.Popen[str]":
        processes.append(start(*arguments))
        return processes[-1]

    monkeypatch.setattr(launch, "_start", starting)
    return processes


def curve(paths: Paths) -> dict[str, Any]:
    """Return gkd.json."""
    read: dict[str, Any] = json.loads(paths.gkd("small").read_text(encoding="utf-8"))
    return read


def test_a_killed_rank_ends_the_others_with_one_message_and_a_rerun_goes_on(
    case: tuple[Params, Paths], started: list["subprocess.Popen[str]"], capfd: pytest.CaptureFixture[str]
) -> None:
    """The second of two is killed at the measurement behind step 3; three ranks go on from there."""
    params, paths = case
    message = (
        r"^distill_child@small: rank 1 of 2 was ended by SIGKILL \(memory may have run out\), and the others with it; "
        "run `dvc repro distill_child@small`, which goes on from the last checkpoint$"
    )
    with pytest.raises(InputError, match=message) as killed:
        distill_child.distill.fn("small", params, paths, lambda _: started[1].kill())
    assert killed.value.exit_code == 2
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
    assert not paths.distilled("small").exists()
    assert "Traceback" not in capfd.readouterr().err
    shown = list[distill_child.Measurement]()
    distill_child.distill.fn("small", with_settings(params, ranks=3), paths, shown.append)
    assert [(seen.step, seen.num_steps) for seen in shown] == [(6, 8), (8, 8)]
    assert not paths.gkd_state("small").exists()
    kls = {row["step"]: row["kl"] for row in curve(paths)["held_out"]}
    assert [kls[seen.step] for seen in shown] == [seen.kl for seen in shown]
    distill_child.distill.fn("small", with_settings(params, ranks=0), paths)
    assert {row["step"]: row["kl"] for row in curve(paths)["held_out"]} == pytest.approx(kls, rel=1e-5)


def test_ranks_read_what_is_kept_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    """The teacher is the cache, whose shards this machine does not have."""
    storage = Storage.model_validate({"root": f"{bucket}/{tmp_path.name}"})
    params, _ = prepare("llama", tmp_path, distill_child={"teacher": "cache"})
    params = with_settings(params.model_copy(update={"storage": storage}), ranks=2)
    paths = Paths(tmp_path / "artifacts", storage)
    make_child(params, paths)
    shutil.rmtree(paths.root / "cached/activations")
    distill_child.distill.fn("small", params, paths)
    assert len(curve(paths)["steps"]) == 8


@pytest.mark.parametrize(
    ("target", "rank", "tokens", "message"),
    [
        (
            "small",
            None,
            256,
            "error: a rank is started by torchrun (tasks/gkd/ranks.py says how), or by the stage: set ",
        ),
        ("small", "0", 0, "error: distill_child.tokens is 0, there is nothing to train; "),
        ("smal", "0", 256, "error: unknown target 'smal', did you mean small?; known: small"),
    ],
)
def test_a_rank_by_hand_that_cannot_train_is_one_error(
    target: str, rank: str | None, tokens: int, message: str, tmp_path: Path
) -> None:
    params = tiny_params(distill_child={"tokens": tokens, "ranks": 1})
    (tmp_path / "params.json").write_text(params.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "tasks.gkd.ranks", "--target", target, "--params", str(tmp_path / "params.json")]
    environment = {**os.environ, **({"RANK": rank} if rank else {})}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith(message)


def test_ranks_end_when_the_process_that_started_them_is_killed(case: tuple[Params, Paths]) -> None:
    params, paths = with_settings(case[0], checkpoint_steps=1), case[1]
    (paths.root / "params.json").write_text(params.model_dump_json(), encoding="utf-8")
    script = (
        "import sys; from pathlib import Path; from storage.params import load; from storage.paths import Paths\n"
        "from tasks import distill_child; root = Path(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "distill_child.distill.fn('small', load(root / 'params.json'), Paths(root), lambda _: sys.stdin.read())\n"
    )
    command = [sys.executable, "-c", script, str(paths.root)]
    stage = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    record = paths.gkd_state("small") / ".pieces/state.json"
    _wait_until(lambda: record.is_file() or stage.poll() is not None)
    ranks = [pid for pid in _running() if str(paths.root) in _command(pid) and pid != stage.pid]
    assert len(ranks) == 2
    stage.kill()
    stage.communicate()
    _wait_until(lambda: not any(pid in _running() for pid in ranks))


def _wait_until(is_true: Any) -> None:
    end = time.monotonic() + _SECONDS
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.1)


def _running() -> list[int]:
    """Return the processes that have not ended, those that nobody waited for aside."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _command(int(path.name))]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_what_ranks_find_wrong_is_said_once(case: tuple[Params, Paths], capfd: pytest.CaptureFixture[str]) -> None:
    """Weights that overflow float32."""
    params, paths = case
    child = Checkpoint(paths.refined("small"), "the test")
    tensors = {name: child.tensor(name) for name in child.checksums}
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(1e38)
    writer = CheckpointWriter(paths.refined("small"), 1 << 30)
    writer.add(tensors)
    writer.finish()
    with pytest.raises(
        InputError, match=r"^distill_child@small stopped at step 0 of 8: the held-out KL behind it is nan"
    ):
        distill_child.distill.fn("small", params, paths)
    assert "Traceback" not in capfd.readouterr().err


def test_torchrun_by_hand_trains_and_the_stage_publishes(
    case: tuple[Params, Paths], started: list["subprocess.Popen[str]"]
) -> None:
    """Here both ranks are of one node."""
    params, paths = case
    (paths.root / "params.json").write_text(params.model_dump_json(), encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    rank = ["-m", "tasks.gkd.ranks", "--target", "small"]
    files = ["--params", str(paths.root / "params.json"), "--artifacts", str(paths.root)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([sys.executable, *torchrun, *rank, *files], cwd=ROOT, env=environment, check=True)
    distill_child.distill.fn("small", params, paths)
    assert not started and len(curve(paths)["steps"]) == 8


def test_more_ranks_than_gpus_are_refused_before_one_starts(
    case: tuple[Params, Paths], started: list["subprocess.Popen[str]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    run = case[0].run.model_copy(update={"device": "cuda"})
    with pytest.raises(InputError, match=r"ranks is 2, a GPU each, but this machine has 1; set fewer, or start the"):
        distill_child.distill.fn("small", case[0].model_copy(update={"run": run}), case[1])
    assert not started


def test_the_rendezvous_listens_on_this_machine_only() -> None:
    with launch._listening() as (port, _store):
        listening = [
            line.split()[1]
            for name in ("tcp", "tcp6")
            for line in Path(f"/proc/net/{name}").read_text(encoding="utf-8").splitlines()[1:]
            if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
        ]
    assert listening == [f"0100007F:{port:04X}"]


# --- which rank failed first -----------------------------------------------------------------------------------------


def ended(codes: list[int | None]) -> Any:
    """Return what `_failure` asks of processes that ended with these codes."""
    return [SimpleNamespace(poll=lambda code=code: code) for code in codes]


def report(scratch: Path, rank: int, message: str, when: int) -> None:
    """Write what torch's `record` writes of an exception of a rank."""
    path = launch._error_file(scratch, rank)
    extra = {"py_callstack": f"Traceback of rank {rank}\n", "timestamp": "1"}
    path.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")
    os.utime(path, ns=(when, when))


def test_the_first_error_counts_and_its_traceback_alone_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(tmp_path, 0, "RuntimeError: Connection closed by peer", 3_000_000)
    report(tmp_path, 2, "OutOfMemoryError: CUDA out of memory: tried 2 GiB", 2_000_000)
    error = launch._failure("small", ended([1, None, 1]), tmp_path)
    assert str(error) == (
        "distill_child@small: rank 2 of 3 failed (OutOfMemoryError: CUDA out of memory: tried 2 GiB); run `dvc repro "
        "distill_child@small`, which goes on from the last checkpoint"
    )
    assert capsys.readouterr().err == "Traceback of rank 2\n"


@pytest.mark.parametrize("kind", [InputError, DamagedFileError, DiskFullError])
def test_an_error_that_a_rank_explains_is_passed_on(
    kind: type[InputError], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(tmp_path, 0, f"{kind.__name__}: a: b\nc", 1_000_000)
    error = launch._failure("small", ended([kind.exit_code, 1]), tmp_path)
    assert type(error) is kind and str(error) == "a: b\nc"
    assert not capsys.readouterr().err


def test_a_rank_that_ends_before_it_begins_shows_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch._stderr_file(tmp_path, 1).write_text("No module named torch\n", encoding="utf-8")
    error = launch._failure("small", ended([None, 1]), tmp_path)
    assert "rank 1 of 2 ended before it began; run `dvc repro distill_child@small`" in str(error)
    assert capsys.readouterr().err == "No module named torch\n"
