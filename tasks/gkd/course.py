"""The course of a global distillation, whoever computes it: its steps, held-out measurements, checkpoints and its end.

In: params, and a :class:`Trainer` that computes (threads of this process, or ranks). Out: the curve; the trainer has
the best weights. Every few steps the held-out KL is measured, and where it is due a checkpoint is written. A loss or a
gradient that is not finite ends the run before any weight changes.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

import torch
from tqdm import tqdm

from storage.files import InputError
from storage.gkd import GkdCurve, GkdStep, HeldOutKl
from storage.params import Params
from tasks.puzzle.distill.gkd import Losses
from tasks.puzzle.distill.optimizer import Schedule
from tasks.tensors.teacher import tokens_before_gkd

_SHORT_SAVE = 1.0
_MOST_SAVING = 0.1
"""Share of the time that goes to checkpoints, where one takes longer than a short save."""


@dataclass(frozen=True)
class Measurement:
    """The training at a held-out measurement, for people who watch: KL in nats/token, loss and norm of the last step.

    The speed is that of this process, measurements included.
    """

    step: int
    num_steps: int
    kl: float
    loss: float
    gradient_norm: float
    tokens_per_s: float
    seconds_left: float


Watch = Callable[[Measurement], None]
"""What is called at every held-out measurement behind a step."""


@dataclass(frozen=True)
class StepGradient:
    """A step's gradient, computed and not yet taken: mean losses, norm, and what is not finite (None: nothing)."""

    losses: Losses
    norm: float
    sick: str | None


class Trainer(Protocol):
    """Computes what a :class:`Course` asks for."""

    def resume(self) -> GkdCurve | None:
        """Go on from the last checkpoint of this very training, and return its curve; None: there is none."""
        ...

    def gradient(self, group: list[int]) -> StepGradient:
        """Compute the mean gradient of a step's train sequences."""
        ...

    def apply(self, scale: float) -> None:
        """Take the step with the gradient times `scale`."""
        ...

    def held_out_kl(self, sequences: range) -> float:
        """Measure the mean KL(parent || child) of calibration sequences, nats/token."""
        ...

    def keep(self) -> None:
        """Remember the present weights as the best so far."""
        ...

    def save(self, curve: GkdCurve) -> None:
        """Write a checkpoint; the earlier one is deleted last."""
        ...

    def agree(self, is_due: bool) -> bool:
        """Return one answer for all processes that train, where each has a clock of its own."""
        ...


class Course:
    """The course of the training of a target's child; `curve` is what was measured so far."""

    def __init__(self, target: str, params: Params) -> None:
        self._params, settings = params, params.distill_child
        self.groups = steps(params)
        self.schedule = Schedule(len(self.groups), settings.learning_rate, settings.warmup, settings.weight_decay)
        self.curve = GkdCurve(target, (), (), 0)
        self._saved_at, self._saving_seconds = time.monotonic(), 0.0

    @property
    def sequences(self) -> range:
        """Return the train sequences, of which each step takes some."""
        trained = [sequence for group in self.groups for sequence in group]
        return range(min(trained), max(trained) + 1)

    def run(self, trainer: Trainer, watch: Watch) -> None:
        """Train to the end, from the last checkpoint or from the start.

        Raises:
            InputError: a loss or a gradient is not finite.
        """
        self.curve = trainer.resume() or self.curve
        every, total, first = self._params.distill_child.checkpoint_steps, len(self.groups), len(self.curve.steps)
        if not self.curve.held_out:
            self._measure(trainer)
        began = time.monotonic()
        progress = tqdm(total=total, desc="distill", unit="step", initial=first, disable=None)
        for group in self.groups[first:]:
            if self._has_stalled:
                break
            self._step(trainer, group)
            progress.update()
            done = len(self.curve.steps)
            if done % every == 0 or done == total:
                self._measure(trainer)
                progress.set_postfix(kl=f"{self.curve.held_out[-1].kl:.3f}")
                if trainer.agree(_is_due(time.monotonic() - self._saved_at, self._saving_seconds)):
                    self._save(trainer)
                watch(self._measurement((time.monotonic() - began) / (done - first)))
        progress.close()

    @property
    def is_finished(self) -> bool:
        """Tell whether nothing is left to train."""
        return len(self.curve.steps) == len(self.groups) or self._has_stalled

    @property
    def _has_stalled(self) -> bool:
        """Tell whether the last measurements brought no new lowest KL, as many as params call enough."""
        since_best = sum(measurement.step > self.curve.best_step for measurement in self.curve.held_out)
        return 0 < self._params.distill_child.patience <= since_best

    def _measurement(self, step_seconds: float) -> Measurement:
        last, num_steps = self.curve.steps[-1], len(self.groups)
        return Measurement(
            step=last.step,
            num_steps=num_steps,
            kl=self.curve.held_out[-1].kl,
            loss=last.loss,
            gradient_norm=last.gradient_norm,
            tokens_per_s=last.tokens / last.step / step_seconds,
            seconds_left=0.0 if self._has_stalled else step_seconds * (num_steps - last.step),
        )

    def _step(self, trainer: Trainer, group: list[int]) -> None:
        clip_norm, done = self._params.distill_child.clip_norm, len(self.curve.steps)
        rate, gradient = self.schedule.rate(done), trainer.gradient(group)
        if gradient.sick:
            if self.curve.steps:
                self._save(trainer)
            self._stop(done + 1, gradient.sick)
        trainer.apply(clip_norm / gradient.norm if gradient.norm > clip_norm else 1.0)
        step = GkdStep(
            step=done + 1,
            tokens=(done + 1) * len(group) * self._params.prepare_corpus.seq_len,
            loss=gradient.losses.total,
            kl=gradient.losses.kl,
            cosine=gradient.losses.cosine,
            learning_rate=rate,
            gradient_norm=gradient.norm,
        )
        self.curve = replace(self.curve, steps=(*self.curve.steps, step))

    def _measure(self, trainer: Trainer) -> None:
        """Measure the held-out KL, and keep the weights if it is the lowest so far."""
        settings, seq_len = self._params.distill_child, self._params.prepare_corpus.seq_len
        kl, done = trainer.held_out_kl(held_out(self._params)), len(self.curve.steps)
        if not math.isfinite(kl):
            self._stop(done, f"the held-out KL behind it is {kl}")
        is_best = not self.curve.held_out or kl < self.curve.best.kl
        if is_best:
            trainer.keep()
        measurement = HeldOutKl(done, done * settings.sequences_per_step * seq_len, kl)
        self.curve = replace(
            self.curve,
            held_out=(*self.curve.held_out, measurement),
            best_step=done if is_best else self.curve.best_step,
        )

    def _save(self, trainer: Trainer) -> None:
        began = time.monotonic()
        trainer.save(self.curve)
        self._saved_at = time.monotonic()
        self._saving_seconds = self._saved_at - began

    def _stop(self, step: int, sick: str) -> NoReturn:
        """End a training that is not finite.

        Raises:
            InputError: always.
        """
        settings, target = self._params.distill_child, self.curve.target
        raise InputError(
            f"distill_child@{target} stopped at step {step} of {len(self.groups)}: {sick}; lower "
            f"distill_child.learning_rate ({settings.learning_rate:g}) or, with run.dtype bfloat16, set float32, and "
            f"run `dvc repro distill_child@{target}` (an earlier child stays)"
        )


def _is_due(since_last: float, saving: float) -> bool:
    """Tell whether a checkpoint is worth its seconds: `since_last` of training would be lost, `saving` goes to it."""
    return saving < _SHORT_SAVE or since_last >= saving / _MOST_SAVING


def steps(params: Params) -> list[list[int]]:
    """Train sequences of each step: those behind BLD's and the correction's, in a seeded order, each used once."""
    settings, seq_len = params.distill_child, params.prepare_corpus.seq_len
    first = tokens_before_gkd(params) // seq_len
    generator = torch.Generator().manual_seed(params.run.seed)
    order = (first + torch.randperm(settings.tokens // seq_len, generator=generator)).tolist()
    size = settings.sequences_per_step
    return [order[start : start + size] for start in range(0, len(order), size)]


def held_out(params: Params) -> range:
    """Return the calibration sequences of the held-out KL: the end of the split, as in BLD."""
    seq_len, stop = params.prepare_corpus.seq_len, params.prepare_corpus.calibration_tokens
    return range((stop - params.distill_child.held_out_tokens) // seq_len, stop // seq_len)
