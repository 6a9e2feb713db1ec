"""Data sheets of devices, which the cost model takes its rates from. No torch.

In: a device's name as params.yaml has it. Out: peak rates, bandwidths and memory, all with their sources.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from storage.files import InputError
from storage.records import Precision


@dataclass(frozen=True)
class Device:
    """One device. Rates are dense peaks of the data sheet; the cost model says which share of them an engine reaches.

    `peak_flops` in FLOP/s by precision (int4 stores weights only and computes in bfloat16); `memory_bandwidth` in
    bytes/s; `memory_bytes` are the usable ones, `total_bytes` all that the driver reports; `link_bandwidth` in bytes/s
    per direction to other devices of the same node. `sources` has the source of each field. A precision that the device
    has no units for is not in `peak_flops`.
    """

    name: str
    description: str
    peak_flops: Mapping[Precision, float]
    memory_bandwidth: float
    memory_bytes: float
    total_bytes: float
    link_bandwidth: float
    sources: Mapping[str, str]


_H100_DATA_SHEET = "NVIDIA H100 Tensor Core GPU data sheet, SXM column"

_USABLE = 0.96
"""Share of a data sheet's memory that an engine can fill: the share of the H100, 82.5e9 of 80 GiB."""

_TOTAL = "memory.total of nvidia-smi, in MiB, as public logs of this device have it"


def _from_data_sheet(sheet: str, link: str) -> dict[str, str]:
    return {
        "peak_flops": f"{sheet}; half of the rates with sparsity; float32 without tensor cores",
        "memory_bandwidth": sheet,
        "memory_bytes": f"{sheet}; usable: {_USABLE:.0%} of it, as of the H100's",
        "total_bytes": _TOTAL,
        "link_bandwidth": f"{sheet}: {link}, both directions together",
    }


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
        total_bytes=81_559 * 2**20,
        link_bandwidth=450e9,
        sources={
            "peak_flops": f"{_H100_DATA_SHEET}; half of the rates with sparsity; float32 without tensor cores",
            "memory_bandwidth": _H100_DATA_SHEET,
            "memory_bytes": "usable: with 80e9 two published rows of the 70B (METHOD.md) would lose half their batch",
            "total_bytes": _TOTAL,
            "link_bandwidth": f"{_H100_DATA_SHEET}: NVLink 900 GB/s, both directions together",
        },
    ),
    Device(
        name="h200-sxm",
        description="NVIDIA H200 SXM 141GB",
        peak_flops={
            "fp8": 1979e12,
            "bfloat16": 989.5e12,
            "float16": 989.5e12,
            "int4": 989.5e12,
            "float32": 67e12,
        },
        memory_bandwidth=4.8e12,
        memory_bytes=_USABLE * 141e9,
        total_bytes=143_771 * 2**20,
        link_bandwidth=450e9,
        sources=_from_data_sheet("NVIDIA H200 Tensor Core GPU data sheet, SXM column", "NVLink 900 GB/s"),
    ),
    Device(
        name="a100-80gb-sxm",
        description="NVIDIA A100 SXM4 80GB",
        peak_flops={"bfloat16": 312e12, "float16": 312e12, "int4": 312e12, "float32": 19.5e12},
        memory_bandwidth=2.039e12,
        memory_bytes=82.5e9,
        total_bytes=81_920 * 2**20,
        link_bandwidth=300e9,
        sources={
            **_from_data_sheet("NVIDIA A100 Tensor Core GPU data sheet, 80GB SXM column", "NVLink 600 GB/s"),
            "memory_bytes": "as of the H100, whose memory has the same size",
        },
    ),
    Device(
        name="l40s",
        description="NVIDIA L40S 48GB",
        peak_flops={
            "fp8": 733e12,
            "bfloat16": 362.05e12,
            "float16": 362.05e12,
            "int4": 362.05e12,
            "float32": 91.6e12,
        },
        memory_bandwidth=864e9,
        memory_bytes=_USABLE * 48e9,
        total_bytes=46_068 * 2**20,
        link_bandwidth=32e9,
        sources=_from_data_sheet("NVIDIA L40S data sheet", "PCIe Gen4 x16, 64 GB/s"),
    ),
    Device(
        name="rtx-4090",
        description="NVIDIA GeForce RTX 4090 24GB",
        peak_flops={
            "fp8": 330.3e12,
            "bfloat16": 165.2e12,
            "float16": 165.2e12,
            "int4": 165.2e12,
            "float32": 82.6e12,
        },
        memory_bandwidth=1.008e12,
        memory_bytes=_USABLE * 24e9,
        total_bytes=24_564 * 2**20,
        link_bandwidth=32e9,
        sources={
            **_from_data_sheet("NVIDIA Ada GPU architecture white paper, appendix A", "PCIe Gen4 x16, 64 GB/s"),
            "peak_flops": "NVIDIA Ada GPU architecture white paper, appendix A; dense, with float32 accumulation",
        },
    ),
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _DEVICES}


def device_named(name: str) -> Device:
    """Return the data sheet of `name`.

    Raises:
        InputError: there is no data sheet of that name; the message lists those that exist.
    """
    if name not in DEVICES:
        close = difflib.get_close_matches(name, DEVICES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"hardware {name!r} has no data sheet (known: {', '.join(DEVICES)}){hint}")
    return DEVICES[name]


def check_precision(device: Device, precision: Precision) -> None:
    """Raise InputError where the device has no units for a precision."""
    if precision not in device.peak_flops:
        raise InputError(f"{device.name} has no units for {precision} (has: {', '.join(device.peak_flops)})")
