"""The stages as dvc.yaml has them, and the code deps in it.

In: dvc.yaml. Out: each stage's name, data in, data out, and whether every target has its own. The code that a stage
depends on follows from what its task imports, so a command writes it:

    python -m storage.pipeline --write
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.files import InputError, read_sealed, write_whole
from storage.sources import SOURCES, Sources
from storage.yaml_files import read_yaml

PIPELINE_FILE = Path("dvc.yaml")
_LONGEST = 1e9
"""Seconds that no stage takes: what is longer is damaged."""
_UNWATCHED = {
    f"storage.{name}"
    for name in (
        *("params", "sections", "accuracy_sections", "paths", "files", "pieces"),
        *("stores", "bucket", "bucket_store", "file_cache"),
        *("code_digest", "bare_code", "sources", "yaml_files"),
    )
}
"""Modules that every stage reads, and whose changes show in no artifact: no deps, nor what only they import."""


@dataclass(frozen=True)
class PipelineStage:
    """A stage of dvc.yaml; `deps` and `outs` are its artifacts, with ${key} where they are a target's own."""

    name: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    per_target: bool

    def reads(self, earlier: "PipelineStage") -> bool:
        """Tell whether this stage depends on an artifact of `earlier`."""
        return any(self.reads_path(out) for out in earlier.outs)

    def reads_path(self, out: str) -> bool:
        """Tell whether `out` is, holds, or lies within what this stage depends on."""
        return any(overlap(out, dep) for dep in self.deps)


def overlap(path: str, other: str) -> bool:
    """Tell whether two paths are the same, or either lies within the other."""
    return f"{path}/".startswith(f"{other}/") or f"{other}/".startswith(f"{path}/")


def read_seconds(path: Path) -> dict[str, float]:
    """Read the seconds that each stage last took; none where the record is missing or damaged: nothing needs it."""
    try:
        record = read_sealed(path, "dvc repro")
    except InputError:
        return {}
    values = record.items()
    return {name: float(value) for name, value in values if type(value) in (int, float) and 0 <= value < _LONGEST}


def read_pipeline(path: Path = PIPELINE_FILE) -> tuple[PipelineStage, ...]:
    """Return all stages in the order of the file.

    Raises:
        InputError: the file is missing or not a pipeline.
    """
    file = read_yaml(path, "run from the project's root")
    stages = file.get("stages") if isinstance(file, dict) else None
    if not isinstance(stages, dict) or not stages:
        raise InputError(f"{path} holds no stages; restore it from git")
    return tuple(_stage(path, name, fields) for name, fields in stages.items())


def _stage(path: Path, name: str, fields: Any) -> PipelineStage:
    per_target = isinstance(fields, dict) and "foreach" in fields
    stage = fields.get("do") if per_target else fields
    if not isinstance(stage, dict):
        raise InputError(f"{path}: {name} is no stage; restore it from git")
    deps, outs = (_artifacts(path, f"{name}.{key}", stage.get(key, [])) for key in ("deps", "outs"))
    return PipelineStage(name, deps, outs, per_target)


def _artifacts(path: Path, where: str, entries: Any) -> tuple[str, ...]:
    """Return the paths of artifacts among deps or outs; an entry may carry settings: `path: {persist: true}`."""
    if not isinstance(entries, list) or not all(entry and isinstance(entry, str | dict) for entry in entries):
        raise InputError(f"{path}: {where} must be a list of paths; restore it from git")
    paths = (entry if isinstance(entry, str) else next(iter(entry)) for entry in entries)
    return tuple(path for path in paths if path.startswith("artifacts/"))


def code_deps(stage: str, sources: Sources) -> list[str]:
    """Return the source files behind `tasks/<stage>.py`, sorted: its own, and those of all that it imports."""
    files = sources.imports_behind(f"tasks.{stage}", but=_UNWATCHED)
    return [path.relative_to(sources.folder).as_posix() for path in files if path.name != "__init__.py"]


def with_code_deps(text: str, sources: Sources) -> str:
    """Return the text of dvc.yaml with every stage's code deps as they follow from the sources, after its data deps.

    Everything else stays as it is: comments, layout, data deps, params and outs.
    """
    lines: list[str] = []
    stage = indent = ""
    for line in text.splitlines():
        if indent and not line.startswith(f"{indent}- "):  # the first line behind a list of deps
            lines += [f"{indent}- {path}" for path in code_deps(stage, sources)]
            indent = ""
        if name := re.fullmatch(r"  (\w+):", line):
            stage = name[1]
        elif deps := re.fullmatch(r"( +)deps:", line):
            indent = f"{deps[1]}  "
        if not (indent and line.endswith(".py")):
            lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the code deps of dvc.yaml anew, or say whether they are as the imports have them."""
    parser = argparse.ArgumentParser(prog="python -m storage.pipeline", description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="write dvc.yaml")
    write = parser.parse_args().write
    text = PIPELINE_FILE.read_text(encoding="utf-8")
    expected = with_code_deps(text, Sources(SOURCES))
    if write:
        with write_whole(PIPELINE_FILE) as temporary:
            temporary.write_text(expected, encoding="utf-8")
    elif text != expected:
        sys.exit(f"the code deps in {PIPELINE_FILE} are not as the imports have them; run `{parser.prog} --write`")


if __name__ == "__main__":
    main()
