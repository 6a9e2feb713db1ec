"""Two ways to costs in llama.cpp, which runs whole models only: least squares over designs, or stacks of 2N and N.

Run: `python -m tests.studies.llamacpp_costs [--batch 8]` (12 minutes and 8 GB for the embedded parent on two cores,
which must have nothing else to do). All models stay loaded and are timed in turn; both ways then predict children that
were in neither, as ratios to the parent. docs/costs.md has what came out.
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
from storage.records import Attention, Ffn
from tasks.engines.designs import Blocks, Costs, designs, solve
from tasks.engines.llamacpp import Work, time_files
from tasks.puzzle.variants import attention_variants, ffn_variants

RATIOS = (0.875, 0.75, 0.5, 0.25, 0.2, 0.1)
STAND_IN = STAND_IN_FFN.intermediate_size
N = 8


def stacks(attentions: Sequence[Attention], ffns: Sequence[Ffn]) -> dict[str, Blocks]:
    """Stacks with 2N and N copies of every variant; a parent block in front of those without any kv heads."""
    own, found = (attentions[0], ffns[0]), dict[str, Blocks]()
    for attention in attentions[:-1]:
        front = [] if attention.kind == "gqa" else [own]
        found[f"2N {attention.name}"] = [*front, *[(attention, ffns[0])] * (2 * N)]
        found[f"N {attention.name}"] = [*front, *[(attention, ffns[0]), (attentions[-1], ffns[0])] * N]
    for ffn in ffns[:-1]:
        found[f"2N {ffn.name}"] = [(attentions[0], ffn)] * (2 * N)
        found[f"N {ffn.name}"] = [(attentions[0], ffn), (attentions[0], ffns[-1])] * N
    return found


def by_stacks(ms: Mapping[str, float], attentions: Sequence[Attention], ffns: Sequence[Ffn], num_blocks: int) -> Costs:
    """Differences of the stacks; a line through the FFNs' widths; the rest is the parent's beyond its parts."""

    def each(of: Attention | Ffn) -> float:
        return (ms[f"2N {of.name}"] - ms[f"N {of.name}"]) / N

    heads = [of for of in attentions if of.kind == "gqa"]
    kv_head, attention = np.polyfit([of.num_kv_heads for of in heads], [each(of) for of in heads], 1).tolist()
    widths = [of.intermediate_size - STAND_IN for of in ffns[:-1]]
    channel, ffn = np.polyfit(widths, [each(of) for of in ffns[:-1]], 1).tolist()
    parts = Costs(attention, kv_head, each(Attention("linear")), ffn - STAND_IN * channel, channel, 0.0)
    whole = parts.total([(attentions[0], ffns[0])] * num_blocks, STAND_IN)
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
    own = (attentions[0], ffns[0])
    draw, held = random.Random(1), dict[str, Blocks]()
    for number, keep in enumerate((0.3, 0.5, 0.5, 0.7, 0.7, 0.8)):
        held[f"held out {number}"] = [
            own if draw.random() < keep else (draw.choice(attentions), draw.choice(ffns))
            for _ in range(config.num_blocks)
        ]
    models: dict[str, Blocks] = {"parent": [own] * config.num_blocks, **held, **stacks(attentions, ffns)}
    models |= {f"design {number}": blocks for number, blocks in enumerate(drawn)}
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / f"{number}.gguf" for number, name in enumerate(models)}
        for name, path in files.items():
            write_gguf(path, config, models[name], None, "F16")
        rounds = time_files(files, Work(args.batch, 128, 192), args.rounds, args.threads)
    for phase in ("prefill", "decode"):
        ms = {name: statistics.median(found[phase]) for name, found in rounds.items()}
        fitted = ["parent", *(name for name in models if name.startswith("design"))]
        ways = {
            "least squares over designs": solve(
                [models[name] for name in fitted], [ms[name] for name in fitted], STAND_IN
            ),
            "stacks of 2N and N": by_stacks(ms, attentions, ffns, config.num_blocks),
        }
        for way, costs in ways.items():
            parent = costs.total(models["parent"], STAND_IN)
            errors = [abs(costs.total(held[name], STAND_IN) / parent / (ms[name] / ms["parent"]) - 1) for name in held]
            sys.stdout.write(
                f"{phase:<8} {way:<28} error of {len(held)} children {statistics.fmean(errors):.1%} on average, "
                f"{max(errors):.1%} at most\n"
            )


if __name__ == "__main__":
    main()
