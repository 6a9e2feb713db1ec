"""The search on synthetic tables: every kind of constraint against brute force, what is written, what is not."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.architecture import read_architecture, read_baselines
from storage.checkpoints import Checkpoint, read_blocks
from storage.files import InputError
from storage.metrics import METRICS
from storage.params import Params
from storage.paths import Paths
from storage.scenario import Setting
from storage.tables import read_costs, write_costs, write_scores
from storage.variants import Architecture
from tasks.assemble_child import assemble
from tasks.measure_costs import write_cost_table
from tasks.puzzle.costs.cost_table import CostTable
from tasks.puzzle.removals import without
from tasks.puzzle.search.infeasible import InfeasibleError
from tasks.puzzle.search.quantities import Quantity, measure
from tasks.puzzle.search_space import parent_blocks
from tasks.search_architecture import search
from tasks.search_baselines import search_baselines
from tests.search_tables import (
    CONFIG,
    MARGIN,
    SPEED,
    TARGET,
    all_children,
    costs,
    run_search,
    scores,
    tiny_search_params,
    write_tables,
)
from tests.settings import tiny_params

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
    """Write the artifacts that the search reads."""
    paths = Paths(tmp_path / "artifacts")
    write_tables(paths)
    return paths


def _quantity(metric: str, scenario: str = "", batch: int = 1, **where: Any) -> Quantity:
    """Return the metric as the constraint with these fields means it."""
    if not scenario:
        return Quantity(METRICS[metric], batch=batch, **where)
    setting = Setting(where["hardware"], where["engine"], "bfloat16", 1, scenario, batch)
    return Quantity(METRICS[metric], mix=((setting, 1.0),))


def _brute_force(quantity: Quantity, limit: float) -> tuple[float | None, float]:
    """Return the smallest sum of scores of a child that keeps the limit, and the metric's best value over all children.

    Nothing in any block is no child.
    """
    table = CostTable(costs())
    better = max if quantity.inverse else min
    children = [
        (child, score)
        for child, score in all_children()
        if any((block.attention.kind, block.ffn.kind) != ("no_op", "no_op") for block in child)
    ]
    values = [measure(table, child, quantity) for child, _ in children]
    kept = [score for (_, score), value in zip(children, values, strict=True) if better(value, limit) == value]
    return min(kept, default=None), better(values)


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
    expected, best = _brute_force(quantity, ratio * parent_value * margin)
    constraints = {"only": {"metric": metric, **operating_point, **limit}}
    if expected is None:
        with pytest.raises(InfeasibleError) as caught:
            run_search(constraints, paths)
        (conflict,) = caught.value.conflicts
        assert conflict.best == pytest.approx(best / margin / (parent_value if relative else 1))
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


@pytest.mark.parametrize("name", ["uniform", "greedy", "depth"])
def test_a_target_can_have_the_child_of_a_baseline(name: str, paths: Paths) -> None:
    """In the form of any child, so that later stages heal it as they heal the search's."""
    search_baselines.fn(TARGET, tiny_search_params(DEMO), paths)
    baseline = read_baselines(TARGET, paths)[name]
    searched, _, _ = run_search(DEMO, paths)
    summary, architecture, report = run_search(DEMO, paths, {"chosen_by": name})
    chosen = read_architecture(TARGET, paths)
    assert chosen.chosen_by == summary.chosen_by == architecture["chosen_by"] == report["chosen_by"] == name
    assert chosen.blocks == baseline.blocks and chosen.predicted == baseline.predicted
    assert [limit.name for limit in chosen.constraints] == list(DEMO)
    assert all(limit.is_kept_by(limit.predicted) for limit in chosen.constraints)
    assert summary.gap is None and summary.score >= searched.score
    assert [limit["slack"] >= 0 for limit in report["limits"]] == [True] * 3
    run_search(DEMO, paths)
    assert read_architecture(TARGET, paths).chosen_by == "search"


def test_depth_goes_by_the_joint_kl_of_removals_where_it_was_measured(paths: Paths) -> None:
    rows, around = scores(random.Random(0)), without(parent_blocks(CONFIG), []).digest
    for first in range(3):
        kls = [0.1 if block == first else 0.2 for block in range(3)]
        whole = replace(rows[0], attention="no_op", ffn="no_op", around=around)
        removed = [replace(whole, first_block=block, kl=kl) for block, kl in enumerate(kls)]
        write_scores(paths.scores, [*rows, *removed])
        run_search({"blocks": {"metric": "attention_blocks", "at_most": 2}}, paths, {"chosen_by": "depth"})
        blocks = read_architecture(TARGET, paths).blocks
        assert [block.first_block for block in blocks if block.ffn.kind == "no_op"] == [first]


def test_a_baseline_that_cannot_keep_the_limits_writes_nothing(paths: Paths) -> None:
    with pytest.raises(InfeasibleError, match="baseline 'uniform' cannot keep all limits"):
        run_search({"size": {"metric": "block_params", "at_most_ratio": 0.01}}, paths, {"chosen_by": "uniform"})
    assert not paths.architecture(TARGET).exists() and not paths.search(TARGET).exists()


def test_the_library_before_bld_is_a_baseline_where_it_was_scored(paths: Paths) -> None:
    search_baselines.fn(TARGET, tiny_search_params(DEMO), paths)
    names = {"uniform", "greedy", "depth", *(f"random_{seed}" for seed in range(5))}
    assert read_baselines(TARGET, paths).keys() == names
    initial = [replace(row, weights="initial", kl=2 * row.kl) for row in scores(random.Random(0)) if row.span == 1]
    write_scores(paths.scores, [*scores(random.Random(0)), *initial])
    params = tiny_search_params(DEMO)
    scored = params.model_copy(update={"score_blocks": params.score_blocks.model_copy(update={"initial_tokens": 16})})
    search_baselines.fn(TARGET, scored, paths)
    baselines = read_baselines(TARGET, paths)
    assert baselines.keys() == {*names, "untrained"}
    assert baselines["untrained"].weights == "initial" and baselines["untrained"].blocks


def test_the_child_of_a_baseline_is_assembled_as_any(finished: tuple[Params, Paths]) -> None:
    _, tiny = finished
    limits = {"size": {"metric": "block_params", "at_most_ratio": 0.7}}
    target = {"label": "Small, uniform", "chosen_by": "uniform", "constraints": limits}
    params = tiny_params(
        targets={"small-uniform": target},
        export_child={"formats": ["nemotron-nas"]},
        measure_costs={"hardware": ["h100-sxm"]},
    )
    write_cost_table.fn(params, tiny)
    search.fn("small-uniform", params, tiny)
    assemble.fn("small-uniform", params, tiny)
    _, blocks = read_blocks(Checkpoint(tiny.assembled("small-uniform"), "the test"))
    chosen = read_architecture("small-uniform", tiny).blocks
    assert blocks == [(block.attention, block.ffn) for block in chosen]


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
    """The fastest child of all has nothing in any block, and is none."""
    tight: dict[str, Any] = {"speed": {"metric": "throughput", "at_least_ratio": 1e5, **SPEED}}
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


NOTHING: dict[str, dict[str, Any]] = {
    "decode_throughput is (inf|nan|0)": {"prefill_ms": 0.0, "decode_ms": 0.0},
    "block_params is 0": {"params": 0},
}


@pytest.mark.parametrize("message", NOTHING)
def test_a_parent_that_costs_nothing_is_a_wrong_table(message: str, paths: Paths) -> None:
    write_costs(paths.costs, [replace(row, **NOTHING[message]) for row in costs()])
    speed = {"metric": "decode_throughput", "at_least_ratio": 1.1, **SPEED}
    size = {"metric": "block_params", "at_most_ratio": 0.7}
    with pytest.raises(InputError, match=message):
        run_search({"limit": size if "params" in message else speed}, paths)
    if "params" in message:
        with pytest.raises(InputError, match="gives the parent 0 parameters"):
            run_search({"kv": {"metric": "kv_bytes", "at_most_ratio": 0.9}}, paths)


def test_a_variant_that_was_scored_but_never_costed(paths: Paths) -> None:
    write_scores(paths.scores, [*scores(random.Random(0)), replace(scores(random.Random(0))[0], ffn="ffn_192")])
    with pytest.raises(InputError, match="no ffn 'ffn_192'"):
        run_search(DEMO, paths)


def test_missing_tables_name_the_stage(paths: Paths) -> None:
    paths.scores.unlink()
    with pytest.raises(InputError, match="dvc repro score_blocks"):
        run_search(DEMO, paths)
