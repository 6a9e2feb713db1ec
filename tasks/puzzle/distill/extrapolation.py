"""The held-out curve of GKD carried on to more tokens: KL = offset + factor * tokens ** -exponent, fitted. No torch.

The form is the one in which losses fall with data (arXiv 2203.15556, equation 2, at one model size). It is
modelled: the learning rate of a longer training falls later, which the curve of a short one cannot show.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from storage.gkd import ModelledKl

_FEWEST_POINTS = 5
_EXPONENTS = np.geomspace(0.02, 3.0, 300)
_LEAST_EXPLAINED = 0.9
"""Share of the measurements' variance that the fit must explain; a curve that rises or jumps is not carried on."""


def longer_training(measured: Sequence[tuple[int, float]], times: int) -> ModelledKl | None:
    """Fit the curve by least squares over a grid of exponents, and read it off at `times` the tokens.

    Args:
        measured: tokens and KL, nats/token; those without tokens say nothing about the curve.
        times: how many times the tokens of the last measurement.

    Returns:
        None if there are fewer than five measurements, if they explain less than nine tenths of their variance, or if
        the best exponent lies at the grid's edge.
    """
    points = [(tokens, kl) for tokens, kl in measured if tokens > 0]
    if len(points) < _FEWEST_POINTS:
        return None
    tokens, kl = np.array([count for count, _ in points], float), np.array([nats for _, nats in points])
    fits = [(*_fit(tokens**-exponent, kl), float(exponent)) for exponent in _EXPONENTS]
    error, offset, factor, exponent = min(fits)
    at_edge = exponent in (_EXPONENTS[0], _EXPONENTS[-1])
    if at_edge or factor <= 0 or error > (1 - _LEAST_EXPLAINED) * float(np.var(kl)):
        return None
    longer = times * points[-1][0]
    return ModelledKl(
        tokens=longer,
        kl=offset + factor * longer**-exponent,
        offset=offset,
        factor=factor,
        exponent=exponent,
        rms_error=error**0.5,
    )


def _fit(falling: NDArray[np.float64], kl: NDArray[np.float64]) -> tuple[float, float, float]:
    """Fit kl = offset + factor * falling, offset >= 0; return the mean squared error, offset and factor."""
    centred = falling - falling.mean()
    factor = float(centred @ (kl - kl.mean()) / (centred @ centred))
    offset = float(kl.mean() - factor * falling.mean())
    if offset < 0:
        offset, factor = 0.0, float(falling @ kl / (falling @ falling))
    return float(np.mean((offset + factor * falling - kl) ** 2)), offset, factor
