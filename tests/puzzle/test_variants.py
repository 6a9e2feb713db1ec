"""Spaces and sizes: known models' counts, transformers' own parameter counts, rounding rules."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from storage.model_config import ModelConfig
from storage.records import ANY_VARIANT, Attention, Component, Ffn, Precision, Replacement
from tasks.puzzle.variants import (
    attention_variants,
    component_sizes,
    ffn_variants,
    parent_blocks,
)

SMOLLM2 = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "SmolLM2-135M",
)
LLAMA_70B = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "Llama-3.1-70B",
)
DEMO_RATIOS = (0.875, 0.75, 0.5, 0.25, 0.2, 0.1)
FIXED: tuple[Component, ...] = ("embedding", "head", "step")


def _total(config: ModelConfig, blocks: tuple[Replacement, ...], precision: Precision) -> tuple[int, int, int]:
    """Parameters, weight bytes and KV bytes per token of a model."""
    sizes = [component_sizes(config, component, ANY_VARIANT, precision) for component in FIXED]
    for block in blocks:
        sizes.append(component_sizes(config, "attention", block.attention.name, precision))
        sizes.append(component_sizes(config, "ffn", block.ffn.name, precision))
    return (
        sum(size.params for size in sizes),
        sum(size.weight_bytes for size in sizes),
        sum(size.kv_bytes_per_token for size in sizes),
    )


def test_smollm2_has_its_published_parameter_count() -> None:
    params, weight_bytes, kv_bytes = _total(SMOLLM2, parent_blocks(SMOLLM2), "bfloat16")
    assert params == 134_515_008
    assert weight_bytes == 2 * params  # the tied head is counted once
    assert kv_bytes == 30 * 2 * 3 * 64 * 2


def test_llama_70b_in_fp8() -> None:
    params, weight_bytes, kv_bytes = _total(LLAMA_70B, parent_blocks(LLAMA_70B), "fp8")
    assert params == 70_553_706_496
    assert weight_bytes / 1e9 == pytest.approx(72.7, abs=0.05)  # issue [E]: embedding and head stay in 16 bit
    assert kv_bytes == 163_840


def test_the_51b_from_its_published_layout() -> None:
    """METHOD.md: kv heads 8 x44, 4 x1, 2 x6, 1 x3, linear x18, no-op x8; FFN 100 % x44, 50 % x16, 25 % x20."""
    attentions = [Attention("gqa", heads) for heads, count in ((8, 44), (4, 1), (2, 6), (1, 3)) for _ in range(count)]
    attentions += [Attention("linear")] * 18 + [Attention("no_op")] * 8
    ffns = [Ffn("gated", 28672 // part) for part, count in ((1, 44), (2, 16), (4, 20)) for _ in range(count)]
    blocks = tuple(Replacement(i, 1, a, f) for i, (a, f) in enumerate(zip(attentions, ffns, strict=True)))
    params, weight_bytes, kv_bytes = _total(LLAMA_70B, blocks, "fp8")
    assert params / 1e9 == pytest.approx(51.50, abs=0.005)
    assert weight_bytes / 1e9 == pytest.approx(53.6, abs=0.05)
    assert kv_bytes / 1e3 == pytest.approx(95.0, abs=0.05)


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("LlamaForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
        ("MistralForCausalLM", {"tie_word_embeddings": False}),
        ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    ],
)
def test_sizes_equal_transformers(architecture: str, extra: dict[str, Any]) -> None:
    fields = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        **extra,
    }
    config = ModelConfig.from_hf({"architectures": [architecture], **fields}, "test")
    hf_config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(**fields)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(hf_config)
    assert _total(config, parent_blocks(config), "float32")[0] == sum(p.numel() for p in model.parameters())


def test_the_demo_space() -> None:
    assert [variant.name for variant in attention_variants(SMOLLM2, linear=False)] == ["kv_3", "kv_1", "no_op"]
    widths = [variant.name for variant in ffn_variants(SMOLLM2, DEMO_RATIOS, 64, linear=False)]
    assert widths == ["ffn_1536", "ffn_1344", "ffn_1152", "ffn_768", "ffn_384", "ffn_320", "ffn_128", "no_op"]


def test_linear_variants_stand_before_the_no_op() -> None:
    assert [variant.name for variant in attention_variants(SMOLLM2, linear=True)] == ["kv_3", "kv_1", "linear", "no_op"]
    assert [variant.name for variant in ffn_variants(SMOLLM2, (0.5,), 64, linear=True)][1:] == [
        "ffn_768",
        "linear",
        "no_op",
    ]


def test_every_proper_divisor_of_the_kv_heads() -> None:
    names = [
        variant.name for variant in attention_variants(replace(SMOLLM2, num_heads=12, num_kv_heads=12), linear=False)
    ]
    assert names == ["kv_12", "kv_6", "kv_4", "kv_3", "kv_2", "kv_1", "no_op"]


@given(
    st.integers(1, 4096),
    st.lists(st.floats(0.01, 1.2), max_size=8),
    st.integers(1, 512),
)
def test_ffn_widths_are_distinct_multiples_below_the_parents(width: int, ratios: list[float], multiple: int) -> None:
    variants = ffn_variants(replace(SMOLLM2, intermediate_size=width), ratios, multiple, linear=False)
    widths = [variant.intermediate_size for variant in variants[:-1]]
    assert widths[0] == width
    assert variants[-1] == Ffn("no_op")
    assert widths == sorted(set(widths), reverse=True)
    assert all(narrow % multiple == 0 and narrow > 0 for narrow in widths[1:])
    for ratio in ratios:  # each wanted width is within half a multiple of one that exists, or below one multiple
        wanted = ratio * width
        if multiple <= wanted <= width - multiple:
            assert min(abs(narrow - wanted) for narrow in widths) <= multiple / 2 + 1e-9


def test_linear_and_no_op() -> None:
    for component in ("attention", "ffn"):
        subblock: Component = "attention" if component == "attention" else "ffn"
        linear = component_sizes(SMOLLM2, subblock, "linear", "fp8")
        assert (linear.params, linear.kv_bytes_per_token) == (576 * 576 + 576, 0)
        assert linear.weight_bytes == 576 * 576 + 2 * 576  # the norm stays in 16 bit
        gone = component_sizes(SMOLLM2, subblock, "no_op", "bfloat16")
        assert (gone.params, gone.weight_bytes, gone.kv_bytes_per_token) == (0, 0, 0)


def test_four_bits_are_half_a_byte() -> None:
    assert component_sizes(SMOLLM2, "ffn", "linear", "int4").weight_bytes == 576 * 576 // 2 + 2 * 576
