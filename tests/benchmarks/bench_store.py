"""How fast shards come from a bucket, against a plain parallel download with s3fs in the same run.

Run: `python -m tests.benchmarks.bench_store`. A real S3 server runs on this machine, with shards as cache_activations
writes them. `stage` reads boundary after boundary as BLD does, through the cache: fetched ahead, compared with their
sha256, mapped and copied into tensors. `s3fs` copies the same objects into a folder, all at once. Repeats alternate; a
table for people and a JSON line for machines.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from storage.activations import REBUILD, BoundaryReader, shard_name, shard_path, write_shard
from storage.paths import Paths
from storage.pieces import Pieces
from storage.sections import Storage
from tasks.engines.machine import machine
from tests.s3_server import S3Server

REPEATS = 3
SHARDS, BOUNDARIES, SEQUENCES, TOKENS, HIDDEN = 6, 4, 16, 512, 1024


def write(paths: Paths) -> int:
    """Write the shards and publish them; return their bytes."""
    hidden, total = torch.randn(SEQUENCES, TOKENS, HIDDEN).bfloat16(), 0
    for shard in range(SHARDS):
        files = []
        for boundary in range(BOUNDARIES):
            files.append(shard_path(paths.activations, "train", boundary, shard))
            write_shard(files[-1], hidden.roll(shard * BOUNDARIES + boundary, 2), {})
            total += files[-1].stat().st_size
        Pieces(paths.activations, REBUILD).finish(
            shard_name("train", shard), "key", files, {"sequences_per_shard": SEQUENCES}
        )
    return total


def read(paths: Paths) -> float:
    """Read every boundary through a cache that is empty; return the seconds."""
    shutil.rmtree(paths.root / "cached")
    began = time.perf_counter()
    for boundary in range(BOUNDARIES):
        reader = BoundaryReader(paths.activations, "train", boundary)
        for start in range(0, SHARDS * SEQUENCES, 8):
            reader.read(range(start, start + 8))
    return time.perf_counter() - began


def download(server: S3Server, folder: Path) -> float:
    """Copy the same objects with s3fs; return the seconds."""
    store = server.client()
    objects = store.find(f"{server.bucket}/bench/activations")
    began = time.perf_counter()
    store.get(objects, [str(folder / Path(name).name) for name in objects])
    return time.perf_counter() - began


def main() -> None:
    """Print the rates and their ratio."""
    with tempfile.TemporaryDirectory() as name, S3Server(Path(tempfile.mkdtemp(dir=name))) as server:
        os.environ.update(server.environment)
        folder, storage = Path(name), Storage(root=f"s3://{server.bucket}/bench", cache_gib=100)
        num_bytes, stage, plain = write(Paths(folder / "run", storage)), list[float](), list[float]()
        for repeat in range(REPEATS + 1):
            fresh = Paths(folder / f"run-{repeat}", storage)  # as another process would find it
            shutil.copytree(folder / "run", fresh.root)
            stage.append(read(fresh))
            (folder / "copies").mkdir()
            plain.append(download(server, folder / "copies"))
            for used in (fresh.root, folder / "copies"):
                shutil.rmtree(used)
    rates = {
        label: num_bytes / 1e6 / statistics.median(times[1:]) for label, times in (("s3fs", plain), ("stage", stage))
    }
    ratio = statistics.median(other / ours for ours, other in zip(stage[1:], plain[1:], strict=True))
    where = machine(torch.device("cpu"))
    sys.stdout.write(f"{num_bytes / 1e6:.0f} MB in {SHARDS * BOUNDARIES} shards, {where}\n")
    for label, rate in rates.items():
        sys.stdout.write(f"{label:6} {rate:8.0f} MB/s\n")
    sys.stdout.write(f"ratio  {ratio:8.2f}\n")
    record = {"bench": "store", "mb": num_bytes / 1e6, "s3fs_mb_s": rates["s3fs"], "stage_mb_s": rates["stage"]}
    sys.stdout.write(json.dumps({**record, "ratio": ratio, "machine": where}) + "\n")


if __name__ == "__main__":
    main()
