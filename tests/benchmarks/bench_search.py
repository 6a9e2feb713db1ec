"""The search against PuLP with CBC on the same made-up problems of a 70B's size: seconds, proven gap, ratio.

Run: `python -m tests.benchmarks.bench_search`. Three sizes, six seeds each, medians: 80 blocks x 54 joint choices with
two limits that bind; the same with the batch left open (10 batches, which CBC has to solve one by one); an 80 x 16
library. Everything is solved to a gap of 0.1 %. A table for people and a JSON line for machines.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import pulp
import torch

from storage.published_library import PublishedVariant
from tasks.engines.machine import machine
from tasks.puzzle.search.best_child import PointLimits, best_child
from tasks.puzzle.search.mip import SolverSettings
from tasks.puzzle.search.problem import Choice, Limit, Problem

SEEDS = range(6)
GAP = 1e-3
BATCHES = (8, 16, 24, 32, 40, 48, 56, 64, 96, 128)
ONE_BATCH = 48
KV_SHARES = np.array([1.0, 0.5, 0.25, 0.125, 0.05, 0.0])  # 8, 4, 2, 1 kv heads, linear, no-op
FFN_SHARES = np.array([1.0, 0.875, 0.75, 0.5, 0.25, 0.2, 0.1, 0.05, 0.0])
GIB_PER_SHARE = (0.28, 1.31, 0.0083)  # 70B in FP8: a block's attention, its FFN, its KV of 4,352 tokens
MS_PER_GIB = 0.32  # 3.35 TB/s
PREFILL_MS_PER_GIB = 0.03  # of compute, spread over a request's steps: it weighs FFNs, where memory weighs the cache
ROOM_GIB, ROOM_MS = 90.0, 2.6
"""At the one batch both limits bind; a larger one takes more memory, a smaller one more time per sequence."""
Instance = tuple[Problem[PublishedVariant], list[PointLimits]]


def joint(seed: int, blocks: int = 80, attentions: int = 6, ffns: int = 9) -> Instance:
    """Make scores that rise towards smaller variants, each block of another importance; two limits.

    The points are batches: memory holds weights and the KV cache of the batch, time is per sequence of it.
    """
    rng = np.random.default_rng(seed)
    kv, ffn = KV_SHARES[:attentions], FFN_SHARES[:ffns]
    size = (blocks, attentions, ffns)

    def rising(count: int) -> np.ndarray:
        values = np.sort(rng.random((blocks, count)), axis=1) * rng.gamma(1.5, 0.02, (blocks, 1))
        values[:, 0] = 0.0
        return values

    scores = (rising(attentions)[:, :, None] + rising(ffns)[:, None, :]).ravel()
    noise = 1 + 0.02 * rng.random(size)
    attention_gib, ffn_gib, kv_gib = GIB_PER_SHARE
    held = (attention_gib * np.sqrt(kv)[:, None] + ffn_gib * ffn[None, :]) * noise
    cached = np.broadcast_to(kv_gib * kv[:, None], size)
    choices = []
    for (block, attention, ffn), score in zip(np.ndindex(size), scores, strict=True):
        choices.append(Choice(PublishedVariant(block, f"{attention:02d}-{ffn:02d}", {}, {}), float(score)))

    def limits(batch: int) -> tuple[Limit, Limit]:
        memory = held + batch * cached
        step = MS_PER_GIB * (held / batch + cached) + PREFILL_MS_PER_GIB * held
        return (
            Limit("memory", "memory", tuple(memory.ravel().tolist()), 0.0, ROOM_GIB),
            Limit("time", "time", tuple(step.ravel().tolist()), 0.0, ROOM_MS),
        )

    points = [PointLimits(str(batch), limits(batch)) for batch in BATCHES]
    return Problem(f"seed {seed}", blocks, tuple(choices), ()), points


def one_batch(seed: int) -> Instance:
    """Return the joint problem at a single batch."""
    problem, points = joint(seed)
    return problem, [points[BATCHES.index(ONE_BATCH)]]


def library(seed: int) -> Instance:
    """Make 80 blocks x 16 choices at a single batch."""
    problem, points = joint(seed, attentions=2, ffns=8)
    return problem, [points[BATCHES.index(ONE_BATCH)]]


def ours(instance: Instance) -> tuple[float, float, int]:
    """Return objective, proven gap and number of limits that bind, by this project's search."""
    problem, points = instance
    solution = best_child(problem, SolverSettings(relative_gap=GAP), points).solution
    return solution.objective, solution.gap, sum(use.binds for use in solution.uses)


def cbc(instance: Instance) -> tuple[float]:
    """Return the best objective over all operating points by CBC, which solves each of them to the gap."""
    problem, points = instance
    return (min(_cbc(problem, point) for point in points),)


def _cbc(problem: Problem[PublishedVariant], point: PointLimits) -> float:
    model = pulp.LpProblem("search", pulp.LpMinimize)
    variables = [pulp.LpVariable(f"x{index}", cat="Binary") for index in range(len(problem.choices))]
    model += pulp.lpSum(choice.score * variable for choice, variable in zip(problem.choices, variables, strict=True))
    for block in range(problem.num_blocks):
        pairs = zip(problem.choices, variables, strict=True)
        model += pulp.lpSum(variable for choice, variable in pairs if choice.replacement.layer == block) == 1
    for limit in point.limits:
        model += pulp.lpDot(limit.coefficients, variables) <= limit.upper
    model.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=GAP, threads=1, timeLimit=60))
    return float(pulp.value(model.objective)) if pulp.LpStatus[model.status] == "Optimal" else float("inf")


def timed(solve: Callable[[Instance], tuple[float, ...]], instance: Instance) -> tuple[float, ...]:
    """Return the seconds that `solve` takes, and what it returns."""
    start = time.perf_counter()
    results = solve(instance)
    return time.perf_counter() - start, *results


def compare(make: Callable[[int], Instance]) -> dict[str, float]:
    """Return medians over seeds of seconds, their ratio, that of the scores; the largest gap, the least that bind."""
    seconds, cbc_seconds, ratios, score_ratios, gaps, binding = [], [], [], [], [], []
    for seed in SEEDS:
        our_seconds, our_score, gap, num_binding = timed(ours, make(seed))
        other_seconds, other_score = timed(cbc, make(seed))
        seconds.append(our_seconds)
        cbc_seconds.append(other_seconds)
        ratios.append(other_seconds / our_seconds)
        score_ratios.append(our_score / other_score)
        gaps.append(gap)
        binding.append(int(num_binding))
    return {
        "seconds": statistics.median(seconds),
        "cbc_seconds": statistics.median(cbc_seconds),
        "ratio": statistics.median(ratios),
        "gap": max(gaps),
        "binding": min(binding),
        "score_ratio": statistics.median(score_ratios),
    }


def main() -> None:
    """Solve, print."""
    cases: dict[str, Callable[[int], Instance]] = {
        "80 x 54, one batch": one_batch,
        f"80 x 54, {len(BATCHES)} batches": joint,
        "80 x 16, one batch": library,
    }
    head = f"{'problem':<20} {'ours':>8} {'PuLP+CBC':>9} {'ratio':>6} {'largest gap':>12} {'score ours/CBC':>15}"
    lines, rows = [f"{head} {'limits that bind':>17}"], {}
    for name, make in cases.items():
        row = compare(make)
        times = f"{row['seconds']:>6.2f} s {row['cbc_seconds']:>7.2f} s {row['ratio']:>5.1f}x"
        lines.append(f"{name:<20} {times} {row['gap']:>12.1e} {row['score_ratio']:>15.5f} {row['binding']:>17}")
        rows[name] = row
    lines.append(f"medians over {len(SEEDS)} seeds, one thread, {machine(torch.device('cpu'))}, both in this run")
    sys.stdout.write("\n".join([*lines, json.dumps(rows), ""]))


if __name__ == "__main__":
    main()
