"""The GGUF file of a target or of the parent: found among what was exported, loaded by llama.cpp.

In: a target's key or `parent`, a format such as gguf-f16. Out: the file, an engine. Who talks to a model or serves one
begins here, so that errors name the command that makes what is missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.files import DamagedFileError, InputError, read_json, sha256
from storage.paths import EXPORTS_OVERVIEW, Paths
from tasks.engines.llamacpp import LlamaCpp

PARENT = "parent"
"""Stands for the parent where a target is asked for."""
FORMAT = "gguf-f16"
"""What is taken unless something else is asked for; exports have it unless params.yaml leaves it out."""
CONTEXT = 4096
"""Tokens of a conversation unless something else is asked for, or as many as the model was made for."""


@dataclass(frozen=True)
class GgufFile:
    """A model's name (of the target, or `parent`), the format, the file."""

    name: str
    format: str
    path: Path


def gguf_of(target: str, wanted: str, paths: Paths) -> GgufFile:
    """The file of a target, or of the parent, in a format.

    Raises:
        InputError: it was not exported, or not in this format.
    """
    is_parent = target == PARENT
    folder = paths.parent_exports if is_parent else paths.exports(target)
    stage, rerun = ("export_parent", "export_parent") if is_parent else ("export_child", f"export_child@{target}")
    there = gguf_files(target, folder)
    if not there:
        raise InputError(f"no GGUF file of {target} is in {folder}; run `dvc repro {rerun}`")
    if wanted not in there:
        raise InputError(
            f"{target} has no {wanted!r} in {folder} (has: {', '.join(there)}); take one of these, or add it to "
            f"{stage}.formats in params.yaml and run `dvc repro {rerun}`"
        )
    return GgufFile(target, wanted, there[wanted])


def parent_beside(child: GgufFile, paths: Paths) -> GgufFile:
    """The parent's file to compare a child's with: of the same format, or of :data:`FORMAT` where it has no such one.

    Raises:
        InputError: the parent was not exported.
    """
    is_there = child.format in gguf_files(PARENT, paths.parent_exports)
    return gguf_of(PARENT, child.format if is_there else FORMAT, paths)


def precision_note(files: Sequence[GgufFile]) -> str:
    """A line for people where models of different precision stand beside each other, else nothing."""
    if len({file.format for file in files}) == 1:
        return ""
    return " beside ".join(f"{file.name} as {file.format}" for file in files) + ": not the same precision\n"


def gguf_files(name: str, folder: Path) -> dict[str, Path]:
    """Format -> file, for all that lie in a folder of exports."""
    found = {}
    for inner in sorted(folder.glob("gguf-*")):
        path = inner / f"{name}-{inner.name.removeprefix('gguf-').upper()}.gguf"
        if path.is_file():
            found[inner.name] = path
    return found


def whole(file: GgufFile) -> Path:
    """The file, if its bytes are those that were exported.

    Raises:
        DamagedFileError: they differ, or exports.json does not know them.
    """
    rebuild = f"dvc repro export_{'parent' if file.name == PARENT else f'child@{file.name}'}"
    folder = file.path.parents[1]
    formats = read_json(folder / EXPORTS_OVERVIEW, rebuild)["formats"]
    known = formats.get(file.format, {"files": {}})["files"].get(str(file.path.relative_to(folder)))
    if known is None or sha256(file.path) != known["sha256"]:
        raise DamagedFileError(f"{file.path} is damaged (its sha256 is not that of the export); run `{rebuild}`")
    return file.path


def loaded(file: GgufFile, threads: int, sequences: int, context: int | None, port: int = 0) -> LlamaCpp:
    """A model in llama.cpp, under its name.

    Args:
        file: what to load.
        threads: of llama.cpp.
        sequences: conversations at once.
        context: tokens of each; None: :data:`CONTEXT`, or as many as the model was made for.
        port: of its HTTP API on 127.0.0.1; 0: any.

    Raises:
        InputError: as :class:`LlamaCpp`, or the model was made for a shorter context.
    """
    engine = LlamaCpp(file.path, threads, sequences, context or CONTEXT, name=file.name, port=port, quiet=True)
    if context and engine.context < context:
        raise InputError(f"{file.name} was made for {engine.context} tokens of context, {context} are asked for")
    return engine
