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
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.head import Head
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.quality.scoring import Candidate, score_group

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
    """Draw random tensors of a block, named as within a Llama layer."""
    rng = np.random.default_rng(seed)
    block = Block(CONFIG, attention, ffn)
    scale = {name: 1.0 if name.endswith("layernorm.weight") else 0.3 for name in block.state_dict()}
    return {
        name: torch.from_numpy(rng.normal(size=tuple(tensor.shape)) * scale[name])
        for name, tensor in block.state_dict().items()
    }


def norm(vector: Numbers, weight: Numbers) -> Numbers:
    return weight * vector / math.sqrt(sum(value**2 for value in vector) / len(vector) + EPS)


def rotated(head: Numbers, position: int) -> Numbers:
    """Rotate element i and i + half as a pair by position / theta^(2 i / head_dim) (rotary)."""
    half = HEAD_DIM // 2
    pairs = np.empty(HEAD_DIM)
    for i in range(half):
        angle = position / THETA ** (2 * i / HEAD_DIM)
        pairs[i] = head[i] * math.cos(angle) - head[i + half] * math.sin(angle)
        pairs[i + half] = head[i + half] * math.cos(angle) + head[i] * math.sin(angle)
    return pairs


def attend(rows: Numbers, weights: Mapping[str, Numbers], attention: Attention) -> Numbers:
    """Compute attention of one sequence, token by token and head by head."""
    if attention.kind == "linear":
        return np.stack([weights["self_attn.linear_attn.weight"] @ row for row in rows])
    query, key, value = ([weights[f"self_attn.{name}_proj.weight"] @ row for row in rows] for name in "qkv")
    outputs = []
    for position in range(TOKENS):
        joined = []
        for head in range(HEADS):
            shared = head // (HEADS // attention.num_kv_heads)
            columns = slice(shared * HEAD_DIM, (shared + 1) * HEAD_DIM)
            rotated_query = rotated(query[position][head * HEAD_DIM : (head + 1) * HEAD_DIM], position)
            probabilities = np.array(
                [
                    math.exp(rotated_query @ rotated(key[earlier][columns], earlier) / math.sqrt(HEAD_DIM))
                    for earlier in range(position + 1)
                ]
            )
            joined.append(
                sum(
                    weight * value[earlier][columns]
                    for earlier, weight in enumerate(probabilities / probabilities.sum())
                )
            )
        outputs.append(weights["self_attn.o_proj.weight"] @ np.concatenate(joined))
    return np.stack(outputs)


def feed(row: Numbers, weights: Mapping[str, Numbers], ffn: Ffn) -> Numbers:
    if ffn.kind == "linear":
        mapped: Numbers = weights["mlp.linear_mlp.weight"] @ row
        return mapped
    gate, up = weights["mlp.gate_proj.weight"] @ row, weights["mlp.up_proj.weight"] @ row
    channels = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
    narrowed: Numbers = weights["mlp.down_proj.weight"] @ np.array(channels)
    return narrowed


def block_by_hand(rows: Numbers, named: Mapping[str, Tensor], attention: Attention, ffn: Ffn) -> Numbers:
    weights = {name: tensor.numpy() for name, tensor in named.items()}
    if attention.kind != "no_op":
        rows = rows + attend(
            np.stack([norm(row, weights["input_layernorm.weight"]) for row in rows]), weights, attention
        )
    if ffn.kind != "no_op":
        rows = rows + np.stack(
            [feed(norm(row, weights["post_attention_layernorm.weight"]), weights, ffn) for row in rows]
        )
    return rows


@pytest.mark.parametrize(("attention", "ffn"), list(itertools.product(ATTENTIONS, FFNS)), ids=str)
def test_a_block_of_every_kind(attention: Attention, ffn: Ffn) -> None:
    named = tensors(attention, ffn, seed=1)
    rows = np.random.default_rng(2).normal(size=(TOKENS, WIDTH))
    hidden = torch.from_numpy(rows)[None]
    with torch.inference_mode():
        output = Block.load(CONFIG, attention, ffn, named)(hidden, rotary_for(CONFIG, TOKENS, hidden))[0]
    # norms and rotary angles are taken in float32
    torch.testing.assert_close(
        output, torch.from_numpy(block_by_hand(rows, named, attention, ffn)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("attention", "ffn"), [(ATTENTIONS[1], FFNS[0]), (ATTENTIONS[2], FFNS[0]), (ATTENTIONS[0], FFNS[3])]
)
def test_a_score_of_two_blocks(attention: Attention, ffn: Ffn) -> None:
    """Block 0 is replaced; block 1 and the head are the parent's."""
    rng = np.random.default_rng(3)
    parents, replaced = [tensors(*PARENT, seed=seed) for seed in (4, 5)], tensors(attention, ffn, seed=6)
    rows, last_norm, words = (
        rng.normal(size=(TOKENS, WIDTH)),
        rng.normal(size=WIDTH),
        rng.normal(size=(VOCABULARY, WIDTH)),
    )
    middle = block_by_hand(rows, parents[0], *PARENT)
    states = [rows, middle, block_by_hand(middle, parents[1], *PARENT)]
    child = block_by_hand(block_by_hand(rows, replaced, attention, ffn), parents[1], *PARENT)
    kls = []
    for theirs, ours in zip(states[2][:-1], child[:-1], strict=True):
        p, q = (_softmax(words @ norm(row, last_norm)) for row in (theirs, ours))
        kls.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    (losses,) = score_group(
        CONFIG,
        lambda index: {name: tensor.float() for name, tensor in parents[index].items()},
        lambda index: torch.from_numpy(states[index])[None].float(),
        Head(torch.from_numpy(last_norm).float(), torch.from_numpy(words).float(), EPS),
        torch.zeros(1, TOKENS, dtype=torch.long),
        [Candidate(Replacement(0, 1, attention, ffn), {name: tensor.float() for name, tensor in replaced.items()})],
    )
    assert losses.kl[0].tolist() == pytest.approx(kls, rel=1e-4, abs=1e-6)


def _softmax(logits: Numbers) -> Numbers:
    powers = np.exp(logits - logits.max())
    weights: Numbers = powers / powers.sum()
    return weights
