"""Text that a model writes: against its own forward pass, and draws against distributions known by hand."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from storage.files import InputError
from tasks.puzzle.model.writing import Drawing, Turn, draw, write
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tests.tiny import random_child, save_tiny

ENDS = frozenset(range(100, 130))
"""Enough of 160 tokens that turns of every length come up."""
TOKENS = 40


def test_draws_follow_the_distribution() -> None:
    chances = torch.linspace(0.0005, 0.9995, 1000)[:, None]
    logits = torch.tensor([0.1, 0.0, 0.2, 0.7]).log().expand(1000, -1)
    counts = draw(logits, Drawing(1.0, 1.0), chances).bincount(minlength=4)
    assert counts.tolist() == [100, 0, 200, 700]
    squared = draw(logits, Drawing(0.5, 1.0), chances).bincount(minlength=4)  # half the temperature squares chances
    assert torch.allclose(squared / 1000, torch.tensor([0.01, 0.0, 0.04, 0.49]) / 0.54, atol=0.002)
    likeliest = draw(logits, Drawing(1.0, 0.75), chances).bincount(minlength=4)  # 0.7 alone is less than the share
    assert torch.allclose(likeliest / 1000, torch.tensor([0.0, 0.0, 2 / 9, 7 / 9]), atol=0.002)


def test_no_chance_draws_a_token_without_probability() -> None:
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    for chance, token in ((2.0**-24, 1), (1.0, 2)):
        assert draw(logits, Drawing(1.0, 1.0), torch.tensor([[chance]])).tolist() == [token]


def test_narrow_logits_are_summed_in_float32() -> None:
    """In bfloat16, sums of 1,000 small probabilities stop growing."""
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    assert draw(logits, Drawing(1.0, 1.0), torch.tensor([[0.7505]])).tolist() == [750]


def test_rows_are_what_the_model_draws_behind_all_that_is_before(tmp_path: Path) -> None:
    """Every token is the one that a forward pass over the whole row gives for the same chance, or one that is given."""
    _, config = save_tiny("llama", tmp_path)
    model = random_child(config, [(parent_attention(config), parent_ffn(config))] * config.num_blocks)
    scripts = [[Turn((3, 4), ENDS), Turn((5,), ENDS)], [Turn((6,), ENDS, (7,))], [Turn((8, 9, 10), frozenset())]]
    drawing = Drawing(1.0, 0.9)
    rows = write(config, model, list(map(itertools.repeat, scripts)), TOKENS, drawing, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    chances = torch.stack([1 - torch.rand(len(rows), 1, generator=generator) for _ in range(TOKENS - 1)])
    for number, (script, texts) in enumerate(zip(scripts, rows, strict=True)):
        tokens: list[int] = []
        is_given: list[bool] = []
        for turn, written in itertools.chain.from_iterable(zip(script, text, strict=False) for text in texts):
            assert not turn.ends.intersection(written)
            assert tuple(written[: len(turn.opening)]) == turn.opening
            tokens += [*turn.given, *written]
            num_drawn = len(written) - len(turn.opening)
            is_given += [True] * (len(tokens) - len(is_given) - num_drawn) + [False] * num_drawn
        with torch.inference_mode():
            logits = model(torch.tensor([tokens[:TOKENS]])).logits[0, :-1]
        drawn = draw(logits, drawing, chances[:, number]).tolist()
        for position in range(1, TOKENS):
            begins_turn = is_given[position] and not is_given[position - 1]
            if begins_turn:
                assert drawn[position - 1] in ENDS
            elif not is_given[position]:
                assert tokens[position] == drawn[position - 1]
    assert len(rows[1]) > 2  # texts that ended are followed by others
    assert [len(text) for text in rows[2]] == [1]  # nothing ends it
    assert len(rows[2][0][0]) == TOKENS - 3


@pytest.mark.parametrize("place", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_weights_that_overflow_are_one_error(place: str, tmp_path: Path) -> None:
    """A draw from NaN is a token beyond the vocabulary, which the embedding has no row for."""
    _, config = save_tiny("llama", tmp_path)
    model = random_child(config, [(parent_attention(config), parent_ffn(config))] * config.num_blocks)
    torch.nn.init.constant_(model.get_parameter(place), 3e38)
    script = itertools.repeat([Turn((3, 4), ENDS)])
    with pytest.raises(InputError, match=r"logits are not finite: its weights overflow in torch.float32"):
        write(config, model, [script], TOKENS, Drawing(1.0, 1.0), torch.Generator().manual_seed(1))
