"""What a target can ask for besides fixed limits: open batches, mixes, pins, kinds, runtimes; and what is explained."""

import functools
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.commands.explain import explanation_text
from flows.ui.overrides import with_profile
from storage.files import InputError
from storage.model_config import ModelConfig
from storage.params import load
from storage.paths import Paths
from storage.records import Runtime, ScoreRow
from storage.scenario import Setting
from storage.tables import write_costs
from storage.variants import Architecture, Attention, Ffn, Replacement
from tasks.commands.explain import explain
from tasks.commands.frontier import frontier
from tasks.puzzle.costs.cost_model import ENGINE, modelled_rows, usable_bytes, workspace_bytes
from tasks.puzzle.costs.cost_table import GIB, CostTable, model_sizes, model_speed, subblocks
from tasks.puzzle.costs.engine_model import ENGINES, Engine, Model, Platform, estimate, fits
from tasks.puzzle.costs.hardware import DEVICES
from tasks.puzzle.runtimes.rules import RUNTIMES, is_empty, refusals
from tasks.puzzle.search.infeasible import InfeasibleError
from tasks.puzzle.search.problem import Choice, Problem
from tasks.puzzle.search_space import attention_variants, ffn_variants, parent_attention, parent_ffn
from tasks.targets.allowed import AllowedReplacements, with_export_needs
from tasks.targets.parent_facts import ParentFacts
from tasks.targets.target_tables import TargetTables, solver_settings
from tests.clone import ROOT
from tests.puzzle.problems import covers
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

SIZE = {"size": {"metric": "block_params", "at_most_ratio": 0.7}}
BATCHES = (1, 8, 64)
FFN_KINDS = (Ffn("gated", 256), Ffn("linear"), Ffn("no_op"))
SCENARIOS = ("128/128", "256/16")
OPEN = {**SPEED, "batch": "best"}


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """Write the artifacts that the search reads, with costs of several scenarios and batches."""
    paths = Paths(tmp_path / "artifacts")
    write_tables(paths)
    write_costs(paths.costs, [row for scenario in SCENARIOS for batch in BATCHES for row in costs(scenario, batch)])
    return paths


@functools.cache
def table() -> CostTable:
    return CostTable(row for scenario in SCENARIOS for batch in BATCHES for row in costs(scenario, batch))


def setting(scenario: str, batch: int) -> Setting:
    return Setting("h100-sxm", ENGINE, "bfloat16", 1, scenario, batch)


@functools.cache
def throughput(blocks: tuple[Replacement, ...], scenario: str, batch: int) -> float:
    return model_speed(table(), blocks, setting(scenario, batch)).throughput


def parent() -> tuple[Replacement, ...]:
    return tuple(Replacement(index, 1, parent_attention(CONFIG), parent_ffn(CONFIG)) for index in range(3))


@pytest.mark.parametrize("ratio", [1.02, 1.2, 1.5])
def test_the_search_chooses_the_batch(paths: Paths, ratio: float) -> None:
    """Relative to the parent at its own best batch; brute force over children and batches."""
    limits = {"speed": {"metric": "throughput", "at_least_ratio": ratio, **OPEN}}
    least = ratio * (1 + MARGIN) * max(throughput(parent(), "128/128", batch) for batch in BATCHES)
    expected = min(
        (
            score
            for child, score in all_children()
            if any(throughput(child, "128/128", batch) >= least for batch in BATCHES)
        ),
        default=None,
    )
    if expected is None:
        with pytest.raises(InfeasibleError):
            run_search(limits, paths)
        return
    summary, architecture, report = run_search(limits, paths)
    assert summary.score == pytest.approx(expected, rel=1e-6, abs=1e-9)
    (point,) = architecture["operating_points"]
    blocks = Architecture.from_json(architecture["blocks"]).blocks
    assert throughput(blocks, "128/128", point["batch"]) >= least * (1 - 1e-9)
    assert architecture["predicted"]["batch"] == point["batch"]
    assert len(report["operating_points"]) == len(BATCHES)


def test_a_baseline_takes_the_batch_that_suits_it_best(paths: Paths) -> None:
    """At batch 8 a smaller child is fast enough, at 64 the parent itself."""
    least = 1.02 * throughput(parent(), "128/128", 8)
    speed, uniform = {"metric": "throughput", "at_least": least}, {"chosen_by": "uniform"}
    assert run_search({"speed": {**speed, **SPEED, "batch": 8}}, paths, uniform)[0].score > 0
    summary, architecture, _ = run_search({"speed": {**speed, **OPEN}}, paths, uniform)
    (point,) = architecture["operating_points"]
    assert (summary.score, point["batch"]) == (0, 64)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))
def test_a_search_fills_a_device_as_the_engine_model_does(engine: Engine) -> None:
    """Just enough memory, and just too little, mean the same to both."""
    model = Model(CONFIG, tuple((block.attention, block.ffn) for block in parent()))
    point = replace(setting("2048/2048", 512), engine=engine.name)
    for share, is_enough in ((1.001, True), (0.999, False)):
        device = DEVICES["h100-sxm"]
        estimated = estimate(model, Platform(device, engine, "bfloat16"), point.lengths, 1, 512)
        held = (estimated.weights_gib + estimated.kv_gib) * GIB + workspace_bytes(CONFIG, point)
        device = replace(device, memory_bytes=share * held, total_bytes=share * held / (engine.fill or 1))
        assert usable_bytes(device, point) == pytest.approx(share * held)
        assert fits(estimated, model, Platform(device, engine, "bfloat16"), point.lengths) == is_enough


def test_the_batch_must_fit_into_the_device(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, the KV cache of whole requests, and the workspace; what does not fit is not chosen."""
    limits = {"speed": {"metric": "throughput", "at_least_ratio": 0.01, **OPEN}}

    def held(blocks: tuple[Replacement, ...], batch: int) -> float:
        sizes = model_sizes(table(), blocks, "bfloat16", "h100-sxm", ENGINE)
        return sizes.memory_gib(batch, 256) + workspace_bytes(CONFIG, setting("128/128", batch)) / GIB

    smallest = min(held(child, 8) for child, _ in all_children())
    device = DEVICES["h100-sxm"]
    small = type(device)(**{**vars(device), "memory_bytes": (smallest + held(parent(), 1)) * GIB})
    monkeypatch.setitem(DEVICES, "h100-sxm", small)
    _, architecture, _ = run_search(limits, paths)
    (point,) = architecture["operating_points"]
    blocks = Architecture.from_json(architecture["blocks"]).blocks
    assert held(blocks, point["batch"]) <= small.memory_bytes / GIB
    assert held(parent(), 64) > small.memory_bytes / GIB
    fits = architecture["constraints"][-1]
    assert fits["name"] == "fits h100-sxm at 128/128" and fits["predicted"] == pytest.approx(
        held(blocks, point["batch"])
    )


def test_a_mix_of_scenarios_is_requests_after_each_other(paths: Paths) -> None:
    """Three requests of one kind and one of the other: tokens over seconds, by hand."""
    mix = {"128/128": 3.0, "256/16": 1.0}
    where = {"hardware": "h100-sxm", "engine": ENGINE, "batch": 8}
    limits = {"speed": {"metric": "throughput", "at_least_ratio": 1.1, "mix": mix, **where}}

    def by_hand(blocks: tuple[Replacement, ...]) -> float:
        speeds = {scenario: model_speed(table(), blocks, setting(scenario, 8)) for scenario in mix}
        seconds = sum(share * speeds[scenario].latency_ms / 1e3 / 8 for scenario, share in mix.items())
        return (3 * 128 + 16) / seconds

    least = 1.1 * (1 + MARGIN) * by_hand(parent())
    expected = min(score for child, score in all_children() if by_hand(child) >= least)
    summary, architecture, _ = run_search(limits, paths)
    assert summary.score == pytest.approx(expected, rel=1e-6, abs=1e-9)
    blocks = Architecture.from_json(architecture["blocks"]).blocks
    assert architecture["constraints"][0]["predicted"] == pytest.approx(by_hand(blocks) / by_hand(parent()))
    assert [part["share"] for part in architecture["constraints"][0]["mix"]] == [0.75, 0.25]


def test_scenarios_with_limits_of_their_own_have_batches_of_their_own(paths: Paths) -> None:
    limits = {
        name: {"metric": "throughput", "at_least_ratio": 1.05, **OPEN, "scenario": scenario}
        for name, scenario in zip(("chat", "summary"), SCENARIOS, strict=True)
    }
    least = {
        scenario: 1.05 * (1 + MARGIN) * max(throughput(parent(), scenario, batch) for batch in BATCHES)
        for scenario in SCENARIOS
    }
    expected = min(
        score
        for child, score in all_children()
        if all(
            any(throughput(child, scenario, batch) >= least[scenario] for batch in BATCHES) for scenario in SCENARIOS
        )
    )
    summary, architecture, report = run_search(limits, paths)
    assert summary.score == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert [point["scenario"] for point in architecture["operating_points"]] == list(SCENARIOS)
    assert len(report["operating_points"]) == len(BATCHES) ** 2


@pytest.mark.parametrize(
    ("more", "allowed"),
    [
        (
            {"pins": [{"blocks": [0], "keep": "attention"}]},
            lambda block: block.first_block or block.attention.num_kv_heads == 2,
        ),
        ({"pins": [{"blocks": [1, 2]}]}, lambda block: not block.first_block or block in parent()),
        ({"allowed": {"ffn": ["gated"]}}, lambda block: block.ffn.kind == "gated"),
        ({"allowed": {"spans": False}}, lambda block: block.span == 1),
        ({"runtimes": ["vllm", "tensorrt-llm"]}, lambda block: not _refused(block)),
    ],
)
def test_what_is_not_allowed_is_not_chosen(paths: Paths, more: dict[str, Any], allowed: Any) -> None:
    children = [(child, score) for child, score in all_children() if all(map(allowed, child))]
    assert 0 < len(children) < len(all_children())
    size = sum(_params_of(block) for block in parent())
    expected = min(score for child, score in children if sum(map(_params_of, child)) <= 0.7 * size)
    summary, architecture, _ = run_search(SIZE, paths, more)
    assert summary.score == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert all(map(allowed, Architecture.from_json(architecture["blocks"]).blocks))


def _params_of(block: Replacement) -> int:
    return model_sizes(table(), [block]).block_params


def _refused(block: Replacement) -> bool:
    """Tell what vLLM and TensorRT-LLM refuse: linear layers, vLLM an FFN before any attention, widths not 256 * n."""
    odd = block.ffn.kind == "gated" and block.ffn.intermediate_size % 256 != 0
    linear = "linear" in (block.attention.kind, block.ffn.kind)
    return odd or linear or (block.first_block == 0 and block.attention.kind == "no_op" and block.ffn.kind != "no_op")


@pytest.mark.parametrize(
    ("limits", "more", "words"),
    [
        (SIZE, {"pins": [{"blocks": [3]}]}, "pins names block 3; tiny has blocks 0 to 2"),
        ({"speed": {"metric": "throughput", "at_least_ratio": 1.1, **OPEN, "scenario": "64/64"}}, {}, "no costs for"),
    ],
)
def test_what_cannot_be_meant_is_refused(paths: Paths, limits: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run_search(limits, paths, more)


def test_alternatives_differ_and_say_whether_they_tie(paths: Paths) -> None:
    summary, architecture, report = run_search(SIZE, paths, alternatives=3, min_distance=0.6)
    blocks = Architecture.from_json(architecture["blocks"]).blocks
    assert len(report["alternatives"]) == 3
    for other in report["alternatives"]:
        assert other["distance"] >= 0.6 and other["score"] >= summary.score
        other_blocks = Architecture.from_json(other["blocks"]).blocks
        assert sum(block.span for block in {*other_blocks} & {*blocks}) <= 1
        assert other["score_difference"] == pytest.approx(other["score"] - summary.score)
        assert other["tie"] == (other["score_difference"] < other["score_difference_stderr"])


def test_an_explanation_is_the_best_child_with_each_variant(paths: Paths) -> None:
    _, architecture, _ = run_search(SIZE, paths)
    blocks = Architecture.from_json(architecture["blocks"]).blocks
    size = sum(_params_of(block) for block in parent())
    feasible = [(child, score) for child, score in all_children() if sum(map(_params_of, child)) <= 0.7 * size]
    for index in range(3):
        explanation = explain(TARGET, index, tiny_search_params(SIZE), paths)
        chosen, *others = explanation.options
        assert chosen.is_chosen and chosen.replacement in blocks and index in chosen.replacement.parent_blocks
        for option in explanation.options:
            scores_with_option = [score for child, score in feasible if option.replacement in child]
            assert (option.child_score is None) == (not scores_with_option)
            assert option.child_score is None or option.child_score == pytest.approx(
                min(scores_with_option), rel=1e-6, abs=1e-9
            )
            assert option.costs == (_params_of(option.replacement),)
        assert all(option.child_score is None or option.child_score >= (chosen.child_score or 0) for option in others)


def test_an_explanation_is_of_the_batch_that_was_chosen_and_fits_a_terminal(paths: Paths) -> None:
    limits = {"speed": {"metric": "throughput", "at_least_ratio": 1.2, **OPEN}, **SIZE}
    _, architecture, _ = run_search(limits, paths)
    (point,) = architecture["operating_points"]
    assert point["batch"] != BATCHES[0]
    explanation = explain(TARGET, 1, tiny_search_params(limits), paths)
    speed = explanation.limits.index("speed [ms/request]")
    for option in explanation.options:
        replacement = option.replacement
        rows = [
            table().row(setting("128/128", point["batch"]), name, variant) for name, variant in subblocks(replacement)
        ]
        by_hand = sum(row.prefill_ms + 128 * row.decode_ms for row in rows) / point["batch"]
        assert option.costs[speed] == pytest.approx(by_hand)
    text = explanation_text(explanation)
    assert max(map(len, text.splitlines())) <= 100
    assert sum(line.startswith("*") for line in text.splitlines()) == 1


def test_no_child_beats_the_frontier_in_quality_and_speed(paths: Paths) -> None:
    limits = {"speed": {"metric": "throughput", "at_least_ratio": 1.1, **SPEED}, **SIZE}
    result = frontier(TARGET, "speed", [], 100.0, 40, tiny_search_params(limits), paths)
    assert all(Path(file).is_file() for file in result.files)
    parents = throughput(parent(), "128/128", 8)
    reached = [(throughput(child, "128/128", 8) / parents, score) for child, score in all_children()]
    for row in result.rows:
        better = [score for ratio, score in reached if ratio >= row.value * (1 - 1e-9)]
        assert row.score == pytest.approx(min(better), rel=2e-4, abs=1e-9)
        assert row.status == "optimal"
    assert min(row.score for row in result.rows) == 0.0


def test_every_runtime_says_which_blocks_it_refuses() -> None:
    """docs/runtimes.md's table, for one child that breaks every rule of nemotron-nas."""
    gqa, gated = Attention("gqa", 2), Ffn("gated", 256)
    blocks = [
        (Attention("no_op"), gated),
        (Attention("linear"), gated),
        (gqa, Ffn("linear")),
        (gqa, Ffn("gated", 192)),
    ]
    texts = {name: [refusal.text for refusal in refused] for name, refused in refusals(CONFIG, blocks).items()}
    no_linear = ["it has no linear attention, unlike block 1", "it has no linear FFN, unlike block 2"]
    first = "it takes no FFN before the first attention, unlike block 0"
    odd = "it takes FFN widths in multiples of 256 only, unlike block 3"
    assert texts["vllm"] == [first, *no_linear]
    assert texts["sglang"] == [odd, first, *no_linear]
    assert texts["mlx-lm"] == [odd, *no_linear]
    assert texts["tensorrt-llm"] == [odd]
    assert texts["llama.cpp"] == ["it has no linear FFN, unlike block 2"]
    assert not any(refusals(CONFIG, [(gqa, gated)] * 4).values())


# --- the real case ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["like-51b", "like-40b"])
def test_the_70b_profile_is_searched_on_given_tables(target: str) -> None:
    """Made-up scores, a modelled H100, every batch of the profile: 80 blocks x 54 choices, no weights."""
    params = with_profile(load(ROOT / "params.yaml"), ROOT / "params/llama-3.1-70b.yaml")
    config = ModelConfig.from_hf(json.loads((ROOT / "params/llama-3.1-70b.config.json").read_text()), "the profile")
    bld, settings = params.distill_blocks, params.measure_costs
    attentions = attention_variants(config, bld.linear)
    ffns = ffn_variants(config, bld.ffn_ratios, bld.width_multiple, bld.linear)
    assert (config.num_blocks, len(attentions) * len(ffns)) == (80, 54)
    rows = [
        row
        for batch in settings.batches
        for row in modelled_rows(
            config,
            attentions,
            ffns,
            DEVICES["h100-sxm"],
            Setting("h100-sxm", ENGINE, settings.precision, 1, "128/1024", batch),
        )
    ]
    halves = [(other, ffns[0]) for other in attentions[1:]] + [(attentions[0], other) for other in ffns[1:]]
    rng = random.Random(0)
    scores = [
        ScoreRow(block, 1, attention.name, ffn.name, "decoupled", "w", "parent", 0, 0, 512, kl, 3.0, 0.9, 0.9)
        for block in range(80)
        for importance in [rng.gammavariate(1.5, 0.02)]
        for attention, ffn in halves
        for kl in [importance * (attentions.index(attention) / 6 + ffns.index(ffn) / 9) * rng.uniform(0.9, 1.1)]
    ]
    constraints = params.targets[target].constraints
    parent = ParentFacts.from_tables(scores, rows, config)
    tables = TargetTables.from_rows(
        target, params.targets[target], parent, scores, rows, params.search_architecture.speed_margin
    )
    child = tables.search("decoupled", solver_settings(params.search_architecture, 0))
    solution, table = child.best.solution, CostTable(rows)
    assert solution.gap <= params.search_architecture.relative_gap
    whole, child_sizes = (model_sizes(table, blocks, "fp8") for blocks in (parent.blocks, child.blocks))
    size, cached = (constraints[name].at_most_ratio for name in ("block_params", "kv"))
    faster = constraints["decode"].at_least_ratio
    assert size and cached and faster
    assert child_sizes.block_params <= size * whole.block_params
    assert child_sizes.kv_bytes_per_token <= cached * whole.kv_bytes_per_token
    (point,) = child.point.settings
    workspace = workspace_bytes(config, point) / GIB
    usable = DEVICES["h100-sxm"].memory_bytes / GIB
    assert child_sizes.memory_gib(point.batch, 128 + 1024, 1) + workspace <= usable
    fastest = max(
        model_speed(table, parent.blocks, replace(point, batch=batch)).throughput
        for batch in settings.batches
        if whole.memory_gib(batch, 128 + 1024, 1) + workspace_bytes(config, replace(point, batch=batch)) / GIB <= usable
    )
    assert model_speed(table, child.blocks, point).throughput >= faster * fastest
    assert point.batch > 1
    assert refusals(config, [(block.attention, block.ffn) for block in child.blocks])["tensorrt-llm"] == []


@pytest.mark.parametrize("engine", ["torch", "llama.cpp"])
def test_a_speed_limit_in_llama_cpp_forbids_what_it_does_not_run(engine: str) -> None:
    """It knows no linear FFN, so a child that has one could never be as fast there as the limit asks."""
    limit = {**SPEED, "metric": "decode_throughput", "at_least_ratio": 1.1, "engine": engine}
    target = tiny_search_params({"speed": limit}).targets["like-51b"]
    facts = ParentFacts("tiny", "", parent(), CONFIG)
    tables = TargetTables.from_rows("like-51b", target, facts, scores(random.Random(0)), [], 0.0)
    block = parent()[1]
    assert tables.allowed.allows(block)
    assert tables.allowed.allows(replace(block, ffn=Ffn("linear"))) == (engine == "torch")


KINDS = list(itertools.product((Attention("gqa", 2), Attention("linear"), Attention("no_op")), FFN_KINDS))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_search_forbids_exactly_what_a_runtime_refuses(runtime: Runtime) -> None:
    """All 81 ** (1 to 3 blocks) children of 3 blocks, one of them a span of two."""
    target = tiny_search_params(SIZE, {"runtimes": [runtime]}).targets["like-51b"]
    allowed = AllowedReplacements("like-51b", target, ParentFacts("tiny", "", parent(), CONFIG))
    places = [(0, 1), (0, 2), (1, 1), (2, 1)]
    replacements = sorted(Replacement(first, span, *variants) for first, span in places for variants in KINDS)
    choices = tuple(Choice(replacement, 0.0) for replacement in replacements)
    problem = Problem("t", 3, choices, (), rules=allowed.rules(replacements))
    problem = problem.with_rules(problem.rules)
    singly = [allowed.allows(replacement) for replacement in replacements]
    for cover in covers(problem):
        child = [(choices[index].replacement.attention, choices[index].replacement.ffn) for index in cover]
        is_allowed = all(singly[index] for index in cover) and problem.kept_by(cover)
        assert is_allowed == (not is_empty(child) and not refusals(CONFIG, child)[runtime]), child


def test_a_child_without_any_attention_is_refused_where_the_runtime_needs_one() -> None:
    """No block of it is wrong by itself; llama.cpp loads no model without kv heads."""
    target = tiny_search_params(SIZE, {"runtimes": ["llama.cpp"]}).targets["like-51b"]
    tables = TargetTables.from_rows(
        "like-51b", target, ParentFacts("tiny", "", parent(), CONFIG), scores(random.Random(0)), [], 0.0
    )
    linear = [replace(block, attention=Attention("linear")) for block in parent()]
    assert all(tables.allowed.allows(block) for block in linear)
    with pytest.raises(InputError, match=r"does not run in llama.cpp: .* without kv heads \(add .* attention_blocks"):
        tables.allowed.check_child(linear)
    tables.allowed.check_child([*linear[:2], parent()[2]])


def test_a_child_with_nothing_left_is_refused() -> None:
    """Whatever its runtimes: torch would say of it that an optimizer has no parameters."""
    target = tiny_search_params(SIZE).targets["like-51b"]
    tables = TargetTables.from_rows(
        "like-51b", target, ParentFacts("tiny", "", parent(), None), scores(random.Random(0)), [], 0.0
    )
    empty = [replace(block, attention=Attention("no_op"), ffn=Ffn("no_op")) for block in parent()]
    with pytest.raises(InputError, match=r"no attention and no FFN in any block, .* add {metric: attention_blocks"):
        tables.allowed.check_child(empty)
    tables.allowed.check_child([*empty[:2], replace(empty[2], ffn=Ffn("linear"))])


def test_a_child_can_have_every_form_that_is_asked_for() -> None:
    """GGUF has no linear FFN, and a Llama nothing linear; what the target itself forbids or names stays."""
    target = tiny_search_params(SIZE, {"allowed": {"attention": ["gqa", "linear"]}}).targets["like-51b"]
    assert with_export_needs(target, ["nemotron-nas", "plain"]) == target
    in_gguf = with_export_needs(target, ["gguf-q8_0"])
    assert (in_gguf.runtimes, in_gguf.allowed) == (("llama.cpp",), target.allowed)
    assert with_export_needs(in_gguf, ["gguf-f16"]) == in_gguf
    padded = with_export_needs(target, ["padded-llama"])
    assert (padded.runtimes, padded.allowed.attention) == ((), ("gqa",))
    assert padded.allowed.ffn == tuple(kind for kind in target.allowed.ffn if kind != "linear")
