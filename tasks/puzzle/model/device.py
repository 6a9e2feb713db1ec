"""The only place that decides on which device, in which dtype and with how many threads a stage computes."""

import ctypes
import functools
from typing import Literal, NamedTuple

import torch

from storage.files import InputError

DtypeName = Literal["bfloat16", "float32"]
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Option numbers of glibc's mallopt: how many freed bytes stay at the heap's end, and from which size an allocation
gets a memory mapping to itself."""
_BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""CPU instructions that make bfloat16 products fast, as torch names them."""

_ABSENT_GPU_BYTES = 79 * 2**30
"""What an A100 or H100 of 80 GB has."""


class Compute(NamedTuple):
    """The device and the precision that a stage computes with; `tensor.to(*compute)` brings a tensor there."""

    device: torch.device
    dtype: torch.dtype


def resolve(device: str, dtype: str) -> tuple[str, DtypeName]:
    """Replace `auto` by what it means on this machine.

    Args:
        device: auto (a GPU if there is one), cpu, cuda or cuda:<n>.
        dtype: auto, bfloat16 or float32. auto is bfloat16 on a GPU and on a CPU with instructions for it, else float32:
            a CPU without them multiplies bfloat16 five to eight times as slowly as float32 (measured on AVX2).

    Returns:
        Device and dtype, neither of them auto. They are the same on every machine of a kind.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        instructions = torch.cpu.get_capabilities()
        narrow = device != "cpu" or any(instructions.get(name) for name in _BF16_INSTRUCTIONS)
        return device, "bfloat16" if narrow else "float32"
    return device, "bfloat16" if dtype == "bfloat16" else "float32"


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep the memory that temporaries free: a stack of blocks ran up to 1.6 times as fast, measured.

    By default glibc gives memory back to the system at each step. Taking it again costs page faults that depend on the
    heap's layout, so that one process is slow and the next is not. Other allocators have no such call and stay as they
    are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and mallopt(_MMAP_THRESHOLD, 32 << 20):  # the largest threshold that every glibc accepts
        mallopt(_TRIM_THRESHOLD, 256 << 20)


def prepare_compute(device: str, dtype: str, threads: int) -> Compute:
    """Set the calling thread's number of torch threads, and decide where and in which precision it computes.

    Args:
        device: the device's name, which :func:`resolve` takes.
        dtype: the type's name, which :func:`resolve` takes; the masters of trained weights are always float32.
        threads: torch threads of the calling thread's kernels; they split sums, so results depend on their number.

    Raises:
        InputError: this machine has no GPU of the number that `device` names.
    """
    torch.set_num_threads(threads)
    _keep_freed_memory()
    device, dtype = resolve(device, dtype)
    resolved = torch.device(device)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"run.device is {device}, but this machine has {torch.cuda.device_count()} CUDA devices; "
            "set run.device to auto or cpu in params.yaml"
        )
    return Compute(resolved, {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype])


def gpu_bytes(device: torch.device) -> int:
    """Return the memory of a GPU; that of one of 80 GB where it is on a node that this machine plans for."""
    if (device.index or 0) >= torch.cuda.device_count():
        return _ABSENT_GPU_BYTES
    return torch.cuda.get_device_properties(device).total_memory
