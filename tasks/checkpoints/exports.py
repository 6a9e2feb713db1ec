"""A checkpoint in the formats that stock runtimes load, a folder for each format (docs/runtimes.md).

In: any checkpoint in nemotron-nas or Llama form. Out: `<folder>/<format>/`, written tensor by tensor and taken as it is
when it is there already, and `<folder>/exports.json`, which says what each runtime takes. The formats are the rows of
storage/formats.py; a kind of format has its writer in WRITERS.
"""

import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor
from tqdm import tqdm

from storage.block_configs import to_anymodel
from storage.checkpoints import Checkpoint, CheckpointWriter
from storage.code_digest import code_digest
from storage.files import InputError, digest_of, sha256, to_run, write_json, write_sealed
from storage.formats import FORMATS, ExportFormat, FormatKind, FormatName
from storage.gguf_child import write_gguf
from storage.gguf_tokenizer import add_tokenizer
from storage.model_config import EMBEDDING, LM_HEAD, NORM, ModelConfig, special_token_ids, to_hf
from storage.nemotron_nas import CHILD_ARCHITECTURE, from_config_json, to_nemotron_nas
from storage.paths import EXPORTS_OVERVIEW
from storage.pieces import Pieces
from storage.side_files import CARD, GENERATION_FILES, LICENCE_FILES, card_text, copy_side_files, side_files
from storage.variants import Attention, Ffn
from storage.weights import check_weights
from tasks.checkpoints.check_runtimes import verdict_lines, verdicts_json
from tasks.puzzle.model.padding import padded_block, padded_config, padded_variants
from tasks.puzzle.runtimes.rules import Verdict, format_refusals, verdicts

_LOAD, _PROVENANCE = "## Load it\n", "## Provenance\n"
_COPIED = (*GENERATION_FILES, CARD, *LICENCE_FILES)
"""Patterns of the files that are copied into every folder; a GGUF file holds the tokenizer itself."""
_REMOTE_CODE = Path(__file__).parents[2] / "storage/remote_code"
_CODE = (_REMOTE_CODE / "configuration_nemotron_nas.py", _REMOTE_CODE / "modeling_nemotron_nas.py")
_AUTO_MAP = {
    "AutoConfig": "configuration_nemotron_nas.NemotronNasConfig",
    "AutoModel": "modeling_nemotron_nas.DeciLMModel",
    "AutoModelForCausalLM": f"modeling_nemotron_nas.{CHILD_ARCHITECTURE}",
}
_FLOAT32_ELEMENTS = 2**24
"""Elements of a tensor that are float32 at once."""


@dataclass(frozen=True)
class CheckpointToExport:
    """A checkpoint that is exported.

    `name` names it in files and for people; `special_tokens` and `dtype` are as its config.json has them.
    """

    name: str
    checkpoint: Checkpoint
    config: ModelConfig
    blocks: tuple[tuple[Attention, Ffn], ...]
    special_tokens: dict[str, Any]
    dtype: str

    @functools.cached_property
    def digest(self) -> str:
        """Return the digest of all tensors: of their checksums, or of the files of a checkpoint that others wrote."""
        files = set() if self.checkpoint.checksums else set(self.checkpoint.files.values())
        return digest_of(self.checkpoint.checksums or {file.name: sha256(file) for file in files})

    @property
    def copied_files(self) -> list[Path]:
        """List the tokenizer, card and licence files of the checkpoint."""
        return side_files(self.checkpoint.folder, _COPIED)


@dataclass(frozen=True)
class ExportedFile:
    """Size and checksum of a file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ExportsOverview:
    """The content of exports.json: the files of each format by path in the exports' folder, and what runtimes take."""

    name: str
    formats: Mapping[str, Mapping[str, ExportedFile]]
    verdicts: Sequence[Verdict]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of exports.json."""
        formats = {}
        for name, files in self.formats.items():
            formats[name] = {
                "files": {path: {"bytes": file.num_bytes, "sha256": file.sha256} for path, file in files.items()}
            }
        return {"name": self.name, "formats": formats, "runtimes": verdicts_json(self.verdicts)}


# --- what is exported, and whether it can be -------------------------------------------------------------------------


def read_checkpoint(name: str, folder: Path, rebuild: str, is_foreign: bool = False) -> CheckpointToExport:
    """Read a checkpoint in `folder`, in nemotron-nas or Llama form, ours or (`is_foreign`) another's.

    Raises:
        InputError: config.json is of another form, quantised, or does not fit the tensors, with the first that differ.
    """
    config_json = folder / "config.json"
    if not config_json.is_file():
        raise InputError(f"{folder} has no config.json; expected a checkpoint folder; {to_run(rebuild)}")
    checkpoint = Checkpoint(folder, rebuild, is_foreign)
    raw = checkpoint.config_json()
    config, blocks = from_config_json(raw, str(config_json))
    check_weights(checkpoint, raw, config, blocks)
    side_files(folder, _COPIED)
    special_tokens = special_token_ids(raw, str(config_json))
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    return CheckpointToExport(name, checkpoint, config, tuple(blocks), special_tokens, dtype)


def check(source: CheckpointToExport, formats: Sequence[FormatName], setting: str) -> None:
    """Raise InputError where a format would be computed wrong, before anything is written.

    Args:
        source: the checkpoint.
        formats: the formats to write.
        setting: the setting that names them, such as `export_child.formats`.
    """
    for name in formats:
        refusals = format_refusals(name, source.config, source.blocks)
        if refusals:
            reasons = "; ".join(f"{refusal.text} ({refusal.way_out})" for refusal in refusals)
            raise InputError(f"{source.name} cannot be exported as {name}: {reasons}; or take {name} out of {setting}")
        if FORMATS[name].is_gguf:
            add_tokenizer(GGUFWriter(None, "llama"), source.checkpoint.folder, source.config.vocab_size)


def exported(out: Path, source: CheckpointToExport) -> list[FormatName]:
    """List the formats that the folder `out`, which is made, already holds of a checkpoint.

    Raises:
        InputError: it holds something else, which exports would delete, or it cannot be made.
    """
    checkpoint, advice = source.checkpoint.folder.resolve(), "name another folder"
    if out.resolve() == checkpoint or out.resolve() in checkpoint.parents:
        raise InputError(f"{out} holds the checkpoint {source.checkpoint.folder}; {advice}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made a folder ({error.strerror}); {advice}") from error
    pieces = Pieces(out, "the export again")
    records = {name: pieces.get(name) for name in pieces.names()}
    ours = {EXPORTS_OVERVIEW, *(file for record in records.values() for file in record["files"])}
    our_folders = {".pieces", *map(_unfinished, FORMATS)}
    for path in (path.relative_to(out) for path in sorted(out.rglob("*")) if path.is_file()):
        if str(path) not in ours and path.parts[0] not in our_folders:
            raise InputError(f"{out} holds something else, {path}; move it, or {advice}")
    if any(record["facts"].get("source") != source.digest for record in records.values()):
        raise InputError(f"{out} holds exports of another checkpoint; {advice}")
    return [name for name in FORMATS if name in records]


def begin(
    source: CheckpointToExport, formats: Sequence[FormatName], folder: Path, max_shard_gib: float
) -> list[tuple[FormatName, str]]:
    """List the formats still to be written, with their keys; everything else in `folder` that is not of these goes."""
    pieces = Pieces(folder, source.checkpoint.rebuild)
    blocks = [[str(attention), str(ffn)] for attention, ffn in source.blocks]
    common = {
        "name": source.name,
        "tensors": source.digest,
        "model": [source.config.to_json(), blocks, source.special_tokens],
        "files": {
            **{file.name: sha256(file) for file in _CODE},
            **{str(file.relative_to(source.checkpoint.folder)): sha256(file) for file in source.copied_files},
        },
        "max_shard_gib": max_shard_gib,
        "code": code_digest("tasks.checkpoints.exports:export"),
        "versions": {name: metadata.version(name) for name in ("gguf", "tokenizers", "safetensors")},
    }
    keys: dict[str, str] = {name: digest_of({**common, "format": name}) for name in formats}
    left = pieces.keep_only(keys)
    return [(name, keys[name]) for name in formats if name in left]


def _unfinished(format_name: FormatName) -> str:
    """Return the folder that a format is written to before it is whole."""
    return f".{format_name}"


# --- writing ---------------------------------------------------------------------------------------------------------


@task(cache_policy=NO_CACHE)
def export(piece: tuple[FormatName, str], source: CheckpointToExport, folder: Path, max_shard_gib: float) -> None:
    """Write one format, given with its key, to `folder`; it counts once its record is there."""
    name, key = piece
    unfinished, final = folder / _unfinished(name), folder / name
    for leftover in (unfinished, final):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    export_format = FORMATS[name]
    _copy_files(source, export_format, unfinished)
    _write_card(source, export_format, unfinished)
    WRITERS[export_format.kind](source, export_format, unfinished, int(max_shard_gib * 2**30))
    written = {final / file.relative_to(unfinished): sha256(file) for file in unfinished.rglob("*") if file.is_file()}
    Pieces(folder, source.checkpoint.rebuild).finish(name, key, written, {"source": source.digest})
    unfinished.rename(final)


def _write_nemotron_nas(
    source: CheckpointToExport, export_format: ExportFormat, into: Path, max_shard_bytes: int
) -> None:
    """Write the child's tensors as they are, and the classes that transformers loads them with."""
    for file in _CODE:
        shutil.copyfile(file, into / file.name)
    raw = to_nemotron_nas(source.config, source.blocks, source.special_tokens, source.dtype)
    config_json = {"architectures": raw.pop("architectures"), "auto_map": _AUTO_MAP, **raw}
    _write_checkpoint(source, export_format, config_json, _tensors(source), into, max_shard_bytes)


def _write_padded(source: CheckpointToExport, export_format: ExportFormat, into: Path, max_shard_bytes: int) -> None:
    """Write a Llama or a Qwen3 of equal blocks, the tensors padded with zeros."""
    block, config = padded_variants(source.blocks), padded_config(source.config)
    config_json = to_hf(config, len(source.blocks), block, source.special_tokens, source.dtype)
    _write_checkpoint(source, export_format, config_json, _tensors(source, pad_to=block), into, max_shard_bytes)


def _write_plain(source: CheckpointToExport, export_format: ExportFormat, into: Path, max_shard_bytes: int) -> None:
    """Write a model of the parent's family, whose blocks are alike."""
    config_json = to_hf(source.config, len(source.blocks), source.blocks[0], source.special_tokens, source.dtype)
    _write_checkpoint(source, export_format, config_json, _tensors(source), into, max_shard_bytes)


def _write_anymodel(source: CheckpointToExport, export_format: ExportFormat, into: Path, max_shard_bytes: int) -> None:
    """Write a model of the parent's family whose config.json lists what differs in each block."""
    config_json = to_anymodel(source.config, source.blocks, source.special_tokens, source.dtype)
    _write_checkpoint(source, export_format, config_json, _tensors(source), into, max_shard_bytes)


def _write_gguf(source: CheckpointToExport, export_format: ExportFormat, into: Path, _max_shard_bytes: int) -> None:
    """Write one GGUF file, whatever its size."""

    def read_rows(name: str) -> Iterator[NDArray[np.float32]]:
        tensor = source.checkpoint.tensor(name)
        return (part.float().numpy() for part in tensor.split(max(1, _FLOAT32_ELEMENTS // tensor[0].numel())))

    assert export_format.file_type is not None, export_format.name
    config, path = source.config, into / export_format.gguf_name(source.name)
    tokenizer = functools.partial(add_tokenizer, folder=source.checkpoint.folder, vocab_size=config.vocab_size)
    write_gguf(path, config, source.blocks, read_rows, export_format.file_type, name=source.name, tokenizer=tokenizer)


WRITERS: Mapping[FormatKind, Callable[[CheckpointToExport, ExportFormat, Path, int], None]] = {
    "nemotron-nas": _write_nemotron_nas,
    "padded-llama": _write_padded,
    "padded-qwen3": _write_padded,
    "plain": _write_plain,
    "anymodel": _write_anymodel,
    "gguf": _write_gguf,
}
"""Writes weights and config of a kind of format into a folder: (checkpoint, format, folder, bytes of a shard)."""


def _write_checkpoint(
    source: CheckpointToExport,
    export_format: ExportFormat,
    config_json: Mapping[str, Any],
    tensors: Iterator[Mapping[str, Tensor]],
    into: Path,
    max_shard_bytes: int,
) -> None:
    """Write tensors in shards of safetensors, config.json, and the checksums of all files."""
    writer = CheckpointWriter(into, max_shard_bytes)
    for part in tqdm(tensors, desc=export_format.name, total=len(source.blocks) + 2, unit="block", disable=None):
        writer.add(part)
    write_json(into / "config.json", config_json)
    writer.finish()


def _tensors(source: CheckpointToExport, pad_to: tuple[Attention, Ffn] | None = None) -> Iterator[Mapping[str, Tensor]]:
    """Yield embedding, blocks, final norm and head; blocks as they are, or padded to one shape."""
    checkpoint = source.checkpoint
    yield {EMBEDDING: checkpoint.tensor(EMBEDDING)}
    for index, block in enumerate(source.blocks):
        tensors = {short: checkpoint.tensor(name) for short, name in checkpoint.block_names(index).items()}
        if pad_to:
            tensors = padded_block(source.config, block, pad_to, tensors, getattr(torch, source.dtype))
        yield {f"model.layers.{index}.{short}": tensor for short, tensor in tensors.items()}
    yield {name: checkpoint.tensor(name) for name in (NORM, *([] if source.config.tie_embeddings else [LM_HEAD]))}


def _copy_files(source: CheckpointToExport, export_format: ExportFormat, into: Path) -> None:
    """Copy tokenizer and licence files; a GGUF file holds the tokenizer itself."""
    patterns = LICENCE_FILES if export_format.is_gguf else (*GENERATION_FILES, *LICENCE_FILES)
    folder = source.checkpoint.folder
    copy_side_files(side_files(folder, patterns), folder, into)


def _write_card(source: CheckpointToExport, export_format: ExportFormat, into: Path) -> None:
    """Write the checkpoint's card, which says how to load this format in place of the checkpoint."""
    card = card_text(source.checkpoint.folder)
    if card is not None:
        head, _, rest = card.partition(_LOAD)
        _, mark, provenance = rest.partition(_PROVENANCE)
        text = f"{head.rstrip()}\n\n{_LOAD}\n{export_format.load_text}\n\n{mark}{provenance}"
        (into / CARD).write_text(text, encoding="utf-8")


def write_overview(source: CheckpointToExport, formats: Sequence[FormatName], folder: Path) -> ExportsOverview:
    """Write exports.json: files with sizes and checksums of each format, and what each runtime takes."""
    pieces = Pieces(folder, source.checkpoint.rebuild)
    files: dict[str, dict[str, ExportedFile]] = {}
    for name in formats:
        checksums: Mapping[str, str] = pieces.get(name)["files"]
        files[name] = {
            path: ExportedFile((folder / path).stat().st_size, checksum) for path, checksum in sorted(checksums.items())
        }
    overview = ExportsOverview(source.name, files, verdicts(source.config, source.blocks))
    write_sealed(folder / EXPORTS_OVERVIEW, overview.to_json())
    return overview


def overview_text(overview: ExportsOverview, folder: Path) -> str:
    """Format exports.json as a table for people."""
    lines = [f"{overview.name}, exported to {folder}", f"  {'format':<14} {'size':>12}"]
    for name, files in overview.formats.items():
        lines.append(f"  {name:<14} {sum(file.num_bytes for file in files.values()) / 2**20:>8,.1f} MiB")
    return "\n".join([*lines, *(f"  {line}" for line in verdict_lines(overview.verdicts)), ""])
