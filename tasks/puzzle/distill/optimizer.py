"""AdamW on float32 masters of weights that compute in a narrower dtype, with warm-up and cosine decay."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BETAS = (0.9, 0.95)
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Schedule:
    """AdamW's settings: linear warm-up over a share `warmup` of the steps, then cosine decay to 0."""

    num_steps: int
    learning_rate: float
    warmup: float
    weight_decay: float

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, 0 .. num_steps - 1."""
        warm = max(1, round(self.warmup * self.num_steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        progress = (step - warm) / max(1, self.num_steps - warm)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class MasterWeights:
    """float32 masters of a module's trainable weights; `narrow` are the weights, which compute in a narrower dtype."""

    def __init__(self, module: torch.nn.Module, schedule: Schedule) -> None:
        trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._names, self.narrow = list(trainable), list(trainable.values())
        self._masters = [parameter.detach().float().clone().requires_grad_() for parameter in self.narrow]
        self._schedule = schedule
        self._optimizer = torch.optim.AdamW(
            self._masters, lr=schedule.learning_rate, betas=BETAS, weight_decay=schedule.weight_decay, fused=True
        )
        self._step = 0

    @property
    def rate(self) -> float:
        """Return the learning rate of the next step."""
        return self._schedule.rate(self._step)

    def step(self) -> None:
        """Apply the narrow weights' gradients to the masters, and round the masters back to the narrow weights."""
        gradients = []
        for narrow in self.narrow:
            assert narrow.grad is not None
            gradients.append(narrow.grad.float())
            narrow.grad = None
        self.apply(gradients)

    def apply(self, gradients: Sequence[Tensor]) -> None:
        """Apply float32 gradients, given in the order of `narrow`, to the masters, and round the masters back."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._round_back()
        self._step += 1

    def _round_back(self) -> None:
        with torch.no_grad():
            for master, narrow in zip(self._masters, self.narrow, strict=True):
                narrow.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Return masters and moments by name; with the number of steps they are all that a resumed run needs."""
        state = {f"master.{name}": master.detach() for name, master in zip(self._names, self._masters, strict=True)}
        for name, master in zip(self._names, self._masters, strict=True):
            state |= {f"{moment}.{name}": self._optimizer.state[master][moment] for moment in _MOMENTS}
        return state

    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue from a :meth:`state` that was taken after `step` steps, on whatever device its tensors are."""
        self._step = step
        for name, master in zip(self._names, self._masters, strict=True):
            with torch.no_grad():
                master.copy_(state[f"master.{name}"])
            self._optimizer.state[master] = {
                "step": torch.tensor(float(step), device=master.device),
                **{moment: state[f"{moment}.{name}"].to(master.device, copy=True) for moment in _MOMENTS},
            }
        self._round_back()
