"""Every kind of subblock, and a score, against plain loops over float64 numbers: two blocks, 16 wide."""

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.model_config import ModelConfig
from storage.records import Attention, Ffn, Replacement
from tasks.puzzle.blocks import Block
from tasks.puzzle.head import Head
from tasks.puzzle.rotary import rotary_for
from tasks.puzzle.scoring import Candidate, score_group

Numbers = NDArray[np.float64]
WIDTH, HEADS, HEAD_DIM, TOKENS, VOCABULARY, EPS, THETA = 16, 4, 4, 6, 11, 1e-5, 10_000.0
CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": EPS,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "tie_word_embeddings": True,
    },
    "by hand",
)
PARENT = (Attention("gqa", 2), Ffn("gated", 24))
ATTENTIONS = (PARENT[0], Attention("gqa", 1), Attention("linear"), Attention("no_op"))
FFNS = (PARENT[1], Ffn("gated", 8), Ffn("linear"), Ffn("no_op"))


def tensors(attention: Attention, ffn: Ffn, seed: int) -> dict[str, Tensor]:
    """Random tensors of a block, named as within a Llama layer."""
    rng = np.random.default_rng(seed)
    block = Block(CONFIG, attention, ffn)
    scale = {name: 1.0 if name.endswith("layernorm.weight") else 0.3 for name in block.state_dict()}
    return {
        name: torch.from_numpy(rng.normal(size=tuple(tensor.shape)) * scale[name])
        for name, tensor in block.state_dict().items()
    }


def norm(vector: Numbers, weight: Numbers) -> Numbers:
    return weight * vector / math.sqrt(sum(value**2 for value in vector) / len(vector) + EPS)


def turned(head: Numbers, position: int) -> Numbers:
    """Rotary: element i and i + half turn together by position / theta^(2 i / head_dim)."""
    half = HEAD_DIM // 2
    found = np.empty(HEAD_DIM)
    for i in range(half):
        angle = position / THETA ** (2 * i / HEAD_DIM)
        found[i] = head[i] * math.cos(angle) - head[i + half] * math.sin(angle)
        found[i + half] = head[i + half] * math.cos(angle) + head[i] * math.sin(angle)
    return found


def attend(rows: Numbers, of: Mapping[str, Numbers], attention: Attention) -> Numbers:
    """Attention of one sequence, token by token and head by head."""
    if attention.kind == "linear":
        return np.stack([of["self_attn.linear_attn.weight"] @ row for row in rows])
    query, key, value = ([of[f"self_attn.{name}_proj.weight"] @ row for row in rows] for name in "qkv")
    found = []
    for position in range(TOKENS):
        joined = []
        for head in range(HEADS):
            shared = head // (HEADS // attention.num_kv_heads)
            own = slice(shared * HEAD_DIM, (shared + 1) * HEAD_DIM)
            asked = turned(query[position][head * HEAD_DIM : (head + 1) * HEAD_DIM], position)
            weights = np.array(
                [
                    math.exp(asked @ turned(key[earlier][own], earlier) / math.sqrt(HEAD_DIM))
                    for earlier in range(position + 1)
                ]
            )
            joined.append(sum(w * value[earlier][own] for earlier, w in enumerate(weights / weights.sum())))
        found.append(of["self_attn.o_proj.weight"] @ np.concatenate(joined))
    return np.stack(found)


def feed(row: Numbers, of: Mapping[str, Numbers], ffn: Ffn) -> Numbers:
    if ffn.kind == "linear":
        mapped: Numbers = of["mlp.linear_mlp.weight"] @ row
        return mapped
    gate, up = of["mlp.gate_proj.weight"] @ row, of["mlp.up_proj.weight"] @ row
    channels = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
    narrowed: Numbers = of["mlp.down_proj.weight"] @ np.array(channels)
    return narrowed


def block_by_hand(rows: Numbers, named: Mapping[str, Tensor], attention: Attention, ffn: Ffn) -> Numbers:
    of = {name: tensor.numpy() for name, tensor in named.items()}
    if attention.kind != "no_op":
        rows = rows + attend(np.stack([norm(row, of["input_layernorm.weight"]) for row in rows]), of, attention)
    if ffn.kind != "no_op":
        rows = rows + np.stack([feed(norm(row, of["post_attention_layernorm.weight"]), of, ffn) for row in rows])
    return rows


@pytest.mark.parametrize(("attention", "ffn"), list(itertools.product(ATTENTIONS, FFNS)), ids=str)
def test_a_block_of_every_kind(attention: Attention, ffn: Ffn) -> None:
    named = tensors(attention, ffn, seed=1)
    rows = np.random.default_rng(2).normal(size=(TOKENS, WIDTH))
    hidden = torch.from_numpy(rows)[None]
    with torch.inference_mode():
        found = Block.load(CONFIG, attention, ffn, named)(hidden, rotary_for(CONFIG, TOKENS, hidden))[0]
    # norms and rotary angles are taken in float32
    torch.testing.assert_close(
        found, torch.from_numpy(block_by_hand(rows, named, attention, ffn)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("attention", "ffn"), [(ATTENTIONS[1], FFNS[0]), (ATTENTIONS[2], FFNS[0]), (ATTENTIONS[0], FFNS[3])]
)
def test_a_score_of_two_blocks(attention: Attention, ffn: Ffn) -> None:
    """KL of the next token's distribution with block 0 replaced, block 1 and the head the parent's."""
    rng = np.random.default_rng(3)
    parents, own = [tensors(*PARENT, seed=seed) for seed in (4, 5)], tensors(attention, ffn, seed=6)
    rows, last_norm, words = (
        rng.normal(size=(TOKENS, WIDTH)),
        rng.normal(size=WIDTH),
        rng.normal(size=(VOCABULARY, WIDTH)),
    )
    middle = block_by_hand(rows, parents[0], *PARENT)
    states = [rows, middle, block_by_hand(middle, parents[1], *PARENT)]
    child = block_by_hand(block_by_hand(rows, own, attention, ffn), parents[1], *PARENT)
    kls = []
    for theirs, ours in zip(states[2][:-1], child[:-1], strict=True):
        p, q = (_softmax(words @ norm(row, last_norm)) for row in (theirs, ours))
        kls.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    (found,) = score_group(
        CONFIG,
        lambda index: {name: tensor.float() for name, tensor in parents[index].items()},
        lambda index: torch.from_numpy(states[index])[None].float(),
        Head(torch.from_numpy(last_norm).float(), torch.from_numpy(words).float(), EPS),
        torch.zeros(1, TOKENS, dtype=torch.long),
        [Candidate(Replacement(0, 1, attention, ffn), {name: tensor.float() for name, tensor in own.items()})],
    )
    assert found.kl[0].tolist() == pytest.approx(kls, rel=1e-4, abs=1e-6)


def _softmax(logits: Numbers) -> Numbers:
    powers = np.exp(logits - logits.max())
    weights: Numbers = powers / powers.sum()
    return weights
