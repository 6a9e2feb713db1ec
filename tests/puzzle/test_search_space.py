"""Variants of a block: the demo's space, divisors of the kv heads, rounding rules of FFN widths."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from storage.model_config import ModelConfig
from storage.variants import Ffn
from tasks.puzzle.search_space import attention_variants, ffn_variants

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
        exact = ratio * width
        if multiple <= exact <= width - multiple:
            assert min(abs(narrow - exact) for narrow in widths) <= multiple / 2 + 1e-9
