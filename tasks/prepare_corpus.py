"""prepare_corpus: text in, packed token sequences out (artifacts/corpus: three splits and a manifest).

Reads the tokenizer and puzzle_parent.json of artifacts/parent and the sources that params.yaml names. A corpus that is
there already under the same key, with every byte as written, is taken as it is.
"""

import importlib.metadata
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from jinja2.exceptions import TemplateError
from prefect import task
from prefect.cache_policies import NO_CACHE
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from storage.corpus import (
    REBUILD,
    SPLITS,
    Ingredient,
    Manifest,
    Split,
    SplitName,
    content_hash,
    drop_manifest,
    read_manifest,
    split_path,
    write_manifest,
    write_split,
)
from storage.files import InputError, digest_of, sha256, verify
from storage.params import Params
from storage.parent import REBUILD as REBUILD_PARENT
from storage.parent import Parent
from storage.paths import Paths
from storage.pieces import code_digest
from storage.remote import expand, fetch, fingerprint
from storage.sections import CorpusSource, PrepareCorpus
from tasks.puzzle.corpora import (
    PAGE_CHARS,
    Columns,
    Document,
    HubDataset,
    Source,
    embedded_documents,
    embedded_versions,
    file_documents,
    file_kind,
    hub_documents,
    order_key,
)
from tasks.puzzle.packing import LONG_CHARS, Feed, Packer

_FILL_ORDER: tuple[SplitName, ...] = ("validation", "calibration", "train")
_DOCUMENT_END = "<|endoftext|>"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
_A_DAY = date(2024, 7, 26)  # templates that print the day (Llama 3.2, Mistral) must print the same one in every run
_DIRECTIVES = "YmdbBaAjyHMS"
_LIBRARIES = ("datasets", "pyarrow", "tokenizers", "transformers")
_NOTES = (
    "Embedded documents are technical prose in English: pages of one module's docstrings, of one topic of Python's "
    f"reference, or of one package's description, of about {PAGE_CHARS} characters; .txt files are cut the same way.",
    f"No document and no paragraph longer than {LONG_CHARS} characters (white space aside) occurs twice, so none is in "
    "two splits; the marks of a chat template do not count as text.",
    "A document that a split's end cuts is not continued in another split.",
)


@dataclass(frozen=True)
class _Ingredient:
    """A source of params.yaml with its files and the version of what is in it."""

    params: CorpusSource
    files: tuple[str, ...]
    version: str

    @property
    def source(self) -> Source:
        """As the manifest names it."""
        parts = (self.params.path, self.params.subset, self.params.split if self.params.kind == "hub" else None)
        name = "/".join(part for part in parts if part) or self.params.kind
        return Source(name, self.version, self.params.licence or "not stated")


@task(cache_policy=NO_CACHE)
def pack_corpus(params: Params, paths: Paths) -> Path:
    """Make artifacts/corpus, unless it is there with the same key and whole.

    Args:
        params: all of params.yaml; read are `prepare_corpus` and `run.seed`.
        paths: where the parent is and where the corpus goes.

    Returns:
        The corpus folder.

    Raises:
        InputError: seq_len beyond the parent's context, a source that cannot be read, too few tokens.
    """
    section = params.prepare_corpus
    parent = Parent(paths.parent)
    _check_context(parent, section.seq_len)
    ingredients = [_ingredient(source) for source in section.sources]
    tokenizer_digest = _tokenizer_digest(paths.parent)
    key = _key(section, params.run.seed, tokenizer_digest, ingredients)
    if _is_done(paths.corpus, key):
        return paths.corpus
    building = paths.corpus.with_name(f".{paths.corpus.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # a killed run's
    try:
        tokenizer = _Tokenizer(parent, for_chats=any(source.messages for source in section.sources))
        packer = _packer(section, params.run.seed, ingredients, tokenizer, building)
        splits = {name: _write(building, name, packer, section.seq_len) for name in _FILL_ORDER}
        sources = [
            Ingredient(source.name, source.version, source.licence, packer.documents_of[source], tokens)
            for source, tokens in sorted(packer.tokens_of.items())
        ]
        manifest = Manifest(
            key=key,
            content_hash=content_hash(splits),
            seq_len=section.seq_len,
            separator=tokenizer.separator,
            separator_id=tokenizer.separator_id,
            tokenizer=tokenizer_digest,
            splits={name: splits[name] for name in SPLITS},
            sources=tuple(sources),
            left_out=packer.left_out,
            notes=_NOTES,
        )
        _move_in(building, paths.corpus, manifest)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return paths.corpus


def _check_context(parent: Parent, seq_len: int) -> None:
    context = parent.config.context
    if seq_len > context:
        raise InputError(
            f"prepare_corpus.seq_len is {seq_len}, and the parent in {parent.folder} reads at most {context} tokens; "
            f"set it to {context} or less"
        )


def _ingredient(source: CorpusSource) -> _Ingredient:
    """Find a source's files, and what changes when they do."""
    if source.kind == "embedded":
        return _Ingredient(source, (), digest_of(embedded_versions()))
    if source.kind == "hub":
        return _Ingredient(source, (), str(source.revision))
    files = expand(str(source.path))
    for name in files:
        file_kind(name)
    return _Ingredient(source, tuple(files), digest_of([fingerprint(name) for name in files]))


def _tokenizer_digest(parent: Path) -> str:
    files = sorted({path for pattern in _TOKENIZER_FILES for path in parent.glob(pattern) if path.is_file()})
    return digest_of({path.name: sha256(path) for path in files})


def _key(section: PrepareCorpus, seed: int, tokenizer: str, ingredients: Sequence[_Ingredient]) -> str:
    return digest_of(
        {
            "params": section.model_dump(mode="json"),
            "seed": seed,
            "tokenizer": tokenizer,
            "sources": [ingredient.version for ingredient in ingredients],
            "code": code_digest("tasks.prepare_corpus"),
            "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        }
    )


def _is_done(corpus: Path, key: str) -> bool:
    try:
        manifest = read_manifest(corpus)
        for name, split in manifest.splits.items():
            verify(split_path(corpus, name), split.sha256, REBUILD)
    except InputError:  # nothing there, or damaged: it is made anew
        return False
    return manifest.key == key


class _Tokenizer:
    """The parent's tokenizer: documents in, token ids out; no BOS is added."""

    def __init__(self, parent: Parent, for_chats: bool) -> None:
        folder = parent.folder
        try:
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} has no tokenizer that can be read ({error}); run `{REBUILD_PARENT}`") from error
        if for_chats and not self._tokenizer.chat_template:
            raise InputError(
                f"the parent in {folder} has no chat template to render messages with; name a text column instead"
            )
        self._template = _on_a_fixed_day(self._tokenizer.get_chat_template()) if for_chats else None
        vocabulary = self._tokenizer.get_vocab()
        separator = _DOCUMENT_END if _DOCUMENT_END in vocabulary else self._tokenizer.eos_token
        if separator is None:
            raise InputError(f"the tokenizer in {folder} has neither {_DOCUMENT_END} nor an eos_token to end documents")
        self.separator: str = separator
        self.separator_id: int = vocabulary[separator]
        self._vocab_size = parent.config.vocab_size

    def encode(self, documents: Sequence[Document]) -> list[list[int]]:
        """Token ids of documents of one source, without separators."""
        chats = bool(documents[0].messages)
        texts = [self._rendered(document) if chats else document.text for document in documents]
        # In plain text "<|endoftext|>" is text; what a chat template writes is meant.
        encoded = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=not chats, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        if (largest := max(map(max, filter(None, ids)), default=0)) >= self._vocab_size:
            raise InputError(
                f"the parent's tokenizer gives token {largest}, and its embedding has {self._vocab_size} rows; "
                "use the tokenizer that belongs to the parent"
            )
        return ids

    def _rendered(self, document: Document) -> str:
        messages = [{"role": message.role, "content": message.content} for message in document.messages]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, chat_template=self._template)
        except TemplateError as error:
            raise InputError(f"{document.path}: the parent's chat template refuses this chat ({error})") from error
        assert isinstance(text, str)
        return text


def _on_a_fixed_day(template: str) -> str:
    """The template, with `strftime_now` shadowed by a macro that knows one day only."""
    filters = "".join(f"|replace('%{letter}', '{_A_DAY.strftime('%' + letter)}')" for letter in _DIRECTIVES)
    # The empty expression keeps Jinja from trimming what follows the macro.
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{filters} }}}}{{%- endmacro -%}}{{{{ '' }}}}{template}"


def _packer(
    section: PrepareCorpus, seed: int, ingredients: Sequence[_Ingredient], tokenizer: _Tokenizer, scratch: Path
) -> Packer:
    feeds = [
        Feed(ingredient.source.name, ingredient.params.weight, _documents(ingredient, seed, scratch / str(index)))
        for index, ingredient in enumerate(ingredients)
    ]
    budgets: dict[str, int] = {name: getattr(section, f"{name}_tokens") for name in _FILL_ORDER}
    return Packer(feeds, budgets, section.seq_len, tokenizer.encode, tokenizer.separator_id, seed)


def _documents(ingredient: _Ingredient, seed: int, scratch: Path) -> Iterator[Document]:
    """A source's documents; a file of S3 is there only while it is read."""
    wanted, source = ingredient.params, ingredient.source
    columns = Columns(wanted.text, wanted.messages)
    if wanted.kind == "embedded":
        yield from embedded_documents(seed)
    elif wanted.kind == "hub":
        dataset = HubDataset(str(wanted.path), str(wanted.revision), wanted.split, wanted.subset)
        yield from hub_documents(dataset, source, columns, scratch)
    else:
        for address in sorted(ingredient.files, key=lambda name: (order_key(seed, Path(name).name), name)):
            file = fetch(address, scratch)
            yield from file_documents(file, address, source, columns, scratch)
            if file.is_relative_to(scratch):
                file.unlink()


def _write(building: Path, name: SplitName, packer: Packer, seq_len: int) -> Split:
    path = split_path(building, name)
    sequences, token_sha256 = write_split(path, packer.sequences(name), seq_len)
    return Split(sequences, sequences * seq_len, packer.documents[name], token_sha256, sha256(path))


def _move_in(building: Path, corpus: Path, manifest: Manifest) -> None:
    """Replace the corpus: without a manifest from the first moved file to the last, so that it is never a mixture."""
    corpus.mkdir(parents=True, exist_ok=True)
    drop_manifest(corpus)
    for name in SPLITS:
        split_path(building, name).replace(split_path(corpus, name))
    for stranger in set(corpus.iterdir()) - {split_path(corpus, name) for name in SPLITS}:
        shutil.rmtree(stranger) if stranger.is_dir() else stranger.unlink()
    write_manifest(corpus, manifest)
