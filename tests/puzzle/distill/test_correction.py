"""The correction of one subblock: planted changes that are known, sums by hand, and what must never happen."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from storage.refinement import SubblockName
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.distill.correction import (
    RIDGES,
    Attempt,
    Moments,
    ParentStates,
    correct,
    corrected_subblocks,
    moments,
    relative_error,
)
from tasks.puzzle.distill.output_layers import (
    attention_features,
    ffn_features,
    joined,
    output_layer,
    solve_ridge,
    with_layer,
)
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.initialise import Tensors, ffn_part
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tests.puzzle.distill.test_bld import VARIANTS, Case
from tests.tiny import FAMILIES

NO_ATTENTION, NO_FFN = Attention("no_op"), Ffn("no_op")


def in_order(attempt: Callable[[int], Attempt], count: int) -> Iterator[Attempt]:
    """Try one after the other, when it is asked for."""
    return map(attempt, range(count))


def weighted_error(states: Tensor, target: Tensor) -> float:
    """Compute |target - states|^2 as a share of |target|^2, tokens weighted by 1 / |target|, in float64."""
    lengths = target.double().norm(dim=-1)
    missing = (target.double() - states.double()).square().sum(-1)
    return float((missing / lengths).sum() / lengths.sum())


class Planted:
    """A child's block with one subblock, whose output layer lost a known change; its states are not the parent's."""

    def __init__(self, case: Case, variant: Attention | Ffn) -> None:
        self.case, self.variant = case, variant
        self.subblock: SubblockName = "attention" if isinstance(variant, Attention) else "ffn"
        pair = (variant, NO_FFN) if isinstance(variant, Attention) else (NO_ATTENTION, variant)
        self.pair: tuple[Attention, Ffn] = pair
        self.name, self.whole = output_layer(variant), case.start(variant)
        generator = torch.Generator().manual_seed(1)
        layer = joined(self.whole, self.name)
        self.change = 0.1 * torch.randn(layer.shape, generator=generator, dtype=torch.float64)
        self.tensors = with_layer(self.whole, self.name, layer - self.change)
        self.hidden = [hidden + 0.3 * torch.randn(hidden.shape, generator=generator) for hidden, _ in case.train]
        self.held_out = [hidden + 0.3 * torch.randn(hidden.shape, generator=generator) for hidden, _ in case.held_out]

    def block(self, tensors: Tensors) -> Block:
        return Block.load(self.case.config, *self.pair, tensors)

    def behind(self, hidden: Tensor, tensors: Tensors) -> Tensor:
        """Return the states behind the block with these tensors."""
        states: Tensor = self.block(tensors)(hidden, rotary_for(self.case.config, hidden.shape[1], hidden))
        return states

    def moments(self, batches: list[Tensor], tensors: Tensors) -> Moments:
        """Sum up over batches towards the states behind the whole block."""
        case = self.case
        parent_block = Block.load(case.config, parent_attention(case.config), parent_ffn(case.config), case.block)
        sums = [
            moments(
                case.config,
                self.subblock,
                self.block(tensors),
                parent_block,
                hidden,
                ParentStates(hidden, self.behind(hidden, self.whole)),
            )
            for hidden in batches
        ]
        for more in sums[1:]:
            sums[0].add(more)
        return sums[0]

    def error(self, batches: list[Tensor], tensors: Tensors) -> float:
        """Compute the weighted error behind the block from the states themselves."""
        hidden = torch.cat(batches)
        return weighted_error(self.behind(hidden, tensors), self.behind(hidden, self.whole))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_change_is_found(family: str, variant: Attention | Ffn, tmp_path: Path) -> None:
    """Nothing else is missing, so the weakest ridge wins, and all but its shrinkage of the change comes back."""
    planted = Planted(Case(tmp_path, family), variant)
    fitted_on = planted.moments(planted.hidden, planted.tensors)
    tensors, correction = correct(
        planted.tensors, variant, fitted_on, planted.moments(planted.held_out, planted.tensors), in_order
    )
    assert correction.ridge == min(RIDGES)
    assert correction.error_before == pytest.approx(planted.error(planted.held_out, planted.tensors), rel=1e-4)
    rounding = 1e-6 * correction.error_before  # of float32 sums
    after = planted.error(planted.held_out, tensors)
    assert correction.error_after == pytest.approx(after, rel=1e-2, abs=rounding)
    assert correction.error_after < 1e-3 * correction.error_before
    change = joined(tensors, planted.name) - joined(planted.tensors, planted.name)
    if variant.kind != "gqa":  # heads that share keys and values see nearly the same: many changes do as well
        assert (change - planted.change).norm() < 0.1 * planted.change.norm()
    assert {name for name in tensors if not torch.equal(tensors[name], planted.tensors[name])} <= {
        f"{planted.name}.weight",
        f"{planted.name}.bias",
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_change_is_the_ridge_regression_of_its_definition(
    variant: Attention | Ffn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Solved by torch's least squares in float64, with a row for the shrinkage of each feature."""
    planted = Planted(Case(tmp_path, "llama3-untied-head_dim-bias"), variant)
    monkeypatch.setattr("tasks.puzzle.distill.correction.RIDGES", (0.3,))
    sums = planted.moments(planted.hidden, planted.tensors)
    tensors, correction = correct(planted.tensors, variant, sums, sums, in_order)
    assert correction.ridge == 0.3
    hidden, block = torch.cat(planted.hidden), planted.block(planted.tensors)
    rotary = rotary_for(planted.case.config, hidden.shape[1], hidden)
    is_attention = isinstance(variant, Attention)
    features = attention_features(block, hidden, rotary) if is_attention else ffn_features(block, hidden)
    features = features.flatten(0, 1).double()
    if f"{planted.name}.bias" in tensors:
        features = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], 1)
    target = planted.behind(hidden, planted.whole).flatten(0, 1).double()
    missing = target - planted.behind(hidden, planted.tensors).flatten(0, 1).double()
    lengths = target.norm(dim=1, keepdim=True).sqrt()
    design = features / lengths
    shrinkage = torch.diag((0.3 * design.square().sum(0)).sqrt())
    rows = torch.cat([missing / lengths, torch.zeros(len(shrinkage), missing.shape[1], dtype=torch.float64)])
    expected = torch.linalg.lstsq(torch.cat([design, shrinkage]), rows).solution
    change = joined(tensors, planted.name) - joined(planted.tensors, planted.name)
    assert (change - expected).norm() < 1e-4 * expected.norm()  # sums and weights are float32


def test_the_held_out_error_is_that_of_the_weights_as_they_are_stored(tmp_path: Path) -> None:
    """Rounded to bfloat16 they keep 8 bits of the solution, and err more than it does."""
    planted = Planted(Case(tmp_path), Ffn("linear"))
    stored = {name: tensor.bfloat16() for name, tensor in planted.tensors.items()}
    fitted_on, held_out = (planted.moments(batches, _widened(stored)) for batches in (planted.hidden, planted.held_out))
    tensors, correction = correct(stored, planted.variant, fitted_on, held_out, in_order)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16} and correction.ridge
    change = joined(tensors, planted.name) - joined(stored, planted.name)
    assert correction.error_after == held_out.error_after(change)
    # the states are float32, which makes a difference of 0.14 % here
    assert correction.error_after == pytest.approx(planted.error(planted.held_out, _widened(tensors)), rel=1e-2)
    solution = solve_ridge(fitted_on.gram, fitted_on.cross, correction.ridge)
    assert held_out.error_after(solution) < 0.5 * correction.error_after


def _widened(tensors: Tensors) -> Tensors:
    return {name: tensor.float() for name, tensor in tensors.items()}


def test_a_correction_that_does_not_generalise_is_not_taken(tmp_path: Path) -> None:
    """Fitted towards noise it would raise the held-out error at every strength, so the weights stay."""
    planted = Planted(Case(tmp_path), Ffn("gated", 48))
    held_out = planted.moments(planted.held_out, planted.whole)
    noise = planted.moments(planted.hidden[:1], planted.whole)
    noise.cross = torch.randn(noise.cross.shape, generator=torch.Generator().manual_seed(2))
    tensors, correction = correct(planted.whole, planted.variant, noise, held_out, in_order)
    assert correction.ridge is None and correction.error_before == correction.error_after == 0
    assert tensors is planted.whole


def test_a_block_that_is_the_parents_on_the_parents_states_has_residual_zero(tmp_path: Path) -> None:
    case = Case(tmp_path)
    block = Block.load(case.config, parent_attention(case.config), parent_ffn(case.config), case.block)
    hidden, _ = case.train[0]
    behind = block(hidden, rotary_for(case.config, hidden.shape[1], hidden))
    subblocks: tuple[SubblockName, ...] = ("attention", "ffn")
    for subblock in subblocks:
        sums = moments(case.config, subblock, block, block, hidden, ParentStates(hidden, behind))
        assert float(sums.error) == 0 and not sums.cross.any()


def test_an_attention_before_an_ffn_aims_at_the_parents_state_behind_its_attention(tmp_path: Path) -> None:
    """The FFN, and an attention without an FFN behind it, aim at the boundary behind the block."""
    case = Case(tmp_path)
    config, full = case.config, parent_ffn(case.config)
    parent_block = Block.load(config, parent_attention(config), full, case.block)
    start = case.start(Attention("gqa", 1))
    before, behind = case.train[0]
    hidden = before + 0.1
    rotary = rotary_for(config, hidden.shape[1], hidden)
    attended = parent_block.attend(before, rotary)
    for ffn, target in ((full, attended), (NO_FFN, behind)):
        tensors = {**start, **(ffn_part(case.block) if ffn == full else {})}
        block = Block.load(config, Attention("gqa", 1), ffn, tensors)
        sums = moments(config, "attention", block, parent_block, hidden, ParentStates(before, behind))
        reached = weighted_error(block.attend(hidden, rotary), target)
        assert float(sums.error / sums.target) == pytest.approx(reached, rel=1e-5)
    block = Block.load(config, NO_ATTENTION, full, ffn_part(case.block))
    sums = moments(config, "ffn", block, parent_block, hidden, ParentStates(before, behind))
    assert float(sums.error / sums.target) == pytest.approx(weighted_error(block(hidden, rotary), behind), rel=1e-5)


def test_errors_weigh_long_and_short_tokens_alike() -> None:
    target = torch.tensor([[[3.0, 4.0], [0.0, 100.0]]])
    states = torch.tensor([[[3.0, 3.0], [0.0, 80.0]]])
    assert relative_error(states, target) == pytest.approx((1 / 25 + 400 / 10_000) / 2)
    assert relative_error(target, target) == 0


def test_what_is_corrected_in_each_kind_of_block() -> None:
    attention, ffn = Attention("gqa", 1), Ffn("linear")
    assert corrected_subblocks(Replacement(0, 1, attention, ffn)) == ("attention", "ffn")
    assert corrected_subblocks(Replacement(0, 2, attention, ffn)) == ("ffn",)
    assert corrected_subblocks(Replacement(0, 2, attention, NO_FFN)) == ("attention",)
    assert corrected_subblocks(Replacement(0, 1, NO_ATTENTION, ffn)) == ("ffn",)
    assert corrected_subblocks(Replacement(0, 1, NO_ATTENTION, NO_FFN)) == ()


def test_a_token_without_a_length_has_no_weight() -> None:
    """Its state is 0 where its embedding is."""
    target = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    missing = torch.tensor([[0.0, 0.0], [5.0, 0.0]])
    sums = Moments.of(torch.tensor([[2.0], [10.0]]), missing, target)
    assert [float(sums.gram), *sums.cross[0].tolist()] == pytest.approx([20, 10, 0])
    assert [float(sums.error), float(sums.target)] == pytest.approx([5, 5])
    assert relative_error((target - missing)[None], target[None]) == pytest.approx(0.5)


def test_states_in_bfloat16_are_compared_in_float32() -> None:
    target = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    states = (1.05 * target.float()).bfloat16()
    assert relative_error(states, target) == relative_error(states.float(), target.float())


def test_an_input_that_is_always_0_gets_no_weight() -> None:
    """One channel never fires; the other one's moment is 4, so 2 / 4 shrinks by 1 / 1.5."""
    gram, cross = torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0], [0.0]])
    assert solve_ridge(gram, cross, 0.5).flatten().tolist() == pytest.approx([1 / 3, 0])
