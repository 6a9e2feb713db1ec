"""Prompts of text for servers that take no token ids, and the number of tokens of what such a server answers.

In: a checkpoint's tokenizer. Out: random words that are a token each, joined by spaces; counts of tokens.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from storage.files import InputError
from storage.tokenizer import load_tokenizer

_WORD = re.compile("[Ġ▁]([a-z]{2,})")
"""A word behind a space, as the vocabularies of byte-level BPE and of SentencePiece spell it."""
_FEWEST_WORDS = 100


@dataclass(frozen=True)
class TextPrompts:
    """A tokenizer and words that are one token of it, at a text's start as behind a space."""

    tokenizer: PreTrainedTokenizerBase
    words: tuple[str, ...]

    def draw(self, random_source: random.Random, tokens: int) -> str:
        """Return random words of so many tokens, without a BOS token, which is the server's to add."""
        return " ".join(random_source.choices(self.words, k=tokens))

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens that the tokenizer would add."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def text_prompts(folder: Path, vocabulary: int) -> TextPrompts:
    """Read the tokenizer of the checkpoint in `folder`; words are those with token ids below `vocabulary`.

    Raises:
        InputError: there is no tokenizer, or too few of its tokens are words.
    """
    tokenizer = load_tokenizer(folder, "dvc repro prepare_parent")
    ids = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items() if token_id < vocabulary)
    candidates = [match[1] for _, token in ids if (match := _WORD.fullmatch(token))]
    texts = [f"{word} {word}" for word in candidates]
    token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    words = tuple(word for word, tokens in zip(candidates, token_ids, strict=True) if len(tokens) == 2)
    if len(words) < _FEWEST_WORDS:
        raise InputError(
            f"the tokenizer in {folder} has {len(words)} words among its first {vocabulary} tokens, expected "
            f"{_FEWEST_WORDS} to write text prompts of; give a larger --vocabulary, or leave --plain out"
        )
    return TextPrompts(tokenizer, words)
