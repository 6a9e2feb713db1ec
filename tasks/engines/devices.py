"""The GPUs that the workers of a stage take, one each, as CUDA_VISIBLE_DEVICES names them."""

import os
from collections.abc import Sequence
from typing import Literal

from storage.files import InputError

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def present_gpus() -> tuple[str, ...]:
    """Return the GPUs that this process sees, by CUDA's name of each; none on a machine without. CUDA stays off."""
    from torch import cuda  # here, since stages that compute nothing start without torch

    count, visible = cuda.device_count(), os.environ.get(_VISIBLE)
    names = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(count)]
    return tuple(names[:count])


def chosen_gpus(devices: Literal["auto"] | Sequence[str], present: Sequence[str]) -> tuple[str, ...]:
    """Return the GPUs that `execution.devices` names, in its order.

    Args:
        devices: auto (all), or cuda:<n> each, where n counts the present ones.
        present: what this process sees, by CUDA's name of each: a number, or a UUID.

    Raises:
        InputError: a GPU that is not there.
    """
    if devices == "auto":
        return tuple(present)
    numbers = {device: int(device.removeprefix("cuda:")) for device in devices}
    if missing := [device for device, number in numbers.items() if number >= len(present)]:
        raise InputError(
            f"execution.devices has {', '.join(missing)}, but this machine shows {len(present)} GPUs "
            f"({_VISIBLE}={','.join(present)}); name those that are there, or auto"
        )
    return tuple(present[number] for number in numbers.values())


def show_only(gpus: Sequence[str]) -> None:
    """Have this process, and those that it starts, see these GPUs alone; before anything starts CUDA."""
    os.environ[_VISIBLE] = ",".join(gpus)


def take_turn(gpus: Sequence[str], worker: str) -> str:
    """Return the GPU of a worker process, whose name ends in its number: `SpawnProcess-3`. Workers take turns."""
    return gpus[int(worker.rpartition("-")[2]) % len(gpus)]


def keep(gpu: str) -> None:
    """Start CUDA in this process with one GPU, which it keeps: what its variables say later changes nothing."""
    show_only([gpu])
    from torch import cuda

    cuda.is_available()
