"""Two ways to costs in llama.cpp, which runs whole models only: least squares over designs, or stacks of 2N and N.

Run: `python -m tests.studies.llamacpp_costs [--batch 8]` (12 minutes and 8 GB for the embedded parent on two cores,
which must have nothing else to do). All models stay loaded and are timed in turn; both ways then predict children that
were in neither, as ratios to the parent. docs/costs.md has the results.
"""

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from storage.gguf import GgufModel, embedded_parent
from storage.gguf_child import STAND_IN_FFN, write_gguf
from storage.model_config import ModelConfig
from storage.scenario import Scenario
from storage.variants import Attention, Ffn
from tasks.engines.designs import Blocks, Costs, designs, solve
from tasks.engines.llamacpp import time_files
from tasks.engines.timings import Workload
from tasks.puzzle.search_space import attention_variants, ffn_variants

RATIOS = (0.875, 0.75, 0.5, 0.25, 0.2, 0.1)
STAND_IN = STAND_IN_FFN.intermediate_size
N = 8


def stacks(attentions: Sequence[Attention], ffns: Sequence[Ffn]) -> dict[str, Blocks]:
    """Return stacks with 2N and N copies of every variant; a parent block in front of those without any kv heads."""
    parent_block, models = (attentions[0], ffns[0]), dict[str, Blocks]()
    for attention in attentions[:-1]:
        front = [] if attention.kind == "gqa" else [parent_block]
        models[f"2N {attention.name}"] = [*front, *[(attention, ffns[0])] * (2 * N)]
        models[f"N {attention.name}"] = [*front, *[(attention, ffns[0]), (attentions[-1], ffns[0])] * N]
    for ffn in ffns[:-1]:
        models[f"2N {ffn.name}"] = [(attentions[0], ffn)] * (2 * N)
        models[f"N {ffn.name}"] = [(attentions[0], ffn), (attentions[0], ffns[-1])] * N
    return models


def by_stacks(ms: Mapping[str, float], attentions: Sequence[Attention], ffns: Sequence[Ffn], num_blocks: int) -> Costs:
    """Return the stacks' differences; a line through the FFNs' widths; the rest is the parent's beyond its parts."""

    def variant_ms(variant: Attention | Ffn) -> float:
        return (ms[f"2N {variant.name}"] - ms[f"N {variant.name}"]) / N

    grouped = [attention for attention in attentions if attention.kind == "gqa"]
    heads = [attention.num_kv_heads for attention in grouped]
    kv_head, no_head = np.polyfit(heads, [variant_ms(attention) for attention in grouped], 1).tolist()
    widths = [ffn.intermediate_size - STAND_IN for ffn in ffns[:-1]]
    channel, narrowest = np.polyfit(widths, [variant_ms(ffn) for ffn in ffns[:-1]], 1).tolist()
    linear = variant_ms(Attention("linear"))
    parts = Costs(no_head, kv_head, linear, narrowest - STAND_IN * channel, channel, 0.0)
    whole = parts.total_ms([(attentions[0], ffns[0])] * num_blocks, STAND_IN)
    return replace(parts, rest=ms["parent"] - whole)


def main() -> None:
    """Time all models, predict the held-out ones both ways."""
    parser = argparse.ArgumentParser(prog="python -m tests.studies.llamacpp_costs", description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    config = ModelConfig.from_hf(GgufModel(embedded_parent()[0]).config(), "the embedded parent")
    attentions, ffns = attention_variants(config, linear=True), ffn_variants(config, RATIOS, 64, linear=False)
    drawn = designs(attentions, ffns, config.num_blocks, 14, seed=0)
    parent_block = (attentions[0], ffns[0])
    draw, held = random.Random(1), dict[str, Blocks]()
    for number, keep in enumerate((0.3, 0.5, 0.5, 0.7, 0.7, 0.8)):
        held[f"held out {number}"] = [
            parent_block if draw.random() < keep else (draw.choice(attentions), draw.choice(ffns))
            for _ in range(config.num_blocks)
        ]
    models: dict[str, Blocks] = {"parent": [parent_block] * config.num_blocks, **held, **stacks(attentions, ffns)}
    models |= {f"design {number}": blocks for number, blocks in enumerate(drawn)}
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / f"{number}.gguf" for number, name in enumerate(models)}
        for name, path in files.items():
            write_gguf(path, config, models[name], None, "F16")
        rounds = time_files(files, Workload(Scenario(128, 128), args.batch), args.rounds, args.threads)
    for phase in ("prefill", "decode"):
        ms = {name: statistics.median(times[phase]) for name, times in rounds.items()}
        fitted = ["parent", *(name for name in models if name.startswith("design"))]
        ways = {
            "least squares over designs": solve(
                [models[name] for name in fitted], [ms[name] for name in fitted], STAND_IN
            ),
            "stacks of 2N and N": by_stacks(ms, attentions, ffns, config.num_blocks),
        }
        for way, costs in ways.items():
            parent = costs.total_ms(models["parent"], STAND_IN)
            errors = []
            for name, blocks in held.items():
                ratio = costs.total_ms(blocks, STAND_IN) / parent
                errors.append(abs(ratio / (ms[name] / ms["parent"]) - 1))
            sys.stdout.write(
                f"{phase:<8} {way:<28} error of {len(held)} children {statistics.fmean(errors):.1%} on average, "
                f"{max(errors):.1%} at most\n"
            )


if __name__ == "__main__":
    main()
