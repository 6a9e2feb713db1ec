"""Text that a model writes: rows of a batch, one token a step, each drawn from the model's own distribution.

In: a model, and for every row a script that says what it is given and where its own parts end. Out: what it wrote. A
row is written to its end without a gap: a text that ends early is followed by the next, as documents follow each other
in the packed text that parents are trained on. Draws come from one seeded generator on the CPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from storage.files import InputError
from storage.model_config import ModelConfig
from tasks.puzzle.model.child import DeciLMForCausalLM
from tasks.puzzle.model.kv_cache import KvCache
from tasks.puzzle.model.rotary import RotaryEmbedding


@dataclass(frozen=True)
class Turn:
    """A part of a text: marks that are `given`, the `opening` of the part, and what the model writes behind both.

    The model writes until it draws one of `ends`, which is no part of what was written: the next turn's `given` holds
    it where it belongs.
    """

    given: tuple[int, ...]
    ends: frozenset[int]
    opening: tuple[int, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """The drawing of a token: logits over `temperature`, the likeliest tokens with `top_p` of the probability."""

    temperature: float
    top_p: float


class _Row:
    """A row under way: the texts so far, the tokens still to put in, and the turn that is being written."""

    def __init__(self, script: Iterator[Sequence[Turn]]) -> None:
        self.texts: list[list[list[int]]] = []
        self.given: list[int] = []
        self._script = script
        self._left: list[Turn] = []
        self._begin()

    def take(self, drawn: int) -> int:
        """Return the row's next token: one that is given, or the one that the model drew, which is kept."""
        if not self.given:
            if drawn not in self._ends:
                self.texts[-1][-1].append(drawn)
                return drawn
            self._begin()
        return self.given.pop(0)

    def _begin(self) -> None:
        """Go to the next turn, of the next text where this one is at its end."""
        if not self._left:
            self._left = list(next(self._script))
            self.texts.append([])
        turn = self._left.pop(0)
        self._ends, self.given = turn.ends, [*turn.given, *turn.opening]
        self.texts[-1].append(list(turn.opening))


def write(
    config: ModelConfig,
    model: DeciLMForCausalLM,
    scripts: Sequence[Iterator[Sequence[Turn]]],
    tokens: int,
    drawing: Drawing,
    generator: torch.Generator,
) -> list[list[list[list[int]]]]:
    """Write `tokens` tokens in each row.

    Args:
        config: geometry of the model.
        model: the model; it computes where its weights are.
        scripts: the turns of each text of a row, without an end; each text begins with a given token.
        tokens: tokens in a row, those that are given among them.
        drawing: how tokens are drawn.
        generator: source of all draws, on the CPU.

    Returns:
        The texts of each row, each with the tokens of every turn that was begun, opening included; the last text may be
        cut.

    Raises:
        InputError: logits are NaN or infinite.
    """
    rows = [_Row(script) for script in scripts]
    weight = model.model.embed_tokens.weight
    cache, rotary = KvCache(tokens), RotaryEmbedding(config)
    ids = torch.tensor([row.take(-1) for row in rows], device=weight.device)
    with torch.inference_mode():
        for position in range(tokens - 1):
            cache.position = position
            hidden = model.model.embed_tokens(ids[:, None])
            angles = rotary(weight, torch.tensor([[position]], device=weight.device))
            for block in model.model.layers:
                hidden = block(hidden, angles, None, cache)
            chances = 1 - torch.rand(len(rows), 1, generator=generator)
            if all(row.given for row in rows):
                drawn = [-1] * len(rows)
            else:
                logits = model.lm_head(model.model.norm(hidden[:, 0]))
                if not logits.isfinite().all():
                    raise InputError(
                        f"the parent's logits are not finite: its weights overflow in {weight.dtype}; set run.dtype to "
                        "float32, or take another revision of it"
                    )
                drawn = draw(logits, drawing, chances).tolist()
            ids = torch.tensor([row.take(token) for row, token in zip(rows, drawn, strict=True)], device=weight.device)
    return [row.texts for row in rows]


def draw(logits: Tensor, drawing: Drawing, chances: Tensor) -> Tensor:
    """Draw a token of each row by inverting its cumulative distribution.

    Args:
        logits: of the next token, [rows, vocabulary].
        drawing: temperature and the share of probability that is kept.
        chances: uniform in (0, 1], [rows, 1] float32; the same chance and logits give the same token.

    Returns:
        Token ids, [rows] int64.
    """
    probability = torch.softmax(logits.float() / drawing.temperature, dim=-1)
    ids = None
    if drawing.top_p < 1:
        probability, ids = probability.sort(dim=-1, descending=True)
        probability = probability * (probability.cumsum(-1) - probability < drawing.top_p)
    cumulative = probability.cumsum(-1)
    # The first token at which the sum reaches a chance above 0 has a probability above 0, however the sum is rounded.
    chosen = torch.searchsorted(cumulative, chances.to(cumulative.device) * cumulative[:, -1:])
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]
