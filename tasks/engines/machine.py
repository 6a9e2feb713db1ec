"""This machine: its name, the versions of its software, and the meaning of `auto` in the params of `run`."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from storage.params import Params
from tasks.puzzle.model.device import resolve


def on_this_machine(params: Params) -> Params:
    """`params` with the device and dtype that `auto` means on this machine: keys of pieces hold no `auto`."""
    device, dtype = resolve(params.run.device, params.run.dtype)
    return params.model_copy(update={"run": params.run.model_copy(update={"device": device, "dtype": dtype})})


def software() -> str:
    """Versions of torch and transformers, as tables have them."""
    import transformers  # a second that stages without tables save

    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def machine(device: torch.device) -> str:
    """The GPU that `device` names, else the processor (with family and model, since cloud machines hide the name)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    facts = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


@dataclass(frozen=True)
class Memory:
    """Bytes of memory of a machine, and of the device that its stages compute on: the same on a CPU."""

    host: int
    device: int


def memory_of(device: str) -> Memory:
    """The memory of this machine (what its container may take of it), and of the GPU that `device` names."""
    limit = Path("/sys/fs/cgroup/memory.max")
    limits = [limit.read_text(encoding="ascii").strip()] if limit.is_file() else []
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    host = min([physical, *(int(text) for text in limits if text.isdecimal())])
    resolved = torch.device(device)
    if resolved.type == "cpu" or (resolved.index or 0) >= torch.cuda.device_count():  # prepare_compute refuses it
        return Memory(host, host)
    return Memory(host, torch.cuda.get_device_properties(resolved).total_memory)
