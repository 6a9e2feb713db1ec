"""Texts behind a prompt: greedy ones against the likeliest tokens, drawn ones by their seed, all up to a stop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.accuracy.writing import batches, continuations
from tasks.puzzle.model.writing import Drawing
from tests.clone import tiny_parent

GREEDY = Drawing(0.0, 1.0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = tmp_path_factory.mktemp("writing") / "parent"
    tiny_parent(folder)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_greedy_text_has_the_likeliest_tokens_up_to_a_stop(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompt = tokenizer("block child").input_ids
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    by_hand = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    (text,) = continuations(model, tokenizer, prompt, GREEDY, 12, [1], 0)
    assert text == by_hand
    stop = by_hand[4:7]
    (cut,) = continuations(model, tokenizer, prompt, GREEDY, 12, [1], 0, [stop, "none such"])
    assert cut == by_hand[: by_hand.find(stop)]


def test_drawn_texts_follow_the_seed(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompt = tokenizer("block").input_ids

    def drawn(seed: int) -> list[str]:
        return list(continuations(model, tokenizer, prompt, Drawing(1.0, 1.0), 8, batches(5, 2), seed))

    first = drawn(0)
    assert len(first) == 5 and len(set(first)) > 1
    assert drawn(0) == first != drawn(1)


def test_batches_hold_all_texts() -> None:
    assert (batches(5, 2), batches(4, 8), batches(8, 8)) == ([2, 2, 1], [4], [8])
