"""The one place that decides device, dtype and threads."""

from dataclasses import dataclass

import torch

from storage.files import InputError


@dataclass(frozen=True)
class Compute:
    """Where and in which precision a stage computes."""

    device: torch.device
    dtype: torch.dtype


def compute(device: str, dtype: str, threads: int) -> Compute:
    """Resolve the params of `run` and set the calling thread's number of torch threads.

    Args:
        device: auto (a GPU if there is one), cpu, cuda or cuda:<n>.
        dtype: bfloat16 or float32, the precision of compute; masters of trained weights are float32 always.
        threads: torch threads of the calling thread's kernels; sums are split by it, so results depend on it.

    Raises:
        InputError: a GPU was asked for and there is none of that number.
    """
    torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"run.device is {device}, but this machine has {torch.cuda.device_count()} CUDA devices; "
            "set run.device to auto or cpu in params.yaml"
        )
    return Compute(resolved, {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype])
