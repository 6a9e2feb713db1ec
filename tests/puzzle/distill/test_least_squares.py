"""The closed-form start of BLD against torch's own least squares."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from storage.variants import Attention, Ffn
from tasks.puzzle.distill.bld import Recipe, distill_block
from tasks.puzzle.distill.least_squares import fit_outputs
from tasks.puzzle.distill.optimizer import Schedule
from tasks.puzzle.model.blocks import Block, GatedFfn, GroupedQueryAttention
from tasks.puzzle.model.initialise import Tensors, attention_part, ffn_part
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tests.puzzle.distill.test_bld import VARIANTS, Case
from tests.tiny import FAMILIES


def fit(case: Case, *variants: Attention | Ffn) -> dict[Attention | Ffn, Tensors]:
    inputs = (hidden for hidden, _ in case.train)
    return fit_outputs(case.config, case.block, case.starts(*variants), case.order, inputs)


def subblock(case: Case, variant: Attention | Ffn, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Compute the input of a variant's output projection and the subblock's output, over all training tokens."""
    hidden = torch.cat([source for source, _ in case.train])
    rotary = rotary_for(case.config, hidden.shape[1], hidden)
    if isinstance(variant, Attention):
        block = Block.load(case.config, variant, parent_ffn(case.config), tensors | ffn_part(case.block))
        normed = block.input_layernorm(hidden)
        features = normed
        if isinstance(block.self_attn, GroupedQueryAttention):
            features = block.self_attn.heads(normed, rotary)
        output = block.self_attn(normed, rotary)
    else:
        block = Block.load(case.config, parent_attention(case.config), variant, attention_part(case.block) | tensors)
        normed = block.post_attention_layernorm(block.attend(hidden, rotary))
        features = block.mlp.channels(normed) if isinstance(block.mlp, GatedFfn) else normed
        output = block.mlp(normed)
    return features.flatten(0, 1), output.flatten(0, 1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fit_is_torchs_least_squares(family: str, variant: Attention | Ffn, tmp_path: Path) -> None:
    """It includes biases; the ridge of 1e-4 costs less than a hundredth of the residual."""
    case = Case(tmp_path, family)
    parents = parent_attention(case.config) if isinstance(variant, Attention) else parent_ffn(case.config)
    whole = attention_part(case.block) if isinstance(variant, Attention) else ffn_part(case.block)
    _, target = subblock(case, parents, whole)
    fitted = fit(case, variant)[variant]
    features, output = subblock(case, variant, fitted)
    bias = any(name.endswith(("o_proj.bias", "down_proj.bias")) for name in fitted)
    design = torch.cat([features, torch.ones(len(features), 1)], 1) if bias else features
    best = design.double() @ torch.linalg.lstsq(design.double(), target.double()).solution
    residual, least = ((outputs - target).square().mean().item() for outputs in (output, best))
    _, untrained = subblock(case, variant, case.start(variant))
    assert (1 - 1e-6) * least <= residual <= 1.01 * least
    assert residual < 0.9 * (untrained - target).square().mean().item()


def test_only_the_output_projection_changes(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama3-untied-head_dim-bias")
    for variant, fitted in fit(case, *VARIANTS).items():
        start = case.start(variant)
        assert fitted.keys() == start.keys()
        changed = {name for name, tensor in fitted.items() if not torch.equal(tensor, start[name])}
        if variant.kind == "linear":
            assert {name.rpartition(".")[0] for name in changed} <= {"self_attn.linear_attn", "mlp.linear_mlp"}
            assert len(changed) == 1
        else:
            layer = "self_attn.o_proj" if isinstance(variant, Attention) else "mlp.down_proj"
            assert changed == {f"{layer}.weight", f"{layer}.bias"}


def test_the_parents_own_subblock_is_its_own_fit(tmp_path: Path) -> None:
    case = Case(tmp_path)
    for variant in (parent_attention(case.config), parent_ffn(case.config)):
        whole = case.start(variant)
        _, target = subblock(case, variant, whole)
        _, output = subblock(case, variant, fit(case, variant)[variant])
        assert (output - target).square().mean() < 1e-6 * target.square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fit_does_not_depend_on_its_company(dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case(tmp_path, dtype=dtype)
    together = fit(case, *VARIANTS)
    for variant in VARIANTS:
        for name, tensor in fit(case, variant)[variant].items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, together[variant][name]), (variant, name)


def test_steps_go_on_from_the_fit(tmp_path: Path) -> None:
    case = Case(tmp_path)
    starts, fitted = case.starts(*VARIANTS), fit(case, *VARIANTS)
    schedule = Schedule(num_steps=12, learning_rate=1e-3, warmup=0.25, weight_decay=0.0)
    trained = distill_block(
        case.config, case.block, starts, fitted, case.train, case.held_out, dict.fromkeys(starts, Recipe(schedule))
    )
    for variant, result in trained.items():
        assert result.loss_fitted != result.loss_before
        best = min(result.loss_fitted, result.loss_before)
        if variant.kind == "linear":  # the fit is its minimum: what steps add is noise
            assert result.loss_fitted < result.loss_before
            assert result.loss_after <= best
        else:
            assert result.loss_after < best
