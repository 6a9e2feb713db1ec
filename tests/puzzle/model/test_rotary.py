"""Rotary positions against transformers' Llama, for every rope type that a parent may have."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from storage.model_config import ROPE_TYPES, ModelConfig
from tasks.puzzle.model.rotary import RotaryEmbedding, rotary_for, rotate
from tests.tiny import LLAMA3_ROPE, SIZES, tiny_model

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": LLAMA3_ROPE,
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
}
CONFIG = ModelConfig.from_hf({**tiny_model("llama").config.to_dict(), "architectures": ["LlamaForCausalLM"]}, "tiny")


@pytest.mark.parametrize("kind", ROPE_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_rotated_as_llama_rotates_them(kind: str, dtype: torch.dtype) -> None:
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SIZES, head_dim=20, rope_parameters=ROPES[kind]))
    ours = RotaryEmbedding(replace(CONFIG, head_dim=20, rope=ROPES[kind]))
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 9, 20, generator=generator).to(dtype) for heads in (4, 2))
    positions = torch.stack((torch.arange(9), torch.arange(100, 109)))
    expected = apply_rotary_pos_emb(query, key, *theirs(query, positions))
    rotary = ours(query, positions)
    assert torch.equal(rotate(query, rotary), expected[0])
    assert torch.equal(rotate(key, rotary), expected[1])


def test_an_embedding_made_for_the_meta_device_still_holds_numbers() -> None:
    with torch.device("meta"):
        embedding = RotaryEmbedding(CONFIG)
    like = torch.zeros(1)
    for computed, expected in zip(embedding(like, torch.arange(5)[None]), rotary_for(CONFIG, 5, like), strict=True):
        assert torch.equal(computed, expected)
