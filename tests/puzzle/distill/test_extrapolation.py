"""The held-out curve carried on: planted curves are found again, and what is no such curve is refused."""

import math

import pytest

from tasks.puzzle.distill.extrapolation import longer_training

TOKENS = [1024 * number for number in range(1, 9)]


@pytest.mark.parametrize(("offset", "factor", "exponent"), [(0.2, 40.0, 0.7), (0.0, 3.0, 0.3)])
def test_a_planted_curve_is_found_again(offset: float, factor: float, exponent: float) -> None:
    def kl(tokens: int) -> float:
        return offset + factor * math.pow(tokens, -exponent)

    modelled = longer_training([(0, 9.9), *((tokens, kl(tokens)) for tokens in TOKENS)], 10)
    assert modelled is not None and modelled.tokens == 10 * TOKENS[-1]
    # the grid's exponents are 1.7 % apart, which moves the curve ten times further on by less
    assert modelled.kl == pytest.approx(kl(modelled.tokens), rel=0.02)
    assert modelled.exponent == pytest.approx(exponent, rel=0.05)
    assert modelled.rms_error < 1e-3


@pytest.mark.parametrize(
    "kls",
    [
        [0.9, 0.8, 0.75, 0.72],
        [0.7, 0.75, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3],
        [0.9, 0.5, 1.0, 0.4, 0.8, 0.6, 0.9, 0.5],
        [0.9 - 0.05 * number for number in range(8)],
        [0.9] * 8,
    ],
    ids=["too few", "rising", "jumping", "a straight line", "flat"],
)
def test_what_is_no_such_curve_is_not_carried_on(kls: list[float]) -> None:
    assert longer_training(list(zip(TOKENS, kls, strict=False)), 10) is None


def test_the_offset_is_not_below_zero() -> None:
    """A curve that falls faster than any power law with a floor: KL is never negative."""
    modelled = longer_training([(tokens, 2 - 0.2 * math.log(tokens)) for tokens in TOKENS], 10)
    assert modelled is None or (modelled.offset >= 0 and modelled.kl > 0)
