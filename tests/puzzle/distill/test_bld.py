"""Blockwise local distillation against hand-computed cases and a plain training loop."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from storage.checkpoints import Checkpoint
from storage.model_config import EMBEDDING
from storage.variants import Attention, Ffn
from tasks.puzzle.distill.bld import Batch, Recipe, Trained, distill_block, distill_whole, rank_channels
from tasks.puzzle.distill.losses import LOSSES, cosine, normalised_mse, token_mse
from tasks.puzzle.distill.optimizer import BETAS, MasterWeights, Schedule
from tasks.puzzle.model.assembly import initial_weights
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.boundaries import boundaries
from tasks.puzzle.model.initialise import Tensors, attention_part, ffn_part
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tests.tiny import FAMILIES, save_tiny

CPU = torch.device("cpu")
VARIANTS: tuple[Attention | Ffn, ...] = (
    Attention("gqa", 1),
    Attention("linear"),
    Ffn("gated", 48),
    Ffn("gated", 24),
    Ffn("linear"),
)
SCHEDULE = Schedule(num_steps=12, learning_rate=3e-3, warmup=0.25, weight_decay=0.1)


class Case:
    """Block 1 of a tiny parent: its tensors, starts of its variants, training and held-out batches."""

    def __init__(self, folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> None:
        _, self.config = save_tiny(family, folder)
        checkpoint = Checkpoint(folder, "the test", is_foreign=True)
        self.block = checkpoint.block(1, CPU, dtype)
        tokens = torch.randint(0, self.config.vocab_size, (56, 16), generator=torch.Generator().manual_seed(5))
        parents = parent_attention(self.config), parent_ffn(self.config)
        blocks = [(*parents, checkpoint.block(index, CPU, dtype)) for index in (0, 1)]
        _, source, target = boundaries(self.config, checkpoint.tensor(EMBEDDING).to(dtype), blocks, tokens, 8)
        batches = list(zip(source.clone().split(4), target.clone().split(4), strict=True))
        self.train: list[Batch] = batches[:12]
        self.held_out: list[Batch] = batches[12:]
        self.order = rank_channels(self.config, self.block, (hidden for hidden, _ in self.train))
        self.start = initial_weights(self.config, self.block, self.order)

    def starts(self, *variants: Attention | Ffn) -> dict[Attention | Ffn, Tensors]:
        return {variant: self.start(variant) for variant in variants}


def distill(case: Case, *variants: Attention | Ffn) -> dict[Attention | Ffn, Trained]:
    """Train the variants from their initial weights."""
    starts = case.starts(*variants)
    return distill_block(
        case.config, case.block, starts, starts, case.train, case.held_out, dict.fromkeys(starts, Recipe(SCHEDULE))
    )


def test_normalised_mse_by_hand() -> None:
    output, target = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [2.0, 4.0]])
    assert float(normalised_mse(output, target)) == pytest.approx((0 + 4 + 4 + 0) / (1 + 0 + 4 + 16), rel=1e-6)
    assert float(normalised_mse(target, target)) == 0


def test_losses_that_weigh_tokens_alike_by_hand() -> None:
    """The second token is ten times as long and has the same relative error."""
    output, target = torch.tensor([[3.0, 4.0], [0.0, 10.0]]), torch.tensor([[4.0, 3.0], [10.0, 0.0]])
    assert float(token_mse(output, target)) == pytest.approx((2 / 25 + 200 / 100) / 2)
    assert float(cosine(output, target)) == pytest.approx(((1 - 24 / 25) + 1) / 2)
    for loss in (token_mse, cosine):
        assert float(loss(target, target)) == pytest.approx(0, abs=1e-6)
        scale = torch.tensor([[1.0], [100.0]])
        assert float(loss(scale * output, scale * target)) == pytest.approx(float(loss(output, target)))
    zero = torch.zeros(1, 2)
    assert float(token_mse(zero, zero)) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_what_training_lowers(name: str, tmp_path: Path) -> None:
    case = Case(tmp_path)
    starts, loss = case.starts(*VARIANTS), LOSSES[name]
    recipes = dict.fromkeys(starts, Recipe(SCHEDULE))
    trained = distill_block(case.config, case.block, starts, starts, case.train, case.held_out, recipes, loss)
    for variant, result in trained.items():
        assert result.improved and result.loss_after < 0.99 * result.loss_before
        student = whole_block(case, variant, result.tensors)
        with torch.no_grad():
            losses = [float(loss(student(x, rotary_for(case.config, 16, x)), y)) for x, y in case.held_out]
        assert result.loss_after == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_variant_has_its_own_steps_and_rate_whatever_trains_beside_it(tmp_path: Path) -> None:
    case = Case(tmp_path)
    starts = case.starts(*VARIANTS)
    short = Recipe(Schedule(num_steps=5, learning_rate=1e-3, warmup=0.25, weight_decay=0.0))
    recipes = {variant: short if variant.kind == "linear" else Recipe(SCHEDULE) for variant in starts}
    mixed = distill_block(case.config, case.block, starts, starts, case.train, case.held_out, recipes)
    assert [result.steps for result in mixed.values()] == [5 if v.kind == "linear" else 12 for v in mixed]
    for variant, result in mixed.items():
        start, recipe = {variant: starts[variant]}, {variant: recipes[variant]}
        alone = distill_block(case.config, case.block, start, start, case.train, case.held_out, recipe)[variant]
        assert all(torch.equal(result.tensors[name], tensor) for name, tensor in alone.tensors.items())
        assert alone.loss_after == result.loss_after


def test_a_variant_stops_when_its_held_out_loss_no_longer_falls(tmp_path: Path) -> None:
    """With too high a rate a variant ends after two checks without a new lowest loss; a calm one goes on."""
    case = Case(tmp_path)
    wild, calm = Attention("gqa", 1), Ffn("gated", 48)
    starts = case.starts(wild, calm)
    recipes: dict[Attention | Ffn, Recipe] = {
        wild: Recipe(Schedule(12, 1.0, 0.0, 0.0), check_steps=2, patience=2),
        calm: Recipe(SCHEDULE, check_steps=2, patience=2),
    }
    trained = distill_block(case.config, case.block, starts, starts, case.train, case.held_out, recipes)
    assert trained[wild].steps < 12 and not trained[wild].improved
    assert trained[calm].steps == 12
    plain = distill_block(
        case.config, case.block, starts, starts, case.train, case.held_out, dict.fromkeys(starts, Recipe(SCHEDULE))
    )
    assert trained[calm].loss_after <= plain[calm].loss_after


def test_the_weights_of_the_lowest_check_are_kept(tmp_path: Path) -> None:
    """A training that falls apart after its best check ends with that check's weights."""
    case = Case(tmp_path)
    variant = Ffn("gated", 48)
    starts = case.starts(variant)
    batches = [*case.train[:4], *((x, -50 * y) for x, y in case.train[4:])]  # what follows teaches nonsense
    recipe = Recipe(Schedule(12, 3e-3, 0.0, 0.0), check_steps=4, patience=9)
    kept = distill_block(case.config, case.block, starts, starts, batches, case.held_out, {variant: recipe})[variant]
    assert kept.improved and kept.steps == 12
    short = Recipe(Schedule(12, 3e-3, 0.0, 0.0))
    four = distill_block(case.config, case.block, starts, starts, batches[:4], case.held_out, {variant: short})[variant]
    assert kept.loss_after == four.loss_after
    assert all(torch.equal(kept.tensors[name], tensor) for name, tensor in four.tensors.items())


def test_normalised_mse_of_bf16_is_summed_in_float32() -> None:
    target = torch.ones(1000, dtype=torch.bfloat16)
    output = target.clone()
    output[0] = 2  # 1/1000; a bf16 sum of 1000 ones would stop at 256
    assert float(normalised_mse(output, target)) == pytest.approx(1e-3)


def test_the_learning_rate_rises_then_falls_to_zero_along_a_cosine() -> None:
    schedule = Schedule(num_steps=10, learning_rate=2.0, warmup=0.2, weight_decay=0)
    rates = [schedule.rate(step) for step in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(1.0)  # half of the way down
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[9] < 0.1
    assert Schedule(1, 2.0, 0.0, 0).rate(0) == 2.0


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_held_out_loss_of_every_variant(family: str, tmp_path: Path) -> None:
    case = Case(tmp_path, family)
    trained = distill(case, *VARIANTS)
    assert trained.keys() == set(VARIANTS)
    for variant, result in trained.items():
        assert result.improved, variant
        assert result.loss_after < 0.99 * result.loss_before
        assert result.tensors.keys() == case.start(variant).keys()
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            assert norm not in result.tensors or torch.equal(result.tensors[norm], case.block[norm])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama3-untied-head_dim-bias", "qwen2"])
def test_training_equals_a_plain_loop_over_a_whole_block(family: str, variant: Attention | Ffn, tmp_path: Path) -> None:
    case = Case(tmp_path, family)
    trained = distill(case, *VARIANTS)
    expected, loss = plain_loop(case, variant)
    assert trained[variant].loss_after == pytest.approx(loss, rel=1e-4)
    for name, tensor in trained[variant].tensors.items():
        if name == "self_attn.k_proj.bias":
            continue  # where rotary hardly turns, it shifts a query's logits alike: its gradient is rounding alone
        # AdamW divides by the gradient's size, so rounding of a tiny gradient may move a weight by a share of a step
        torch.testing.assert_close(tensor, expected[name], atol=0.01 * SCHEDULE.learning_rate, rtol=1e-4)


def whole_block(case: Case, variant: Attention | Ffn, tensors: Tensors) -> Block:
    """Build the parent's block with one subblock replaced."""
    if isinstance(variant, Attention):
        block, rest = Block(case.config, variant, parent_ffn(case.config)), ffn_part(case.block)
    else:
        block, rest = Block(case.config, parent_attention(case.config), variant), attention_part(case.block)
    block.load_state_dict({**tensors, **rest})
    return block


def plain_loop(case: Case, variant: Attention | Ffn) -> tuple[Mapping[str, Tensor], float]:
    """Train a variant in a whole block by torch.optim.AdamW alone; return the block's tensors and held-out loss."""
    student = whole_block(case, variant, case.start(variant))
    trainable: nn.Module = student.self_attn if isinstance(variant, Attention) else student.mlp
    optimizer = torch.optim.AdamW(
        list(trainable.parameters()), lr=SCHEDULE.learning_rate, betas=BETAS, weight_decay=0.1
    )
    rates = [step / 3 for step in (1, 2, 3)] + [0.5 + 0.5 * math.cos(math.pi * step / 9) for step in range(9)]
    rotary = rotary_for(case.config, 16, case.train[0][0])
    for rate, (hidden, target) in zip(rates, case.train, strict=True):
        optimizer.param_groups[0]["lr"] = SCHEDULE.learning_rate * rate
        optimizer.zero_grad()
        output = student(hidden, rotary)
        torch.autograd.backward(((output - target) ** 2).sum() / (target**2).sum())
        optimizer.step()
    with torch.no_grad():
        losses = [((student(hidden, rotary) - y) ** 2).sum() / (y**2).sum() for hidden, y in case.held_out]
    return student.state_dict(), float(sum(losses) / len(losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_variants_bytes_do_not_depend_on_its_company(dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case(tmp_path, dtype=dtype)
    together = distill(case, *VARIANTS)
    for variant in VARIANTS:
        alone = distill(case, variant)[variant]
        assert (alone.loss_before, alone.loss_after) == (together[variant].loss_before, together[variant].loss_after)
        for name, tensor in alone.tensors.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, together[variant].tensors[name]), (variant, name)


def test_the_parent_and_the_starts_are_left_as_they_were(tmp_path: Path) -> None:
    case = Case(tmp_path)
    starts = case.starts(*VARIANTS)
    copies = {variant: {name: tensor.clone() for name, tensor in start.items()} for variant, start in starts.items()}
    parent = {name: tensor.clone() for name, tensor in case.block.items()}
    trained = distill_block(
        case.config, case.block, starts, starts, case.train, case.held_out, dict.fromkeys(starts, Recipe(SCHEDULE))
    )
    assert all(torch.equal(tensor, case.block[name]) for name, tensor in parent.items())
    assert all(torch.equal(t, starts[variant][name]) for variant, copy in copies.items() for name, t in copy.items())
    assert not any(tensor.requires_grad for result in trained.values() for tensor in result.tensors.values())


def test_steps_begin_with_the_better_start(tmp_path: Path) -> None:
    case = Case(tmp_path)
    starts = case.starts(*VARIANTS)
    worse = {v: {name: tensor * 1.5 for name, tensor in start.items()} for v, start in starts.items()}
    expected = distill(case, *VARIANTS)
    for initial, fitted in ((starts, worse), (worse, starts)):
        trained = distill_block(
            case.config,
            case.block,
            initial,
            fitted,
            case.train,
            case.held_out,
            dict.fromkeys(initial, Recipe(SCHEDULE)),
        )
        for variant, result in trained.items():
            assert (result.loss_before < result.loss_fitted) == (initial is starts)
            assert min(result.loss_before, result.loss_fitted) == expected[variant].loss_before
            assert result.loss_after == expected[variant].loss_after


def test_a_span_of_one_block_is_that_block(tmp_path: Path) -> None:
    case = Case(tmp_path)
    other = {name: tensor + 0.01 for name, tensor in case.block.items()}
    for blocks, start in (([case.block, other], 0), ([other, case.block], 1)):
        trained, chosen_start = distill_whole(case.config, blocks, case.train, case.held_out, Recipe(SCHEDULE))
        assert chosen_start == start
        assert trained.loss_before == 0
        assert not trained.improved
        assert all(torch.equal(trained.tensors[name], tensor) for name, tensor in case.block.items())


def test_a_whole_block_learns_two_as_a_plain_loop_teaches_it(tmp_path: Path) -> None:
    """It starts as that of the parent's two blocks which alone has the lower loss."""
    case = Case(tmp_path, "qwen2")
    checkpoint = Checkpoint(tmp_path, "the test", is_foreign=True)
    kind = parent_attention(case.config), parent_ffn(case.config)
    pair = [case.block, checkpoint.block(2, CPU, torch.float32)]
    second = Block.load(case.config, *kind, pair[1])
    rotary = rotary_for(case.config, 16, case.train[0][0])
    with torch.no_grad():
        train = [(source, second(middle, rotary)) for source, middle in case.train]
        held_out = [(source, second(middle, rotary)) for source, middle in case.held_out]

    def loss(block: Block) -> float:
        with torch.no_grad():
            return float(sum(normalised_mse(block(x, rotary), y) for x, y in held_out) / len(held_out))

    alone = [loss(Block.load(case.config, *kind, tensors)) for tensors in pair]
    trained, start = distill_whole(case.config, pair, train, held_out, Recipe(SCHEDULE))
    assert start == alone.index(min(alone))
    assert trained.loss_before == pytest.approx(min(alone), rel=1e-5)
    assert trained.loss_after < 0.98 * trained.loss_before
    student = Block(case.config, *kind)
    student.load_state_dict(pair[start])
    parameters = [*student.self_attn.parameters(), *student.mlp.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=SCHEDULE.learning_rate, betas=BETAS, weight_decay=0.1)
    for step, (source, target) in enumerate(train):
        optimizer.param_groups[0]["lr"] = SCHEDULE.rate(step)
        optimizer.zero_grad()
        torch.autograd.backward(((student(source, rotary) - target) ** 2).sum() / (target**2).sum())
        optimizer.step()
    assert trained.loss_after == pytest.approx(loss(student), rel=1e-3)


def assert_kept(case: Case, train: list[Batch], schedule: Schedule) -> dict[Attention | Ffn, float]:
    """Check that every variant keeps its start and says so; return the losses after training."""
    starts = case.starts(*VARIANTS)
    trained = distill_block(
        case.config, case.block, starts, starts, train, case.held_out, dict.fromkeys(starts, Recipe(schedule))
    )
    for variant, result in trained.items():
        assert not result.improved
        assert not result.loss_after < result.loss_before
        start = case.start(variant)
        assert result.tensors.keys() == start.keys()
        assert all(torch.equal(result.tensors[name], tensor) for name, tensor in start.items())
    return {variant: result.loss_after for variant, result in trained.items()}


def test_a_variant_that_diverges_keeps_its_start(tmp_path: Path) -> None:
    case = Case(tmp_path)
    assert_kept(case, case.train, Schedule(12, learning_rate=1.0, warmup=0, weight_decay=0))


def test_a_variant_that_becomes_nan_keeps_its_start(tmp_path: Path) -> None:
    case = Case(tmp_path)
    hidden, target = case.train[5]
    poisoned = [*case.train[:5], (hidden, torch.full_like(target, math.inf)), *case.train[6:]]
    losses = assert_kept(case, poisoned, SCHEDULE)
    assert all(math.isnan(loss) for loss in losses.values())


def test_a_variant_that_does_not_change_keeps_its_start(tmp_path: Path) -> None:
    case = Case(tmp_path)
    assert_kept(case, [], SCHEDULE)


def test_masters_add_up_steps_that_bf16_cannot_hold() -> None:
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    schedule = Schedule(num_steps=100, learning_rate=2e-4, warmup=0, weight_decay=0)
    masters = MasterWeights(layer, schedule)
    for _ in range(schedule.num_steps):
        # AdamW moves by the rate while the gradient stays the same; bf16 below 1 has steps of 2^-8 = 0.0039
        torch.autograd.backward(layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
        masters.step()
        assert layer.weight.grad is None
    expected = 1 - sum(schedule.rate(step) for step in range(schedule.num_steps))  # 0.98990
    assert layer.weight.item() == torch.tensor(expected).bfloat16().item() == 0.98828125


def test_masters_train_only_what_is_trainable() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    masters = MasterWeights(layer, SCHEDULE)
    torch.autograd.backward(layer(torch.ones(1, 3)).sum())
    masters.step()
    assert torch.equal(layer.bias, bias)
    assert not torch.equal(layer.weight, weight)


def test_a_variant_that_is_the_parent_has_nothing_to_gain(tmp_path: Path) -> None:
    case = Case(tmp_path)
    starts = case.starts(parent_attention(case.config), parent_ffn(case.config))
    trained = distill_block(
        case.config, case.block, starts, starts, case.train, case.held_out, dict.fromkeys(starts, Recipe(SCHEDULE))
    )
    for result in trained.values():
        assert result.loss_before < 1e-12  # squares of float32 rounding
        assert not result.improved or result.loss_after < result.loss_before


def test_the_best_of_start_fit_and_steps_is_kept(tmp_path: Path) -> None:
    """Steps that diverge fall back to the fitted start where it is better than the initial one, else to that."""
    case = Case(tmp_path)
    good = {variant: result.tensors for variant, result in distill(case, *VARIANTS).items()}
    starts, diverging = case.starts(*VARIANTS), Schedule(12, learning_rate=1.0, warmup=0, weight_decay=0)
    results = distill_block(
        case.config, case.block, starts, good, case.train, case.held_out, dict.fromkeys(starts, Recipe(diverging))
    )
    for variant, result in results.items():
        assert result.improved
        assert result.loss_after == result.loss_fitted < result.loss_before
        assert all(torch.equal(result.tensors[name], tensor) for name, tensor in good[variant].items())
    results = distill_block(
        case.config, case.block, good, starts, case.train, case.held_out, dict.fromkeys(good, Recipe(diverging))
    )
    for variant, result in results.items():
        assert not result.improved
        assert result.loss_before < result.loss_fitted
        assert all(torch.equal(result.tensors[name], tensor) for name, tensor in good[variant].items())
