"""A checkpoint's Hugging Face tokenizer as the tokenizer metadata of a GGUF file, where llama.cpp computes its tokens.

In: tokenizer.json and the small files beside it, read without torch or transformers. Two kinds are written: byte-level
BPE whose pre-tokenizer llama.cpp has, and BPE with byte fallback as converted from SentencePiece. All else is refused:
llama.cpp takes a wrong tokenizer as gladly as the right one.

What still differs, all of it pinned by the test: texts that are not in NFC, where the tokenizer brings them to it;
under Metaspace a space that begins a text or follows a special token (both are logged); letters and digits newer than
Unicode 15; the long s behind an apostrophe; what merges across a byte without a token (SmolLM2 lacks six controls).
"""

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from storage.files import InputError, read_json

_log = logging.getLogger(__name__)

_DIGITS, _GPT2, _BYTES = "every digit apart", "GPT-2's words", "bytes"
_LLAMA3, _QWEN2 = (
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for number in (r"\p{N}{1,3}", r"\p{N}")
)
_PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_LLAMA3, _BYTES), True): "llama-bpe",
    ((_LLAMA3, _BYTES), False): "dbrx",
    ((_QWEN2, _BYTES), False): "qwen2",
}
"""llama.cpp's names (llama-vocab.cpp), by steps of the pre-tokenizer and by ignore_merges. Its `tekken` is left out: it
splits words at combining marks, so Hindi, Thai or Hebrew would have other tokens."""
_SPACE = "▁"
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_METASPACE = {"type": "Metaspace", "replacement": _SPACE, "split": False}
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_SETTINGS = ("tokenizer_config", "special_tokens_map", "generation_config", "config")

_Json = Mapping[str, Any]


class _OtherwiseError(ValueError):
    """What llama.cpp would compute otherwise."""

    def __init__(self, expected: str, found: object) -> None:
        super().__init__(f"expected {expected}, found {found}")


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Add the tokenizer and the chat template of a checkpoint.

    Args:
        writer: of the GGUF file.
        folder: the checkpoint.
        vocab_size: rows of the embedding; those that the tokenizer has nothing for become unused tokens.

    Raises:
        InputError: no tokenizer.json, more tokens than rows, or a tokenizer that llama.cpp would compute otherwise.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} is missing, which the tokenizer in a GGUF file is made of; save it with transformers")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the binding has no types of its own
        raise InputError(f"{path} is not a tokenizer ({error}); save it anew with transformers") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= vocab_size:
        raise InputError(
            f"{path} has tokens up to id {last}, the embedding {vocab_size} rows; remove those without one"
        )
    try:
        _add(writer, tokenizer, folder, vocab_size)
    except _OtherwiseError as error:
        raise InputError(
            f"{path}: {error}; llama.cpp would compute otherwise: leave the gguf formats out of "
            "export_child.formats, or convert the child with llama.cpp's own converter"
        ) from error


def _add(writer: GGUFWriter, tokenizer: Tokenizer, folder: Path, vocab_size: int) -> None:
    spec = json.loads(tokenizer.to_str())  # all defaults written out
    model = spec["model"]
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model["type"] != "BPE" or odd:
        raise _OtherwiseError("a plain BPE model", " with ".join([model["type"], *odd]))
    _check_added(tokenizer)
    texts, types = _tokens(tokenizer, model, vocab_size)
    if model["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_space_prefix(spec))
        writer.add_token_scores(_scores(texts, types, model))
    elif not model["merges"]:
        raise _OtherwiseError("merges of bytes", "none")
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(spec))
        writer.add_token_merges([f"{left} {right}" for left, right in model["merges"]])
    writer.add_token_list(texts)
    writer.add_token_types(types)
    files = {name: folder / f"{name}.json" for name in _SETTINGS}
    again = "the export of this checkpoint again"
    settings = {name: read_json(file, again) if file.is_file() else {} for name, file in files.items()}
    _add_special(writer, tokenizer, settings)
    template = settings["tokenizer_config"].get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default")
    if template is not None:
        writer.add_chat_template(template)


def _check_added(tokenizer: Tokenizer) -> None:
    """Refuse added tokens that llama.cpp would find in other places of a text."""
    added = list(tokenizer.get_added_tokens_decoder().values())
    for token in added:
        normal = tokenizer.normalizer.normalize_str(token.content) if tokenizer.normalizer else token.content
        if token.lstrip or token.rstrip or token.single_word or (token.normalized and normal != token.content):
            raise _OtherwiseError("added tokens that are found just as they are written", repr(token))
    begins = {token.content[:length]: token.content for token in added for length in range(1, len(token.content))}
    for text in (token.content for token in added):
        for other in (begins.get(text[at:], text) for at in range(1, len(text))):
            if other != text:  # the leftmost one is found, in llama.cpp the longest
                raise _OtherwiseError("added tokens that cannot overlap in a text", f"{text!r} and {other!r}")


def _tokens(tokenizer: Tokenizer, model: _Json, vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Text and type of every row of the embedding."""
    texts = [f"<no token {index}>" for index in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    added = tokenizer.get_added_tokens_decoder()
    for text, index in tokenizer.get_vocab().items():
        texts[index], types[index] = text, TokenType.NORMAL
        if index in added:
            types[index] = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        if model["byte_fallback"] and text in _BYTE_TOKENS:
            types[index] = TokenType.BYTE
        elif model["byte_fallback"] and text == model["unk_token"] and index in added:
            types[index] = TokenType.UNKNOWN
    return texts, types


def _steps(step: _Json | None) -> list[_Json]:
    """The steps of a normalizer or pre-tokenizer."""
    if step is None:
        return []
    inner = step.get("normalizers", step.get("pretokenizers"))
    return [step] if inner is None else [single for each in inner for single in _steps(each)]


def _pre_tokenizer(spec: _Json) -> str:
    """llama.cpp's name of a byte-level pre-tokenizer."""
    model, found = spec["model"], []
    if normalizers := _steps(spec["normalizer"]):
        if normalizers != [{"type": "NFC"}]:
            raise _OtherwiseError("no normalizer, or NFC", normalizers)
        _log.warning("llama.cpp does not bring texts to Unicode's NFC, as this tokenizer does; give it such texts")
    for step in _steps(spec["pre_tokenizer"]):
        match step:
            case {"type": "Digits", "individual_digits": True}:
                found.append(_DIGITS)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
                found.append(_GPT2 if use_regex else _BYTES)
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                found.append(pattern)
            case _:
                found.append(str(step))
    name = _PRE_TOKENIZERS.get((tuple(found), model["ignore_merges"]))
    if name is None:
        known = ", ".join(_PRE_TOKENIZERS.values())
        raise _OtherwiseError(f"a pre-tokenizer like {known}", f"{found} with ignore_merges {model['ignore_merges']}")
    if model["unk_token"] is not None and not model["vocab"].keys() >= set(ByteLevel.alphabet()):
        raise _OtherwiseError("a token for every byte", f"bytes that become {model['unk_token']}")
    return name


def _space_prefix(spec: _Json) -> bool:
    """Whether every piece of text between special tokens gets a space in front."""
    steps = [*_steps(spec["normalizer"]), *_steps(spec["pre_tokenizer"])]
    if steps == [_METASPACE | {"prepend_scheme": "always"}]:
        _log.warning("llama.cpp puts a space before texts that begin with one, too, which this tokenizer does not")
        return True
    if steps not in ([_PREPEND, _REPLACE], [_REPLACE], [_METASPACE | {"prepend_scheme": "never"}]):
        raise _OtherwiseError("spaces by Prepend and Replace, Replace, or Metaspace (always or never, unsplit)", steps)
    return _PREPEND in steps


def _scores(texts: Sequence[str], types: Sequence[TokenType], model: _Json) -> list[float]:
    """Scores by which llama.cpp, which knows no merges here, does the same ones in the same order."""
    if missing := _BYTE_TOKENS - model["vocab"].keys():
        raise _OtherwiseError("a token for every byte", f"none for {min(missing)}")
    merges = [(left, right) for left, right in model["merges"]]
    first, last, ranks = dict[str, int](), dict[str, int](), dict[str, int]()
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
        last[left + right] = rank
    start, end = 0, -1
    for product, rank in first.items():
        start = rank if rank > end else start
        end = max(end, last[product])
        if rank > start and not _leftmost(merges[start : end + 1]):
            raise _OtherwiseError("merges into a token one after another", f"others between those into {product!r}")
        ranks[product] = start
    known, pairs = set(texts), set(merges)
    added = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)  # found before anything merges
    for text in (text for text, kind in zip(texts, types, strict=True) if kind not in added):
        for left, right in ((text[:at], text[at:]) for at in range(1, len(text))):
            meet = all(len(part) == 1 or part in known for part in (left, right))  # as symbols of llama.cpp
            if meet and (left, right) not in pairs:
                raise _OtherwiseError("a merge of any two tokens that make a third", f"none of {left!r} and {right!r}")
    return [-float(ranks.get(text, len(merges))) for text in texts]


def _leftmost(merges: Sequence[tuple[str, str]]) -> bool:
    """Whether merges in this order are those of the leftmost two tokens, which llama.cpp takes where scores are alike.

    They are in runs of one character, the longest first: SentencePiece's runs of spaces all have the same score.
    """
    lengths = [(len(left), len(right)) for left, right in merges]
    return len(set("".join(map("".join, merges)))) == 1 and lengths == sorted(lengths, reverse=True)


def _add_special(writer: GGUFWriter, tokenizer: Tokenizer, settings: Mapping[str, _Json]) -> None:
    """Add the ids of special tokens, and whether BOS and EOS go around a text."""
    ids = {name: _ids(name, tokenizer, settings) for name in ("bos", "eos", "pad", "unk")}
    if not 1 <= len(ids["eos"]) <= 3:
        raise _OtherwiseError("one to three tokens that end a text (eos_token, eos_token_id)", f"ids {ids['eos']}")
    eos = ids["eos"][0]
    bos = ids["bos"][0] if ids["bos"] else eos  # llama.cpp takes 11 where a file has none
    text, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    flags = itertools.product((False, True), repeat=2)
    ways = [(before, after) for before, after in flags if [bos] * before + text + [eos] * after == whole]
    if not ways:
        raise _OtherwiseError(f"a text behind BOS ({bos}), before EOS ({eos}) or bare", f"{whole} around {text}")
    writer.add_add_bos_token(ways[0][0])
    writer.add_add_eos_token(ways[0][1])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    others = {"eot": ids["eos"][1:2], "eom": ids["eos"][2:], "pad": ids["pad"][:1], "unk": ids["unk"][:1]}
    for name, index in ((name, index) for name, found in others.items() for index in found):
        getattr(writer, f"add_{name}_token_id")(index)


def _ids(name: str, tokenizer: Tokenizer, settings: Mapping[str, _Json]) -> list[int]:
    """Ids of what the files call `name`: first the tokenizer's own, then those of the model."""
    tokens = [values[f"{name}_token"] for values in settings.values() if values.get(f"{name}_token")]
    found = [tokenizer.token_to_id(token if isinstance(token, str) else token["content"]) for token in tokens]
    model = settings["generation_config"].get(f"{name}_token_id", settings["config"].get(f"{name}_token_id"))
    known = set(tokenizer.get_vocab().values())
    return list(dict.fromkeys(i for i in [*found, *(model if isinstance(model, list) else [model])] if i in known))
