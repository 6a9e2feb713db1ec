"""A checkpoint in the forms that stock runtimes load, a folder each (RUNTIMES.md).

In: any checkpoint in nemotron-nas or Llama form. Out: `<folder>/<format>/`, written tensor by tensor and taken as it is
when it is there already, and `<folder>/exports.json`, which says what each runtime takes.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
"""Patterns of what travels unchanged into every folder but GGUF's."""
_REMOTE_CODE = Path(__file__).parents[1] / "storage/remote_code"
_CODE = (_REMOTE_CODE / "configuration_nemotron_nas.py", _REMOTE_CODE / "modeling_nemotron_nas.py")
_AUTO_MAP = {
    "AutoConfig": "configuration_nemotron_nas.NemotronNasConfig",
    "AutoModelForCausalLM": f"modeling_nemotron_nas.{CHILD_ARCHITECTURE}",
}
_ABOUT = {
    "plain": "A plain model of the parent's family, since all blocks are alike: any tool loads it.",
    "padded-llama": "The same model as a plain Llama, with zeros where the child has nothing: any tool that loads a "
    "Llama computes it, no faster than the parent.",
}
"""Behind the card, which is of the nemotron-nas form."""
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


def exported(name: str, out: Path, checkpoint: Path) -> list[ExportFormat]:
    """Formats that `out` already holds of a model of that name.

    Raises:
        InputError: it holds something else as well, which exports would delete.
    """
    known = get_args(ExportFormat)
    if out.exists() and (
        not out.is_dir() or {one.name for one in out.iterdir()} - {*known, EXPORTS_OVERVIEW, ".pieces"}
    ):
        raise InputError(f"{out} holds something else; expected a new folder, an empty one, or one of earlier exports")
    if out.resolve() == checkpoint.resolve() or out.resolve() in checkpoint.resolve().parents:
        raise InputError(f"{out} holds the checkpoint {checkpoint}; name another folder")
    if (out / EXPORTS_OVERVIEW).is_file() and (
        of := read_json(out / EXPORTS_OVERVIEW, "the export again")["name"]
    ) != name:
        raise InputError(f"{out} holds exports of {of}, not of {name}; name another folder")
    done = Pieces(out, "").names()
    if out.is_dir() and set(done) - set(known):
        raise InputError(f"{out} holds pieces of something else; name another folder")
    return [one for one in known if one in done]


def begin(
    source: Source, formats: Sequence[ExportFormat], folder: Path, max_shard_gib: float
) -> list[tuple[ExportFormat, str]]:
    """What is still to be written, with its key; everything else in `folder` that is not of these formats goes."""
    pieces = Pieces(folder, source.checkpoint.rebuild)
    files = (*_CODE, *_kept(source))
    common = {
        "name": source.name,
        "tensors": _digest(source),
        "model": [source.config.to_json(), [list(map(str, of)) for of in source.blocks], source.special_tokens],
        "files": {file.name: sha256(file) for file in files},
        "max_shard_gib": max_shard_gib,
        "code": code_digest("tasks.exports", *(f"storage.{name}" for name in _WRITERS)),
        "versions": {name: metadata.version(name) for name in ("gguf", "tokenizers", "safetensors")},
    }
    keys: dict[str, str] = {wanted: digest_of({**common, "format": wanted}) for wanted in formats}
    left = pieces.keep_only(keys)
    return [(wanted, keys[wanted]) for wanted in formats if wanted in left]


def _digest(source: Source) -> str:
    """Of all tensors: from their checksums, or from the files of a checkpoint that others wrote."""
    checkpoint = source.checkpoint
    files = {file.name: sha256(file) for file in set(checkpoint.files.values())} if not checkpoint.checksums else {}
    return digest_of(checkpoint.checksums or files)


@task(cache_policy=NO_CACHE)
def export(piece: tuple[ExportFormat, str], source: Source, folder: Path, max_shard_gib: float) -> None:
    """Write one format, given with its key, to `folder`; it counts once its record is there."""
    wanted, key = piece
    into = folder / wanted
    shutil.rmtree(into, ignore_errors=True)  # what a killed run left
    into.mkdir(parents=True)
    if wanted in _FILE_TYPES:
        _write_gguf(source, into / gguf_name(source.name, wanted), _FILE_TYPES[wanted])
    else:
        _write_folder(wanted, source, into, int(max_shard_gib * 2**30))
    Pieces(folder, source.checkpoint.rebuild).finish(wanted, key, [file for file in into.rglob("*") if file.is_file()])


def gguf_name(name: str, wanted: str) -> str:
    """Of the file in the folder of a gguf format."""
    return f"{name}-{_FILE_TYPES[wanted]}.gguf"


def _write_gguf(source: Source, path: Path, file_type: FileType) -> None:
    def rows(name: str) -> Iterator[NDArray[np.float32]]:
        tensor = source.checkpoint.tensor(name)
        return (part.float().numpy() for part in tensor.split(max(1, _ELEMENTS // tensor[0].numel())))

    config = source.config
    tokenizer = partial(add_tokenizer, folder=source.checkpoint.folder, vocab_size=config.vocab_size)
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
    for file in _kept(source):
        shutil.copyfile(file, into / file.name)
    if wanted != "nemotron-nas" and (into / "README.md").is_file():
        with (into / "README.md").open("a", encoding="utf-8") as card:
            card.write(f"\n## This folder\n\n{_ABOUT[wanted]}\n")


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
