"""Chunked losses against torch's own, over full logits in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tasks.puzzle.model.head import Head, TokenLosses, compare_with_parent, tile_sizes

CHUNK_TOKENS, TILE_WORDS = tile_sizes(torch.device("cpu"), 0)
HIDDEN, VOCABULARY, EPS = 24, 2 * TILE_WORDS + 500, 1e-5
SHAPES = [(1, 2), (3, 5), (2, CHUNK_TOKENS), (1, CHUNK_TOKENS + 1), (5, 70), (1, 3 * CHUNK_TOKENS + 2)]


def random_head(seed: int = 0) -> Head:
    generator = torch.Generator().manual_seed(seed)
    norm = 1 + 0.3 * torch.randn(HIDDEN, generator=generator)
    return Head(norm, 0.5 * torch.randn(VOCABULARY, HIDDEN, generator=generator), EPS)


def random_states(sequences: int, tokens: int, count: int, noise: float = 0.3) -> tuple[Tensor, list[Tensor]]:
    """Draw token ids, and hidden states that differ by `noise` from the first."""
    generator = torch.Generator().manual_seed(sequences * 1000 + tokens)
    ids = torch.randint(0, VOCABULARY, (sequences, tokens), generator=generator)
    first = torch.randn(sequences, tokens, HIDDEN, generator=generator)
    others = [first + noise * torch.randn(first.shape, generator=generator) for _ in range(count - 1)]
    return ids, [first, *others]


def reference(head: Head, ids: Tensor, parent: Tensor, child: Tensor) -> TokenLosses:
    """Compute torch's losses over all logits at once, in float64."""

    def logits(hidden: Tensor) -> Tensor:
        wide = hidden.double()
        normed = wide / (wide.square().mean(-1, keepdim=True) + head.eps).sqrt() * head.norm.double()
        full: Tensor = normed[:, :-1] @ head.weight.double().T
        return full

    ours, theirs = logits(parent), logits(child)
    kl = functional.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    lm_loss = functional.cross_entropy(theirs.mT, ids[:, 1:], reduction="none")
    dots = (parent.double() * child.double()).sum(-1)
    cosine = dots / (parent.double().norm(dim=-1) * child.double().norm(dim=-1))
    return TokenLosses(kl, lm_loss, (ours.argmax(-1) == theirs.argmax(-1)).double(), cosine[:, :-1])


@pytest.mark.parametrize(("sequences", "tokens"), SHAPES)
def test_losses_equal_torchs_over_full_logits(sequences: int, tokens: int) -> None:
    head = random_head()
    ids, (parent, *children) = random_states(sequences, tokens, 3)
    for child, losses in zip(children, compare_with_parent(head, ids, parent, children), strict=True):
        expected = reference(head, ids, parent, child)
        assert losses.kl.shape == losses.lm_loss.shape == losses.top1.shape == (sequences, tokens - 1)
        # logits reach 10, whose float32 rounding is 1e-6; KL is a difference of two sums of that size
        torch.testing.assert_close(losses.kl.double(), expected.kl, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(losses.lm_loss.double(), expected.lm_loss, atol=1e-5, rtol=1e-5)
        assert torch.equal(losses.top1.double(), expected.top1)
        torch.testing.assert_close(losses.cosine.double(), expected.cosine, atol=1e-6, rtol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    head = random_head()
    large = Head(head.norm, head.weight * 20, EPS)  # logits beyond 200: exp overflows float32 at 89
    ids, (parent, child) = random_states(2, 60, 2)
    [losses] = compare_with_parent(large, ids, parent, [child])
    expected = reference(large, ids, parent, child)
    torch.testing.assert_close(losses.kl.double(), expected.kl, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(losses.lm_loss.double(), expected.lm_loss, atol=1e-3, rtol=1e-5)


def _as_bf16(tensor: Tensor) -> Tensor:
    return tensor.bfloat16()


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("cast", [_as_is, _as_bf16])
def test_a_child_equal_to_the_parent_scores_exactly_zero(cast: Callable[[Tensor], Tensor]) -> None:
    head = random_head()
    narrow = Head(cast(head.norm), cast(head.weight), EPS)
    ids, (parent, other) = random_states(3, 100, 2)
    same, _ = compare_with_parent(narrow, ids, cast(parent), [cast(parent).clone(), cast(other)])
    assert torch.equal(same.kl, torch.zeros_like(same.kl))
    assert torch.equal(same.top1, torch.ones_like(same.top1))


def test_rounded_weights_add_nothing_to_a_small_kl() -> None:
    head = random_head()
    narrow = Head(head.norm.bfloat16(), head.weight.bfloat16(), EPS)
    ids, states = random_states(4, 200, 2, noise=0.02)
    parent, child = (state.bfloat16() for state in states)
    [losses] = compare_with_parent(narrow, ids, parent, [child])
    expected = reference(narrow, ids, parent, child)
    apart = (functional.linear(narrow.normalise(state[:, :-1]), narrow.weight) for state in (parent, child))
    ours, theirs = (logits.double().log_softmax(-1) for logits in apart)
    kl_apart = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    assert float(losses.kl.mean()) == pytest.approx(float(expected.kl.mean()), rel=5e-3)
    assert kl_apart > 1.02 * float(expected.kl.mean())  # what logits that are rounded one by one would say
    torch.testing.assert_close(losses.lm_loss.double(), expected.lm_loss, atol=0.05, rtol=0)


def test_a_child_is_compared_alike_alone_and_beside_others() -> None:
    head = random_head()
    ids, (parent, *children) = random_states(2, 150, 4)
    together = compare_with_parent(head, ids, parent, children)
    for child, beside in zip(children, together, strict=True):
        [alone] = compare_with_parent(head, ids, parent, [child])
        assert torch.equal(alone.kl, beside.kl)
        assert torch.equal(alone.lm_loss, beside.lm_loss)


def test_the_last_token_predicts_nothing() -> None:
    head = random_head()
    ids, (parent, child) = random_states(2, 10, 2)
    [before] = compare_with_parent(head, ids, parent, [child])
    parent[:, -1], child[:, -1] = 3.0, -5.0
    [after] = compare_with_parent(head, ids, parent, [child])
    assert torch.equal(before.kl, after.kl)
    assert torch.equal(before.lm_loss, after.lm_loss)
