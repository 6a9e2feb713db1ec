"""Texts behind a prompt: greedy ones against the likeliest tokens, drawn ones by their seed, all up to a stop."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import decoders
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from storage.checkpoints import Checkpoint
from storage.files import InputError
from tasks.accuracy.models import AskedModel
from tasks.accuracy.writing import batches, continuations
from tasks.puzzle.model.device import prepare_compute
from tasks.puzzle.model.writing import Drawing
from tasks.puzzle.quality.accuracy import PARENT
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


class _Writer:
    """A planted model: behind every prompt it writes the same tokens."""

    def __init__(self, written: list[int]) -> None:
        self.written, self.device = written, torch.device("cpu")
        self.config = SimpleNamespace(max_position_embeddings=64)
        self.generation_config = GenerationConfig(eos_token_id=0)

    def generate(self, ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([ids, torch.tensor([self.written])], dim=1)


def test_the_space_that_a_decoder_strips_from_a_texts_begin_stays(loaded: tuple[Any, Any]) -> None:
    """As tokenizers of SentencePiece decode: the first space of a text is none of it. Here it is a body's indent."""
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.clean_up_tokenization_spaces = True
    prompt, body = tokenizer("def double(x):\n").input_ids, "    return 2 * x .\nprint"
    written = tokenizer(body, add_special_tokens=False).input_ids
    assert tokenizer.decode(written)[:4] != "    ", "the test's own assumption: decoded alone it loses a space"
    model: Any = _Writer(written)
    (text,) = continuations(model, tokenizer, prompt, GREEDY, 32, [1], 0)
    assert text == body
    (cut,) = continuations(model, tokenizer, prompt, GREEDY, 32, [1], 0, ["\nprint"])
    assert cut == "    return 2 * x ."


def test_a_checkpoints_own_penalties_do_not_count(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompt = tokenizer("block child").input_ids
    plain = list(continuations(model, tokenizer, prompt, GREEDY, 12, [1], 0))
    penal = copy.deepcopy(model)
    penal.generation_config.update(repetition_penalty=9.0, no_repeat_ngram_size=1, suppress_tokens=[5, 6, 7])
    ids = torch.tensor([prompt])
    penalised = penal.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    assert tokenizer.decode(penalised) != plain[0], "the test's own assumption: the penalties change the text"
    assert list(continuations(penal, tokenizer, prompt, GREEDY, 12, [1], 0)) == plain
    assert penal.generation_config.repetition_penalty == 9.0


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_overflow_are_one_error(temperature: float, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Greedy texts of such a model were of token 0, without a word."""
    model = copy.deepcopy(loaded[0])
    torch.nn.init.constant_(model.model.norm.weight, 3e38)
    for part in (model, loaded[1]):
        part.save_pretrained(tmp_path)
    asked = AskedModel(PARENT, Checkpoint(tmp_path, "rebuild", is_foreign=True))
    model, tokenizer = asked.load(prepare_compute("cpu", "float32", 1), chat=False)
    with pytest.raises(InputError, match=r"logits of .* are not finite: its weights overflow in torch.float32"):
        list(continuations(model, tokenizer, tokenizer("block").input_ids, Drawing(temperature, 1.0), 8, [1], 0))
