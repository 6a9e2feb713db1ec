"""The engine models against two published tables.

Run: `python -m tests.benchmarks.bench_engine_model [--fit]`. Without `--fit` it shows what the constants in the code
give; with it they are fitted again, and rows are predicted by constants that were fitted without them.

`tensorrt-llm` is fitted to Llama-3.1-70B's rows of the announcement of Llama-3.1-Nemotron-51B alone (tokens/s per H100,
FP8), then the 51B is predicted; with `--fit` each row is left out in turn. `tensorrt-llm-inflight` is fitted to rows of
TensorRT-LLM v1.0's own table, a CSV file beside the clone (IN_FLIGHT_TABLE), and left out of the fit in turn are a
model, a hardware and a scenario; the announcement's 51B, which no fit has, is predicted.
"""

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scipy.optimize import least_squares, minimize

from storage.files import read_json
from storage.model_config import ModelConfig
from storage.scenario import Scenario
from storage.variants import Attention, Ffn
from tasks.puzzle.costs.engine_model import (
    DEGREES,
    TENSORRT_LLM,
    TENSORRT_LLM_INFLIGHT,
    Engine,
    Estimate,
    Model,
    Platform,
    best_estimate,
)
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

IN_FLIGHT_TABLE = Path("../shared/data/tensorrt_llm_published.csv")
"""Rows of the table in TensorRT-LLM v1.0's documentation (FP8, PyTorch backend, requests at an infinite rate), with
columns model, hardware, tensor_parallel, scenario, output_tokens_per_s_total. It is no part of this project."""
SMALL_CONFIG = ModelConfig.from_hf(read_json(Path("params/llama-3.1-8b.config.json"), "git"), "8B")
MODELS = {
    "llama-3.1-8b": Model(SMALL_CONFIG, ((Attention("gqa", 8), Ffn("gated", 14_336)),) * 32),
    "llama-3.3-70b": PARENT,
    "51B": CHILD,
}
IN_FLIGHT_START = {"compute": 0.6, "memory": 0.9, "reduce_ms": 0.02}
"""Where the fit begins, and what a constant stays at where no row depends on it: usual shares, and the latency of a
small sum over devices of one node."""
IN_FLIGHT_BOUNDS = {"compute": (0.2, 1.0), "memory": (0.2, 0.95), "reduce_ms": (0.0, 0.2)}


@dataclass(frozen=True)
class PublishedRow:
    """Published generated tokens/s per GPU of a model on `degree` devices."""

    model: str
    hardware: str
    degree: int
    scenario: Scenario
    tokens_per_s: float

    def modelled(self, engine: Engine, batches: Sequence[int] | None = None) -> Estimate:
        """Return the modelled speed in FP8 on as many devices."""
        platform = Platform(device_named(self.hardware), engine, "fp8")
        return best_estimate(MODELS[self.model], platform, self.scenario, [self.degree], batches)

    def error(self, engine: Engine) -> float:
        """Return modelled over published tokens/s, less one."""
        return self.modelled(engine).tokens_per_s_per_gpu / self.tokens_per_s - 1


CHILD_ROWS = [PublishedRow("51B", "h100-sxm", 1, scenario, tokens) for scenario, (tokens, _) in CHILD_BEST.items()]
CHILD_ROWS.append(PublishedRow("51B", "h100-sxm", 2, Scenario(128, 4096), 3855))
"""The announcement's rows of the 51B; 128/4096 is published on two GPUs, all others on one."""
HELD_OUT: dict[str, Callable[[PublishedRow], str]] = {
    "model": lambda row: row.model,
    "hardware": lambda row: row.hardware,
    "scenario": lambda row: str(row.scenario),
}


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


def in_flight_rows() -> list[PublishedRow]:
    """Read the rows of the second table; none where it is not there."""
    if not IN_FLIGHT_TABLE.is_file():
        return []
    with IN_FLIGHT_TABLE.open(newline="", encoding="utf-8") as file:
        return [
            PublishedRow(
                row["model"],
                row["hardware"],
                int(row["tensor_parallel"]),
                Scenario.parse(row["scenario"]),
                float(row["output_tokens_per_s_total"]) / int(row["tensor_parallel"]),
            )
            for row in csv.DictReader(file)
        ]


def fit_in_flight(rows: Sequence[PublishedRow]) -> Engine:
    """Return constants with the least sum of squared log ratios; the others are those of the static engine."""
    # what memory holds, whatever the constants
    batches = [row.modelled(TENSORRT_LLM_INFLIGHT).batch for row in rows]

    def engine(values: Sequence[float]) -> Engine:
        compute, memory, reduce_ms = map(float, values)
        return replace(TENSORRT_LLM_INFLIGHT, compute=compute, memory=memory, reduce_ms=reduce_ms, fitted="now")

    def residuals(values: Sequence[float]) -> list[float]:
        fitted = engine(values)
        return [
            math.log(row.modelled(fitted, [batch]).tokens_per_s_per_gpu / row.tokens_per_s)
            for row, batch in zip(rows, batches, strict=True)
        ]

    bounds = tuple(zip(*IN_FLIGHT_BOUNDS.values(), strict=True))
    return engine(least_squares(residuals, list(IN_FLIGHT_START.values()), bounds=bounds, x_scale="jac").x.tolist())


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
    say(f"  {name:<34} published {tokens:>5}  modelled {best.tokens_per_s_per_gpu:>6.0f}  {error:>+7.1%}  {setting}")
    return error


def main() -> None:
    """Fit the constants with `--fit`, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_engine_model", description=__doc__)
    parser.add_argument("--fit", action="store_true", help="fit the constants again, and leave rows out in turn")
    is_fitted = parser.parse_args().fit
    summary = compare_static(fit(ROWS) if is_fitted else TENSORRT_LLM)
    summary |= compare_in_flight(is_fitted)
    say(json.dumps({"bench": "engine_model", **summary}))


def compare_static(engine: Engine) -> dict[str, Any]:
    """Print static batches against the announcement; where the engine is fitted now, with each row left out in turn.

    Returns:
        The mean and the largest error of each kind.
    """
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
    return {kind: summarise(kind, values) for kind, values in errors.items() if values}


def compare_in_flight(is_fitted: bool) -> dict[str, Any]:
    """Print in-flight batches against the second table, and against the announcement's 51B, which no fit has.

    Returns:
        The mean and the largest error of each kind.
    """
    rows = in_flight_rows()
    if not rows:
        say(f"no {IN_FLIGHT_TABLE}: {TENSORRT_LLM_INFLIGHT.name} is compared with the announcement's 51B alone")
    engine = fit_in_flight(rows) if rows and is_fitted else TENSORRT_LLM_INFLIGHT
    say(f"{engine.name}: " + ", ".join(f"{field} {getattr(engine, field):.4g}" for field in FIELDS))
    for row in [*rows, *CHILD_ROWS]:
        best = row.modelled(engine)
        compare(f"{row.model} {row.hardware} {row.scenario}", best, round(row.tokens_per_s))
    groups = {f"in-flight, {name}": [row for row in rows if row.model == name] for name in MODELS}
    groups |= {"in-flight, all": rows, "in-flight, 51B": CHILD_ROWS}
    summary = {
        name: summarise(name, [row.error(engine) for row in members]) for name, members in groups.items() if members
    }
    for kind, key in HELD_OUT.items() if is_fitted else ():
        for value in sorted({key(row) for row in rows}):
            other = fit_in_flight([row for row in rows if key(row) != value])
            name = f"in-flight, {kind} {value} left out"
            summary[name] = summarise(name, [row.error(other) for row in rows if key(row) == value])
    return summary


def summarise(kind: str, errors: Sequence[float]) -> dict[str, float]:
    """Print and return the mean and the largest of relative errors, without their signs."""
    absolute = list(map(abs, errors))
    mean, most = statistics.fmean(absolute), max(absolute)
    say(f"{kind}: error {mean:.1%} on average, {most:.1%} at most")
    return {"mean": mean, "most": most}


if __name__ == "__main__":
    main()
