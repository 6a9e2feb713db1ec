"""`auto` means bfloat16 only where the hardware multiplies it."""

import resource

import pytest
import torch

from storage.files import InputError
from tasks.puzzle.model.device import prepare_compute, resolve


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")],
)
def test_a_cpu_computes_in_bfloat16_only_with_instructions_for_it(
    instructions: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert resolve("cpu", "auto") == ("cpu", expected)
    assert resolve("cpu", "bfloat16") == ("cpu", "bfloat16")
    assert resolve("cpu", "float32") == ("cpu", "float32")


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve("auto", "auto") == ("cuda", "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve("auto", "auto") == ("cpu", "float32")
    assert resolve("cuda:1", "auto") == ("cuda:1", "bfloat16")


def test_a_gpu_that_is_not_there_is_one_error() -> None:
    with pytest.raises(InputError, match=r"run.device is cuda:99, but .* set run.device to auto or cpu"):
        prepare_compute("cuda:99", "auto", 1)


def test_threads_are_those_of_the_params() -> None:
    before = torch.get_num_threads()
    try:
        assert prepare_compute("cpu", "float32", 1).dtype == torch.float32
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_temporaries_do_not_fault_their_pages_in_again() -> None:
    """24 times 6 MiB is 37,000 pages, which glibc by default gives back and takes again at each step."""
    prepare_compute("cpu", "float32", torch.get_num_threads())

    def step() -> None:
        held = [torch.ones(3 << 19) for _ in range(24)]
        del held

    for _ in range(4):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2_000
