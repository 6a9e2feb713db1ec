"""Peak memory of caching, BLD, scoring, exports over parents of one width, 8 to 64 blocks; a parent larger than memory.

Run: `python -m tests.benchmarks.bench_memory`. Parents are synthetic, in float32. Each stage runs in a process of its
own, whose peak resident memory is read from the kernel; ratios are to the parent of 8 blocks. Last, a parent whose
weights are larger than the data that the processes may have (RLIMIT_DATA) goes through all of them.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from storage.formats import FormatName
from storage.params import Params
from storage.paths import Paths
from tasks.checkpoints import exports
from tasks.checkpoints.exports import read_checkpoint
from tasks.engines.machine import machine
from tasks.prepare_parent import prepare_parent
from tests.settings import SEQ_LEN, tiny_params
from tests.stages import STAGES
from tests.tiny import save_tokenizer, tiny_corpus

DEPTHS = (8, 16, 32, 64)
WIDTH, LARGE_WIDTH, LARGE_BLOCKS = 256, 1024, 48
ALLOWED = 2 << 30
VOCABULARY = 512


def params_of(folder: Path) -> Params:
    """Return params of a few sequences of everything."""
    return tiny_params(
        prepare_parent={"source": str(folder / "source")},
        cache_activations={"sequences_per_shard": 48},
        score_blocks={"sequences_per_batch": 4, "initial_tokens": 0},
        distill_blocks={"width_multiple": 64, "ffn_ratios": [0.5], "fit_tokens": 0},  # its float64 solves take minutes
    )


def write_parent(folder: Path, width: int, blocks: int) -> None:
    """Write a random Llama, prepared, and a corpus of random tokens; in a process of its own, which may hold it all."""
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "vocab_size": VOCABULARY}
    heads: dict[str, Any] = {"num_attention_heads": width // 64, "num_key_value_heads": max(2, width // 128)}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=blocks, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder / "source", max_shard_size="100MB")
    save_tokenizer(folder / "source")
    paths = Paths(folder / "artifacts")
    prepare_parent.fn(params_of(folder), paths)
    tiny_corpus(paths.corpus, VOCABULARY, SEQ_LEN)


def peak_mib(*arguments: str, limit: int | None = None) -> float:
    """Return the peak resident memory of this module run with arguments; `limit` in bytes of data."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, "-m", "tests.benchmarks.bench_memory", *arguments]
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # Arrow's own reserves a GiB of addresses
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=restrict)
    return float(ended.stdout.split()[-1])


def export(_: Params, paths: Paths) -> None:
    """Export the parent in every kind of form, in shards of 10 MiB."""
    formats: tuple[FormatName, ...] = ("nemotron-nas", "padded-llama", "gguf-f32", "gguf-q8_0")
    source, shard = read_checkpoint("parent", paths.parent, "the benchmark"), 0.01
    for piece in exports.begin(source, formats, paths.parent_exports, shard):
        exports.export.fn(piece, source, paths.parent_exports, shard)


MEASURED = (*STAGES, export)


def run(stage_name: str, folder: Path) -> None:
    """Run one stage in this process and print its peak memory."""
    stage = next(stage for stage in MEASURED if stage.__name__ == stage_name)
    stage(params_of(folder), Paths(folder / "artifacts"))
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # getrusage counts the process before exec as well
    sys.stdout.write(f"{int(status.partition('VmHWM:')[2].split()[0]) / 1024}\n")


def main() -> None:
    """Print a table and a JSON line."""
    machine_name = machine(torch.device("cpu"))
    names = [stage.__name__ for stage in MEASURED]
    sys.stdout.write(f"peak resident memory, MiB (ratio to {DEPTHS[0]} blocks), width {WIDTH}, {machine_name}\n")
    sys.stdout.write(f"{'blocks':>6} {'weights':>8}" + "".join(f"{name:>18}" for name in names) + "\n")
    peaks: dict[int, dict[str, float]] = {}
    for depth in DEPTHS:
        with tempfile.TemporaryDirectory() as folder:
            peak_mib("write", folder, str(WIDTH), str(depth))
            peaks[depth] = {name: peak_mib(name, folder) for name in names}
            weights = _mib(Path(folder) / "artifacts/parent")
        texts = (f"{peaks[depth][name]:.0f} ({peaks[depth][name] / peaks[DEPTHS[0]][name]:.2f})" for name in names)
        sys.stdout.write(f"{depth:>6} {weights:>8.0f}" + "".join(f"{text:>18}" for text in texts) + "\n")
        sys.stdout.flush()
    with tempfile.TemporaryDirectory() as folder:
        peak_mib("write", folder, str(LARGE_WIDTH), str(LARGE_BLOCKS))
        weights = _mib(Path(folder) / "artifacts/parent")
        sys.stdout.write(f"{weights:.0f} MiB of weights in processes that may have {ALLOWED >> 20} MiB of data: ")
        large = {name: peak_mib(name, folder, limit=ALLOWED) for name in names}
        sys.stdout.write(", ".join(f"{name} {peak:.0f} MiB resident" for name, peak in large.items()) + "\n")
    rows = {"depths": peaks, "large": {"weights_mib": weights, **large}}
    sys.stdout.write(json.dumps({"bench": "memory", "machine": machine_name, **rows}) + "\n")


def _mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "write":
        write_parent(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        sys.stdout.write("0\n")
    else:
        run(sys.argv[1], Path(sys.argv[2]))
