"""Sizes: known models' counts, transformers' own parameter counts, linear and no-op variants, four bits."""

from typing import Any

import pytest
import torch
import transformers

from storage.model_config import ModelConfig
from storage.records import ANY_VARIANT, Component, Precision
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.costs.sizes import component_sizes
from tasks.puzzle.search_space import parent_blocks
from tests.puzzle.test_search_space import LLAMA_70B, SMOLLM2

FIXED: tuple[Component, ...] = ("embedding", "head", "step")


def _total(config: ModelConfig, blocks: tuple[Replacement, ...], precision: Precision) -> tuple[int, int, int]:
    """Return parameters, weight bytes and KV bytes per token of a model."""
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
        ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),  # heads of 128 where none is named
        ("Qwen3ForCausalLM", {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": False}),
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
