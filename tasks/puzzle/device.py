"""The one place that decides device, dtype and threads."""

import ctypes
import functools
from dataclasses import dataclass
from typing import Literal

import torch

from storage.files import InputError

DtypeName = Literal["bfloat16", "float32"]
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt: freed bytes at the heap's end that are kept, least bytes of a mapping of its own."""
_BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")


@dataclass(frozen=True)
class Compute:
    """Where and in which precision a stage computes."""

    device: torch.device
    dtype: torch.dtype


def resolve(device: str, dtype: str) -> tuple[str, DtypeName]:
    """What `auto` means on this machine.

    Args:
        device: auto (a GPU if there is one), cpu, cuda or cuda:<n>.
        dtype: auto, bfloat16 or float32. auto is bfloat16 on a GPU and on a CPU with instructions for it (a CPU without
            them multiplies bfloat16 five to eight times as slowly as float32, measured on AVX2), else float32.

    Returns:
        Device and dtype without auto; the same on every machine of a kind.
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
    """Let glibc keep what temporaries free, for the next ones: a stack of blocks ran up to 1.6 times as fast, measured.

    By its defaults it gives memory back at each step, and the page faults of taking it again depend on the heap's
    layout, so that one process is slow and the next is not. Other allocators have no such call and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and mallopt(_MMAP_THRESHOLD, 32 << 20):  # the most that every glibc takes
        mallopt(_TRIM_THRESHOLD, 256 << 20)


def compute(device: str, dtype: str, threads: int) -> Compute:
    """Set the calling thread's number of torch threads and say where and in which precision it computes.

    Args:
        device: as in :func:`resolve`.
        dtype: as in :func:`resolve`; masters of trained weights are float32 always.
        threads: torch threads of the calling thread's kernels; sums are split by it, so results depend on it.

    Raises:
        InputError: a GPU was asked for and there is none of that number.
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
