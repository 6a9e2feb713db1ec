"""The search on synthetic tables: every kind of constraint against brute force, what is written, what is not."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.files import InputError
from storage.metrics import METRICS
from storage.paths import Paths
from storage.scenario import Setting
from storage.tables import read_costs, write_costs, write_scores
from storage.variants import Architecture
from tasks.puzzle.costs.cost_table import CostTable
from tasks.puzzle.search.infeasible import InfeasibleError
from tasks.puzzle.search.quantities import Quantity, measure
from tasks.puzzle.search_space import parent_blocks
from tests.search_tables import CONFIG, MARGIN, SPEED, all_children, costs, run_search, scores, write_tables

# Every kind of constraint, with limits from loose to tight as multiples of the parent's value.
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "params": ({}, "at_most"),
    "block_params": ({}, "at_most"),
    "weight_bytes": ({}, "at_most"),
    "kv_bytes": ({}, "at_most"),
    "memory_gib": ({"batch": 64, "context": 512}, "at_most"),
    "attention_blocks": ({}, "at_most"),
    "latency_ms": (SPEED, "at_most"),
    "time_to_first_token_ms": (SPEED, "at_most"),
    "time_per_token_ms": (SPEED, "at_most"),
    "throughput": (SPEED, "at_least"),
    "decode_throughput": (SPEED, "at_least"),
}


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """Artifacts that the search reads."""
    paths = Paths(tmp_path / "artifacts")
    write_tables(paths)
    return paths


def _quantity(metric: str, scenario: str = "", batch: int = 1, **where: Any) -> Quantity:
    """The metric as the constraint with these fields means it."""
    if not scenario:
        return Quantity(METRICS[metric], batch=batch, **where)
    setting = Setting(where["hardware"], where["engine"], "bfloat16", 1, scenario, batch)
    return Quantity(METRICS[metric], mix=((setting, 1.0),))


def _brute_force(quantity: Quantity, limit: float) -> tuple[float | None, bool, float]:
    """The smallest sum of scores of a child that keeps the limit, whether that child is empty, and the metric's best.

    The best value of the metric is over all children.
    """
    table = CostTable(costs())
    better = max if quantity.inverse else min
    values = [measure(table, child, quantity) for child, _ in all_children()]
    kept = []
    for (child, score), value in zip(all_children(), values, strict=True):
        if better(value, limit) == value:
            kept.append((score, all(block.attention.kind == block.ffn.kind == "no_op" for block in child)))
    if not kept:
        return None, False, better(values)
    return (*min(kept), better(values))


@pytest.mark.parametrize("metric", list(KINDS))
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("tightness", [1.0, 1.5, 1e6])
def test_every_kind_of_constraint_equals_brute_force(
    paths: Paths, metric: str, relative: bool, tightness: float
) -> None:
    operating_point, side = KINDS[metric]
    quantity = _quantity(metric, **operating_point)
    parent_value = measure(CostTable(costs()), parent_blocks(CONFIG), quantity)
    ratio = tightness if quantity.inverse else 1 / tightness
    limit = {f"{side}_ratio": ratio} if relative else {side: ratio * parent_value}
    speed = "hardware" in operating_point
    margin = (1 + MARGIN if quantity.inverse else 1 - MARGIN) if speed else 1.0
    expected, is_empty, best = _brute_force(quantity, ratio * parent_value * margin)
    constraints = {"only": {"metric": metric, **operating_point, **limit}}
    if expected is None:
        with pytest.raises(InfeasibleError) as caught:
            run_search(constraints, paths)
        (conflict,) = caught.value.conflicts
        assert conflict.best == pytest.approx(best / margin / (parent_value if relative else 1))
        return
    if is_empty:
        with pytest.raises(InputError, match="no attention and no FFN in any block"):
            run_search(constraints, paths)
        return
    summary, architecture, _ = run_search(constraints, paths)
    assert summary.score == pytest.approx(expected, rel=1e-6, abs=1e-9)
    predicted = architecture["constraints"][0]["predicted"] / (1 if relative else parent_value)
    assert predicted * (-1 if quantity.inverse else 1) <= ratio * (-1 if quantity.inverse else 1) + 1e-9


DEMO = {
    "size": {"metric": "block_params", "at_most_ratio": 0.7},
    "cache": {"metric": "kv_bytes", "at_most_ratio": 0.9},
    "speed": {"metric": "decode_throughput", "at_least_ratio": 1.1, **SPEED},
}


def test_what_is_written(paths: Paths) -> None:
    summary, architecture, report = run_search(DEMO, paths)
    blocks = Architecture.from_json(architecture["blocks"])
    assert architecture["target"] == "like-51b" and architecture["label"] == "51B-like"
    assert architecture["parent"] == {"name": "tiny", "digest": "d1"}
    table, predicted = CostTable(read_costs(paths.costs)), architecture["predicted"]
    parent = parent_blocks(CONFIG)
    ratios = {
        "params_ratio": "params",
        "block_params_ratio": "block_params",
        "kv_ratio": "kv_bytes",
    }
    for key, metric in ratios.items():
        ratio = measure(table, blocks.blocks, Quantity(METRICS[metric])) / measure(
            table, parent, Quantity(METRICS[metric])
        )
        assert predicted[key] == pytest.approx(ratio), key
    assert predicted["batch"] == 8 and predicted["context"] == 256
    memory = Quantity(METRICS["memory_gib"], batch=8, context=256)
    assert predicted["memory_gib"] == pytest.approx(measure(table, blocks.blocks, memory))
    assert predicted["score_stderr"] > 0
    assert predicted["speed"]["hardware"] == "h100-sxm" and predicted["speed"]["origin"] == "modelled"
    assert predicted["throughput_ratio"] == pytest.approx(predicted["speed"]["child"] / predicted["speed"]["parent"])
    assert predicted["throughput_ratio"] >= 1.1 * (1 + MARGIN)
    assert [row["name"] for row in architecture["constraints"]] == list(DEMO)
    assert summary.score == report["objective"] == pytest.approx(predicted["score"])
    assert {"solver", "status", "bound", "gap", "seconds", "binding", "nodes"} <= set(report)
    assert report["status"] == "optimal" and report["bound"] <= report["objective"]


def test_the_same_tables_give_the_same_bytes_and_no_clock(paths: Paths) -> None:
    run_search(DEMO, paths)
    before = paths.architecture("like-51b").read_bytes()
    run_search(DEMO, paths)
    assert paths.architecture("like-51b").read_bytes() == before
    assert b"seconds" not in before


def test_the_parent_itself_meets_a_limit_of_1(paths: Paths) -> None:
    summary, _, _ = run_search({"size": {"metric": "params", "at_most_ratio": 1.0}}, paths)
    assert summary.score == 0 and summary.throughput_ratio is None


def test_infeasible_names_both_limits_writes_nothing_and_leaves_an_earlier_child(paths: Paths) -> None:
    run_search(DEMO, paths)
    before = paths.architecture("like-51b").read_bytes()
    tight = DEMO | {"speed": {"metric": "decode_throughput", "at_least_ratio": 1e5, **SPEED}}
    with pytest.raises(InfeasibleError) as caught:
        run_search(tight, paths)
    message = str(caught.value)
    assert (
        "speed: decode_throughput (h100-sxm, roofline, bfloat16, 128/128, batch 8) >= 100000x the parent's" in message
    )
    assert "best reachable" in message and "margin of 5%" in message
    assert paths.architecture("like-51b").read_bytes() == before


def test_the_best_value_that_is_reported_can_be_set_and_a_better_one_cannot(paths: Paths) -> None:
    """With an attention that has to stay, since the fastest child of all has nothing in any block, and is refused."""
    attention = {"metric": "attention_blocks", "at_least": 1}
    tight = {"speed": {"metric": "throughput", "at_least_ratio": 1e5, **SPEED}, "attention": attention}
    with pytest.raises(InfeasibleError) as caught:
        run_search(tight, paths)
    (best,) = [conflict.best for conflict in caught.value.conflicts if conflict.limit.name == "speed"]
    assert best is not None
    tight["speed"]["at_least_ratio"] = best * (1 - 1e-6)
    run_search(tight, paths)
    tight["speed"]["at_least_ratio"] = best * (1 + 1e-6)
    with pytest.raises(InfeasibleError):
        run_search(tight, paths)


def test_a_table_without_the_parents_variant(paths: Paths) -> None:
    write_costs(paths.costs, [row for row in costs() if row.variant != "ffn_256"])
    with pytest.raises(InputError, match="no ffn 'ffn_256'"):
        run_search(DEMO, paths)


def test_a_constraint_on_hardware_that_was_never_measured(paths: Paths) -> None:
    with pytest.raises(InputError, match=r"on a100, torch, .* the table has h100-sxm, roofline"):
        run_search(
            {"speed": {"metric": "throughput", "at_least_ratio": 1.1, "hardware": "a100", "scenario": "128/128"}}, paths
        )


def test_a_variant_that_was_scored_but_never_costed(paths: Paths) -> None:
    write_scores(paths.scores, [*scores(random.Random(0)), replace(scores(random.Random(0))[0], ffn="ffn_192")])
    with pytest.raises(InputError, match="no ffn 'ffn_192'"):
        run_search(DEMO, paths)


def test_missing_tables_name_the_stage(paths: Paths) -> None:
    paths.scores.unlink()
    with pytest.raises(InputError, match="dvc repro score_blocks"):
        run_search(DEMO, paths)
