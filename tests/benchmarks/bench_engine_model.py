"""The engine model against the published table: fitted to Llama-3.1-70B's rows alone, then the 51B is predicted.

Run: `python -m tests.benchmarks.bench_engine_model [--fit]`. Without `--fit` it shows what the constants in the code
give; with it they are fitted again, and each row is predicted by constants that were fitted without it (leave-one-out).
Published numbers: tokens/s per H100, FP8, TensorRT-LLM (the announcement of Llama-3.1-Nemotron-51B).
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.optimize import minimize

from storage.files import read_json
from storage.model_config import ModelConfig
from storage.scenario import Scenario
from storage.variants import Attention, Ffn
from tasks.puzzle.costs.engine_model import DEGREES, TENSORRT_LLM, Engine, Estimate, Model, Platform, best_estimate
from tasks.puzzle.costs.hardware import device_named

H100 = device_named("h100-sxm")
CONFIG = ModelConfig.from_hf(read_json(Path("params/llama-3.1-70b.config.json"), "git"), "70B")
PARENT = Model(CONFIG, ((Attention("gqa", 8), Ffn("gated", 28_672)),) * 80)
CHILD = Model(
    CONFIG,
    tuple(
        zip(
            [Attention("gqa", 8)] * 44
            + [Attention("gqa", 4)]
            + [Attention("gqa", 2)] * 6
            + [Attention("gqa", 1)] * 3
            + [Attention("linear")] * 18
            + [Attention("no_op")] * 8,
            [Ffn("gated", 28_672)] * 44 + [Ffn("gated", 14_336)] * 16 + [Ffn("gated", 7_168)] * 20,
            strict=True,
        )
    ),
)
"""The shipped 51B's counts; which of its blocks has which does not matter to a sum."""
ONE_GPU = {
    Scenario(128, 128): 2645,
    Scenario(128, 1024): 1274,
    Scenario(128, 2048): 646,
    Scenario(128, 4096): 313,
    Scenario(2048, 128): 300,
    Scenario(2048, 2048): 319,
}
BEST = {
    Scenario(128, 128): (2645, 1),
    Scenario(128, 1024): (2975, 4),
    Scenario(128, 2048): (2786, 4),
    Scenario(128, 4096): (1828, 4),
    Scenario(2048, 128): (339, 4),
    Scenario(2048, 2048): (1336, 4),
}
CHILD_BEST = {Scenario(128, 128): (5478, 1), Scenario(128, 1024): (6472, 1), Scenario(2048, 128): (653, 1)}
Row = tuple[Scenario, int, int]
ROWS: list[Row] = [(scenario, tokens, 1) for scenario, tokens in ONE_GPU.items()]
ROWS += [(scenario, tokens, degree) for scenario, (tokens, degree) in BEST.items() if degree > 1]
FIELDS = ("compute", "memory", "sharpness", "launch_ms", "reduce_ms")


def modelled(model: Model, engine: Engine, scenario: Scenario, degrees: Sequence[int] = DEGREES) -> Estimate:
    """Return the best setting in FP8 on H100s."""
    return best_estimate(model, Platform(H100, engine, "fp8"), scenario, degrees)


def fit(rows: Sequence[Row]) -> Engine:
    """Return constants with the least sum of squared log ratios."""

    def engine(values: Sequence[float]) -> Engine:
        compute, memory, sharpness, launch_ms, reduce_ms = values
        return Engine("fitted", compute, memory, sharpness, launch_ms, reduce_ms, "now")

    def loss(values: Sequence[float]) -> float:
        compute, memory, sharpness, *times = values
        if not (0 < compute <= 1 and 0 < memory <= 0.95 and 1 <= sharpness <= 8 and min(times) >= 0):
            return 1e9
        fitted = engine(values)
        total = 0.0
        for scenario, tokens, degree in rows:
            total += math.log(modelled(PARENT, fitted, scenario, [degree]).tokens_per_s_per_gpu / tokens) ** 2
        return total

    start = [getattr(TENSORRT_LLM, field) for field in FIELDS]
    options = {"maxiter": 400, "xatol": 1e-6, "fatol": 1e-6}
    return engine(minimize(loss, start, method="Nelder-Mead", options=options).x.tolist())


def say(text: str) -> None:
    """Write a line to the terminal."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def compare(name: str, best: Estimate, tokens: int) -> float:
    """Print modelled beside published tokens/s.

    Returns:
        The relative error.
    """
    error = best.tokens_per_s_per_gpu / tokens - 1
    setting = f"batch {best.batch}, TP{best.tensor_parallel}, step {best.step_ms:.1f} ms"
    say(f"  {name:<24} published {tokens:>5}  modelled {best.tokens_per_s_per_gpu:>6.0f}  {error:>+7.1%}  {setting}")
    return error


def main() -> None:
    """Fit the constants with `--fit`, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_engine_model", description=__doc__)
    parser.add_argument("--fit", action="store_true", help="fit the constants again, and leave one row out in turn")
    engine = fit(ROWS) if parser.parse_args().fit else TENSORRT_LLM
    say(", ".join(f"{field} {getattr(engine, field):.4g}" for field in FIELDS))
    say("70B, fitted (modelled against published, tokens/s per H100, FP8)")
    errors: dict[str, list[float]] = {"fitted": [], "51B": [], "ratio": [], "ratio of 2.0": [], "left out": []}
    for scenario, tokens, degree in ROWS:
        name = str(scenario)
        errors["fitted"].append(compare(name, modelled(PARENT, engine, scenario, [degree]), tokens))
    right = [modelled(PARENT, engine, scenario).tensor_parallel == degree for scenario, (_, degree) in BEST.items()]
    say(f"  best TP right for {sum(right)} of {len(right)}")
    say("51B, predicted")
    for scenario, (tokens, degree) in CHILD_BEST.items():
        best = modelled(CHILD, engine, scenario)
        errors["51B"].append(compare(str(scenario), best, tokens))
        parent = modelled(PARENT, engine, scenario, [1]).tokens_per_s_per_gpu
        ratio, published = (
            modelled(CHILD, engine, scenario, [1]).tokens_per_s_per_gpu / parent,
            tokens / ONE_GPU[scenario],
        )
        errors["ratio"].append(ratio / published - 1)
        errors["ratio of 2.0"].append(2.0 / published - 1)
        right_tp = "right" if best.tensor_parallel == degree else f"wrong, TP{degree} is published"
        say(f"    times the 70B on one GPU: published {published:.2f}, modelled {ratio:.2f}; best TP {right_tp}")
    if engine is not TENSORRT_LLM:
        for number, (scenario, tokens, degree) in enumerate(ROWS):
            other = fit([*ROWS[:number], *ROWS[number + 1 :]])
            best = modelled(PARENT, other, scenario, [degree])
            errors["left out"].append(best.tokens_per_s_per_gpu / tokens - 1)
    summary: dict[str, Any] = {}
    for kind, values in errors.items():
        if values:
            absolute = list(map(abs, values))
            summary[kind] = {"mean": statistics.fmean(absolute), "most": max(absolute)}
            say(f"{kind}: error {summary[kind]['mean']:.1%} on average, {summary[kind]['most']:.1%} at most")
    say(json.dumps({"bench": "engine_model", **summary}))


if __name__ == "__main__":
    main()
