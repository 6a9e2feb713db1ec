"""Replace-1-block scores against full-model replacement in transformers' own models."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from storage.checkpoints import Checkpoint
from storage.model_config import EMBEDDING, LM_HEAD, NORM, ModelConfig
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.model.assembly import compose, initial_weights
from tasks.puzzle.model.boundaries import boundaries
from tasks.puzzle.model.head import Head, TokenLosses
from tasks.puzzle.quality.scoring import Candidate, score_group, score_removals
from tasks.puzzle.search_space import attention_variants, ffn_variants, parent_attention, parent_ffn
from tests.reference import full_replacement
from tests.tiny import FAMILIES, save_tiny

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # nats; float32 logits of order 1, summed in another order than transformers' from block 0 on


@dataclass
class TinyParent:
    """A tiny parent with its boundaries on some tokens; it counts which blocks and boundaries are read."""

    config: ModelConfig
    checkpoint: Checkpoint
    tokens: Tensor
    dtype: torch.dtype
    sequences_per_batch: int
    blocks_read: Counter[int] = field(default_factory=Counter)
    boundaries_read: Counter[int] = field(default_factory=Counter)
    states: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        parents = parent_attention(self.config), parent_ffn(self.config)
        blocks = ((*parents, self.block(index)) for index in range(self.config.num_blocks))
        embedding = self.checkpoint.tensor(EMBEDDING).to(self.dtype)
        self.states = list(boundaries(self.config, embedding, blocks, self.tokens, self.sequences_per_batch))

    def block(self, index: int) -> dict[str, Tensor]:
        return self.checkpoint.block(index, CPU, self.dtype)

    def parent_block(self, index: int) -> Mapping[str, Tensor]:
        self.blocks_read[index] += 1
        return self.block(index)

    def boundary(self, index: int) -> Tensor:
        self.boundaries_read[index] += 1
        return self.states[index]

    def candidate(self, index: int, attention: Attention, ffn: Ffn, span: int = 1) -> Candidate:
        """Make a replacement whose weights are the initial ones with noise, as training would leave them."""
        replacement, block = Replacement(index, span, attention, ffn), self.block(index)
        order = torch.randperm(self.config.intermediate_size, generator=torch.Generator().manual_seed(index))
        tensors = compose(self.config, block, replacement, initial_weights(self.config, block, order))
        generator = torch.Generator().manual_seed(len(tensors))
        noisy = {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()
        }
        return Candidate(replacement, {name: tensor.to(self.dtype) for name, tensor in noisy.items()})

    def candidates(self) -> list[Candidate]:
        """List every variant of every block, the last block first, and one joint replacement of each block."""
        parents = parent_attention(self.config), parent_ffn(self.config)
        candidates = []
        for index in reversed(range(self.config.num_blocks)):
            candidates += [
                self.candidate(index, variant, parents[1]) for variant in attention_variants(self.config, linear=True)
            ]
            candidates += [
                self.candidate(index, parents[0], variant)
                for variant in ffn_variants(self.config, (0.5, 0.25), 8, linear=True)
            ]
            candidates.append(self.candidate(index, Attention("gqa", 1), Ffn("no_op")))
        return candidates

    @property
    def head(self) -> Head:
        weight = self.checkpoint.tensor(EMBEDDING if self.config.tie_embeddings else LM_HEAD).to(self.dtype)
        return Head(self.checkpoint.tensor(NORM).to(self.dtype), weight, self.config.rms_norm_eps)

    def score(self, candidates: list[Candidate]) -> list[TokenLosses]:
        return score_group(self.config, self.parent_block, self.boundary, self.head, self.tokens, candidates)


def tiny_parent(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, sequences_per_batch: int = 3
) -> TinyParent:
    _, config = save_tiny(family, folder)
    tokens = torch.randint(0, config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(1))
    return TinyParent(config, Checkpoint(folder, "the test", is_foreign=True), tokens, dtype, sequences_per_batch)


def assert_same(losses: TokenLosses, expected: TokenLosses) -> None:
    torch.testing.assert_close(losses.kl, expected.kl, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(losses.lm_loss, expected.lm_loss, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(losses.top1, expected.top1, atol=0, rtol=0)
    torch.testing.assert_close(losses.cosine, expected.cosine, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_full_model_replacement(family: str, tmp_path: Path) -> None:
    parent = tiny_parent(family, tmp_path)
    candidates = parent.candidates()
    for candidate, losses in zip(candidates, parent.score(candidates), strict=True):
        index = candidate.replacement.first_block
        expected = full_replacement(family, parent.tokens, {index: dict(candidate.tensors)})
        assert float(expected.kl.mean()) > 100 * TOLERANCE, "the test must tell replacements apart"
        assert_same(losses, expected)


def test_removals_equal_the_full_model_without_those_blocks(tmp_path: Path) -> None:
    parent = tiny_parent("llama", tmp_path)
    first, last = parent.states[0], parent.states[-1]
    for removed, candidates in (((), (0, 2)), ((1,), (2, 0)), ((0, 2), (1,))):
        losses = score_removals(
            parent.config, parent.block, first, last, parent.head, parent.tokens, removed, candidates
        )
        for candidate, without in zip(candidates, losses, strict=True):
            assert_same(without, full_replacement("llama", parent.tokens, {i: {} for i in (*removed, candidate)}))


def test_a_span_stands_for_all_its_blocks(tmp_path: Path) -> None:
    parent = tiny_parent("llama", tmp_path)
    span = parent.candidate(0, Attention("gqa", 2), Ffn("gated", 48), span=2)
    single = parent.candidate(0, Attention("no_op"), Ffn("gated", 96))
    span_losses, single_losses = parent.score([span, single])
    assert_same(span_losses, full_replacement("llama", parent.tokens, {0: dict(span.tensors), 1: {}}))
    assert_same(single_losses, full_replacement("llama", parent.tokens, {0: dict(single.tensors)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_does_not_depend_on_its_group(dtype: torch.dtype, tmp_path: Path) -> None:
    parent = tiny_parent("qwen2", tmp_path, dtype)
    candidates = parent.candidates()
    for candidate, grouped in zip(candidates, parent.score(candidates), strict=True):
        [alone] = parent.score([candidate])
        assert torch.equal(grouped.kl, alone.kl)
        assert torch.equal(grouped.lm_loss, alone.lm_loss)
        assert torch.equal(grouped.top1, alone.top1)


def test_each_parent_block_is_read_once_for_the_whole_group(tmp_path: Path) -> None:
    parent = tiny_parent("mistral", tmp_path)
    parent.score([candidate for candidate in parent.candidates() if candidate.replacement.first_block])
    assert parent.blocks_read == {2: 1}, "block 1 is replaced by all candidates, block 2 by some"
    assert parent.boundaries_read == {1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parent_in_place_of_itself_scores_exactly_zero(dtype: torch.dtype, tmp_path: Path) -> None:
    parent = tiny_parent("llama", tmp_path, dtype, sequences_per_batch=4)  # cached in the batches in which it is scored
    parents = parent_attention(parent.config), parent_ffn(parent.config)
    same = [
        Candidate(Replacement(index, 1, *parents), parent.block(index)) for index in range(parent.config.num_blocks)
    ]
    for losses in parent.score(same):
        assert torch.equal(losses.kl, torch.zeros_like(losses.kl))
        assert torch.equal(losses.top1, torch.ones_like(losses.top1))


def test_the_parent_scores_next_to_zero_from_boundaries_of_other_batches(tmp_path: Path) -> None:
    parent = tiny_parent("llama", tmp_path, sequences_per_batch=3)
    parents = parent_attention(parent.config), parent_ffn(parent.config)
    for losses in parent.score([Candidate(Replacement(0, 1, *parents), parent.block(0))]):
        assert float(losses.kl.abs().max()) < TOLERANCE  # GEMMs of another shape may sum in another order
