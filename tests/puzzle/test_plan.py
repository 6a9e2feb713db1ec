"""Estimates of stages: by hand for a tiny parent, and what must grow with what."""

from dataclasses import replace

import pytest

from storage.model_config import ModelConfig
from storage.records import Attention, Ffn
from tasks.puzzle.plan import Estimate, Planner, Rates, Work

CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
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
    start_seconds=0.0,
)
WORK = Work(
    seq_len=4,
    train_tokens=16,
    calibration_tokens=4,
    validation_tokens=4,
    cache_bytes=2,
    compute_bytes=4,
    rolling=False,
    kept_boundaries=2,
    workers=1,
    attentions=(Attention("gqa", 2), Attention("no_op")),
    ffns=(Ffn("gated", 16), Ffn("gated", 8), Ffn("no_op")),
    spans=(),
    importance_tokens=0,
    fit_tokens=0,
    bld_tokens=4,
    bld_read_tokens=4,
    bld_checks=0,
    bld_sequences_per_step=1,
    bld_held_out_tokens=0,
    score_tokens=4,
    initial_score_tokens=0,
    blocks_per_group=3,
    gkd_tokens=8,
    gkd_sequences_per_step=1,
    gkd_held_out_tokens=0,
    gkd_checkpoint_steps=1,
    evaluate_tokens=4,
    baseline_tokens=0,
    num_baselines=0,
    export_tokens=4,
    num_ggufs=0,
    child_export_ratio=1.5,
    parent_export_ratio=1.0,
    export_shard_bytes=2.0**31,
    benchmark_prefill_tokens=8,
    benchmark_decode_steps=0,
)
ATTEND = 2 * 4 * 8 * 8 + 2 * 4 * 8  # four matrices of 8 x 8; q k^T and its sum of v over half of 4 tokens
FFN = 2 * 3 * 8 * 16
BLOCK = ATTEND + FFN


def estimates(work: Work = WORK, rates: Rates = RATES, share: float = 1.0) -> dict[str, Estimate]:
    return {one.stage: one for one in Planner(CONFIG, work, rates).stages({"t": share})}


def test_operations_by_hand() -> None:
    found = {name: one.seconds for name, one in estimates().items()}
    assert found["cache_activations"] == pytest.approx(3 * 24 * BLOCK)
    # one narrow FFN and two no-ops from each of three blocks, on 4 tokens, through 3 + 2 + 1 blocks
    assert found["score_blocks"] == pytest.approx(3 * 4 * 6 * BLOCK)
    assert found["distill_child@t"] == pytest.approx(3 * 8 * 3 * BLOCK)
    assert found["evaluate_child@t"] == pytest.approx(2 * 4 * 3 * BLOCK)
    assert found["benchmark_throughput@t"] == pytest.approx(8 * 6 * BLOCK)
    assert found["distill_blocks"] == pytest.approx(3 * 4 * (ATTEND + 3.4 * FFN / 2))
    assert found["report"] == pytest.approx(0.0)


def test_the_closed_form_start_by_hand() -> None:
    """In float32 the FFN's Gram matrix of 16 channels; at half that rate its solution for width 8 and 8 outputs."""
    rates = replace(RATES, block_flops=1e30, float32_flops=1.0)
    found = estimates(replace(WORK, fit_tokens=4), rates)["distill_blocks"].seconds
    assert found == pytest.approx(3 * (4 * 2 * 16**2 + 2 * (8**3 / 3 + 2 * 8 * 8 * (8 + 16))))
    assert estimates(rates=rates)["distill_blocks"].seconds == pytest.approx(0)


def test_spans_by_hand() -> None:
    before, after = estimates(), estimates(replace(WORK, spans=(2,)))
    # two spans: the whole block, one narrow FFN and two no-ops of each, on 4 tokens, through 2 + 1 blocks
    more = after["score_blocks"].seconds - before["score_blocks"].seconds
    assert more == pytest.approx(4 * 4 * 3 * BLOCK)
    more = after["distill_blocks"].seconds - before["distill_blocks"].seconds
    assert more == pytest.approx(2 * 4 * (ATTEND + 3.4 * FFN / 2 + ATTEND + 3.4 * BLOCK))
    disk = after["distill_blocks"].disk_bytes - before["distill_blocks"].disk_bytes
    assert disk == 2 * (3 * 8 * 8 + 4 * 64 + 3 * 128 + 2 * 8) * 4
    assert {name for name in before if before[name] != after[name]} == {"distill_blocks", "score_blocks"}


def test_rolling_by_hand() -> None:
    """The first and the last boundary of 24 tokens in bfloat16, two of 4 + 4 tokens in float32; one worker of two."""
    work = replace(WORK, workers=2)
    before, after = estimates(work), estimates(replace(work, rolling=True))
    assert after["cache_activations"].disk_bytes == 2 * 24 * 8 * 2 + 2 * (4 + 4) * 8 * 4
    for stage, tokens in (("distill_blocks", 8), ("score_blocks", 4)):
        assert after[stage].seconds == pytest.approx(2 * (before[stage].seconds + tokens * 3 * BLOCK))
    slow_head = replace(RATES, block_flops=1e30, head_flops=1.0)
    alone, together = (estimates(of, slow_head)["score_blocks"].seconds for of in (replace(work, rolling=True), work))
    assert alone == pytest.approx(2 * together) and together > 0
    changed = {"cache_activations", "distill_blocks", "score_blocks"}
    assert {name for name in before if before[name] != after[name]} == changed


def test_bytes_by_hand() -> None:
    found = estimates()
    assert found["cache_activations"].disk_bytes == 4 * 24 * 8 * 2  # boundaries, tokens, hidden, bfloat16
    assert found["distill_blocks"].disk_bytes == 3 * (3 * 8 * 8) * 4
    params = 3 * (4 * 64 + 3 * 128 + 2 * 8) + 80
    assert found["prepare_parent"].disk_bytes == found["export_parent"].disk_bytes == 2 * params
    assert found["export_child@t"].disk_bytes == 1.5 * 2 * params


def test_exported_ggufs_are_compared_in_float32_by_hand() -> None:
    """Four tokens of each of two files: torch's blocks and llama.cpp's, the head of both twice."""
    rates = replace(RATES, block_flops=1e30, head_flops=1e30, float32_flops=1.0)
    found = estimates(replace(WORK, num_ggufs=2), rates)["evaluate_child@t"].seconds
    head = 2 * CONFIG.hidden_size * CONFIG.vocab_size
    assert found == pytest.approx(2 * 4 * (2 * 3 * BLOCK + 4 * head))


@pytest.mark.parametrize(
    ("field", "stages"),
    [
        ("train_tokens", {"cache_activations", "prepare_corpus"}),
        ("bld_tokens", {"distill_blocks"}),
        ("fit_tokens", {"distill_blocks"}),
        ("initial_score_tokens", {"score_blocks"}),
        ("gkd_tokens", {"distill_child@t"}),
        ("evaluate_tokens", {"evaluate_child@t"}),
        ("num_ggufs", {"evaluate_child@t"}),
        ("child_export_ratio", {"export_child@t"}),
        ("benchmark_decode_steps", {"benchmark_throughput@t"}),
    ],
)
def test_more_tokens_cost_more_where_they_are_used_and_nowhere_else(field: str, stages: set[str]) -> None:
    rates = Rates(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    before = estimates(rates=rates)
    after = estimates(replace(WORK, **{field: getattr(WORK, field) + 400}), rates)
    assert {name for name in before if after[name] != before[name]} == stages
    assert all(after[name].seconds >= before[name].seconds for name in stages)


def test_a_faster_machine_is_faster_and_a_smaller_child_cheaper() -> None:
    slow, fast = estimates(), estimates(rates=replace(RATES, block_flops=2.0))
    assert fast["cache_activations"].seconds == pytest.approx(slow["cache_activations"].seconds / 2)
    assert estimates(share=0.5)["distill_child@t"].seconds < slow["distill_child@t"].seconds
