"""Global distillation against torch's own losses over full logits, differentiated by autograd."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from storage.checkpoints import Checkpoint
from storage.model_config import EMBEDDING, LM_HEAD, NORM
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.distill.gkd import (
    LossWeights,
    Teacher,
    TrainableChild,
    chunk_tokens,
    gradients,
    kl_to_parent,
    sick_part,
)
from tasks.puzzle.model.assembly import compose, initial_weights
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.boundaries import boundaries
from tasks.puzzle.model.head import Head
from tasks.puzzle.search_space import parent_attention, parent_blocks, parent_ffn
from tests.tiny import FAMILIES, save_tiny

CPU = torch.device("cpu")
TOKENS = chunk_tokens(CPU, 0) + 10
WEIGHTS = LossWeights(kl=0.7, cosine=1.9)


class Case:
    """A tiny parent's states on one sequence, and a child of it: narrower, without attention, without FFN."""

    def __init__(
        self, folder: Path, family: str, as_parent: bool = False, ends: Sequence[int | None] = (1, 2, 3)
    ) -> None:
        _, config = save_tiny(family, folder)
        checkpoint = Checkpoint(folder, "the test", is_foreign=True)
        tokens = torch.randint(0, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(3))
        parents = parent_attention(config), parent_ffn(config)
        whole = [checkpoint.block(index, CPU, torch.float32) for index in range(config.num_blocks)]
        embedding = checkpoint.tensor(EMBEDDING)
        weights = [(*parents, tensors) for tensors in whole]
        self.teacher = Teacher(config, embedding, [Block.load(config, *block) for block in weights])
        self.tokens = tokens
        self.states = [state.clone() for state in boundaries(config, embedding, weights, tokens, 1)]
        replacements = [
            Replacement(0, 1, Attention("gqa", 1), Ffn("gated", 48)),
            Replacement(1, 1, Attention("no_op"), parents[1]),
            Replacement(2, 1, parents[0], Ffn("no_op")),
        ]
        blocks = []
        for replacement, tensors in zip(parent_blocks(config) if as_parent else replacements, whole, strict=True):
            start = initial_weights(config, tensors, torch.arange(config.intermediate_size))
            composed = compose(config, tensors, replacement, start)
            blocks.append(Block.load(config, replacement.attention, replacement.ffn, composed))
        self.child = TrainableChild(config, blocks, ends)
        lm_head = embedding if config.tie_embeddings else checkpoint.tensor(LM_HEAD)
        self.head = Head(checkpoint.tensor(NORM), lm_head, config.rms_norm_eps)

    def state(self, boundary: int) -> Tensor:
        return self.states[boundary]

    def plain_loss(self) -> tuple[Tensor, Tensor]:
        """Compute KL and 1 - cosine by torch, over all logits at once."""
        outputs = self.child.hidden_states(self.states[0])
        distances = [
            1 - functional.cosine_similarity(output, self.states[end], dim=-1)
            for output, end in zip(outputs, self.child.ends, strict=True)
            if end is not None
        ]
        ours, theirs = (self.head.normalise(hidden) @ self.head.weight.T for hidden in (outputs[-1], self.states[-1]))
        kl = functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        return kl.mean(), torch.stack(distances).mean()


@pytest.mark.parametrize("ends", [(1, 2, 3), (None, 2, 3), (None, None, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_autograds_over_full_logits(
    family: str, ends: tuple[int | None, ...], tmp_path: Path
) -> None:
    """A block whose end the cache does not keep has no cosine loss of its own."""
    case = Case(tmp_path, family, ends=ends)
    kl, cosine = case.plain_loss()
    expected = torch.autograd.grad(WEIGHTS.kl * kl + WEIGHTS.cosine * cosine, list(case.child.parameters()))
    computed, losses = gradients(case.child, case.state, case.head, WEIGHTS)
    assert losses.kl == pytest.approx(kl.item(), rel=1e-4)
    assert losses.cosine == pytest.approx(cosine.item(), rel=1e-4)
    assert losses.total == pytest.approx(0.7 * kl.item() + 1.9 * cosine.item(), rel=1e-4)
    assert kl_to_parent(case.child, case.state, case.head) == pytest.approx(kl.item(), rel=1e-4)
    for (name, _), ours, theirs in zip(case.child.named_parameters(), computed, expected, strict=True):
        # float32, sums in another order; a gradient's size is what its rounding is relative to
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3, msg=name)
        assert theirs.abs().max() > 0 or name.endswith("k_proj.bias"), name


def test_a_child_that_is_the_parent_has_nothing_to_learn(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", as_parent=True)
    computed, losses = gradients(case.child, case.state, case.head, WEIGHTS)
    assert abs(losses.kl) < 1e-6  # float32 rounding of log-probabilities
    assert abs(losses.cosine) < 1e-6
    other, _ = gradients(Case(tmp_path / "other", "llama").child, case.state, case.head, WEIGHTS)
    assert max(float(gradient.abs().max()) for gradient in computed) < 1e-3 * max(
        float(gradient.abs().max()) for gradient in other
    )


def test_a_live_teacher_has_the_states_of_the_parent(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama3-untied-head_dim-bias")
    live = case.teacher.states(case.tokens)
    for boundary, state in enumerate(case.states):
        torch.testing.assert_close(live(boundary), state, atol=1e-5, rtol=1e-5)  # float32
    cached, losses = gradients(case.child, case.state, case.head, WEIGHTS)
    computed, live_losses = gradients(case.child, live, case.head, WEIGHTS)
    assert live_losses.total == pytest.approx(losses.total, rel=1e-5)
    for ours, theirs in zip(computed, cached, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-3)


def test_in_bfloat16_the_losses_are_summed_in_float32(tmp_path: Path) -> None:
    """Rounded, 1 - cosine would have 2 digits, and a log-probability less."""
    case = Case(tmp_path, "llama")
    child, head = case.child.bfloat16(), Head(case.head.norm.bfloat16(), case.head.weight.bfloat16(), case.head.eps)
    case.states = [state.bfloat16() for state in case.states]
    _, losses = gradients(child, case.state, head, WEIGHTS)
    with torch.inference_mode():
        outputs = child.hidden_states(case.states[0])
        pairs = zip(outputs, case.states[1:], strict=True)
        cosines = [functional.cosine_similarity(ours.double(), theirs.double(), dim=-1) for ours, theirs in pairs]
        ours, theirs = (
            functional.linear(head.normalise(hidden).double(), head.weight.double()).log_softmax(-1)
            for hidden in (outputs[-1], case.states[-1])
        )
    assert losses.cosine == pytest.approx(1 - float(torch.stack(cosines).mean()), rel=1e-4)
    assert losses.kl == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-3)


def test_what_is_not_finite_is_found_where_it_is(tmp_path: Path) -> None:
    """A product that overflows makes the loss NaN; an entry of a gradient alone is found by the name of its weight."""
    case = Case(tmp_path, "llama")
    computed, losses = gradients(case.child, case.state, case.head, WEIGHTS)
    names = [name for name, _ in case.child.named_parameters()]

    def sick() -> str | None:
        norm = float(torch.nn.utils.get_total_norm(computed))
        return sick_part([losses], norm, zip(names, computed, strict=True))

    assert sick() is None
    computed[3].view(-1)[5] = torch.nan
    assert sick() == f"the gradient of {names[3]} is not finite"
    with torch.no_grad():
        next(parameter for name, parameter in case.child.named_parameters() if "down_proj" in name).fill_(1e38)
    computed, losses = gradients(case.child, case.state, case.head, WEIGHTS)
    assert sick() == "the loss's KL term is nan"


def test_threads_share_the_child_and_change_no_byte(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    alone, _ = gradients(case.child, case.state, case.head, WEIGHTS)
    with ThreadPoolExecutor(4) as pool:
        for computed, _ in pool.map(lambda _: gradients(case.child, case.state, case.head, WEIGHTS), range(8)):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(computed, alone, strict=True))
    assert all(parameter.grad is None for parameter in case.child.parameters())
