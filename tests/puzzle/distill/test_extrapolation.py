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
        [1 - 500 / tokens for tokens in TOKENS],
        [2.0, *[0.5] * 7],
    ],
    ids=["too few", "rising", "jumping", "a straight line", "flat", "rising to a level", "falling at once"],
)
def test_what_is_no_such_curve_is_not_carried_on(kls: list[float]) -> None:
    assert longer_training(list(zip(TOKENS, kls, strict=False)), 10) is None


def test_five_measurements_are_enough() -> None:
    assert longer_training([(tokens, 0.2 + 40 * tokens**-0.7) for tokens in TOKENS[:5]], 10) is not None


def test_the_offset_is_not_below_zero() -> None:
    """The best fit would fall below 0 where this curve is carried on, and KL is never negative."""
    modelled = longer_training([(tokens, 2 - 0.2 * math.log(tokens)) for tokens in TOKENS], 10)
    assert modelled is not None and modelled.offset == 0 and modelled.kl > 0


def test_the_error_is_the_root_mean_square_of_what_the_fit_leaves() -> None:
    measured = [(tokens, 0.2 + 40 * tokens**-0.7 + 0.01 * (-1) ** number) for number, tokens in enumerate(TOKENS)]
    modelled = longer_training(measured, 10)
    assert modelled is not None
    residuals = [modelled.offset + modelled.factor * tokens**-modelled.exponent - kl for tokens, kl in measured]
    assert modelled.rms_error == pytest.approx(math.sqrt(sum(error**2 for error in residuals) / len(residuals)))
