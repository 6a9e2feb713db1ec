"""A checkpoint's Hugging Face tokenizer as the tokenizer metadata of a GGUF file, where llama.cpp computes its tokens.

In: tokenizer.json and the small files beside it, read without torch or transformers. Out: metadata of a GGUF file. Two
kinds of tokenizer are written: byte-level BPE whose pre-tokenizer llama.cpp has, and BPE with byte fallback as
converted from SentencePiece. Every other kind is refused, because llama.cpp loads a wrong tokenizer without a word.

The test pins the differences that remain: texts that are not in NFC, where the tokenizer brings them to it; under
Metaspace a space that begins a text or follows a special token (both are logged); letters and digits newer than Unicode
15; the long s behind an apostrophe; merges across a byte without a token (SmolLM2 lacks six control characters).
"""

import itertools
import json
import logging
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, Keys, TokenType
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from storage.files import InputError
from storage.json_files import read_text
from storage.tokenizer_files import check_tokenizer, read_settings

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
_REBUILD = "the export of this checkpoint again"
_MAX_PARTS = 1 << 28

_Json = Mapping[str, Any]


class _UnsupportedError(ValueError):
    """Something in a tokenizer from which llama.cpp would compute other tokens."""

    def __init__(self, expected: str, actual: object) -> None:
        super().__init__(f"expected {expected}, found {actual}")


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Add the tokenizer and the chat template of a checkpoint.

    Args:
        writer: the writer of the GGUF file.
        folder: the checkpoint.
        vocab_size: rows of the embedding; those that the tokenizer has nothing for become unused tokens.

    Raises:
        InputError: no tokenizer.json, more tokens than rows, or a tokenizer from which llama.cpp would compute other
            tokens.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} is missing; the tokenizer in a GGUF file is made from it: save it with transformers")
    check_tokenizer(folder, _REBUILD)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= vocab_size:
        raise InputError(
            f"{path} has tokens up to id {last}, the embedding {vocab_size} rows; remove the tokens without a row"
        )
    try:
        _add(writer, tokenizer, folder, vocab_size)
    except _UnsupportedError as error:
        raise InputError(
            f"{path}: {error}; llama.cpp would compute other tokens: leave the gguf formats out of "
            "export_child.formats, or convert the child with llama.cpp's own converter"
        ) from error


def _add(writer: GGUFWriter, tokenizer: Tokenizer, folder: Path, vocab_size: int) -> None:
    """Add all metadata, or raise _UnsupportedError."""
    spec = json.loads(tokenizer.to_str())  # all defaults written out
    model = spec["model"]
    extras = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model["type"] != "BPE" or extras:
        raise _UnsupportedError("a plain BPE model", " with ".join([model["type"], *extras]))
    lengths = [len(text) for text in tokenizer.get_vocab()]
    if sum(length**2 for length in lengths) > _MAX_PARTS:
        raise _UnsupportedError("tokens as long as words", f"some of {max(lengths):,} characters")
    _check_added(tokenizer)
    texts, types = _tokens(tokenizer, model, vocab_size)
    if model["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_space_prefix(spec))
        writer.add_token_scores(_scores(texts, types, model))
    elif not model["merges"]:
        raise _UnsupportedError("merges of bytes", "none")
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(spec))
        writer.add_token_merges([f"{left} {right}" for left, right in model["merges"]])
    writer.add_token_list(texts)
    writer.add_token_types(types)
    settings = read_settings(folder, _REBUILD)
    _add_special(writer, tokenizer, settings)
    templates = _chat_templates(folder, settings["tokenizer_config"])
    if "default" in templates:
        writer.add_chat_template(templates.pop("default"))
    for name, template in templates.items():
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), template)
    if templates:
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, list(templates))


def _chat_templates(folder: Path, config: _Json) -> dict[str, str]:
    """Return chat templates by name, sorted: those of files, else tokenizer_config.json's, as transformers does."""
    default = folder / "chat_template.jinja"
    files = {"default": default} if default.is_file() else {}
    for path in folder.glob("additional_chat_templates/*.jinja"):  # `default.jinja` is the default then
        files[path.name.removesuffix(".jinja")] = path
    templates: Any = {name: read_text(path, _REBUILD) for name, path in files.items()} or config.get("chat_template")
    if isinstance(templates, list):
        templates = {named.get("name"): named.get("template") for named in templates if isinstance(named, dict)}
    elif not isinstance(templates, dict):
        templates = {} if templates is None else {"default": templates}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor a list of templates with their "
            "names; save the tokenizer anew with transformers"
        )
    keys = {name: "".join(c if c.isalnum() else "_" for c in name) for name in sorted(templates)}
    if len(set(keys.values())) < len(keys):
        raise InputError(
            f"{folder} has chat templates {list(keys)!s:.300}, some of which have one name in a GGUF file, where all "
            "but letters and digits becomes _; rename one, or leave the gguf formats out of export_child.formats"
        )
    return {key: templates[name] for name, key in keys.items()}


def _check_added(tokenizer: Tokenizer) -> None:
    """Raise _UnsupportedError for added tokens that llama.cpp would find in other places of a text."""
    added = list(tokenizer.get_added_tokens_decoder().values())
    for token in added:
        normal = tokenizer.normalizer.normalize_str(token.content) if tokenizer.normalizer else token.content
        if token.lstrip or token.rstrip or token.single_word or (token.normalized and normal != token.content):
            raise _UnsupportedError("added tokens that are found just as they are written", repr(token))
    by_beginning = {}
    for token in added:
        for length in range(1, len(token.content)):
            by_beginning[token.content[:length]] = token.content
    for text in (token.content for token in added):
        for start in range(1, len(text)):
            other = by_beginning.get(text[start:], text)
            if other != text:  # the library finds the leftmost, llama.cpp the longest
                raise _UnsupportedError("added tokens that cannot overlap in a text", f"{text!r} and {other!r}")


def _tokens(tokenizer: Tokenizer, model: _Json, vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Return text and type of every row of the embedding."""
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
    """Return the steps of a normalizer or pre-tokenizer, sequences of steps taken apart."""
    if step is None:
        return []
    inner = step.get("normalizers", step.get("pretokenizers"))
    if inner is None:
        return [step]
    steps = []
    for part in inner:
        steps += _steps(part)
    return steps


def _pre_tokenizer(spec: _Json) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer."""
    model, steps = spec["model"], []
    if normalizers := _steps(spec["normalizer"]):
        if normalizers != [{"type": "NFC"}]:
            raise _UnsupportedError("no normalizer, or NFC", normalizers)
        _log.warning("llama.cpp does not bring texts to Unicode's NFC, as this tokenizer does; give it texts in NFC")
    for step in _steps(spec["pre_tokenizer"]):
        match step:
            case {"type": "Digits", "individual_digits": True}:
                steps.append(_DIGITS)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
                steps.append(_GPT2 if use_regex else _BYTES)
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                steps.append(pattern)
            case _:
                steps.append(str(step))
    name = _PRE_TOKENIZERS.get((tuple(steps), model["ignore_merges"]))
    if name is None:
        names = ", ".join(_PRE_TOKENIZERS.values())
        raise _UnsupportedError(f"a pre-tokenizer like {names}", f"{steps} with ignore_merges {model['ignore_merges']}")
    if model["unk_token"] is not None and not model["vocab"].keys() >= set(ByteLevel.alphabet()):
        raise _UnsupportedError("a token for every byte", f"bytes that become {model['unk_token']}")
    return name


def _space_prefix(spec: _Json) -> bool:
    """Tell whether every part of a text between special tokens gets a space in front."""
    steps = [*_steps(spec["normalizer"]), *_steps(spec["pre_tokenizer"])]
    if steps == [_METASPACE | {"prepend_scheme": "always"}]:
        _log.warning("llama.cpp puts a space before texts that begin with one, too, which this tokenizer does not")
        return True
    if steps not in ([_PREPEND, _REPLACE], [_REPLACE], [_METASPACE | {"prepend_scheme": "never"}]):
        expected = "spaces by Prepend and Replace, Replace, or Metaspace (always or never, unsplit)"
        raise _UnsupportedError(expected, steps)
    return _PREPEND in steps


def _scores(texts: Sequence[str], types: Sequence[TokenType], model: _Json) -> list[float]:
    """Return scores of tokens by which llama.cpp, which has no merges here, does the same merges in the same order."""
    if missing := _BYTE_TOKENS - model["vocab"].keys():
        raise _UnsupportedError("a token for every byte", f"none for {min(missing)}")
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
            raise _UnsupportedError("merges into a token one after another", f"others between those into {product!r}")
        ranks[product] = start
    _check_all_merge(texts, types, set(merges))
    return [-float(ranks.get(text, len(merges))) for text in texts]


def _check_all_merge(texts: Sequence[str], types: Sequence[TokenType], merges: Set[tuple[str, str]]) -> None:
    """Raise _UnsupportedError where two tokens make a third without a merge: llama.cpp would merge them."""
    vocabulary = set(texts)
    added = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)  # found before anything merges
    for text, token_type in zip(texts, types, strict=True):
        if token_type in added:
            continue
        for middle in range(1, len(text)):
            left, right = text[:middle], text[middle:]
            are_symbols = all(len(part) == 1 or part in vocabulary for part in (left, right))  # of llama.cpp
            if are_symbols and (left, right) not in merges:
                actual = f"none of {left!r} and {right!r}"
                raise _UnsupportedError("a merge of any two tokens that make a third", actual)


def _leftmost(merges: Sequence[tuple[str, str]]) -> bool:
    """Tell whether merges in this order are of the leftmost two tokens, which llama.cpp merges first at equal scores.

    True for runs of one character, the longest first: SentencePiece's runs of spaces all have the same score.
    """
    lengths = [(len(left), len(right)) for left, right in merges]
    return len(set("".join(map("".join, merges)))) == 1 and lengths == sorted(lengths, reverse=True)


def _add_special(writer: GGUFWriter, tokenizer: Tokenizer, settings: Mapping[str, _Json]) -> None:
    """Add the ids of special tokens, and whether BOS and EOS go around a text."""
    ids = {name: _ids(name, tokenizer, settings) for name in ("bos", "eos", "pad", "unk")}
    if not 1 <= len(ids["eos"]) <= 3:
        raise _UnsupportedError("one to three tokens that end a text (eos_token, eos_token_id)", f"ids {ids['eos']}")
    eos = ids["eos"][0]
    bos = ids["bos"][0] if ids["bos"] else eos  # llama.cpp takes 11 where a file has none
    try:
        text, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    except Exception as error:  # the binding has no types of its own
        raise _UnsupportedError("a tokenizer that encodes a text", error) from error
    flags = itertools.product((False, True), repeat=2)
    fitting = [(before, after) for before, after in flags if [bos] * before + text + [eos] * after == whole]
    if not fitting:
        raise _UnsupportedError(f"a text behind BOS ({bos}), before EOS ({eos}) or bare", f"{whole} around {text}")
    has_bos, has_eos = fitting[0]
    writer.add_add_bos_token(has_bos)
    writer.add_add_eos_token(has_eos)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    add_others = (
        (writer.add_eot_token_id, ids["eos"][1:2]),
        (writer.add_eom_token_id, ids["eos"][2:]),
        (writer.add_pad_token_id, ids["pad"][:1]),
        (writer.add_unk_token_id, ids["unk"][:1]),
    )
    for add, indices in add_others:
        for index in indices:
            add(index)


def _ids(name: str, tokenizer: Tokenizer, settings: Mapping[str, _Json]) -> list[int]:
    """Return ids of the special tokens that the files call `name`: first the tokenizer's own, then the model's."""
    tokens = [values[f"{name}_token"] for values in settings.values() if values.get(f"{name}_token")]
    texts: list[Any] = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    if not all(isinstance(text, str) for text in texts):
        raise _UnsupportedError(f"a text for {name}_token in the files beside it", texts)
    ids = [tokenizer.token_to_id(text) for text in texts]
    model_ids = settings["generation_config"].get(f"{name}_token_id", settings["config"].get(f"{name}_token_id"))
    ids += model_ids if isinstance(model_ids, list) else [model_ids]
    vocabulary = set(tokenizer.get_vocab().values())
    return list(dict.fromkeys(index for index in ids if isinstance(index, int) and index in vocabulary))
