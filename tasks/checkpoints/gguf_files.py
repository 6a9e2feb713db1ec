"""The GGUF file of a target or of the parent: looked up among the exports, loaded by llama.cpp.

In: a target's key or `parent`, and the name of a format such as gguf-f16. Out: the file, or an engine with it loaded.
Everything that talks to a model or serves one begins here, so that errors name the command that makes a missing file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.files import InputError, damaged, sha256
from storage.formats import FORMATS, LLAMACPP_FORMAT, FormatName
from storage.json_records import read_record
from storage.paths import EXPORTS_OVERVIEW, Paths
from tasks.engines.llamacpp import LlamaCpp

PARENT = "parent"
"""Stands for the parent where a target is expected."""
CONTEXT = 4096
"""Default tokens of a conversation; fewer where the model was made for fewer."""


@dataclass(frozen=True)
class GgufFile:
    """A file that was exported: the name of its model (a target's key, or `parent`), its format, its path."""

    name: str
    format: FormatName
    path: Path


@dataclass(frozen=True)
class _ListedFile:
    sha256: str


@dataclass(frozen=True)
class _ListedFormat:
    files: dict[str, _ListedFile]


@dataclass(frozen=True)
class _Overview:
    """The part of exports.json that lists the files of each format, by their paths."""

    formats: dict[str, _ListedFormat]


def gguf_of(target: str, format_name: FormatName, paths: Paths) -> GgufFile:
    """Return the file of a target, or of the parent, in a format.

    Raises:
        InputError: the model was not exported, or not in this format.
    """
    is_parent = target == PARENT
    folder = paths.parent_exports if is_parent else paths.exports(target)
    stage, rerun = ("export_parent", "export_parent") if is_parent else ("export_child", f"export_child@{target}")
    files = gguf_files(target, folder)
    if not files:
        raise InputError(f"no GGUF file of {target} is in {folder}; run `dvc repro {rerun}`")
    if format_name not in files:
        raise InputError(
            f"{target} has no {format_name!r} in {folder} (has: {', '.join(files)}); take one of these, or add it to "
            f"{stage}.formats in params.yaml and run `dvc repro {rerun}`"
        )
    return GgufFile(target, format_name, files[format_name])


def parent_beside(child: GgufFile, paths: Paths) -> GgufFile:
    """Return the parent's file to compare a child's with: of the same format, else of :data:`LLAMACPP_FORMAT`.

    Raises:
        InputError: the parent was not exported.
    """
    has_same = child.format in gguf_files(PARENT, paths.parent_exports)
    return gguf_of(PARENT, child.format if has_same else LLAMACPP_FORMAT, paths)


def precision_note(files: Sequence[GgufFile]) -> str:
    """Return a line for people where models of different precision are compared, else an empty text."""
    if len({file.format for file in files}) == 1:
        return ""
    return " beside ".join(f"{file.name} as {file.format}" for file in files) + ": not the same precision\n"


def gguf_files(model: str, folder: Path) -> dict[FormatName, Path]:
    """Return format -> a model's GGUF file, for all in a folder of exports; sorted by the format's name."""
    files = {}
    for name, row in sorted(FORMATS.items()):
        if row.is_gguf and (path := folder / name / row.gguf_name(model)).is_file():
            files[name] = path
    return files


def exported_ggufs(target: str, folder: Path) -> dict[FormatName, Path]:
    """Return format -> a target's GGUF file, for all that exports.json lists, their bytes compared with it.

    Raises:
        InputError: exports.json, or a file that it lists, is missing.
        DamagedFileError: a file's bytes are not those that were exported.
    """
    rebuild = f"dvc repro export_child@{target}"
    listed = read_record(folder / EXPORTS_OVERVIEW, _Overview, rebuild).formats
    files = {name: folder / name / row.gguf_name(target) for name, row in sorted(FORMATS.items()) if row.is_gguf}
    for name, path in files.items():
        if name in listed and not path.is_file():
            raise InputError(f"{path} is missing, and {EXPORTS_OVERVIEW} beside it lists it; run `{rebuild}`")
    return {name: whole(GgufFile(target, name, path)) for name, path in files.items() if name in listed}


def whole(file: GgufFile) -> Path:
    """Return the path of a file whose bytes are those that were exported.

    Raises:
        DamagedFileError: they differ, or exports.json does not list the file.
    """
    rebuild = f"dvc repro export_{'parent' if file.name == PARENT else f'child@{file.name}'}"
    folder = file.path.parents[1]
    listed = read_record(folder / EXPORTS_OVERVIEW, _Overview, rebuild).formats.get(file.format)
    listed_file = listed and listed.files.get(str(file.path.relative_to(folder)))
    if not listed_file or sha256(file.path) != listed_file.sha256:
        raise damaged(file.path, "is damaged (its sha256 is not that of the export)", rebuild)
    return file.path


def loaded(file: GgufFile, threads: int, sequences: int, context: int | None) -> LlamaCpp:
    """Load a model into llama.cpp, under its name.

    Args:
        file: the file to load.
        threads: threads of llama.cpp.
        sequences: conversations at once.
        context: tokens of a conversation; None: :data:`CONTEXT`, or as many as the model was made for.

    Raises:
        DamagedFileError: its bytes are not those that were exported.
        InputError: llama.cpp refuses the file, as for :class:`LlamaCpp`, or the model was made for a shorter context.
    """
    engine = LlamaCpp(whole(file), threads, sequences, context or CONTEXT, name=file.name, quiet=True)
    if context and engine.context < context:
        raise InputError(f"{file.name} was made for {engine.context} tokens of context, {context} are asked for")
    return engine
