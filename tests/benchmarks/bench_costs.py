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
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from storage.files import InputError, read_json
from storage.gguf import GgufModel, embedded_parent
from storage.model_config import ModelConfig
from storage.nemotron_nas import to_nemotron_nas
from storage.scenario import Scenario
from storage.variants import Attention, Ffn
from tasks.engines.in_torch import Components, Whole, interleaved, time_models
from tasks.engines.machine import machine, software
from tasks.engines.timings import Fit, Timing, Workload, fit_to_whole
from tasks.puzzle.model.child import DeciLMForCausalLM, NemotronNasConfig
from tasks.puzzle.model.device import Compute, prepare_compute
from tasks.puzzle.search_space import attention_variants, ffn_variants, parent_attention, parent_ffn

Blocks = Sequence[tuple[Attention, Ffn]]
Part = Attention | Ffn | str
"""A component of a model: a variant, `embedding` or `head`."""
RATIOS = (0.75, 0.5, 0.25, 0.1)


def random_model(config: ModelConfig, blocks: Blocks, compute: Compute) -> DeciLMForCausalLM:
    """Make a model whose weights are noise."""
    dtype = str(compute.dtype).removeprefix("torch.")
    with torch.device(compute.device):
        model = DeciLMForCausalLM(NemotronNasConfig(**to_nemotron_nas(config, blocks, {}, dtype)))
    nn.Module.to(model, compute.dtype)
    model.requires_grad_(False)
    return model


def counted(blocks: Blocks) -> Counter[Part]:
    """Count how often a model has each component."""
    names: list[Part] = ["embedding", "head"]
    for block in blocks:
        names += block
    return Counter(names)


def graph_gain(
    config: ModelConfig, model: DeciLMForCausalLM, workload: Workload, compute: Compute, repeats: int
) -> float | None:
    """Return the time of a decode step called from Python over that of its CUDA graph; None without a GPU."""
    if compute.device.type != "cuda":
        return None
    with torch.inference_mode():
        whole = Whole(config, model, workload, compute)
        calls = {"called": lambda: whole.run(1, workload.context_at_midpoint), "timed": whole.calls()["decode"]}
        rounds = interleaved(calls, 16 * repeats, compute.device)
    return statistics.median(rounds["called"]) / statistics.median(rounds["timed"])


def draw_models(
    config: ModelConfig, attentions: Sequence[Attention], ffns: Sequence[Ffn], children: int
) -> dict[str, Blocks]:
    """Draw the parent, and random children that keep 20 to 80 % of its blocks."""
    parent_block = (parent_attention(config), parent_ffn(config))
    draw = random.Random(0)
    models: dict[str, Blocks] = {"parent": [parent_block] * config.num_blocks}
    for number in range(children):
        keep = draw.uniform(0.2, 0.8)
        models[f"child {number}"] = [
            parent_block if draw.random() < keep else (draw.choice(attentions), draw.choice(ffns))
            for _ in range(config.num_blocks)
        ]
    return models


def compare(
    phase: str, models: Mapping[str, Blocks], fit: Fit[Part], parent: Timing, measured: Mapping[str, float]
) -> list[float]:
    """Print each child's sum of parts beside its end-to-end time, both as ratios to the parent.

    Returns:
        The relative error of each child.
    """
    whole = getattr(parent, f"{phase}_ms")
    say(f"{phase}: the parent takes {whole:.2f} ms{fit.text}")
    say(f"  {'':<10} {'sum of parts / parent':>22} {'end to end / parent':>20} {'error':>7}")
    errors = []
    for name in list(models)[1:]:
        total = sum(count * getattr(fit.parts[part], f"{phase}_ms") for part, count in counted(models[name]).items())
        ratio, real = total / whole, measured[name] / measured["parent"]
        errors.append(ratio / real - 1)
        say(f"  {name:<10} {ratio:>22.3f} {real:>20.3f} {errors[-1]:>+7.1%}")
    absolute = list(map(abs, errors))
    say(f"  error: {statistics.fmean(absolute):.1%} on average, {max(absolute):.1%} at most")
    return errors


def main() -> None:
    """Time the components, sum them up, compare with whole models."""
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
    config, compute = ModelConfig.from_hf(raw, "config"), prepare_compute(args.device, args.precision, args.threads)
    workload = Workload(Scenario.parse(args.scenario), args.batch)
    say(f"{args.scenario}, batch {args.batch}, {compute.dtype}, {args.threads} threads, {software()}")
    say(f"on {machine(compute.device)}")
    timed = Components(config, workload, compute, args.copies, args.repeats)
    attentions, ffns = attention_variants(config, linear=True), ffn_variants(config, RATIOS, 64, linear=False)
    variants: list[Attention | Ffn] = [*attentions, *ffns]
    costs: dict[Part, Timing] = {}
    for variant in tqdm(variants, desc="components", disable=None):
        costs[variant] = timed.subblock(variant)
    costs["embedding"], costs["head"] = timed.outside()
    models = draw_models(config, attentions, ffns, args.children)
    built = {name: random_model(config, blocks, compute) for name, blocks in models.items()}
    rounds = time_models(config, built, workload, args.repeats, compute)
    parent = timed.whole(built["parent"])
    fit = fit_to_whole(costs, counted(models["parent"]), parent)
    errors: dict[str, list[float]] = {}
    for phase in ("prefill", "decode"):
        measured = {name: statistics.median(rounds[name][phase]) for name in models}
        errors[phase] = compare(phase, models, fit, parent, measured)
    graph = graph_gain(config, built["parent"], workload, compute, args.repeats)
    if graph:
        say(f"decode steps of the parent as a CUDA graph: {graph:.2f}x as fast as from Python")
    else:
        say("no GPU, no graph")
    say(json.dumps({"bench": "costs", "machine": machine(compute.device), "errors": errors, "graph": graph}))


def say(text: str) -> None:
    """Write a line to the terminal at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
