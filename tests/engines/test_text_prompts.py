"""Text prompts have the length asked for, in tokenizers of both families; a tokenizer without words is refused."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from storage.files import InputError
from tasks.engines.text_prompts import text_prompts
from tests.tiny import save_tokenizer

LETTERS = "abcdefghijklmnop"


def _save_sentencepiece(folder: Path) -> None:
    """Save a BPE tokenizer of words of two letters that marks spaces as SentencePiece does, and puts <s> first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    words = [first + second for first in LETTERS for second in LETTERS]
    trainer = trainers.BpeTrainer(vocab_size=2_000, show_progress=False, special_tokens=["<s>"])
    tokenizer.train_from_iterator(words, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)


def test_prompts_are_of_the_length_asked_for(smollm: Path, tmp_path: Path) -> None:
    _save_sentencepiece(tmp_path)
    for folder, fewest in ((smollm, 4_000), (tmp_path, 200)):
        prompts = text_prompts(folder, 30_000)
        assert len(prompts.words) > fewest
        texts = [prompts.draw(random.Random(seed), 300) for seed in range(20)]
        assert len(set(texts)) == 20
        assert {prompts.count(text) for text in texts} == {300}


def test_the_vocabulary_bounds_the_words(smollm: Path) -> None:
    few, many = text_prompts(smollm, 4_000), text_prompts(smollm, 30_000)
    assert 0 < len(few.words) < len(many.words)
    assert set(few.words) < set(many.words)


def test_a_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    with pytest.raises(
        InputError, match=r"has 0 words among its first 30000 tokens, expected 100 .* leave --plain out"
    ):
        text_prompts(tmp_path, 30_000)
