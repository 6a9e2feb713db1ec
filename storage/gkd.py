"""gkd.json, the curve of a child's global distillation (GKD). No torch.

distill_child writes it, the report draws it. One step trains on a few sequences; every few steps the KL to the parent
is measured on held-out sequences, and the weights of the lowest one are published. What was measured stands apart from
what a fit of it expects (`modelled`).
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from storage.files import write_sealed
from storage.json_records import read_record
from storage.paths import Paths


@dataclass(frozen=True)
class GkdStep:
    """One training step.

    Attributes:
        step: its number, from 1.
        tokens: tokens trained on so far, this step's included.
        loss: weighted sum of `kl` and `cosine`, a mean over the step's sequences.
        kl: KL(parent || child), nats/token.
        cosine: 1 - cosine of the hidden states, a mean over blocks and tokens.
        learning_rate: the learning rate of this step.
        gradient_norm: Euclidean norm of the step's gradient over all weights, before it is clipped.
    """

    step: int
    tokens: int
    loss: float
    kl: float
    cosine: float
    learning_rate: float
    gradient_norm: float


@dataclass(frozen=True)
class HeldOutKl:
    """KL(parent || child) on held-out sequences after `step` steps on `tokens` tokens, nats/token."""

    step: int
    tokens: int
    kl: float


@dataclass(frozen=True)
class ModelledKl:
    """The held-out KL that a longer training is expected to reach: modelled, never measured.

    Attributes:
        tokens: tokens of the longer training.
        kl: KL = offset + factor * tokens ** -exponent, nats/token.
        offset: the KL that no number of tokens undercuts.
        factor: the part that falls, nats/token at one token.
        exponent: how fast it falls.
        rms_error: root of the mean squared distance of the measurements from the fit, nats/token.
    """

    tokens: int
    kl: float
    offset: float
    factor: float
    exponent: float
    rms_error: float


@dataclass(frozen=True)
class GkdCurve:
    """The training of one target's child; `best_step` is the step whose weights are published.

    Steps and measurements are empty where `distill_child.tokens` was 0. `modelled` is None where the measurements are
    too few, or lie on no such curve.
    """

    target: str
    steps: tuple[GkdStep, ...]
    held_out: tuple[HeldOutKl, ...]
    best_step: int
    modelled: ModelledKl | None = None

    @property
    def best(self) -> HeldOutKl:
        """Return the held-out measurement of the published weights."""
        return next(measurement for measurement in self.held_out if measurement.step == self.best_step)


def read_gkd(target: str, paths: Paths) -> GkdCurve:
    """Read the gkd.json of a target.

    Raises:
        InputError: it is missing.
        DamagedFileError: it is not what was written, or a field is missing or has the wrong type.
    """
    return read_record(paths.gkd(target), GkdCurve, f"dvc repro distill_child@{target}")


def write_gkd(path: Path, curve: GkdCurve) -> None:
    """Write gkd.json."""
    write_sealed(path, asdict(curve))
