"""Costs from whole models: made-up ones are found again, noise does not make any negative."""

import dataclasses
import random

import pytest

from storage.variants import Attention, Ffn
from tasks.engines.designs import Costs, designs, solve

ATTENTIONS = [Attention("gqa", 3), Attention("gqa", 1), Attention("linear"), Attention("no_op")]
FFNS = [Ffn("gated", 1536), Ffn("gated", 768), Ffn("gated", 128), Ffn("no_op")]
TRUE = Costs(attention=0.9, kv_head=0.1, linear=0.3, ffn=0.25, channel=6e-4, rest=10.0)


def test_made_up_costs_are_found_again() -> None:
    models = designs(ATTENTIONS, FFNS, 30, 14, seed=0)
    costs = solve(models, [TRUE.total_ms(blocks, 32) for blocks in models], 32)
    assert dataclasses.astuple(costs) == pytest.approx(dataclasses.astuple(TRUE))


def test_a_total_by_hand() -> None:
    """0.9 + 3 x 0.1 + 0.25 + 1536 x 6e-4, a removed FFN as one of 32 channels, a block that vanishes, and the rest."""
    blocks = [(ATTENTIONS[0], FFNS[0]), (ATTENTIONS[1], FFNS[3]), (ATTENTIONS[3], FFNS[3])]
    expected = (0.9 + 3 * 0.1 + 0.25 + 1536 * 6e-4) + (0.9 + 0.1 + 0.25 + 32 * 6e-4) + 10.0
    assert TRUE.total_ms(blocks, 32) == pytest.approx(expected)


def test_noise_makes_nothing_negative_and_children_stay_close() -> None:
    draw = random.Random(1)
    models = designs(ATTENTIONS, FFNS, 30, 14, seed=0)
    costs = solve(models, [TRUE.total_ms(blocks, 32) * draw.gauss(1, 0.02) for blocks in models], 32)
    assert min(dataclasses.astuple(costs)) >= 0
    for blocks in designs(ATTENTIONS, FFNS, 30, 10, seed=7):
        assert costs.total_ms(blocks, 32) == pytest.approx(TRUE.total_ms(blocks, 32), rel=0.06)


def test_every_design_has_an_attention_and_all_variants_occur() -> None:
    drawn = designs(ATTENTIONS, FFNS, 30, 14, seed=3)
    assert drawn == designs(ATTENTIONS, FFNS, 30, 14, seed=3)
    assert all(blocks[0][0] == ATTENTIONS[0] and 7 <= len(blocks) <= 24 for blocks in drawn)
    assert {variant for blocks in drawn for block in blocks for variant in block} == {*ATTENTIONS, *FFNS}
