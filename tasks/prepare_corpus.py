"""prepare_corpus: text in, packed token sequences out (artifacts/corpus: three splits and a manifest).

It reads the tokenizer and puzzle_parent.json of artifacts/parent and the sources that params.yaml names. An existing
corpus with the same key, and with every byte as written, is kept.
"""

import importlib.metadata
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from jinja2.exceptions import TemplateError
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.code_digest import code_digest
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
from storage.documents import PAGE_CHARS, Document, Message, Source, order_key
from storage.embedded_corpus import embedded_documents, embedded_versions
from storage.files import InputError, digest_of, sha256, verify
from storage.params import Params
from storage.parent import Parent
from storage.parent_info import REBUILD as REBUILD_PARENT
from storage.paths import Paths
from storage.remote import expand, fetch, fingerprint
from storage.sections import CorpusSource, PrepareCorpus
from storage.text_datasets import Columns, HubDataset, SkippedRows, file_documents, file_kind, hub_documents
from storage.tokenizer import load_tokenizer
from tasks.puzzle.corpus.packing import Feed, Packer
from tasks.puzzle.corpus.repeats import LONG_CHARS

_FILL_ORDER: tuple[SplitName, ...] = ("validation", "calibration", "train")
_DOCUMENT_END = "<|endoftext|>"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
_A_DAY = date(2024, 7, 26)  # templates that print the day (Llama 3.2, Mistral) must print the same one in every run
_DIRECTIVES = "YmdbBaAjyHMS"
_USUAL_ROLES = ("system", "user", "assistant")
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError)
"""What a chat template raises: on purpose, or where a message is not as it expects."""
_LIBRARIES = ("datasets", "pyarrow", "tokenizers", "transformers")
_NOTES = (
    "Embedded documents are technical prose in English: pages of one module's docstrings, of one topic of Python's "
    f"reference, or of one package's description, of about {PAGE_CHARS} characters; .txt files are cut the same way.",
    f"No document and no paragraph longer than {LONG_CHARS} characters (white space aside) occurs twice, so none is in "
    "two splits; the marks of a chat template do not count as text.",
    "A document that a split's end cuts is not continued in another split.",
)


@dataclass(frozen=True)
class _VersionedSource:
    """A source of params.yaml with its files and the version of their content."""

    params: CorpusSource
    files: tuple[str, ...]
    version: str

    @property
    def source(self) -> Source:
        """The source's name in the manifest."""
        parts = (self.params.path, self.params.subset, self.params.split if self.params.kind == "hub" else None)
        name = "/".join(part for part in parts if part) or self.params.kind
        return Source(name, self.version, self.params.licence or "not stated")


@task(cache_policy=NO_CACHE)
def pack_corpus(params: Params, paths: Paths) -> Path:
    """Make artifacts/corpus, unless it exists whole with the same key.

    Args:
        params: all of params.yaml; `prepare_corpus` and `run.seed` are read.
        paths: the paths of the parent and of the corpus.

    Returns:
        The corpus folder.

    Raises:
        InputError: seq_len beyond the parent's context, a source that cannot be read, too few tokens.
    """
    section = params.prepare_corpus
    parent = Parent(paths.parent)
    parent.checkpoint.verify_files()  # the tokenizer's among them
    _check_context(parent, section.seq_len)
    sources = [_versioned(source) for source in section.sources]
    tokenizer_digest = _tokenizer_digest(paths.parent)
    key = _key(section, params.run.seed, tokenizer_digest, sources)
    if _is_done(paths.corpus, key):
        return paths.corpus
    building = paths.corpus.with_name(f".{paths.corpus.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # a killed run's
    skipped = {source.source: SkippedRows(source.source.name) for source in sources}
    try:
        tokenizer = _Tokenizer(parent, skipped, for_chats=any(source.messages for source in section.sources))
        packer = _packer(section, params.run.seed, sources, tokenizer, building)
        splits = _write_splits(building, packer, section.seq_len, skipped)
        ingredients = [
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
            sources=tuple(ingredients),
            left_out=packer.left_out,
            notes=(*_NOTES, *(f"{rows.address}: {line}" for rows in skipped.values() for line in rows.lines())),
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


def _versioned(source: CorpusSource) -> _VersionedSource:
    """A source with its files, and a version that changes with their content."""
    if source.kind == "embedded":
        return _VersionedSource(source, (), digest_of(embedded_versions()))
    if source.kind == "hub":
        return _VersionedSource(source, (), str(source.revision))
    files = expand(str(source.path))
    for name in files:
        file_kind(name)
    return _VersionedSource(source, tuple(files), digest_of([fingerprint(name) for name in files]))


def _tokenizer_digest(parent: Path) -> str:
    files = sorted({path for pattern in _TOKENIZER_FILES for path in parent.glob(pattern) if path.is_file()})
    return digest_of({path.name: sha256(path) for path in files})


def _key(section: PrepareCorpus, seed: int, tokenizer: str, sources: Sequence[_VersionedSource]) -> str:
    return digest_of(
        {
            "params": section.model_dump(mode="json"),
            "seed": seed,
            "tokenizer": tokenizer,
            "sources": [source.version for source in sources],
            "code": code_digest("tasks.prepare_corpus:pack_corpus"),
            "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        }
    )


def _is_done(corpus: Path, key: str) -> bool:
    try:
        manifest = read_manifest(corpus)
        for name, split in manifest.splits.items():
            verify(split_path(corpus, name), split.sha256, REBUILD)
    except InputError:  # missing or damaged: it is made anew
        return False
    return manifest.key == key


class _Tokenizer:
    """The parent's tokenizer: documents in, token ids out; no BOS is added."""

    def __init__(self, parent: Parent, skipped: Mapping[Source, SkippedRows], *, for_chats: bool) -> None:
        folder = parent.folder
        self._tokenizer = load_tokenizer(folder, REBUILD_PARENT)
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
        self.skipped = skipped

    def takes(self, document: Document) -> bool:
        """Whether the template can render the document; other chats are counted."""
        return not document.messages or self._rendered(document) is not None

    def encode(self, documents: Sequence[Document]) -> Sequence[list[int] | None]:
        """Token ids of documents of one source, without separators; None for a chat that the template cannot render."""
        if not documents[0].messages:
            return self._ids([document.text for document in documents], chats=False)
        texts = [self._rendered(document) for document in documents]
        ids = iter(self._ids([text for text in texts if text is not None], chats=True))
        return [None if text is None else next(ids) for text in texts]

    def _ids(self, texts: list[str], *, chats: bool) -> list[list[int]]:
        if not texts:
            return []
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # JSON can hold half a surrogate pair
        # In plain text "<|endoftext|>" is text; in a rendered chat it is the special token.
        encoded = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=not chats, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        if (largest := max(map(max, filter(None, ids)), default=0)) >= self._vocab_size:
            raise InputError(
                f"the parent's tokenizer gives token {largest}, and its embedding has {self._vocab_size} rows; "
                "use the parent's own tokenizer"
            )
        return ids

    def _rendered(self, document: Document) -> str | None:
        """A chat as the template writes it; None, and a reason, where it cannot, or leaves something out."""
        messages = [message.for_template for message in document.messages]
        bare = [
            {**turn, "content": None} if "tool_calls" in turn and not turn["content"] else turn for turn in messages
        ]
        left_out = _unusual_words(document.messages)
        try:
            for turns in [messages] if bare == messages else [messages, bare]:  # some templates want null beside calls
                text = self._tokenizer.apply_chat_template(turns, tokenize=False, chat_template=self._template)
                assert isinstance(text, str)
                if all(word in text for word in left_out):
                    return text
        except _TEMPLATE_ERRORS as error:
            reason = f"the parent's chat template refuses this chat ({' '.join(str(error).split())[:200]})"
        else:
            reason = "the parent's chat template leaves out tool calls, or messages with other roles than the usual"
        self.skipped[document.source].skip(reason, document.path)
        return None


def _unusual_words(messages: Sequence[Message]) -> list[str]:
    """Words that show whether a template writes what some leave out: functions called, messages of unusual roles."""
    names = [call["name"] for message in messages for call in message.tool_calls]
    contents = [message.content for message in messages if message.role not in _USUAL_ROLES]
    return names + [max(re.findall(r"\w+", content), key=len, default="") for content in contents]


def _on_a_fixed_day(template: str) -> str:
    """The template with a macro in place of `strftime_now` that always prints the same day."""
    filters = "".join(f"|replace('%{letter}', '{_A_DAY.strftime('%' + letter)}')" for letter in _DIRECTIVES)
    # The empty expression keeps Jinja from trimming what follows the macro.
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{filters} }}}}{{%- endmacro -%}}{{{{ '' }}}}{template}"


def _packer(
    section: PrepareCorpus, seed: int, sources: Sequence[_VersionedSource], tokenizer: _Tokenizer, scratch: Path
) -> Packer:
    feeds = [
        Feed(
            versioned.source.name,
            versioned.params.weight,
            filter(
                tokenizer.takes,
                _documents(versioned, seed, scratch / str(index), tokenizer.skipped[versioned.source]),
            ),
        )
        for index, versioned in enumerate(sources)
    ]
    budgets: dict[str, int] = {name: getattr(section, f"{name}_tokens") for name in _FILL_ORDER}
    return Packer(feeds, budgets, section.seq_len, tokenizer.encode, tokenizer.separator_id, seed)


def _documents(versioned: _VersionedSource, seed: int, scratch: Path, skipped: SkippedRows) -> Iterator[Document]:
    """Documents of a source; a file of S3 exists in `scratch` only while it is read."""
    settings, source = versioned.params, versioned.source
    columns = Columns(settings.text, settings.messages)
    if settings.kind == "embedded":
        yield from embedded_documents(seed)
    elif settings.kind == "hub":
        dataset = HubDataset(str(settings.path), str(settings.revision), settings.split, settings.subset)
        yield from hub_documents(dataset, source, columns, scratch, skipped)
    else:
        for address in sorted(versioned.files, key=lambda name: (order_key(seed, Path(name).name), name)):
            file = fetch(address, scratch)
            yield from file_documents(file, address, source, columns, skipped)
            if file.is_relative_to(scratch):
                file.unlink()
    skipped.check()


def _write_splits(
    building: Path, packer: Packer, seq_len: int, skipped: Mapping[Source, SkippedRows]
) -> dict[SplitName, Split]:
    try:
        splits = {name: _write(building, name, packer, seq_len) for name in _FILL_ORDER}
    except InputError:
        _check(skipped)  # that most rows cannot be used says more than that a source ended
        raise
    _check(skipped)
    return splits


def _check(skipped: Mapping[Source, SkippedRows]) -> None:
    for rows in skipped.values():
        rows.log()
        rows.check()


def _write(building: Path, name: SplitName, packer: Packer, seq_len: int) -> Split:
    path = split_path(building, name)
    sequences, token_sha256 = write_split(path, packer.sequences(name), seq_len)
    return Split(sequences, sequences * seq_len, packer.documents[name], token_sha256, sha256(path))


def _move_in(building: Path, corpus: Path, manifest: Manifest) -> None:
    """Replace the corpus; it has no manifest from the first moved file to the last, so a mixture is never read."""
    corpus.mkdir(parents=True, exist_ok=True)
    drop_manifest(corpus)
    for name in SPLITS:
        split_path(building, name).replace(split_path(corpus, name))
    for stranger in set(corpus.iterdir()) - {split_path(corpus, name) for name in SPLITS}:
        shutil.rmtree(stranger) if stranger.is_dir() else stranger.unlink()
    write_manifest(corpus, manifest)
