"""The stages that compute, on a GPU: are they right, what do they take, and what did the planner say?

Run: `make check-gpu`, at most 8 minutes on one GPU of 80 GB or more, or anywhere `python -m tests.gpu.check_gpu
--device cpu --sizes tiny`. Random Llamas go through caching, BLD of two blocks, scores, correction and 20 steps of GKD,
which are killed once and go on. Prints a row for each part (seconds, the planner's beside them; TFLOP/s and their share
of what products of a block's shapes reach; time that waits for input; peak memory) and one line of JSON. Exit status 1
where a result is wrong: hidden states against transformers' own, the child behind a kill.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from storage.activations import BoundaryReader
from storage.architecture import read_architecture, write_architecture
from storage.checkpoints import placed
from storage.corpus import read_sequences
from storage.fields import resolved
from storage.gkd import read_gkd
from storage.library import Library
from storage.model_config import ModelConfig, expected_shapes
from storage.params import Params, parse
from storage.parent import Parent
from storage.paths import Paths
from storage.pipeline import read_pipeline
from storage.variants import Attention, Ffn, Replacement
from tasks import assemble_child, cache_activations, distill_blocks, distill_child, refine_child
from tasks.commands import machine_rates
from tasks.engines.machine import machine, on_this_machine
from tasks.estimates.stage_case import StageCase
from tasks.estimates.stage_estimates import estimate_stages
from tasks.prepare_parent import prepare_parent
from tasks.puzzle.model.device import Compute, prepare_compute
from tasks.puzzle.model.head import Head
from tasks.puzzle.quality.scoring import Candidate, score_group
from tasks.puzzle.search_space import block_variants, parent_attention, parent_blocks, parent_ffn
from tasks.tensors.replacements import ReplacementWeights
from tests.chosen import chosen_architecture
from tests.settings import tiny_values
from tests.tiny import LLAMA3_ROPE, save_tokenizer, tiny_corpus
from tests.waiting import waiting_counted

TARGET, STEPS, SAVED_EVERY = "small", 20, 5
KL_TOLERANCE = {"cpu": 0.0, "cuda": 0.02}
"""How far the KL behind a kill may be from the one without: attention's backward pass on a GPU adds up in any order."""


@dataclass(frozen=True)
class Size:
    """A Llama's geometry, the tokens of a sequence, and the sequences that each part takes."""

    hidden: int
    ffn: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    seq_len: int
    sequences: int
    tied: bool = False


SIZES = {
    "tiny": Size(48, 96, 3, 4, 2, 260, 16, 8, tied=True),
    "1b": Size(2048, 8192, 16, 32, 8, 128_256, 1024, 64, tied=True),
    "8b": Size(4096, 14_336, 32, 32, 8, 128_256, 2048, 32),
}


@dataclass(frozen=True)
class Row:
    """A part as measured; seconds that the planner models, and shares, where they are known."""

    size: str
    part: str
    seconds: float
    planned_seconds: float | None
    tflops: float | None
    utilisation: float | None
    waiting: float
    peak_gib: float

    def text(self) -> str:
        """Return the row of the table."""
        planned = "-" if self.planned_seconds is None else f"{self.planned_seconds:.1f}"
        rate = "-" if self.tflops is None else f"{self.tflops:.3g}"
        share = "-" if self.utilisation is None else f"{self.utilisation:.0%}"
        cells = f"{self.seconds:>9.1f}{planned:>10}{rate:>10}{share:>10}{self.waiting:>9.1%}{self.peak_gib:>9.1f}"
        return f"{self.size:<6}{self.part:<20}{cells}\n"


HEADER = f"{'':<26}{'seconds':>9}{'planned':>10}{'TFLOP/s':>10}{'of GEMM':>10}{'waits':>9}{'GiB':>9}\n"


class Check:
    """One size on one device: its parent, its params, and the parts in their order."""

    def __init__(self, name: str, root: Path, device: str) -> None:
        self.name, self.size, self.root = name, SIZES[name], root
        self.params = on_this_machine(params_of(self.size, root, device))
        self.paths = Paths(root / "artifacts")
        run = self.params.run
        self.compute = prepare_compute(run.device, run.dtype, run.threads)
        self.rows: list[Row] = []

    def run(self) -> None:
        """Do all parts; raises SystemExit where a result is wrong."""
        write_random(self.size, self.root / "source", self.compute)
        with self._part("prepare_parent"):
            prepare_parent.fn(self.params, self.paths)
        self.config = Parent(self.paths.parent).config
        self.case = StageCase(self.config, self.params)
        self.peak = gemm_peak(self.config, self.size.seq_len, self.compute)
        self.planned = planned(self.config, self.params, self.compute, self.root)
        tiny_corpus(self.paths.corpus, self.config.vocab_size, self.size.seq_len, splits(self.size))
        self._cache()
        self._train_blocks()
        self._score()
        self._assemble_and_refine()
        self._distil()

    def _cache(self) -> None:
        shards = cache_activations.plan_shards.fn(self.params, self.paths)
        flops = self.case.cached_tokens * self.config.num_blocks * self.case.block_flops
        with self._part("cache_activations", flops, self.planned["cache_activations"]):
            for group in cache_activations.grouped(shards, self.params, self.paths):
                cache_activations.cache_shards.fn(group, self.params, self.paths)
        self._compare_with_transformers()

    def _compare_with_transformers(self) -> None:
        """End with status 1 where the cached states are not transformers' own, up to rounding."""
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.paths.parent, dtype=self.compute.dtype, trust_remote_code=False
        )
        model = model.to(self.compute.device)
        tokens = torch.from_numpy(read_sequences(self.paths.corpus, "train", 0, 1)).long().to(self.compute.device)
        with torch.inference_mode():
            states = model.model(tokens, output_hidden_states=True, use_cache=False).hidden_states
        middle = self.config.num_blocks // 2
        ours = BoundaryReader(self.paths.activations, "train", middle).read([0]).float()
        cosine = functional.cosine_similarity(ours, states[middle].float().cpu(), dim=-1).mean()
        if not cosine > 0.999:
            sys.exit(f"{self.name}: cosine of cached states and transformers' own is {cosine:.4f}, expected 0.999")

    def _train_blocks(self) -> None:
        self._trained = (0, self.config.num_blocks // 2)
        plans = {plan.first_block: plan for plan in distill_blocks.plan_blocks.fn(self.params, self.paths)}
        share = len(self._trained) / self.config.num_blocks
        with self._part("BLD of two blocks", planned_seconds=share * self.planned["distill_blocks"]):
            for first in self._trained:
                distill_blocks.train_block.fn(plans[first], self.params, self.paths)

    def _score(self) -> None:
        """Score all variants of the trained blocks on the calibration tokens of score_blocks, one group for each."""
        config, parent, size = self.config, Parent(self.paths.parent), self.size
        _, norm, lm_head = parent.outside(*self.compute)
        head = Head(norm, lm_head, config.rms_norm_eps)
        weights = ReplacementWeights(parent, Library(self.paths.library), *self.compute)
        attentions, ffns = block_variants(config, self.params.distill_blocks)
        sequences = range(resolved(self.params.score_blocks.sequences_per_batch))
        tokens = torch.from_numpy(read_sequences(self.paths.corpus, "calibration", 0, len(sequences))).long()
        ids, count, flops = tokens.to(self.compute.device), len(sequences) * size.seq_len, 0.0
        readers = [BoundaryReader(self.paths.activations, "calibration", i) for i in range(config.num_blocks + 1)]
        with self._part("scores of two blocks", lambda: flops):
            for first in self._trained:
                changed = [Replacement(first, 1, each, parent_ffn(config)) for each in attentions[1:]]
                changed += [Replacement(first, 1, parent_attention(config), each) for each in ffns[1:]]
                losses = score_group(
                    config,
                    lambda index: parent.block(index, *self.compute),
                    lambda index: placed(readers[index].read(sequences), *self.compute),
                    head,
                    ids,
                    [Candidate(each, weights.tensors(each, "decoupled")) for each in changed],
                )
                behind = config.num_blocks - first
                flops += count * len(changed) * (behind * self.case.block_flops + self.case.head_flops)
                if not all(loss.kl.isfinite().all() for loss in losses):
                    sys.exit(f"{self.name}: a score of block {first} is not finite")

    def _assemble_and_refine(self) -> None:
        """A child with a narrow FFN and fewer kv heads in the trained blocks, and every third attention removed."""
        config, parent = self.config, Parent(self.paths.parent)
        attentions, ffns = block_variants(config, self.params.distill_blocks)
        blocks = list(parent_blocks(config))
        for index in range(1, config.num_blocks, 3):
            blocks[index] = Replacement(index, 1, Attention("no_op"), parent_ffn(config))
        for index in range(2, config.num_blocks, 4):
            blocks[index] = Replacement(index, 1, blocks[index].attention, Ffn("no_op"))
        for index in self._trained:
            blocks[index] = Replacement(index, 1, attentions[1], ffns[1])
        chosen = chosen_architecture(blocks, parent.info.name, parent.digest)
        write_architecture(self.paths.architecture(TARGET), chosen)
        with self._part("assemble_child"):
            assemble_child.assemble.fn(TARGET, self.params, self.paths)
        with self._part("refine_child", planned_seconds=self.planned[f"refine_child@{TARGET}"]):
            refine_child.refine.fn(TARGET, self.params, self.paths)

    def _distil(self) -> None:
        """Train in a process that is killed behind its first checkpoint and run again, then in one that is not."""
        flops = self.params.distill_child.tokens * (3 * self._child_flops() + 3 * self.case.head_flops)
        with self._part("GKD, killed once", planned_seconds=None):
            process = self._training()
            while process.poll() is None and not list(self.paths.gkd_state(TARGET).glob(".pieces/*.json")):
                time.sleep(0.05)
            was_killed = process.poll() is None
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            if self._training().wait():
                sys.exit(f"{self.name}: GKD did not go on behind a kill")
        resumed = read_gkd(TARGET, self.paths)
        with self._part(f"GKD, {STEPS} steps", flops, self.planned[f"distill_child@{TARGET}"]):
            distill_child.distill.fn(TARGET, self.params, self.paths)
        curve = read_gkd(TARGET, self.paths)
        if was_killed and abs(resumed.best.kl / curve.best.kl - 1) > KL_TOLERANCE[self.compute.device.type]:
            sys.exit(f"{self.name}: held-out KL {resumed.best.kl} behind a kill, {curve.best.kl} without one")
        if curve.best.kl > curve.held_out[0].kl:
            sys.exit(f"{self.name}: GKD raised the held-out KL from {curve.held_out[0].kl} to {curve.best.kl}")

    def _training(self) -> subprocess.Popen[bytes]:
        arguments = ["--device", self.params.run.device, "--distil", self.name, "--root", str(self.root)]
        return subprocess.Popen([sys.executable, "-m", "tests.gpu.check_gpu", *arguments])

    def _child_flops(self) -> float:
        blocks = read_architecture(TARGET, self.paths).blocks
        return sum(self.case.attention_flops(block.attention) + self.case.ffn_flops(block.ffn) for block in blocks)

    @contextmanager
    def _part(
        self, name: str, flops: float | Callable[[], float] = 0.0, planned_seconds: float | None = None
    ) -> Iterator[None]:
        """Measure what is done within."""
        on_gpu = self.compute.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with waiting_counted() as waited:
            yield
            if on_gpu:
                torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        done = flops() if callable(flops) else flops
        rate = done / seconds if done else None
        row = Row(
            size=self.name,
            part=name,
            seconds=seconds,
            planned_seconds=planned_seconds,
            tflops=rate / 1e12 if rate else None,
            utilisation=rate / self.peak if rate else None,
            waiting=waited[0] / seconds,
            peak_gib=(torch.cuda.max_memory_allocated() if on_gpu else 0) / 2**30,
        )
        self.rows.append(row)
        sys.stdout.write(row.text())
        sys.stdout.flush()


def params_of(size: Size, root: Path, device: str) -> Params:
    """Return the params of a check, on `device`."""
    seq_len = size.seq_len
    part = size.sequences * seq_len
    values = tiny_values(
        run={"device": device, "dtype": "auto"},
        prepare_parent={"source": str(root / "source")},
        prepare_corpus={
            "seq_len": seq_len,
            "train_tokens": part + STEPS * 2 * seq_len,
            "calibration_tokens": part // 2,
            "validation_tokens": 2 * seq_len,
        },
        cache_activations={"dtype": "bfloat16", "sequences_per_shard": 8, "sequences_per_batch": 4},
        distill_blocks={
            "fit_tokens": part // 2,
            "tokens": part,
            "sequences_per_step": 2,
            "held_out_tokens": part // 4,
            "importance_tokens": part // 4,
            "ffn_ratios": [0.5, 0.25],
            "width_multiple": 8,
        },
        score_blocks={"tokens": part // 4, "initial_tokens": 0, "sequences_per_batch": size.sequences // 4},
        refine_child={"tokens": part // 2, "held_out_tokens": part // 4},
        distill_child={
            "tokens": STEPS * 2 * seq_len,
            "sequences_per_step": 2,
            "learning_rate": 1e-4,
            "held_out_tokens": 2 * seq_len,
            "checkpoint_steps": SAVED_EVERY,
            "ranks": 1,  # with a float32 master and two moments a weight, and no second copy of anything
        },
        evaluate_child={"tokens": 2 * seq_len, "baseline_tokens": 0, "domain_baseline_tokens": 0, "export_tokens": 0},
    )
    return parse(values, "tests/gpu/check_gpu.py")


def splits(size: Size) -> tuple[int, int, int]:
    """Return the sequences of each split of the corpus."""
    return size.sequences + 2 * STEPS, size.sequences // 2, 2


def write_random(size: Size, folder: Path, compute: Compute) -> None:
    """Write a Llama whose weights are noise, a safetensors file a block, drawn on the device."""
    folder.mkdir(parents=True)
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.blocks,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 2048},
        "tie_word_embeddings": size.tied,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    save_tokenizer(folder)
    shapes = expected_shapes(ModelConfig.from_hf(raw, str(folder)))
    generator = torch.Generator(compute.device).manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        block = name.split(".")[2] if ".layers." in name else "outside"
        noise = torch.randn(shape, generator=generator, device=compute.device) * size.hidden**-0.5
        tensor = noise if len(shape) > 1 else 1 + 0.1 * noise
        files.setdefault(f"model-{block}.safetensors", {})[name] = tensor.to(torch.bfloat16).cpu()
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def gemm_peak(config: ModelConfig, tokens: int, compute: Compute) -> float:
    """Measure FLOP/s of the products of a block's FFN, four sequences at once, for a second."""
    rows = torch.randn(4 * tokens, config.hidden_size).to(*compute)
    weights = [torch.randn(config.intermediate_size, config.hidden_size).to(*compute) for _ in range(4)]
    done, start, elapsed = 0, time.perf_counter(), 0.0
    with torch.inference_mode():
        while elapsed < 1:
            for weight in weights:
                functional.linear(rows, weight)
            if compute.device.type == "cuda":
                torch.cuda.synchronize()
            done, elapsed = done + len(weights), time.perf_counter() - start
    return done * 2.0 * len(rows) * config.hidden_size * config.intermediate_size / elapsed


def planned(config: ModelConfig, params: Params, compute: Compute, root: Path) -> dict[str, float]:
    """Return the planner's seconds of every stage, from rates of this device that are timed for a moment each."""
    seconds = machine_rates._SECONDS
    machine_rates._SECONDS = 0.5
    try:
        rates = machine_rates.calibrate(config, params, compute, root)
    finally:
        machine_rates._SECONDS = seconds
    rates = replace(rates, start_seconds=0.0)  # the parts run in this process
    return {stage.stage: stage.seconds for stage in estimate_stages(read_pipeline(), config, params, rates)}


def main() -> None:
    """Run the sizes that are asked for; print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1b", "8b"])
    parser.add_argument("--distil", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.distil:  # the process that is killed
        params = on_this_machine(params_of(SIZES[arguments.distil], arguments.root, arguments.device))
        distill_child.distill.fn(TARGET, params, Paths(arguments.root / "artifacts"))
        return
    sys.stdout.write(f"{machine(torch.device(arguments.device))}, torch {torch.__version__}\n{HEADER}")
    rows: list[Row] = []
    for name in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            check = Check(name, Path(folder), arguments.device)
            check.run()
            rows += check.rows
    device = machine(torch.device(arguments.device))
    sys.stdout.write(json.dumps({"check": "gpu", "device": device, "rows": [asdict(row) for row in rows]}) + "\n")


if __name__ == "__main__":
    main()
