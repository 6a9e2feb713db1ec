"""The search on synthetic tables: every kind of constraint against brute force, what is written, what is not."""

import functools
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.files import InputError, write_json
from storage.model_config import ModelConfig
from storage.params import Params, parse
from storage.paths import Paths
from storage.records import Architecture, CostRow, Metric, Replacement, ScoreRow
from storage.tables import read_costs, write_costs, write_scores
from tasks.puzzle.cost_model import ENGINE, modelled_rows
from tasks.puzzle.costs import CostTable, Quantity, measure
from tasks.puzzle.hardware import device_named
from tasks.puzzle.infeasible import InfeasibleError
from tasks.puzzle.score_rule import Scores
from tasks.puzzle.variants import attention_variants, ffn_variants, parent_blocks
from tasks.search_architecture import Found, search

CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "tiny",
)
ATTENTIONS = attention_variants(CONFIG)
FFNS = ffn_variants(CONFIG, (0.5, 0.25), 64)
SPEED = {"hardware": "h100-sxm", "engine": ENGINE, "scenario": "128/128", "batch": 8}
# Every kind of constraint, with limits from loose to tight as multiples of the parent's value.
KINDS: dict[Metric, tuple[dict[str, Any], str]] = {
    "params": ({}, "at_most"),
    "block_params": ({}, "at_most"),
    "weight_bytes": ({}, "at_most"),
    "kv_bytes": ({}, "at_most"),
    "memory_gib": ({"batch": 64, "context": 512}, "at_most"),
    "latency_ms": (SPEED, "at_most"),
    "throughput": (SPEED, "at_least"),
    "decode_throughput": (SPEED, "at_least"),
}
MARGIN = 0.05


def _params(constraints: dict[str, Any], **search_section: Any) -> Params:
    stages = ("run", "prepare_parent", "prepare_corpus", "cache_activations", "distill_blocks", "score_blocks")
    later = ("measure_costs", "search_baselines", "assemble_child", "distill_child", "evaluate_child")
    last = ("benchmark_throughput", "measure_accuracy", "report")
    raw: dict[str, Any] = {stage: {} for stage in (*stages, *later, *last)}
    raw["search_architecture"] = {"speed_margin": MARGIN, **search_section}
    raw["targets"] = {"like-51b": {"label": "51B-like", "constraints": constraints}}
    return parse(raw, "test")


def _scores(rng: random.Random) -> list[ScoreRow]:
    """Two shards of every half, some pairs measured jointly, and a span of blocks 1-2."""
    parent_attention, parent_ffn = ATTENTIONS[0], FFNS[0]
    halves = [(attention, parent_ffn) for attention in ATTENTIONS[1:]] + [(parent_attention, ffn) for ffn in FFNS[1:]]
    replaced = [Replacement(block, 1, *half) for block in range(3) for half in halves]
    replaced += [Replacement(0, 1, ATTENTIONS[1], FFNS[1]), Replacement(1, 2, parent_attention, parent_ffn)]
    return [
        ScoreRow(
            first_block=of.first_block,
            span=of.span,
            attention=of.attention.name,
            ffn=of.ffn.name,
            weights="decoupled",
            weights_hash="w",
            around="parent",
            sequence_shard=shard,
            tokens=512,
            kl=kl * rng.uniform(0.9, 1.1),
            lm_loss=3.0,
            top1_agreement=0.9,
        )
        for of in replaced
        for kl in [rng.uniform(0.01, 0.5)]
        for shard in (0, 1)
    ]


def _costs() -> tuple[CostRow, ...]:
    return modelled_rows(CONFIG, ATTENTIONS, FFNS, device_named("h100-sxm"), "bfloat16", "128/128", 8)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """Artifacts that the search reads."""
    paths = Paths(tmp_path / "artifacts")
    write_json(paths.parent / "puzzle_parent.json", {"name": "tiny", "digest": "d1", "config": CONFIG.to_json()})
    write_scores(paths.scores, _scores(random.Random(0)))
    write_costs(paths.costs, _costs())
    return paths


def _search(constraints: dict[str, Any], paths: Paths, **section: Any) -> tuple[Found, dict[str, Any], dict[str, Any]]:
    found = search.fn("like-51b", _params(constraints, **section), paths)
    architecture = json.loads(paths.architecture("like-51b").read_text())
    return found, architecture, json.loads(paths.search("like-51b").read_text())


def _children(scores: Scores) -> Iterator[tuple[Replacement, ...]]:
    """Every child that the tables allow."""
    scored = [*parent_blocks(CONFIG), *scores.replacements("decoupled")]
    single = [[of for of in scored if of.first_block == block and of.span == 1] for block in range(3)]
    yield from itertools.product(*single)
    yield from itertools.product(single[0], [of for of in scored if of.span == 2])


@functools.cache
def _all_children() -> tuple[tuple[tuple[Replacement, ...], float], ...]:
    """Every child with its sum of scores."""
    scores = Scores.of(_scores(random.Random(0)), CONFIG)
    return tuple((child, scores.total(child, "decoupled").mean) for child in _children(scores))


def _brute_force(quantity: Quantity, limit: float) -> tuple[float | None, float]:
    """The smallest sum of scores of a child that keeps the limit, and the best value of the metric that any reaches."""
    table = CostTable(_costs())
    better = max if quantity.inverse else min
    values = [measure(table, child, quantity) for child, _ in _all_children()]
    kept = [score for (_, score), value in zip(_all_children(), values, strict=True) if better(value, limit) == value]
    return min(kept, default=None), better(values)


@pytest.mark.parametrize("metric", list(KINDS))
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("tightness", [1.0, 1.5, 1e6])
def test_every_kind_of_constraint_equals_brute_force(
    paths: Paths, metric: Metric, relative: bool, tightness: float
) -> None:
    operating_point, side = KINDS[metric]
    quantity = Quantity(metric, **operating_point)
    parent_value = measure(CostTable(_costs()), parent_blocks(CONFIG), quantity)
    ratio = tightness if quantity.inverse else 1 / tightness
    limit = {f"{side}_ratio": ratio} if relative else {side: ratio * parent_value}
    speed = "hardware" in operating_point
    margin = (1 + MARGIN if quantity.inverse else 1 - MARGIN) if speed else 1.0
    expected, best = _brute_force(quantity, ratio * parent_value * margin)
    constraints = {"only": {"metric": metric, **operating_point, **limit}}
    if expected is None:
        with pytest.raises(InfeasibleError) as caught:
            _search(constraints, paths)
        (conflict,) = caught.value.conflicts
        assert conflict.best == pytest.approx(best / margin / (parent_value if relative else 1))
        return
    found, architecture, _ = _search(constraints, paths)
    assert found.score == pytest.approx(expected, rel=1e-6, abs=1e-9)
    predicted = architecture["constraints"][0]["predicted"] / (1 if relative else parent_value)
    assert predicted * (-1 if quantity.inverse else 1) <= ratio * (-1 if quantity.inverse else 1) + 1e-9


DEMO = {
    "size": {"metric": "block_params", "at_most_ratio": 0.7},
    "cache": {"metric": "kv_bytes", "at_most_ratio": 0.9},
    "speed": {"metric": "decode_throughput", "at_least_ratio": 1.1, **SPEED},
}


def test_what_is_written(paths: Paths) -> None:
    found, architecture, report = _search(DEMO, paths)
    blocks = Architecture.from_json(architecture["blocks"])
    assert blocks.num_parent_blocks == 3
    assert architecture["target"] == "like-51b" and architecture["label"] == "51B-like"
    assert architecture["parent"] == {"name": "tiny", "digest": "d1"}
    table, predicted = CostTable(read_costs(paths.costs)), architecture["predicted"]
    parent = parent_blocks(CONFIG)
    ratios: dict[str, Metric] = {
        "params_ratio": "params",
        "block_params_ratio": "block_params",
        "kv_ratio": "kv_bytes",
    }
    for key, metric in ratios.items():
        ratio = measure(table, blocks.blocks, Quantity(metric)) / measure(table, parent, Quantity(metric))
        assert predicted[key] == pytest.approx(ratio), key
    assert predicted["batch"] == 8 and predicted["context"] == 256
    memory = Quantity("memory_gib", batch=8, context=256)
    assert predicted["memory_gib"] == pytest.approx(measure(table, blocks.blocks, memory))
    assert predicted["score_stderr"] > 0
    assert predicted["speed"]["hardware"] == "h100-sxm" and predicted["speed"]["origin"] == "modelled"
    assert predicted["throughput_ratio"] == pytest.approx(predicted["speed"]["child"] / predicted["speed"]["parent"])
    assert predicted["throughput_ratio"] >= 1.1 * (1 + MARGIN)
    assert [row["name"] for row in architecture["constraints"]] == list(DEMO)
    assert found.score == report["objective"] == pytest.approx(predicted["score"])
    assert {"solver", "status", "bound", "gap", "seconds", "binding", "nodes"} <= set(report)
    assert report["status"] == "optimal" and report["bound"] <= report["objective"]


def test_the_same_tables_give_the_same_bytes_and_no_clock(paths: Paths) -> None:
    _search(DEMO, paths)
    before = paths.architecture("like-51b").read_bytes()
    _search(DEMO, paths)
    assert paths.architecture("like-51b").read_bytes() == before
    assert b"seconds" not in before


def test_all_solvers_choose_equally_well(paths: Paths) -> None:
    scores = [_search(DEMO, paths, solver=solver)[0].score for solver in ("highs", "scip", "cp-sat")]
    assert scores == [pytest.approx(scores[0], rel=1e-6)] * 3


def test_the_parent_itself_meets_a_limit_of_1(paths: Paths) -> None:
    found, _, _ = _search({"size": {"metric": "params", "at_most_ratio": 1.0}}, paths)
    assert found.score == 0 and found.throughput_ratio is None


def test_infeasible_names_both_limits_writes_nothing_and_leaves_an_earlier_child(paths: Paths) -> None:
    _search(DEMO, paths)
    before = paths.architecture("like-51b").read_bytes()
    tight = DEMO | {"speed": {"metric": "decode_throughput", "at_least_ratio": 1e5, **SPEED}}
    with pytest.raises(InfeasibleError) as caught:
        _search(tight, paths)
    message = str(caught.value)
    assert (
        "speed: decode_throughput (h100-sxm, roofline, bfloat16, 128/128, batch 8) >= 100000x the parent's" in message
    )
    assert "best reachable" in message and "margin of 5%" in message
    assert paths.architecture("like-51b").read_bytes() == before


def test_the_best_value_that_is_reported_can_be_set_and_a_better_one_cannot(paths: Paths) -> None:
    tight = {"speed": {"metric": "throughput", "at_least_ratio": 1e5, **SPEED}}
    with pytest.raises(InfeasibleError) as caught:
        _search(tight, paths)
    best = caught.value.conflicts[0].best
    assert best is not None
    tight["speed"]["at_least_ratio"] = best * (1 - 1e-6)
    _search(tight, paths)
    tight["speed"]["at_least_ratio"] = best * (1 + 1e-6)
    with pytest.raises(InfeasibleError):
        _search(tight, paths)


def test_a_table_without_the_parents_variant(paths: Paths) -> None:
    write_costs(paths.costs, [row for row in _costs() if row.variant != "ffn_256"])
    with pytest.raises(InputError, match="no ffn 'ffn_256'"):
        _search(DEMO, paths)


def test_a_constraint_on_hardware_that_was_never_measured(paths: Paths) -> None:
    with pytest.raises(InputError, match=r"on a100, torch, .* the table has h100-sxm, roofline"):
        _search(
            {"speed": {"metric": "throughput", "at_least_ratio": 1.1, "hardware": "a100", "scenario": "128/128"}}, paths
        )


def test_a_variant_that_was_scored_but_never_costed(paths: Paths) -> None:
    write_scores(paths.scores, [*_scores(random.Random(0)), replace(_scores(random.Random(0))[0], ffn="ffn_192")])
    with pytest.raises(InputError, match="no ffn 'ffn_192'"):
        _search(DEMO, paths)


def test_missing_tables_name_the_stage(paths: Paths) -> None:
    paths.scores.unlink()
    with pytest.raises(InputError, match="dvc repro score_blocks"):
        _search(DEMO, paths)
