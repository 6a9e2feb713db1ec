"""A checkpoint's tokenizer as transformers loads it, without code of the checkpoint."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from storage.files import InputError
from storage.side_files import side_files
from storage.tokenizer_files import check_tokenizer

_VOCABULARIES = ("tokenizer.*", "vocab.*")


def load_tokenizer(folder: Path, rebuild: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer whose files were checked.

    Raises:
        InputError: there is none, or none that can be read without code of its own; `rebuild` is what to run.
    """
    check_tokenizer(folder, rebuild)
    if not side_files(folder, _VOCABULARIES):  # transformers makes an empty Qwen2 tokenizer of nothing
        raise InputError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json); run `{rebuild}`")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as error:  # readers of a dozen formats, each with errors of its own; a panic is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder} has no tokenizer that can be read ({reason}); run `{rebuild}`") from error
    return tokenizer
