"""Texts that a model of transformers writes behind a prompt, drawn from one seed."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tasks.puzzle.model.writing import Drawing


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    drawing: Drawing,
    max_tokens: int,
    rows: Sequence[int],
    seed: int,
    stops: Sequence[str] = (),
) -> Iterator[str]:
    """Write texts behind one prompt, each up to the first of `stops`, the model's own end, or `max_tokens`.

    Args:
        model: a causal model of transformers; of its generation_config.json only the tokens that end a text count.
        tokenizer: its tokenizer.
        prompt: token ids; what leaves no room for `max_tokens` in the model's context is cut at the front.
        drawing: how tokens are drawn; at temperature 0 the likeliest one always.
        max_tokens: longest text, in tokens.
        rows: numbers of texts in one forward pass, batch after batch.
        seed: seed of all draws.
        stops: texts that end a text and are no part of it.
    """
    torch.manual_seed(seed)
    generator: Any = model
    context: int = model.config.max_position_embeddings
    prompt_ids = list(prompt)[-max(1, context - max_tokens) :]
    ids, prompt_text = torch.tensor([prompt_ids], device=model.device), _decoded(tokenizer, prompt_ids)
    is_drawn = drawing.temperature > 0
    draws = {"temperature": drawing.temperature, "top_p": drawing.top_p, "top_k": 0} if is_drawn else {}
    for count in rows:
        settings = GenerationConfig(
            do_sample=is_drawn,
            max_new_tokens=max_tokens,
            num_return_sequences=count,
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            stop_strings=list(stops) or None,
            **draws,
        )
        with torch.inference_mode(), _plain(model):
            written = generator.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                tokenizer=tokenizer if stops else None,
            )
        for row in written[:, ids.shape[1] :]:
            yield _up_to(_decoded(tokenizer, [*prompt_ids, *row.tolist()])[len(prompt_text) :], stops)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode tokens as they are; some drop the first space, so what follows a prompt is decoded with it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@contextlib.contextmanager
def _plain(model: PreTrainedModel) -> Iterator[None]:
    """Keep a checkpoint's own settings from generation: transformers adds a penalty or a top_k that it names."""
    generation_config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = generation_config


def _up_to(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first of `stops`."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def batches(count: int, largest: int) -> list[int]:
    """Split a number of texts into batches."""
    return [min(largest, count - start) for start in range(0, count, largest)]
