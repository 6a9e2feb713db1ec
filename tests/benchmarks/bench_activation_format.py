"""Which file format for cached hidden states: bytes, write rate and read rate against raw file I/O.

Run: `python -m tests.benchmarks.bench_activation_format`. Data: the parent's own hidden states if artifacts/ has
them (compression depends on real values), else random bf16. A table for people and a JSON line for machines.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from storage.activations import BoundaryReader
from storage.paths import Paths
from tasks.engines.machine import machine

REPEATS = 7
Data = NDArray[np.uint16]


def hidden_states() -> tuple[Data, str]:
    """Return [sequences, tokens * hidden] uint16 (bf16 bits) of a middle boundary, and where they are from."""
    paths = Paths()
    if (paths.activations / "train").is_dir():
        hidden = BoundaryReader(paths.activations, "train", 15).read(range(32))
        return hidden.flatten(1).view(torch.uint16).numpy(), "cached boundary 15, train"
    return torch.randn(32, 256 * 576).bfloat16().view(torch.uint16).numpy(), "random"


def as_column(data: Data) -> pa.FixedSizeListArray:
    """Return a row per sequence."""
    return pa.FixedSizeListArray.from_arrays(pa.array(data.reshape(-1)), data.shape[1])


def as_halves(data: Data) -> pa.FixedSizeListArray:
    """Return the same as two-byte values, which Parquet can split by byte."""
    return pa.FixedSizeListArray.from_arrays(pa.array(data.reshape(-1).view(np.float16)), data.shape[1])


def ipc_writer(compression: str | None) -> Callable[[Path, Data], None]:
    """Return what writes an Arrow IPC file."""

    def write(path: Path, data: Data) -> None:
        batch = pa.record_batch([as_column(data)], names=["hidden"])
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema, options=options) as writer:
            writer.write_batch(batch)

    return write


def read_ipc(path: Path) -> int:
    """Map, and touch every value once."""
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    return int(np.frombuffer(batch.column(0).flatten().buffers()[1], dtype=np.uint16).max())


def parquet_writer(compression: str, split: bool) -> Callable[[Path, Data], None]:
    """Return what writes Parquet, plain or byte-stream-split."""

    def write(path: Path, data: Data) -> None:
        table = pa.table({"hidden": as_halves(data)})
        pq.write_table(table, path, compression=compression, use_dictionary=False, use_byte_stream_split=split)

    return write


def read_parquet(path: Path) -> int:
    """Decode, and touch every value once."""
    column = pq.read_table(path, memory_map=True).column("hidden").combine_chunks()
    return int(np.frombuffer(column.flatten().buffers()[1], dtype=np.uint16).max())


def write_raw(path: Path, data: Data) -> None:
    """Write the baseline: the bytes as they are."""
    data.tofile(path)


def read_raw(path: Path) -> int:
    """Read the baseline: map the bytes and touch every value once."""
    return int(np.memmap(path, dtype=np.uint16, mode="r").max())


FORMATS: dict[str, tuple[Callable[[Path, Data], None], Callable[[Path], int]]] = {
    "raw file": (write_raw, read_raw),
    "arrow ipc": (ipc_writer(None), read_ipc),
    "arrow ipc lz4": (ipc_writer("lz4"), read_ipc),
    "arrow ipc zstd": (ipc_writer("zstd"), read_ipc),
    "parquet": (parquet_writer("none", split=False), read_parquet),
    "parquet zstd": (parquet_writer("zstd", split=False), read_parquet),
    "parquet split zstd": (parquet_writer("zstd", split=True), read_parquet),
}


def main() -> None:
    """Time every format in turn, in rounds, and print ratios to the raw file."""
    data, origin = hidden_states()
    seconds: dict[str, dict[str, list[float]]] = {name: {"write": [], "read": []} for name in FORMATS}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(REPEATS):
            for name, (write, read) in FORMATS.items():
                path = Path(folder) / name.replace(" ", "_")
                start = time.perf_counter()
                write(path, data)
                middle = time.perf_counter()
                read(path)
                seconds[name]["read"].append(time.perf_counter() - middle)
                seconds[name]["write"].append(middle - start)
                sizes[name] = path.stat().st_size
    rows = {
        name: {
            "bytes": sizes[name] / data.nbytes,
            "write": _ratio(seconds["raw file"]["write"], seconds[name]["write"]),
            "read": _ratio(seconds["raw file"]["read"], seconds[name]["read"]),
        }
        for name in FORMATS
    }
    machine_name = machine(torch.device("cpu"))
    sys.stdout.write(f"hidden states: {origin}, {data.nbytes / 2**20:.0f} MiB, {REPEATS} rounds, {machine_name}\n")
    sys.stdout.write(f"{'format':<20} {'bytes/raw':>10} {'write rate/raw':>15} {'read rate/raw':>14}\n")
    for name, row in rows.items():
        sys.stdout.write(f"{name:<20} {row['bytes']:>10.3f} {row['write']:>15.2f} {row['read']:>14.2f}\n")
    sys.stdout.write(json.dumps({"bench": "activation_format", "data": origin, "machine": machine_name, **rows}) + "\n")


def _ratio(baseline: list[float], other: list[float]) -> float:
    """Return the median of the paired ratios of rates."""
    return statistics.median(base / seconds for base, seconds in zip(baseline, other, strict=True))


if __name__ == "__main__":
    main()
