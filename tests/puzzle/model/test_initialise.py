"""Importance and initial weights against cases computed by hand and against transformers' own models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from storage.checkpoints import Checkpoint
from storage.model_config import EMBEDDING, ModelConfig
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.distill.bld import rank_channels
from tasks.puzzle.model.assembly import compose, initial_weights
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.boundaries import boundaries
from tasks.puzzle.model.initialise import (
    channel_contribution,
    channel_order,
    initial_attention,
    initial_ffn,
)
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tests.tiny import FAMILIES, save_tiny

CPU = torch.device("cpu")


def read(folder: Path, family: str) -> tuple[Any, ModelConfig, dict[str, Tensor]]:
    """Save a tiny parent; return the model, its geometry and its block 1."""
    model, config = save_tiny(family, folder)
    return model, config, Checkpoint(folder, "the test", is_foreign=True).block(1, CPU, torch.float32)


def test_contribution_by_hand() -> None:
    down = torch.tensor([[3.0, 0.0], [4.0, 1.0]])  # columns of norm 5 and 1
    contribution = channel_contribution(torch.tensor([2.0, 12.0]), 4, down)  # mean |x| 0.5 and 3
    assert contribution.tolist() == [2.5, 3.0]
    assert channel_order(contribution).tolist() == [1, 0]


def test_equal_channels_keep_their_order() -> None:
    assert channel_order(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])).tolist() == [1, 3, 0, 2, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_ranking_equals_a_hook_on_the_parents_down_proj(family: str, tmp_path: Path) -> None:
    model, config, block = read(tmp_path, family)
    tokens = torch.randint(0, config.vocab_size, (5, 20), generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    layer = model.model.layers[1]
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    hidden = model(tokens, output_hidden_states=True).hidden_states[1].detach()
    expected = seen[0].detach().double().abs().mean((0, 1)) * layer.mlp.down_proj.weight.detach().double().norm(dim=0)
    order = rank_channels(config, block, torch.split(hidden, 2))  # batches of 2, 2 and 1: means weigh tokens
    torch.testing.assert_close(expected[order], expected.sort(descending=True).values, atol=1e-6, rtol=1e-5)


def test_key_and_value_heads_are_averaged_inside_each_group() -> None:
    config = replace(_geometry(), num_heads=4, num_kv_heads=4, head_dim=1, hidden_size=2, qkv_bias=True)
    block = {f"self_attn.{name}_proj.weight": torch.arange(8.0).view(4, 2) ** power for name, power in _POWERS.items()}
    block |= {f"self_attn.{name}_proj.bias": torch.tensor([1.0, 3.0, 10.0, 20.0]) for name in _POWERS}
    block |= {"mlp.up_proj.weight": torch.ones(1), "self_attn.o_proj.weight": torch.ones(2, 4)}
    start = initial_attention(config, block, Attention("gqa", 2))
    assert start["self_attn.k_proj.weight"].tolist() == [[1.0, 2.0], [5.0, 6.0]]
    assert start["self_attn.v_proj.weight"].tolist() == [[2.0, 5.0], [26.0, 37.0]]
    assert start["self_attn.k_proj.bias"].tolist() == start["self_attn.v_proj.bias"].tolist() == [2.0, 15.0]
    for name in ("q_proj.weight", "q_proj.bias", "o_proj.weight"):
        assert torch.equal(start[f"self_attn.{name}"], block[f"self_attn.{name}"])
    assert "mlp.up_proj.weight" not in start


_POWERS = {"q": 1, "k": 1, "v": 2}


def test_rows_of_one_head_stay_apart() -> None:
    config = replace(_geometry(), num_heads=2, num_kv_heads=2, head_dim=2, hidden_size=1)
    rows = torch.tensor([[1.0], [100.0], [3.0], [300.0]])  # head 0 has rows 0 and 1
    start = initial_attention(config, {"self_attn.k_proj.weight": rows}, Attention("gqa", 1))
    assert start["self_attn.k_proj.weight"].tolist() == [[2.0], [200.0]]


@pytest.mark.parametrize("family", ["llama", "mistral", "llama3-untied-head_dim-bias"])
def test_linear_attention_starts_as_what_a_lone_token_sees(family: str, tmp_path: Path) -> None:
    """With one token the attention weights are 1 whatever the keys: W_o W_v, without the biases of v and o."""
    _, config, block = read(tmp_path, family)
    for name in [name for name in block if name.startswith("self_attn.") and name.endswith(".bias")]:
        block[name].zero_()
    start = initial_attention(config, block, Attention("linear"))
    hidden = torch.randn(7, 1, config.hidden_size, generator=torch.Generator().manual_seed(2))
    rotary = rotary_for(config, 1, hidden)
    parent = Block.load(config, parent_attention(config), parent_ffn(config), block)
    linear = Block.load(config, Attention("linear"), Ffn("no_op"), start)
    torch.testing.assert_close(linear(hidden, rotary), parent.attend(hidden, rotary), atol=1e-5, rtol=1e-5)


def test_linear_starts_by_hand() -> None:
    config = replace(_geometry(), num_heads=4, num_kv_heads=2, head_dim=1, hidden_size=2)
    block = {
        "input_layernorm.weight": torch.ones(2),
        "post_attention_layernorm.weight": torch.tensor([2.0, 3.0]),
        "self_attn.v_proj.weight": torch.tensor([[1.0, 2.0], [10.0, 20.0]]),  # heads 0, 1 read row 0; heads 2, 3 row 1
        "self_attn.o_proj.weight": torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0]]),
        "mlp.up_proj.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        "mlp.down_proj.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
    }
    attention = initial_attention(config, block, Attention("linear"))
    assert attention["self_attn.linear_attn.weight"].tolist() == [[73.0, 146.0], [10.0, 20.0]]  # 3 x row 0 + 7 x row 1
    assert attention.keys() == {"input_layernorm.weight", "self_attn.linear_attn.weight"}
    ffn = initial_ffn(block, Ffn("linear"), torch.arange(3))
    assert ffn["mlp.linear_mlp.weight"].tolist() == [[4.0, 5.0], [10.0, 11.0]]
    assert ffn["post_attention_layernorm.weight"].tolist() == [2.0, 3.0]


def test_kept_channels_stay_in_the_parents_order() -> None:
    block = {f"mlp.{name}_proj.weight": torch.arange(8.0).view(4, 2) for name in ("gate", "up")}
    block |= {"mlp.gate_proj.bias": torch.arange(4.0), "mlp.up_proj.bias": -torch.arange(4.0)}
    block |= {"mlp.down_proj.weight": torch.arange(8.0).view(2, 4), "mlp.down_proj.bias": torch.tensor([7.0, 9.0])}
    start = initial_ffn(block, Ffn("gated", 2), torch.tensor([3, 1, 0, 2]))
    assert start["mlp.gate_proj.weight"].tolist() == start["mlp.up_proj.weight"].tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert start["mlp.gate_proj.bias"].tolist() == [1.0, 3.0]
    assert start["mlp.up_proj.bias"].tolist() == [-1.0, -3.0]
    assert start["mlp.down_proj.weight"].tolist() == [[1.0, 3.0], [5.0, 7.0]]
    assert start["mlp.down_proj.bias"].tolist() == [7.0, 9.0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variants_of_full_size_are_the_parent(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _, config, tensors = read(tmp_path, family)
    block = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    order = torch.randperm(config.intermediate_size, generator=torch.Generator().manual_seed(0))
    started = {
        **initial_attention(config, block, parent_attention(config)),
        **initial_ffn(block, parent_ffn(config), order),
    }
    assert started.keys() == block.keys()
    assert all(torch.equal(started[name], block[name]) for name in block)


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_contribute_nothing_are_dropped_first(family: str, tmp_path: Path) -> None:
    _, config, block = read(tmp_path, family)
    dead = torch.randperm(config.intermediate_size, generator=torch.Generator().manual_seed(3))[:40]
    block["mlp.down_proj.weight"][:, dead] = 0
    hidden = _input_of_block_1(tmp_path, config)
    order = rank_channels(config, block, [hidden])
    assert sorted(order[-40:].tolist()) == sorted(dead.tolist())
    narrow = Ffn("gated", config.intermediate_size - 40)
    child = compose(
        config, block, Replacement(1, 1, parent_attention(config), narrow), initial_weights(config, block, order)
    )
    rotary = rotary_for(config, hidden.shape[1], hidden)
    output = Block.load(config, parent_attention(config), narrow, child)(hidden, rotary)
    expected = Block.load(config, parent_attention(config), parent_ffn(config), block)(hidden, rotary)
    # the same 56 products, summed in another grouping of float32 additions
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)


def _input_of_block_1(folder: Path, config: ModelConfig) -> Tensor:
    checkpoint = Checkpoint(folder, "the test", is_foreign=True)
    tokens = torch.randint(0, config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))
    parents = parent_attention(config), parent_ffn(config)
    states = boundaries(
        config, checkpoint.tensor(EMBEDDING), [(*parents, checkpoint.block(0, CPU, torch.float32))], tokens, 3
    )
    *_, last = states
    return last


def test_no_ops_have_no_tensors() -> None:
    config = _geometry()
    nothing = compose(
        config, {"mlp.up_proj.weight": torch.ones(1)}, Replacement(0, 1, Attention("no_op"), Ffn("no_op")), _never
    )
    assert nothing == {}
    assert initial_attention(config, {}, Attention("no_op")) == {}
    assert initial_ffn({}, Ffn("no_op"), torch.arange(4)) == {}


def _never(variant: Attention | Ffn) -> dict[str, Tensor]:
    raise AssertionError(f"{variant} was asked for")


def _geometry() -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 4,
            "vocab_size": 5,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32,
        },
        "the test",
    )
