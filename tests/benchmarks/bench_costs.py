"""Do the parts add up? Components timed on this machine, summed, against children that are timed end to end.

Run: `python -m tests.benchmarks.bench_costs [--config CONFIG_JSON] [--device cuda] [--precision bfloat16] ...`.
Children are drawn at random: none of them is a stack that the components were timed in. On a GPU every call is a CUDA
graph, and the parent's decode step without one is timed beside it (`make bench-gpu`).
"""

import argparse
import json
import random
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from storage.files import InputError, read_json
from storage.gguf import GgufModel, embedded_parent
from storage.model_config import ModelConfig, to_nemotron_nas
from storage.records import Attention, Ffn
from tasks.puzzle.child import DeciLMForCausalLM, NemotronNasConfig
from tasks.puzzle.device import Compute, compute
from tasks.puzzle.timing import (
    Components,
    Timing,
    Whole,
    Workload,
    fit_to_whole,
    interleaved,
    machine,
    software,
    time_models,
)
from tasks.puzzle.variants import attention_variants, ffn_variants, parent_attention, parent_ffn

Blocks = Sequence[tuple[Attention, Ffn]]
RATIOS = (0.75, 0.5, 0.25, 0.1)


def random_model(config: ModelConfig, blocks: Blocks, device: Compute) -> DeciLMForCausalLM:
    """A model whose weights are noise."""
    dtype = str(device.dtype).removeprefix("torch.")
    with torch.device(device.device):
        model = DeciLMForCausalLM(NemotronNasConfig(**to_nemotron_nas(config, blocks, {}, dtype)))
    nn.Module.to(model, device.dtype)
    model.requires_grad_(False)
    return model


def counted(blocks: Blocks) -> Counter[Attention | Ffn | str]:
    """How often a model has each component."""
    names: list[Attention | Ffn | str] = ["embedding", "head"]
    for block in blocks:
        names += block
    return Counter(names)


def graph_gain(config: ModelConfig, model: DeciLMForCausalLM, work: Workload, device: Compute, repeats: int) -> float:
    """How much faster the timed decode step is than the same calls from Python."""
    with torch.inference_mode():
        whole = Whole(config, model, work, device)
        calls = {"called": lambda: whole.run(1, work.mean_context), "timed": whole.calls()["decode"]}
        rounds = interleaved(calls, 16 * repeats, device.device)
    return statistics.median(rounds["called"]) / statistics.median(rounds["timed"])


def main() -> None:
    """Time, sum, compare."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_costs", description=__doc__)
    parser.add_argument("--config", type=Path, help="a Llama-like config.json; the embedded parent's if left out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--scenario", default="128/128")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--children", type=int, default=6)
    parser.add_argument("--copies", type=int, default=8, help="N of the stacks of 2N and N copies")
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    raw = read_json(args.config, "the download") if args.config else GgufModel(embedded_parent()[0]).config()
    config, device = ModelConfig.from_hf(raw, "config"), compute(args.device, args.precision, args.threads)
    work = Workload.of(args.scenario, args.batch)
    say(f"{args.scenario}, batch {args.batch}, {device.dtype}, {args.threads} threads, {software()}")
    say(f"on {machine(device.device)}")
    timed = Components(config, work, device, args.copies, args.repeats)
    attentions, ffns = attention_variants(config, linear=True), ffn_variants(config, RATIOS, 64, linear=False)
    variants: list[Attention | Ffn] = [*attentions, *ffns]
    costs: dict[Attention | Ffn | str, Timing] = {}
    for variant in tqdm(variants, desc="components", disable=None):
        costs[variant] = timed.subblock(variant)
    costs["embedding"], costs["head"] = timed.outside()
    own = (parent_attention(config), parent_ffn(config))
    draw = random.Random(0)
    models: dict[str, Blocks] = {"parent": [own] * config.num_blocks}
    for number in range(args.children):
        keep = draw.uniform(0.2, 0.8)
        models[f"child {number}"] = [
            own if draw.random() < keep else (draw.choice(attentions), draw.choice(ffns))
            for _ in range(config.num_blocks)
        ]
    built = {name: random_model(config, blocks, device) for name, blocks in models.items()}
    rounds = time_models(config, built, work, args.repeats, device)
    measured = {
        (name, phase): statistics.median(rounds[name][phase]) for name in models for phase in ("prefill", "decode")
    }
    parent = timed.whole(built["parent"])
    fit = fit_to_whole(costs, counted(models["parent"]), parent)
    errors: dict[str, list[float]] = {"prefill": [], "decode": []}
    for phase, of_all in errors.items():
        whole = getattr(parent, f"{phase}_ms")
        say(f"{phase}: the parent takes {whole:.2f} ms{fit.text}")
        say(f"  {'':<10} {'sum of parts / parent':>22} {'end to end / parent':>20} {'error':>7}")
        for name in list(models)[1:]:
            total = sum(
                count * getattr(fit.parts[part], f"{phase}_ms") for part, count in counted(models[name]).items()
            )
            ratio, real = total / whole, measured[name, phase] / measured["parent", phase]
            of_all.append(ratio / real - 1)
            say(f"  {name:<10} {ratio:>22.3f} {real:>20.3f} {of_all[-1]:>+7.1%}")
        absolute = list(map(abs, of_all))
        say(f"  error: {statistics.fmean(absolute):.1%} on average, {max(absolute):.1%} at most")
    graph = graph_gain(config, built["parent"], work, device, args.repeats) if device.device.type == "cuda" else None
    say(
        f"decode steps of the parent as a CUDA graph: {graph:.2f}x as fast as from Python"
        if graph
        else "no GPU, no graph"
    )
    say(json.dumps({"bench": "costs", "machine": machine(device.device), "errors": errors, "graph": graph}))


def say(text: str) -> None:
    """To the terminal, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
