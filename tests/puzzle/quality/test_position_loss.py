"""Log-loss by position against losses of transformers, one token after the other."""

import statistics
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.puzzle.quality.position_loss import compare_positions, ranges, summed_losses


def test_ranges_double_and_cover_every_position_that_is_predicted() -> None:
    assert ranges(300) == [(1, 64), (64, 128), (128, 256), (256, 300)]
    assert ranges(64) == [(1, 64)]
    for tokens in (2, 63, 65, 8_192):
        covered = [position for first, end in ranges(tokens) for position in range(first, end)]
        assert covered == list(range(1, tokens))


def test_sums_are_those_of_each_tokens_loss() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=256, **sizes)).eval()
    ids = torch.randint(0, 50, (1, 150))
    with torch.no_grad():
        logits = model(ids).logits[0]
        sums = summed_losses(model, ids, ranges(200))
    losses = [float(functional.cross_entropy(logits[position - 1], ids[0, position])) for position in range(1, 150)]
    assert sums == pytest.approx([sum(losses[:63]), sum(losses[63:127]), sum(losses[127:])], rel=1e-5)


def test_children_are_paired_with_the_parent_by_document() -> None:
    """Two documents of 128 and 64 tokens: the second reaches the first range only."""
    models = {"parent": [[63 * 2.0, 64 * 1.0], [63 * 3.0]], "refined": [[63 * 2.5, 64 * 1.25], [63 * 4.5]]}
    near, far = compare_positions(models, [128, 64], [0, 1])
    assert (near.first, near.end, near.tokens, near.documents) == (1, 64, 126, 2)
    assert near.parent == pytest.approx(2.5)
    child = near.children["refined"]
    assert child.loss == pytest.approx(3.5)
    assert child.difference == pytest.approx(1.0)
    assert child.difference_stderr == pytest.approx(statistics.stdev([0.5, 1.5]) / 2**0.5)
    assert (far.tokens, far.documents, far.parent) == (64, 1, 1.0)
    assert (far.children["refined"].difference, far.children["refined"].difference_stderr) == (0.25, None)
