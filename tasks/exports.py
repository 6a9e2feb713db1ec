"""A checkpoint in the forms that stock runtimes load, a folder each (docs/runtimes.md).

In: any checkpoint in nemotron-nas or Llama form. Out: `<folder>/<format>/`, written tensor by tensor and taken as it is
when it is there already, and `<folder>/exports.json`, which says what each runtime takes.
"""

import functools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from gguf import GGUFWriter
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor
from tqdm import tqdm

from storage.checkpoints import Checkpoint, CheckpointWriter
from storage.files import InputError, digest_of, read_json, sha256, write_json
from storage.gguf_child import FileType, write_gguf
from storage.gguf_tokenizer import add_tokenizer
from storage.model_config import (
    CHILD_ARCHITECTURE,
    EMBEDDING,
    LM_HEAD,
    NORM,
    ModelConfig,
    expected_shapes,
    from_config_json,
    to_llama,
    to_nemotron_nas,
)
from storage.parent import TOKENIZER_FILES
from storage.paths import EXPORTS_OVERVIEW
from storage.pieces import Pieces, code_digest
from storage.records import Attention, ExportFormat, Ffn
from tasks.check_runtimes import runtimes_lines, runtimes_of
from tasks.puzzle.padding import padded_block, padded_config, padded_variants
from tasks.puzzle.runtimes import format_refusals

_KEPT = (*TOKENIZER_FILES, "README.md", "LICEN[CS]E*", "USE_POLICY*", "NOTICE*")
"""Patterns of what travels into every folder; a GGUF has the tokenizer within."""
_REMOTE_CODE = Path(__file__).parents[1] / "storage/remote_code"
_CODE = (_REMOTE_CODE / "configuration_nemotron_nas.py", _REMOTE_CODE / "modeling_nemotron_nas.py")
_AUTO_MAP = {
    "AutoConfig": "configuration_nemotron_nas.NemotronNasConfig",
    "AutoModelForCausalLM": f"modeling_nemotron_nas.{CHILD_ARCHITECTURE}",
}
_CARD, _LOAD, _PROVENANCE = "README.md", "## Load it\n", "## Provenance\n"
_ABOUT = {
    "nemotron-nas": """With the class in this folder (`import tasks.puzzle.child` of Puzzle Pipeline does without it):

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
```

exports.json beside this folder says which other runtimes compute it right.""",
    "plain": "A plain model of the parent's family, since all blocks are alike, for any tool that knows the family.",
    "padded-llama": "The child as a plain Llama, with zeros where it has nothing: any tool that loads a Llama computes "
    "the same, no faster than the parent.",
    "gguf": "One file with tokenizer and chat template for llama.cpp: `llama-server -m FILE`.",
}
"""How to load a form, in place of what the child's own card says of it."""
_FILE_TYPES: dict[str, FileType] = {"gguf-f32": "F32", "gguf-f16": "F16", "gguf-bf16": "BF16", "gguf-q8_0": "Q8_0"}
_WRITERS = ("checkpoints", "gguf_child", "gguf_tokenizer", "model_config")
_ELEMENTS = 2**24
"""Of a tensor that are float32 at once."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to export: `name` for files and people, geometry, blocks, `special_tokens` and `dtype` as
    config.json has them.
    """

    name: str
    checkpoint: Checkpoint
    config: ModelConfig
    blocks: tuple[tuple[Attention, Ffn], ...]
    special_tokens: dict[str, Any]
    dtype: str

    @functools.cached_property
    def digest(self) -> str:
        """Of all tensors: from their checksums, or from the files of a checkpoint that others wrote."""
        files = set() if self.checkpoint.checksums else set(self.checkpoint.files.values())
        return digest_of(self.checkpoint.checksums or {file.name: sha256(file) for file in files})


def read_source(name: str, folder: Path, rebuild: str) -> Source:
    """A checkpoint in `folder`, in nemotron-nas or Llama form, ours or another's.

    Raises:
        InputError: config.json is of another form, quantised, or does not fit the tensors, with the first that differ.
    """
    where = str(folder / "config.json")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; expected a checkpoint folder; run `{rebuild}`")
    raw = read_json(folder / "config.json", rebuild)
    config, blocks = from_config_json(raw, where)
    if raw.get("quantization_config"):
        raise InputError(f"{where}: the checkpoint is quantised; exports are made of bf16, fp16 or fp32 weights")
    checkpoint = Checkpoint(folder, rebuild)
    _check_tensors(checkpoint, config, blocks)
    special = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw}
    dtype = str(checkpoint.tensor(EMBEDDING).dtype).removeprefix("torch.")
    return Source(name, checkpoint, config, tuple(blocks), special, dtype)


def _check_tensors(checkpoint: Checkpoint, config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]]) -> None:
    expected, there, folder = expected_shapes(config, blocks), set(checkpoint.files), checkpoint.folder
    if config.tie_embeddings and LM_HEAD in there:  # some keep a copy
        if not checkpoint.tensor(LM_HEAD).equal(checkpoint.tensor(EMBEDDING)):
            raise InputError(
                f"{folder}: config.json says that the embeddings are tied, and {LM_HEAD} is another tensor"
            )
        there.remove(LM_HEAD)
    for problem, names in (("lacks", set(expected) - there), ("does not ask for", there - set(expected))):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            who = "the checkpoint" if problem == "lacks" else "config.json"
            raise InputError(f"{folder}: {who} {problem} {len(names)} tensors ({shown}); run `{checkpoint.rebuild}`")
    for name, shape in expected.items():
        if (found := checkpoint.shape(name)) != shape:
            raise InputError(
                f"{folder}: tensor {name} has shape {found}, config.json asks for {shape}; run `{checkpoint.rebuild}`"
            )


def check(source: Source, formats: Sequence[ExportFormat], what: str) -> None:
    """Raise InputError where something asked for would be computed wrong, before anything is written.

    Args:
        source: the checkpoint.
        formats: asked for.
        what: where they were asked for, such as `export_child.formats`.
    """
    for wanted in formats:
        if refused := format_refusals(wanted, source.config, source.blocks):
            reasons = "; ".join(f"{one.text} ({one.way_out})" for one in refused)
            raise InputError(f"{source.name} cannot be exported as {wanted}: {reasons}; or take {wanted} out of {what}")
        if wanted in _FILE_TYPES:
            add_tokenizer(GGUFWriter(None, "llama"), source.checkpoint.folder, source.config.vocab_size)


def exported(out: Path, source: Source) -> list[ExportFormat]:
    """Formats that `out`, which is made, already holds of a checkpoint.

    Raises:
        InputError: it holds something else, which exports would delete, or it cannot be made.
    """
    checkpoint, other = source.checkpoint.folder.resolve(), "name another folder"
    if out.resolve() == checkpoint or out.resolve() in checkpoint.parents:
        raise InputError(f"{out} holds the checkpoint {source.checkpoint.folder}; {other}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made a folder ({error.strerror}); {other}") from error
    pieces = Pieces(out, "the export again")
    records = {name: pieces.get(name) for name in pieces.names()}
    ours = {EXPORTS_OVERVIEW, *(file for record in records.values() for file in record["files"])}
    begun = {".pieces", *map(_begun, get_args(ExportFormat))}
    for path in (path.relative_to(out) for path in sorted(out.rglob("*")) if path.is_file()):
        if str(path) not in ours and path.parts[0] not in begun:
            raise InputError(f"{out} holds something else, {path}; move it, or {other}")
    if any(record["facts"].get("source") != source.digest for record in records.values()):
        raise InputError(f"{out} holds exports of another checkpoint; {other}")
    return [one for one in get_args(ExportFormat) if one in records]


def _begun(wanted: str) -> str:
    """The folder that a format is written to before it is whole."""
    return f".{wanted}"


def begin(
    source: Source, formats: Sequence[ExportFormat], folder: Path, max_shard_gib: float
) -> list[tuple[ExportFormat, str]]:
    """What is still to be written, with its key; everything else in `folder` that is not of these formats goes."""
    pieces = Pieces(folder, source.checkpoint.rebuild)
    files = (*_CODE, *_kept(source))
    common = {
        "name": source.name,
        "tensors": source.digest,
        "model": [source.config.to_json(), [list(map(str, of)) for of in source.blocks], source.special_tokens],
        "files": {file.name: sha256(file) for file in files},
        "max_shard_gib": max_shard_gib,
        "code": code_digest("tasks.exports", *(f"storage.{name}" for name in _WRITERS)),
        "versions": {name: metadata.version(name) for name in ("gguf", "tokenizers", "safetensors")},
    }
    keys: dict[str, str] = {wanted: digest_of({**common, "format": wanted}) for wanted in formats}
    left = pieces.keep_only(keys)
    return [(wanted, keys[wanted]) for wanted in formats if wanted in left]


@task(cache_policy=NO_CACHE)
def export(piece: tuple[ExportFormat, str], source: Source, folder: Path, max_shard_gib: float) -> None:
    """Write one format, given with its key, to `folder`; it counts once its record is there."""
    wanted, key = piece
    into, final = folder / _begun(wanted), folder / wanted
    for old in (into, final):  # what a killed run left
        shutil.rmtree(old, ignore_errors=True)
    into.mkdir(parents=True)
    if wanted in _FILE_TYPES:
        _write_gguf(source, into / gguf_name(source.name, wanted), _FILE_TYPES[wanted])
    else:
        _write_folder(wanted, source, into, int(max_shard_gib * 2**30))
    _write_words(wanted, source, into)
    written = {final / file.relative_to(into): sha256(file) for file in into.rglob("*") if file.is_file()}
    Pieces(folder, source.checkpoint.rebuild).finish(wanted, key, written, {"source": source.digest})
    into.rename(final)


def gguf_name(name: str, wanted: str) -> str:
    """Of the file in the folder of a gguf format."""
    return f"{name}-{_FILE_TYPES[wanted]}.gguf"


def _write_gguf(source: Source, path: Path, file_type: FileType) -> None:
    def rows(name: str) -> Iterator[NDArray[np.float32]]:
        tensor = source.checkpoint.tensor(name)
        return (part.float().numpy() for part in tensor.split(max(1, _ELEMENTS // tensor[0].numel())))

    config = source.config
    tokenizer = functools.partial(add_tokenizer, folder=source.checkpoint.folder, vocab_size=config.vocab_size)
    write_gguf(path, config, source.blocks, rows, file_type, name=source.name, tokenizer=tokenizer)


def _write_folder(wanted: ExportFormat, source: Source, into: Path, max_shard_bytes: int) -> None:
    """A checkpoint folder: tensors, then config, tokenizer, licence and card."""
    config, special, dtype = source.config, source.special_tokens, source.dtype
    to: tuple[Attention, Ffn] | None = None
    if wanted == "nemotron-nas":
        raw = to_nemotron_nas(config, source.blocks, special, dtype)
        raw = {"architectures": raw.pop("architectures"), "auto_map": _AUTO_MAP, **raw}
        for file in _CODE:
            shutil.copyfile(file, into / file.name)
    else:
        to = padded_variants(source.blocks) if wanted == "padded-llama" else source.blocks[0]
        said = padded_config(config) if wanted == "padded-llama" else config
        raw = to_llama(said, (len(source.blocks), *to), special, dtype)
    writer = CheckpointWriter(into, max_shard_bytes)
    for tensors in tqdm(
        _tensors(source, to if wanted == "padded-llama" else None),
        desc=wanted,
        total=len(source.blocks) + 2,
        unit="block",
        disable=None,
    ):
        writer.add(tensors)
    writer.finish()
    write_json(into / "config.json", raw)


def _write_words(wanted: ExportFormat, source: Source, into: Path) -> None:
    """Tokenizer, which a GGUF has within, licence, and the card, which says how to load this form."""
    for file in _kept(source):
        if file.name != _CARD and not (wanted in _FILE_TYPES and any(file.match(one) for one in TOKENIZER_FILES)):
            shutil.copyfile(file, into / file.name)
    card = source.checkpoint.folder / _CARD
    if card.is_file():
        head, _, rest = card.read_text(encoding="utf-8").partition(_LOAD)
        _, mark, behind = rest.partition(_PROVENANCE)
        about = _ABOUT.get(wanted, _ABOUT["gguf"])
        (into / _CARD).write_text(f"{head.rstrip()}\n\n{_LOAD}\n{about}\n\n{mark}{behind}", encoding="utf-8")


def _tensors(source: Source, to: tuple[Attention, Ffn] | None) -> Iterator[Mapping[str, Tensor]]:
    """Embedding, blocks, final norm and head, as they are or padded to `to`."""
    checkpoint = source.checkpoint
    yield {EMBEDDING: checkpoint.tensor(EMBEDDING)}
    for index, block in enumerate(source.blocks):
        tensors = {short: checkpoint.tensor(name) for short, name in checkpoint.block_names(index).items()}
        if to:
            tensors = padded_block(source.config, block, to, tensors, getattr(torch, source.dtype))
        yield {f"model.layers.{index}.{short}": tensor for short, tensor in tensors.items()}
    yield {name: checkpoint.tensor(name) for name in (NORM, *([] if source.config.tie_embeddings else [LM_HEAD]))}


def _kept(source: Source) -> list[Path]:
    found = {file for pattern in _KEPT for file in source.checkpoint.folder.glob(pattern) if file.is_file()}
    return sorted(found)


def write_overview(source: Source, formats: Sequence[ExportFormat], folder: Path) -> dict[str, Any]:
    """Write exports.json: files with sizes and checksums of each format, and what each runtime takes.

    Returns:
        What it holds.
    """
    pieces = Pieces(folder, source.checkpoint.rebuild)
    overview = {
        "name": source.name,
        "formats": {
            wanted: {
                "files": {
                    file: {"bytes": (folder / file).stat().st_size, "sha256": digest}
                    for file, digest in sorted(pieces.get(wanted)["files"].items())
                }
            }
            for wanted in formats
        },
        "runtimes": runtimes_of(source.config, source.blocks),
    }
    write_json(folder / EXPORTS_OVERVIEW, overview)
    return overview


def overview_text(overview: Mapping[str, Any], folder: Path) -> str:
    """exports.json as a table for people."""
    lines = [f"{overview['name']}, exported to {folder}", f"  {'format':<14} {'size':>12}"]
    for name, of in overview["formats"].items():
        lines.append(f"  {name:<14} {sum(file['bytes'] for file in of['files'].values()) / 2**20:>8,.1f} MiB")
    return "\n".join([*lines, *(f"  {line}" for line in runtimes_lines(overview["runtimes"])), ""])
