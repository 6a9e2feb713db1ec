"""Estimates of stages: by hand for a tiny parent, and what must grow with what."""

from dataclasses import replace
from typing import Any

import pytest

from storage.model_config import ModelConfig
from storage.params import Params
from storage.pipeline import read_pipeline
from tasks.estimates.stage_estimates import ESTIMATORS, Rates, StageEstimate, estimate_stages, kept_share
from tests.clone import ROOT
from tests.settings import tiny_params

CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "vocab_size": 10,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    "tiny",
)
RATES = Rates(
    block_flops=1.0,
    head_flops=1e30,
    float32_flops=1e30,
    memory_bytes_per_s=1e30,
    disk_bytes_per_s=1e30,
    read_bytes_per_s=1e30,
    hash_bytes_per_s=1e30,
    start_seconds=0.0,
)


def with_fields(params: Params, section: str, **fields: Any) -> Params:
    """Return Params with other values in a section; rules across sections do not matter to an estimate."""
    return params.model_copy(update={section: getattr(params, section).model_copy(update=fields)})


def case_params(kept: float = 1.0) -> Params:
    """Return params: a corpus of 24 tokens in sequences of 4, one narrow FFN, both no-ops; 0 tokens wherever it can."""
    limit = {"metric": "block_params", "at_most_ratio": kept}
    params = tiny_params(targets={"small": {"label": "Small", "constraints": {"size": limit}}})
    corpus = {"seq_len": 4, "train_tokens": 16, "calibration_tokens": 4, "validation_tokens": 4}
    params = with_fields(params, "prepare_corpus", **corpus)
    params = with_fields(params, "cache_activations", dtype="bfloat16")
    bld = {"tokens": 4, "fit_tokens": 0, "importance_tokens": 0, "held_out_tokens": 0, "sequences_per_step": 1}
    params = with_fields(params, "distill_blocks", **bld, ffn_ratios=(0.5,), linear=False)
    params = with_fields(params, "score_blocks", tokens=4, initial_tokens=0, blocks_per_group=3)
    params = with_fields(params, "refine_child", tokens=4, held_out_tokens=0)
    gkd = {"tokens": 8, "sequences_per_step": 1, "held_out_tokens": 0, "checkpoint_steps": 1}
    params = with_fields(params, "distill_child", **gkd)
    params = with_fields(params, "evaluate_child", tokens=4, baseline_tokens=0, export_tokens=0)
    params = with_fields(params, "export_parent", formats=("gguf-f16",))
    params = with_fields(params, "export_child", formats=("gguf-f16", "gguf-q8_0"))
    return with_fields(
        params, "benchmark_throughput", scenarios=("1/2",), batches=(1,), repeats=5
    )  # 8 tokens of prefill


ATTEND = (
    2 * 3 * 8 * 8 + 2 * 4 * 8
)  # matrices of 8 x 8 (two) and 8 x 4 (two); q k^T and its sum of v over half of 4 tokens
FFN = 2 * 3 * 8 * 16
BLOCK = ATTEND + FFN
BLOCK_PARAMS = 3 * 64 + 3 * 128 + 2 * 8
PIPELINE = read_pipeline(ROOT / "dvc.yaml")


def estimates(params: Params | None = None, rates: Rates = RATES) -> dict[str, StageEstimate]:
    stages = estimate_stages(PIPELINE, CONFIG, params or case_params(), rates)
    return {estimate.stage: estimate for estimate in stages}


def changed_stages(before: dict[str, StageEstimate], after: dict[str, StageEstimate]) -> set[str]:
    return {stage for stage in before if before[stage] != after[stage]}


def test_every_stage_of_the_pipeline_has_an_estimator() -> None:
    assert set(ESTIMATORS) == {stage.name for stage in PIPELINE}


def test_operations_by_hand() -> None:
    seconds = {stage: estimate.seconds for stage, estimate in estimates().items()}
    assert seconds["cache_activations"] == pytest.approx(3 * 24 * BLOCK)
    # one narrow FFN and two no-ops from each of three blocks, on 4 tokens, through 3 + 2 + 1 blocks
    assert seconds["score_blocks"] == pytest.approx(3 * 4 * 6 * BLOCK)
    assert seconds["distill_child@small"] == pytest.approx(3 * 8 * 3 * BLOCK)
    assert seconds["refine_child@small"] == pytest.approx(4 * 3 * (2 * BLOCK + 2 * ATTEND))
    assert seconds["evaluate_child@small"] == pytest.approx(3 * 4 * 3 * BLOCK)
    assert seconds["benchmark_throughput@small"] == pytest.approx(8 * 6 * BLOCK)
    assert seconds["distill_blocks"] == pytest.approx(3 * 4 * (ATTEND + 3.4 * FFN / 2))
    assert seconds["report"] == pytest.approx(0.0)


def test_the_closed_form_start_by_hand() -> None:
    """In float32 the FFN's Gram matrix of 16 channels; at half that rate its solution for width 8 and 8 outputs."""
    rates = replace(RATES, block_flops=1e30, float32_flops=1.0)
    seconds = estimates(with_fields(case_params(), "distill_blocks", fit_tokens=4), rates)["distill_blocks"].seconds
    assert seconds == pytest.approx(3 * (4 * 2 * 16**2 + 2 * (8**3 / 3 + 2 * 8 * 8 * (8 + 16))))
    assert estimates(rates=rates)["distill_blocks"].seconds == pytest.approx(0)


def test_spans_by_hand() -> None:
    before, after = estimates(), estimates(with_fields(case_params(), "distill_blocks", spans=(2,)))
    # two spans: the whole block, one narrow FFN and two no-ops of each, on 4 tokens, through 2 + 1 blocks
    more = after["score_blocks"].seconds - before["score_blocks"].seconds
    assert more == pytest.approx(4 * 4 * 3 * BLOCK)
    more = after["distill_blocks"].seconds - before["distill_blocks"].seconds
    assert more == pytest.approx(2 * 4 * (ATTEND + 3.4 * FFN / 2 + ATTEND + 3.4 * BLOCK))
    disk = after["distill_blocks"].disk_bytes - before["distill_blocks"].disk_bytes
    assert disk == 2 * (3 * 8 * 8 + BLOCK_PARAMS) * 4
    assert changed_stages(before, after) == {"distill_blocks", "score_blocks"}


def test_removals_by_hand() -> None:
    """One of three blocks goes: three candidates and the parent go through half of the blocks on 4 tokens each."""
    before, after = estimates(), estimates(with_fields(case_params(), "score_blocks", depth_tokens=4))
    assert after["score_blocks"].seconds - before["score_blocks"].seconds == pytest.approx(4 * 4 * 3 / 2 * BLOCK)
    assert changed_stages(before, after) == {"score_blocks"}


def test_rolling_by_hand() -> None:
    """The first and the last boundary of 24 tokens in bfloat16, two of 4 + 4 tokens in float32; one worker of two."""
    params = with_fields(case_params(), "run", workers=2)
    params = with_fields(params, "distill_child", teacher="cache")
    params = with_fields(params, "score_blocks", blocks_per_group=2)  # of three blocks, as many as rolling mode allows
    rolling = with_fields(params, "cache_activations", mode="rolling")
    before, after = estimates(params), estimates(rolling)
    assert after["cache_activations"].disk_bytes == 2 * 24 * 8 * 2 + 2 * (4 + 4) * 8 * 4
    for stage, tokens in (("distill_blocks", 8), ("score_blocks", 4)):
        assert after[stage].seconds == pytest.approx(2 * (before[stage].seconds + tokens * 3 * BLOCK))
    walked = after["refine_child@small"].seconds - before["refine_child@small"].seconds
    assert walked == pytest.approx(2 * 4 * 3 * BLOCK)
    slow_head = replace(RATES, block_flops=1e30, head_flops=1.0)
    alone = estimates(rolling, slow_head)["score_blocks"].seconds
    together = estimates(params, slow_head)["score_blocks"].seconds
    assert alone == pytest.approx(2 * together) and together > 0
    walking = {"distill_blocks", "score_blocks", "refine_child@small"}
    assert changed_stages(before, after) == {"cache_activations", *walking}


def test_a_live_teacher_by_hand() -> None:
    """The parent on GKD's 8 tokens, in float32; of 16 train tokens the cache holds the 4 that BLD reads."""
    params = with_fields(case_params(), "refine_child", tokens=0)
    before, after = estimates(params), estimates(with_fields(params, "distill_child", teacher="live"))
    child, cache = "distill_child@small", "cache_activations"
    assert after[child].seconds - before[child].seconds == pytest.approx(8 * 3 * BLOCK)
    assert after[child].memory_bytes - before[child].memory_bytes == 3 * BLOCK_PARAMS * 4
    assert after[cache].seconds == pytest.approx(3 * (24 - 12) * BLOCK)
    assert after[cache].disk_bytes == 4 * (24 - 12) * 8 * 2
    assert changed_stages(before, after) == {child, cache}


def test_ranks_by_hand() -> None:
    """The child's blocks a second time; all time and one rank's memory where each rank has a GPU."""
    params = with_fields(case_params(), "distill_child", teacher="live", ranks=2)
    on_gpus = with_fields(params, "run", device="cuda")
    on_cpu, of_gpu = (estimates(case)["distill_child@small"] for case in (params, on_gpus))
    assert on_cpu.seconds == pytest.approx(5 * 8 * 3 * BLOCK)
    assert of_gpu.seconds == pytest.approx(on_cpu.seconds / 2)
    states = 4 * (4 * ((2 * 3 + 1) * 8 + 12 * 8 + 4 * 16) + 16 * 8)  # of 4 tokens, in float32
    outside, logits = 4 * 80, 16 * 128 * 10
    child = 3 * BLOCK_PARAMS / 2 * 16 + BLOCK_PARAMS * (4 * 4 + 4 + 4)
    teacher = 4 * BLOCK_PARAMS * (3 / 2 + 4)
    held = 0.6e9 + child + teacher + states + outside
    assert of_gpu.memory_bytes == 0.6e9 + held + 16 * 2**25, "a GPU's chunks of logits are larger"
    saved = 3 * BLOCK_PARAMS / 2 * (4 + 4)
    assert on_cpu.memory_bytes == 0.6e9 + 2 * (held + logits + saved)


def test_a_streamed_teacher_by_hand() -> None:
    """One block of the parent, and four boundaries of one sequence of four tokens that wait on the CPU."""
    live = with_fields(case_params(), "distill_child", teacher="live", ranks=2, sequences_per_step=2)
    streamed = with_fields(live, "distill_child", teacher="streamed")
    before, after = (estimates(case)["distill_child@small"].memory_bytes for case in (live, streamed))
    assert (before - after) / 2 == pytest.approx(4 * BLOCK_PARAMS * (3 / 2 + 4 - 1) - 4 * (4 * 4 * 8))
    rates = replace(RATES, block_flops=1e30, read_bytes_per_s=1.0)
    read = [estimates(case, rates)["distill_child@small"].seconds for case in (live, streamed)]
    assert read[1] - read[0] == pytest.approx(4 * (3 * BLOCK_PARAMS + 80)), "one step"


def test_a_distillation_of_no_tokens_is_a_copy() -> None:
    nothing = estimates(with_fields(case_params(), "distill_child", tokens=0))
    assert replace(nothing["distill_child@small"], stage="") == replace(nothing["assemble_child@small"], stage="")


def test_bytes_by_hand() -> None:
    disk = {stage: estimate.disk_bytes for stage, estimate in estimates().items()}
    assert disk["cache_activations"] == 4 * 24 * 8 * 2  # boundaries, tokens, hidden, bfloat16
    assert disk["distill_blocks"] == 3 * (3 * 8 * 8) * 4
    params = 3 * BLOCK_PARAMS + 80
    assert disk["prepare_parent"] == disk["export_parent"] == 2 * params
    assert disk["export_child@small"] == (1 + 17 / 32) * 2 * params


def test_what_is_read_and_hashed_by_hand() -> None:
    """Two shards of 12 tokens go through the parent, in float32; every stage hashes what it reads once."""
    params = with_fields(case_params(), "cache_activations", sequences_per_shard=3)
    read = {stage: (estimate.read_bytes, estimate.hashed_bytes) for stage, estimate in estimates(params).items()}
    parent = 2 * (3 * BLOCK_PARAMS + 80)
    assert read["cache_activations"] == (2 * 2 * parent, parent)
    states = (4 + 4) * 8 * 2  # tokens of BLD and calibration, hidden, bfloat16
    assert read["distill_blocks"] == (2 * parent + 2 * 3 * states, parent + 4 * states)
    assert read["distill_child@small"] == (0, 8 * 4 * 8 * 2)
    rates = replace(RATES, block_flops=1e30, hash_bytes_per_s=1.0)
    assert estimates(params, rates)["cache_activations"].seconds == pytest.approx(parent)
    gpu = with_fields(params, "run", device="cuda")
    assert estimates(gpu)["cache_activations"].read_bytes == 2 * parent


def test_exported_ggufs_are_compared_in_float32_by_hand() -> None:
    """Four tokens through torch's blocks once and two files'; three comparisons, each with three products of a head."""
    rates = replace(RATES, block_flops=1e30, head_flops=1e30, float32_flops=1.0)
    params = with_fields(case_params(), "evaluate_child", export_tokens=4)
    head = 2 * CONFIG.hidden_size * CONFIG.vocab_size
    assert estimates(params, rates)["evaluate_child@small"].seconds == pytest.approx(3 * 4 * (3 * BLOCK + 3 * head))


@pytest.mark.parametrize(
    ("section", "field", "stages"),
    [
        ("prepare_corpus", "train_tokens", {"cache_activations", "prepare_corpus"}),
        ("distill_blocks", "tokens", {"distill_blocks"}),
        ("distill_blocks", "fit_tokens", {"distill_blocks"}),
        ("score_blocks", "initial_tokens", {"score_blocks"}),
        ("refine_child", "tokens", {"refine_child@small"}),
        ("distill_child", "tokens", {"distill_child@small"}),
        ("evaluate_child", "tokens", {"evaluate_child@small"}),
        ("evaluate_child", "export_tokens", {"evaluate_child@small"}),
        ("benchmark_throughput", "repeats", {"benchmark_throughput@small"}),
    ],
)
def test_more_tokens_cost_more_where_they_are_used_and_nowhere_else(section: str, field: str, stages: set[str]) -> None:
    rates = Rates(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    params = case_params()
    more = with_fields(params, section, **{field: getattr(getattr(params, section), field) + 400})
    before, after = estimates(params, rates), estimates(more, rates)
    assert changed_stages(before, after) == stages
    assert all(after[stage].seconds >= before[stage].seconds for stage in stages)


def test_a_faster_machine_is_faster_and_a_smaller_child_cheaper() -> None:
    slow, fast = estimates(), estimates(rates=replace(RATES, block_flops=2.0))
    assert fast["cache_activations"].seconds == pytest.approx(slow["cache_activations"].seconds / 2)
    assert estimates(case_params(kept=0.5))["distill_child@small"].seconds < slow["distill_child@small"].seconds


@pytest.mark.parametrize(("metric", "share"), [("block_params", 0.5), ("params", 1.0), ("kv_bytes", 1.0)])
def test_only_a_limit_on_block_parameters_says_what_is_kept_of_them(metric: str, share: float) -> None:
    """Half of all parameters may be any share of the blocks', since embedding and head stay as they are."""
    limit = {"metric": metric, "at_most_ratio": 0.5}
    target = tiny_params(targets={"small": {"label": "Small", "constraints": {"size": limit}}}).target("small")
    assert kept_share(target) == share
