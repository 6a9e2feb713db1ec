"""Engines that are not at hand: what their loaders take of a checkpoint, against the checkpoint and against our rules.

The loaders are tests.engines.loaders', written from the engines' sources. No rule against a runtime means that it takes
every tensor of the checkpoint with its shape, and no other; so whatever a loader gets wrong, a rule must name.
"""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.model_config import ACTIVATIONS, LM_HEAD, ModelConfig
from storage.nemotron_nas import to_nemotron_nas
from storage.records import Runtime
from storage.variants import Attention, Ffn
from tasks.puzzle.model.child import DeciLMForCausalLM, NemotronNasConfig
from tasks.puzzle.runtimes.rules import refusals, verdicts
from tests.engines.loaders import LOADERS, RefusedError, Shapes
from tests.tiny import LLAMA3_ROPE

Blocks = list[tuple[Attention, Ffn]]
PLAIN = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    num_blocks=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    intermediate_size=512,
    vocab_size=128,
    rms_norm_eps=1e-5,
    rope={"rope_type": "default", "rope_theta": 10000.0},
    context=128,
    tie_embeddings=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    activation="silu",
)
KV, HALF, ONE = Attention("gqa", 4), Attention("gqa", 2), Attention("gqa", 1)
LINEAR, NO_ATTENTION = Attention("linear"), Attention("no_op")
WIDE, NARROW, ODD = Ffn("gated", 512), Ffn("gated", 256), Ffn("gated", 200)
LINEAR_FFN, NO_FFN = Ffn("linear"), Ffn("no_op")

configs = st.builds(
    replace,
    st.just(PLAIN),
    hidden_size=st.sampled_from((64, 64, 96)),  # 4 heads share it evenly where head_dim is 16, or 24
    head_dim=st.sampled_from((16, 16, 24)),
    tie_embeddings=st.booleans(),
    activation=st.sampled_from(("silu", "silu", *ACTIVATIONS)),
    rope=st.sampled_from((PLAIN.rope, LLAMA3_ROPE)),
    **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), st.sampled_from((False, False, True))),
)
blocks = st.lists(
    st.tuples(
        st.sampled_from((KV, KV, KV, HALF, ONE, NO_ATTENTION, LINEAR)),
        st.sampled_from((WIDE, WIDE, NARROW, NARROW, ODD, NO_FFN, LINEAR_FFN)),
    ),
    min_size=1,
    max_size=4,
)


def checkpoint(config: ModelConfig, variants: Blocks) -> tuple[dict[str, Any], Shapes]:
    """Return a child's config.json, through JSON, and its tensors."""
    written = json.dumps(to_nemotron_nas(config, variants, {}, "bfloat16"))
    with torch.device("meta"):
        model = DeciLMForCausalLM(NemotronNasConfig(**json.loads(written)))
    tied = {LM_HEAD} if config.tie_embeddings else set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return json.loads(written), shapes


def what_is_wrong(runtime: Runtime, config: ModelConfig, variants: Blocks) -> str:
    """Return the error of a loader, or the tensors that it takes wrong; empty if it takes the checkpoint as it is."""
    written, tensors = checkpoint(config, variants)
    try:
        taken = LOADERS[runtime](written)
    except RefusedError as error:
        return str(error)
    return ", ".join(sorted(name for name in taken | tensors if taken.get(name) != tensors.get(name)))


@pytest.mark.parametrize("runtime", LOADERS)
@settings(deadline=None, max_examples=80)
@given(config=configs, variants=blocks)
def test_what_a_loader_gets_wrong_is_refused(runtime: Runtime, config: ModelConfig, variants: Blocks) -> None:
    wrong = what_is_wrong(runtime, config, variants)
    assert not wrong or refusals(config, variants)[runtime], wrong


EVERY = tuple(LOADERS)
GOOD: dict[str, tuple[ModelConfig, Blocks, tuple[Runtime, ...]]] = {
    "a plain Llama": (PLAIN, [(KV, WIDE)] * 2, EVERY),
    "halves removed": (PLAIN, [(KV, WIDE), (NO_ATTENTION, NARROW), (KV, NO_FFN), (NO_ATTENTION, NO_FFN)], EVERY),
    "fewer kv heads everywhere": (PLAIN, [(ONE, WIDE), (ONE, NARROW)], EVERY),
    "kv heads that differ": (PLAIN, [(KV, WIDE), (ONE, WIDE), (HALF, NARROW)], ("vllm", "tensorrt-llm", "mlx-lm")),
    "an exact width": (PLAIN, [(KV, ODD), (KV, WIDE)], ("vllm",)),
    "linear layers": (PLAIN, [(LINEAR, WIDE), (KV, LINEAR_FFN)], ("tensorrt-llm",)),
    "an FFN before attention": (PLAIN, [(NO_ATTENTION, WIDE), (KV, WIDE)], ("tensorrt-llm", "mlx-lm")),
    "a later FFN before attention": (
        PLAIN,
        [(NO_ATTENTION, NO_FFN), (NO_ATTENTION, WIDE), (KV, WIDE)],
        ("tensorrt-llm", "mlx-lm"),
    ),
    "nothing before attention": (PLAIN, [(NO_ATTENTION, NO_FFN)] * 2 + [(KV, NO_FFN), (NO_ATTENTION, WIDE)], EVERY),
    "no attention": (PLAIN, [(NO_ATTENTION, WIDE)], ("tensorrt-llm",)),
    "untied": (replace(PLAIN, tie_embeddings=False), [(KV, WIDE)], EVERY),
    "wide heads": (replace(PLAIN, head_dim=24), [(KV, WIDE)], ("vllm", "sglang", "tensorrt-llm")),
    "Qwen2's biases": (replace(PLAIN, qkv_bias=True), [(KV, WIDE)], ("vllm",)),
    "attention's biases": (
        replace(PLAIN, qkv_bias=True, output_bias=True),
        [(KV, WIDE)],
        ("vllm", "sglang", "mlx-lm"),
    ),
    "every bias": (replace(PLAIN, qkv_bias=True, output_bias=True, mlp_bias=True), [(KV, WIDE)], ("vllm", "mlx-lm")),
    "GELU": (replace(PLAIN, activation="gelu"), [(KV, WIDE)], ("mlx-lm",)),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_a_loader_takes_is_not_refused(name: str) -> None:
    """The rules are no stricter than the loaders where it matters, and the loaders are not wrong about everything."""
    config, variants, takers = GOOD[name]
    refused = refusals(config, variants)
    assert tuple(runtime for runtime in LOADERS if not refused[runtime]) == takers
    for runtime in takers:
        assert not what_is_wrong(runtime, config, variants), runtime


RIGHT_YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
RIGHT_YARN |= {"original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 1.1, "beta_fast": 16.0}
MLX_LM: dict[str, tuple[dict[str, Any], Blocks, tuple[str, ...]]] = {
    "SiLU": ({}, [(KV, WIDE)] * 2, ("nemotron-nas", "plain")),
    "GELU": ({"activation": "gelu"}, [(KV, WIDE)] * 2, ("nemotron-nas",)),
    "ReLU, blocks that differ": ({"activation": "relu"}, [(KV, WIDE), (ONE, WIDE)], ("nemotron-nas",)),
    "GELU by tanh": ({"activation": "gelu_pytorch_tanh"}, [(KV, WIDE)], ()),
    "no attention": ({}, [(NO_ATTENTION, WIDE)] * 2, ("padded-llama",)),
    "yarn": ({"rope": RIGHT_YARN}, [(KV, WIDE)], ("nemotron-nas", "plain")),
    "yarn with a factor on attention": ({"rope": RIGHT_YARN | {"attention_factor": 1.5}}, [(KV, WIDE)], ()),
    "yarn without rounding": ({"rope": RIGHT_YARN | {"truncate": False}}, [(KV, WIDE)], ()),
    "half of yarn's mscale": ({"rope": RIGHT_YARN | {"mscale_all_dim": 0}}, [(KV, WIDE)], ()),
}


@pytest.mark.parametrize("name", MLX_LM)
def test_what_mlx_lm_computes_right(name: str) -> None:
    """As mlx-lm 0.32.2 ran on a CPU: right within 4e-6 of torch's logits, wrong by 0.2 to 2, or it does not load."""
    changes, variants, takes = MLX_LM[name]
    judged = {verdict.runtime: verdict.takes for verdict in verdicts(replace(PLAIN, **changes), variants)}
    assert judged["mlx-lm"] == takes


def test_widths_of_real_models() -> None:
    """Llama-3.1-70B's, every one: the formula rounds down before it rounds up, and mlx-lm keeps six digits."""
    config = replace(PLAIN, hidden_size=8192, num_heads=64, head_dim=128, num_kv_heads=8)
    variants = [(Attention("gqa", 8), Ffn("gated", width)) for width in range(256, 28673, 256)]
    for runtime in LOADERS:
        assert not what_is_wrong(runtime, config, variants), runtime
