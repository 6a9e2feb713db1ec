"""Which GPU a worker takes, on lists of GPUs that this machine does not have."""

import os
import subprocess
import sys

import pytest
import torch

from storage.files import InputError
from tasks.engines.devices import chosen_gpus, present_gpus, take_turn
from tests.clone import ROOT

UUIDS = ("GPU-a", "GPU-b")


def test_devices_count_what_is_visible() -> None:
    assert chosen_gpus("auto", UUIDS) == UUIDS
    assert chosen_gpus(["cuda:1"], UUIDS) == ("GPU-b",)
    assert chosen_gpus(["cuda:1", "cuda:0"], ("6", "2", "3")) == ("2", "6")
    assert chosen_gpus("auto", ()) == ()


def test_a_device_that_is_not_there_is_one_error() -> None:
    expected = (
        r"execution.devices has cuda:2, cuda:7, but this machine shows 2 GPUs \(CUDA_VISIBLE_DEVICES=GPU-a,GPU-b\)"
    )
    with pytest.raises(InputError, match=expected):
        chosen_gpus(["cuda:0", "cuda:2", "cuda:7"], UUIDS)


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [(2, None, ("0", "1")), (2, "5, 3", ("5", "3")), (0, "5,3", ()), (1, "5,-1,3", ("5",)), (0, "", ()), (0, None, ())],
)
def test_gpus_have_the_names_that_cuda_gives_them(
    count: int, visible: str | None, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA itself stops at the first name that it does not know."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert present_gpus() == expected


def test_workers_take_turns() -> None:
    workers = [take_turn(("5", "3"), f"SpawnProcess-{number}") for number in range(3, 7)]
    assert sorted(workers) == ["3", "3", "5", "5"]
    assert workers[0] != workers[1]


def test_stages_that_compute_nothing_start_without_torch() -> None:
    code = "import sys, flows.workers; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
