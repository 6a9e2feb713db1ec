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
from storage.records import Attention, Ffn, Replacement
from tasks.puzzle.assembly import compose, initial_weights
from tasks.puzzle.boundaries import boundaries
from tasks.puzzle.head import Head, TokenLosses
from tasks.puzzle.scoring import Candidate, score_group
from tasks.puzzle.variants import attention_variants, ffn_variants, parent_attention, parent_ffn
from tests.reference import full_replacement
from tests.tiny import FAMILIES, save_tiny

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # nats; float32 logits of order 1, summed in another order than transformers' from block 0 on


@dataclass
class Setting:
    """A tiny parent with its boundaries on some tokens, and what was read from it."""

    config: ModelConfig
    checkpoint: Checkpoint
    tokens: Tensor
    dtype: torch.dtype
    sequences_per_batch: int
    blocks_read: Counter[int] = field(default_factory=Counter)
    boundaries_read: Counter[int] = field(default_factory=Counter)
    states: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        own = parent_attention(self.config), parent_ffn(self.config)
        blocks = ((*own, self.block(index)) for index in range(self.config.num_blocks))
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
        """A replacement whose weights are the initial ones with noise, as training would leave them."""
        replacement, block = Replacement(index, span, attention, ffn), self.block(index)
        order = torch.randperm(self.config.intermediate_size, generator=torch.Generator().manual_seed(index))
        tensors = compose(self.config, block, replacement, initial_weights(self.config, block, order))
        generator = torch.Generator().manual_seed(len(tensors))
        noisy = {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()
        }
        return Candidate(replacement, {name: tensor.to(self.dtype) for name, tensor in noisy.items()})

    def candidates(self) -> list[Candidate]:
        """Every variant of every block, the last block first, and one joint replacement of each block."""
        own = parent_attention(self.config), parent_ffn(self.config)
        found = []
        for index in reversed(range(self.config.num_blocks)):
            found += [self.candidate(index, other, own[1]) for other in attention_variants(self.config, linear=True)]
            found += [
                self.candidate(index, own[0], other) for other in ffn_variants(self.config, (0.5, 0.25), 8, linear=True)
            ]
            found.append(self.candidate(index, Attention("gqa", 1), Ffn("no_op")))
        return found

    def score(self, candidates: list[Candidate]) -> list[TokenLosses]:
        tied = self.config.tie_embeddings
        weight = self.checkpoint.tensor(EMBEDDING if tied else LM_HEAD).to(self.dtype)
        head = Head(self.checkpoint.tensor(NORM).to(self.dtype), weight, self.config.rms_norm_eps)
        return score_group(self.config, self.parent_block, self.boundary, head, self.tokens, candidates)


def setting(family: str, folder: Path, dtype: torch.dtype = torch.float32, sequences_per_batch: int = 3) -> Setting:
    _, config = save_tiny(family, folder)
    tokens = torch.randint(0, config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(1))
    return Setting(config, Checkpoint(folder, "the test"), tokens, dtype, sequences_per_batch)


def assert_same(found: TokenLosses, expected: TokenLosses) -> None:
    torch.testing.assert_close(found.kl, expected.kl, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.lm_loss, expected.lm_loss, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.top1, expected.top1, atol=0, rtol=0)
    torch.testing.assert_close(found.cosine, expected.cosine, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_full_model_replacement(family: str, tmp_path: Path) -> None:
    parent = setting(family, tmp_path)
    candidates = parent.candidates()
    for candidate, found in zip(candidates, parent.score(candidates), strict=True):
        index = candidate.replacement.first_block
        expected = full_replacement(family, parent.tokens, {index: dict(candidate.tensors)})
        assert float(expected.kl.mean()) > 100 * TOLERANCE, "the test must tell replacements apart"
        assert_same(found, expected)


def test_a_span_stands_for_all_its_blocks(tmp_path: Path) -> None:
    parent = setting("llama", tmp_path)
    span = parent.candidate(0, Attention("gqa", 2), Ffn("gated", 48), span=2)
    single = parent.candidate(0, Attention("no_op"), Ffn("gated", 96))
    found, beside = parent.score([span, single])
    assert_same(found, full_replacement("llama", parent.tokens, {0: dict(span.tensors), 1: {}}))
    assert_same(beside, full_replacement("llama", parent.tokens, {0: dict(single.tensors)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_does_not_depend_on_its_group(dtype: torch.dtype, tmp_path: Path) -> None:
    parent = setting("qwen2", tmp_path, dtype)
    candidates = parent.candidates()
    for candidate, grouped in zip(candidates, parent.score(candidates), strict=True):
        [alone] = parent.score([candidate])
        assert torch.equal(grouped.kl, alone.kl)
        assert torch.equal(grouped.lm_loss, alone.lm_loss)
        assert torch.equal(grouped.top1, alone.top1)


def test_each_parent_block_is_read_once_for_the_whole_group(tmp_path: Path) -> None:
    parent = setting("mistral", tmp_path)
    parent.score([candidate for candidate in parent.candidates() if candidate.replacement.first_block])
    assert parent.blocks_read == {2: 1}, "block 1 is replaced by all candidates, block 2 by some"
    assert parent.boundaries_read == {1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parent_in_place_of_itself_scores_exactly_zero(dtype: torch.dtype, tmp_path: Path) -> None:
    parent = setting("llama", tmp_path, dtype, sequences_per_batch=4)  # cached in the batches in which it is scored
    own = parent_attention(parent.config), parent_ffn(parent.config)
    same = [Candidate(Replacement(index, 1, *own), parent.block(index)) for index in range(parent.config.num_blocks)]
    for losses in parent.score(same):
        assert torch.equal(losses.kl, torch.zeros_like(losses.kl))
        assert torch.equal(losses.top1, torch.ones_like(losses.top1))


def test_the_parent_scores_next_to_zero_from_boundaries_of_other_batches(tmp_path: Path) -> None:
    parent = setting("llama", tmp_path, sequences_per_batch=3)
    own = parent_attention(parent.config), parent_ffn(parent.config)
    for losses in parent.score([Candidate(Replacement(0, 1, *own), parent.block(0))]):
        assert float(losses.kl.abs().max()) < TOLERANCE  # GEMMs of another shape may sum in another order
