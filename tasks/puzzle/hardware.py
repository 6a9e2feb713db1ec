"""Data sheets of devices: what the cost model may assume of each. No torch.

In: a device's name as params.yaml has it. Out: peak rates, bandwidths and memory, each with its source.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from storage.files import InputError
from storage.records import Precision


@dataclass(frozen=True)
class Device:
    """One device. Rates are dense peaks of the data sheet; what an engine reaches of them is the cost model's matter.

    `peak_flops` in FLOP/s by precision (int4 stores weights only and computes in bfloat16); `memory_bandwidth` in
    bytes/s; `memory_bytes` are the usable ones; `link_bandwidth` in bytes/s per direction to other devices of the
    same node. `sources` says for each field where the number is from.
    """

    name: str
    description: str
    peak_flops: Mapping[Precision, float]
    memory_bandwidth: float
    memory_bytes: float
    link_bandwidth: float
    sources: Mapping[str, str]


_H100_DATA_SHEET = "NVIDIA H100 Tensor Core GPU data sheet, SXM column"

_DEVICES = (
    Device(
        name="h100-sxm",
        description="NVIDIA H100 SXM5 80GB",
        peak_flops={
            "fp8": 1979e12,
            "bfloat16": 989.5e12,
            "float16": 989.5e12,
            "int4": 989.5e12,
            "float32": 67e12,
        },
        memory_bandwidth=3.35e12,
        memory_bytes=82.5e9,
        link_bandwidth=450e9,
        sources={
            "peak_flops": f"{_H100_DATA_SHEET}; half of the rates with sparsity; float32 without tensor cores",
            "memory_bandwidth": _H100_DATA_SHEET,
            "memory_bytes": "usable: with 80e9 two published rows of the 70B (METHOD.md) would lose half their batch",
            "link_bandwidth": f"{_H100_DATA_SHEET}: NVLink 900 GB/s, both directions together",
        },
    ),
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _DEVICES}


def device_named(name: str) -> Device:
    """The data sheet of `name`.

    Raises:
        InputError: no such device; the message has the known ones.
    """
    if name not in DEVICES:
        close = difflib.get_close_matches(name, DEVICES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"hardware {name!r} has no data sheet (known: {', '.join(DEVICES)}){hint}")
    return DEVICES[name]
