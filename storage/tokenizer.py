"""A checkpoint's tokenizer as transformers loads it, without code of the checkpoint, and what it says of texts."""

import contextlib
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from storage.files import InputError, digest_of, sha256, to_run
from storage.side_files import TOKENIZER_FILES, side_files
from storage.tokenizer_files import check_tokenizer

_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
"""What separates documents in the training of parents whose eos_token ends the turn of a chat (Qwen2, Llama-3)."""
_SAMPLE = "Words, 1 to 3."
_A_DAY = date(2024, 7, 26)  # templates that print the day (Llama 3.2, Mistral) must print the same one in every run
_DIRECTIVES = "YmdbBaAjyHMS"
_VOCABULARIES = ("tokenizer.*", "vocab.*")


def load_tokenizer(folder: Path, rebuild: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer whose files were checked.

    Raises:
        InputError: there is none, or none that can be read without code of its own; `rebuild` is what to run.
    """
    check_tokenizer(folder, rebuild)
    if not side_files(folder, _VOCABULARIES):  # transformers makes an empty Qwen2 tokenizer of nothing
        raise InputError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json); {to_run(rebuild)}"
        )
    with tokenizer_errors(f"{folder} has no tokenizer that can be read", to_run(rebuild)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer(_SAMPLE)
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):
        raise InputError(f"{folder}: the tokenizer's dropout gives a text other tokens each time; set it to null there")
    return tokenizer


def check_tokens(tokens: Iterable[int], vocab_size: int, folder: Path) -> None:
    """Raise InputError where a tokenizer gives tokens that the embedding has no row for."""
    if (largest := max(tokens, default=0)) >= vocab_size:
        raise InputError(
            f"the tokenizer in {folder} gives token {largest}, and the embedding has {vocab_size} rows; "
            "use the parent's own tokenizer"
        )


def tokenizer_digest(folder: Path) -> str:
    """Return the digest of the files that a tokenizer and its chat template are made of."""
    files = sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
    return digest_of({path.name: sha256(path) for path in files})


@contextlib.contextmanager
def tokenizer_errors(problem: str, way_out: str) -> Iterator[None]:
    """Turn whatever a tokenizer raises into an InputError: `problem`, the reason, and the way out."""
    try:
        yield
    except BaseException as error:  # readers of a dozen formats, each with errors of its own; a panic is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{problem} ({reason}); {way_out}") from error


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the BOS token, if the tokenizer puts it before every text by itself; else None."""
    bos: int | None = tokenizer.bos_token_id
    text = "a"
    bare, whole = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
    return bos if bos is not None and whole[:1] == [bos] and bare[:1] != [bos] else None


def document_separator(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Return the token that ends a document.

    Raises:
        InputError: there is none.
    """
    vocabulary = tokenizer.get_vocab()
    ends = [token for token in _DOCUMENT_ENDS if token in vocabulary]
    separator: str | None = ends[0] if ends else tokenizer.eos_token
    if separator is None:
        raise InputError(
            f"the tokenizer in {folder} has no {', no '.join(_DOCUMENT_ENDS)} and no eos_token to end documents with"
        )
    return separator


def chat_template(tokenizer: PreTrainedTokenizerBase, problem: str, way_out: str) -> str:
    """Return the template, with a macro in place of `strftime_now` that always prints the same day.

    Raises:
        InputError: there is no template, or none to choose; the message is `problem`, the reason and `way_out`.
    """
    with tokenizer_errors(problem, way_out):
        template: str = tokenizer.get_chat_template()
    filters = "".join(f"|replace('%{letter}', '{_A_DAY.strftime('%' + letter)}')" for letter in _DIRECTIVES)
    # The empty expression keeps Jinja from trimming what follows the macro.
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{filters} }}}}{{%- endmacro -%}}{{{{ '' }}}}{template}"
