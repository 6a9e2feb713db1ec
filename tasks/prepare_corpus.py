"""prepare_corpus: text in, packed token sequences out (artifacts/corpus: a file for each split, and a manifest).

It reads the tokenizer and puzzle_parent.json of artifacts/parent and the sources that params.yaml names. Held-out
domains are packed first, then validation, calibration and train, so that a longer train split changes nothing in the
others. An existing corpus with the same key, and with every byte as written, is kept.
"""

import importlib.metadata
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    domain_split,
    drop_manifest,
    read_manifest,
    split_path,
    write_manifest,
    write_split,
)
from storage.documents import PAGE_CHARS, TRAINING_MIX, Document, Message, Source, order_key
from storage.embedded_corpus import embedded_documents, embedded_versions
from storage.encyclopedia import encyclopedia_documents, encyclopedia_version
from storage.files import InputError, digest_of, sha256, verify
from storage.params import Params
from storage.parent import Parent
from storage.parent_info import REBUILD as REBUILD_PARENT
from storage.paths import Paths
from storage.remote import expand, fetch, fingerprint
from storage.sections import CorpusSource, PrepareCorpus
from storage.text_datasets import Columns, HubDataset, SkippedRows, file_documents, file_kind, hub_documents
from storage.tokenizer import (
    added_bos,
    chat_template,
    check_tokens,
    document_separator,
    load_tokenizer,
    tokenizer_digest,
    tokenizer_errors,
)
from storage.written_text import written_files
from tasks.puzzle.corpus.packing import Feed, Packer, SplitPlan
from tasks.puzzle.corpus.repeats import LONG_CHARS

_TRAINING_PLANS: tuple[tuple[SplitName, int | None], ...] = (("validation", 4), ("calibration", 3), ("train", None))
"""Splits of the training mix in the order of packing. Validation takes every fourth document, calibration every third
of the others: of a source of a dozen books each split has some, and at most half of any source is held out."""
_USUAL_ROLES = ("system", "user", "assistant")
_TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, AttributeError, LookupError),
    *(ArithmeticError, RecursionError),
)
"""What a chat template raises: on purpose, or where a message is not as it expects."""
_READS_PARTS = re.compile(r"""\.text\b|\[['"]text['"]\]""")
_LIBRARIES = ("datasets", "pyarrow", "tokenizers", "transformers")
_NOTES = (
    "Embedded documents are technical prose in English: pages of one module's docstrings, of one topic of Python's "
    f"reference, or of one package's description, of about {PAGE_CHARS} characters; .txt files are cut the same way.",
    f"No document and no paragraph longer than {LONG_CHARS} characters (white space aside) occurs twice, so none is in "
    "two splits; the marks of a chat template do not count as text.",
    "Outside of train, a sequence begins with a document and a document gives one sequence, short ones are followed by "
    "others; where a source has no more documents for a split, those that it has go on. Train is packed without gaps.",
    "A document that is cut in one split is not continued in another.",
)


@dataclass(frozen=True)
class _VersionedSource:
    """A source of params.yaml with its files and the version of their content."""

    params: CorpusSource
    files: tuple[str, ...]
    version: str

    @property
    def source(self) -> Source:
        """Return the source's name in the manifest."""
        if self.params.kind == "written":
            name = f"{self.params.written_kind} that the parent wrote (write_text)"
            return Source(name, self.version, "the parent's")
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
    mixes = _mixes(section, paths)
    tokenizer_version = tokenizer_digest(paths.parent)
    key = _key(section, params.run.seed, tokenizer_version, mixes)
    if _is_done(paths.corpus, key):
        return paths.corpus
    building = paths.corpus.with_name(f".{paths.corpus.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # a killed run's
    sources = [source for mix in mixes.values() for source in mix]
    skipped = {source.source: SkippedRows(source.source.name) for source in sources}
    try:
        tokenizer = _Tokenizer(parent, skipped, for_chats=any(source.params.messages for source in sources))
        packer = _packer(section, params.run.seed, mixes, tokenizer, building)
        splits = _write_splits(building, packer, section, skipped)
        ingredients = [
            Ingredient(mix, source.name, source.version, source.licence, packer.documents_of[mix, source], tokens)
            for (mix, source), tokens in sorted(packer.tokens_of.items())
        ]
        manifest = Manifest(
            key=key,
            content_hash=content_hash(splits),
            seq_len=section.seq_len,
            separator=tokenizer.separator,
            separator_id=tokenizer.separator_id,
            bos=tokenizer.bos,
            tokenizer=tokenizer_version,
            splits={name: splits[name] for name in (*SPLITS, *(name for name in splits if name not in SPLITS))},
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


def _mixes(section: PrepareCorpus, paths: Paths) -> dict[str, list[_VersionedSource]]:
    """Return the sources of each held-out domain, by name, and of the training mix, with their files and versions.

    Raises:
        InputError: a source cannot be read, or a file is in a domain and in the training mix.
    """
    mix_sources = {name: section.domains[name].sources for name in sorted(section.domains)}
    mix_sources[TRAINING_MIX] = section.sources
    mixes = {name: [_versioned(source, paths) for source in sources] for name, sources in mix_sources.items()}
    training = {file for source in mixes[TRAINING_MIX] for file in source.files}
    for name in section.domains:
        if shared := training & {file for source in mixes[name] for file in source.files}:
            raise InputError(
                f"prepare_corpus.domains.{name} must be held out, and {min(shared)} is in `sources` too; take it out "
                "of one of them"
            )
    return mixes


def _plans(section: PrepareCorpus) -> list[SplitPlan]:
    """Plan the splits in the order of packing."""
    domains = [
        SplitPlan(domain_split(name), name, section.domains[name].tokens, 1, f"prepare_corpus.domains.{name}.tokens")
        for name in sorted(section.domains)
    ]
    return domains + [
        SplitPlan(name, TRAINING_MIX, getattr(section, f"{name}_tokens"), every, f"prepare_corpus.{name}_tokens")
        for name, every in _TRAINING_PLANS
    ]


def _versioned(source: CorpusSource, paths: Paths) -> _VersionedSource:
    """Return a source with its files, and a version that changes with their content."""
    if source.kind == "embedded":
        return _VersionedSource(source, (), digest_of(embedded_versions()))
    if source.kind == "encyclopedia":
        return _VersionedSource(source, (), encyclopedia_version())
    if source.kind == "hub":
        return _VersionedSource(source, (), str(source.revision))
    if source.kind == "written":
        written = written_files(paths.written, source.written_kind)
        return _VersionedSource(source, tuple(written), digest_of(list(written.values())))
    files = expand(str(source.path))
    for name in files:
        file_kind(name)
    return _VersionedSource(source, tuple(files), digest_of([fingerprint(name) for name in files]))


def _key(section: PrepareCorpus, seed: int, tokenizer: str, mixes: Mapping[str, Sequence[_VersionedSource]]) -> str:
    return digest_of(
        {
            "params": section.model_dump(mode="json"),
            "seed": seed,
            "tokenizer": tokenizer,
            "sources": {name: [source.version for source in sources] for name, sources in mixes.items()},
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
    """The parent's tokenizer: documents in, token ids out, behind a BOS where the parent is used to one."""

    def __init__(self, parent: Parent, skipped: Mapping[Source, SkippedRows], *, for_chats: bool) -> None:
        folder = parent.folder
        self._tokenizer = load_tokenizer(folder, REBUILD_PARENT)
        if for_chats and not self._tokenizer.chat_template:
            raise InputError(
                f"the parent in {folder} has no chat template to render messages with; name a text column instead"
            )
        problem, way_out = f"the parent in {folder} has no chat template to choose", "name a text column instead"
        self._template = chat_template(self._tokenizer, problem, way_out) if for_chats else None
        vocabulary = self._tokenizer.get_vocab()
        separator = document_separator(self._tokenizer, folder)
        with tokenizer_errors(f"the tokenizer in {folder} cannot encode text", f"run `{REBUILD_PARENT}`"):
            self._bos_id = added_bos(self._tokenizer)
        self.bos: str | None = None if self._bos_id is None else self._tokenizer.bos_token
        self.separator: str = separator
        self.separator_id: int = vocabulary[separator]
        self._vocab_size = parent.config.vocab_size
        self._folder = folder
        check_tokens([self.separator_id, self._bos_id or 0], self._vocab_size, folder)
        self.skipped = skipped

    def takes(self, document: Document) -> bool:
        """Tell whether the template can render the document; other chats are counted."""
        return not document.messages or self._rendered(document) is not None

    def encode(self, documents: Sequence[Document]) -> Sequence[list[int] | None]:
        """Encode documents of one source, without separators; None for a chat that the template cannot render."""
        where = f"a document of {documents[0].source.name}, from {documents[0].path} on"
        if not documents[0].messages:
            return self._ids([document.text for document in documents], where, chats=False)
        texts = [self._rendered(document) for document in documents]
        ids = iter(self._ids([text for text in texts if text is not None], where, chats=True))
        return [None if text is None else next(ids) for text in texts]

    def _ids(self, texts: list[str], where: str, *, chats: bool) -> list[list[int]]:
        if not texts:
            return []
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # JSON can hold half a surrogate pair
        # In plain text "<|endoftext|>" is text; in a rendered chat it is the special token.
        options = {"add_special_tokens": False, "split_special_tokens": not chats, "verbose": False}
        way_out = "leave the document out, or use the parent's own tokenizer"
        with tokenizer_errors(f"the parent's tokenizer cannot encode {where}", way_out):
            ids: list[list[int]] = self._tokenizer(texts, **options)["input_ids"]
        check_tokens(map(max, filter(None, ids)), self._vocab_size, self._folder)
        if self._bos_id is None:
            return ids
        bos = [self._bos_id]
        return [tokens if tokens[:1] == bos else bos + tokens for tokens in ids]  # a chat template may write it

    def _rendered(self, document: Document) -> str | None:
        """Render a chat with the template; None, and a reason, where it cannot, or leaves something out."""
        words, reasons = _telling_words(document.messages), list[str]()
        for turns in _forms(document.messages, str(self._template)):
            try:
                text = self._tokenizer.apply_chat_template(turns, tokenize=False, chat_template=self._template)
            except _TEMPLATE_ERRORS as error:
                reasons.append(f"the parent's chat template refuses this chat ({' '.join(str(error).split())[:200]})")
                continue
            assert isinstance(text, str)
            if all(word in text for word in words):
                return text
            reasons.append("the parent's chat template leaves out tool calls, the last message, or unusual roles")
        self.skipped[document.source].skip(reasons[0], document.path)
        return None


def _forms(messages: Sequence[Message], template: str) -> Iterator[list[dict[str, Any]]]:
    """Yield a chat as templates want it: most read texts, some null beside tool calls, some lists of parts."""
    turns = [message.for_template for message in messages]
    yield turns
    if any("tool_calls" in turn and not turn["content"] for turn in turns):
        yield [{**turn, "content": None} if "tool_calls" in turn and not turn["content"] else turn for turn in turns]
    if _READS_PARTS.search(template):
        yield [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def _telling_words(messages: Sequence[Message]) -> list[str]:
    """List words that show whether a template writes what some leave out: the functions that are called, and the
    longest word of the last message and of those with unusual roles."""
    names = [call["name"] for message in messages for call in message.tool_calls]
    contents = [message.content for message in messages if message.role not in _USUAL_ROLES] + [messages[-1].content]
    return names + [max(re.findall(r"\w+", content), key=len, default="") for content in contents]


def _packer(
    section: PrepareCorpus,
    seed: int,
    mixes: Mapping[str, Sequence[_VersionedSource]],
    tokenizer: _Tokenizer,
    scratch: Path,
) -> Packer:
    def feed(versioned: _VersionedSource, folder: Path) -> Feed:
        documents = _documents(versioned, seed, folder, tokenizer.skipped[versioned.source])
        return Feed(versioned.source.name, versioned.params.weight, filter(tokenizer.takes, documents))

    feeds = {
        name: [feed(versioned, scratch / f"{name}.{index}") for index, versioned in enumerate(sources)]
        for name, sources in mixes.items()
    }
    return Packer(feeds, _plans(section), section.seq_len, tokenizer.encode, tokenizer.separator_id, seed)


def _documents(versioned: _VersionedSource, seed: int, scratch: Path, skipped: SkippedRows) -> Iterator[Document]:
    """Read the documents of a source; a file of S3 exists in `scratch` only while it is read."""
    settings, source = versioned.params, versioned.source
    columns = Columns(settings.text, settings.messages)
    if settings.kind == "embedded":
        yield from embedded_documents(seed)
    elif settings.kind == "encyclopedia":
        yield from encyclopedia_documents(seed)
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
    building: Path, packer: Packer, section: PrepareCorpus, skipped: Mapping[Source, SkippedRows]
) -> dict[str, Split]:
    try:
        splits = {plan.name: _write(building, plan.name, packer, section.seq_len) for plan in _plans(section)}
    except InputError:
        _check(skipped)  # that most rows cannot be used says more than that a source ended
        raise
    _check(skipped)
    return splits


def _check(skipped: Mapping[Source, SkippedRows]) -> None:
    for rows in skipped.values():
        rows.log()
        rows.check()


def _write(building: Path, name: str, packer: Packer, seq_len: int) -> Split:
    path = split_path(building, name)
    sequences, token_sha256 = write_split(path, packer.sequences(name), seq_len)
    return Split(sequences, sequences * seq_len, packer.documents[name], token_sha256, sha256(path))


def _move_in(building: Path, corpus: Path, manifest: Manifest) -> None:
    """Replace the corpus; it has no manifest from the first moved file to the last, so a mixture is never read."""
    corpus.mkdir(parents=True, exist_ok=True)
    drop_manifest(corpus)
    for name in manifest.splits:
        split_path(building, name).replace(split_path(corpus, name))
    for stranger in set(corpus.iterdir()) - {split_path(corpus, name) for name in manifest.splits}:
        shutil.rmtree(stranger) if stranger.is_dir() else stranger.unlink()
    write_manifest(corpus, manifest)
