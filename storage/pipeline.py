"""The stages as dvc.yaml has them: name, data in, data out, whether each target has its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from storage.files import InputError

PIPELINE_FILE = Path("dvc.yaml")


@dataclass(frozen=True)
class PipelineStage:
    """A stage of dvc.yaml; `deps` and `outs` are its artifacts, with ${key} where they are a target's own."""

    name: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    per_target: bool

    def reads(self, earlier: "PipelineStage") -> bool:
        """Whether this stage depends on an artifact of `earlier`."""
        return any(self.reads_path(out) for out in earlier.outs)

    def reads_path(self, out: str) -> bool:
        """Whether `out` is, holds, or lies within what this stage depends on."""
        return any(f"{dep}/".startswith(f"{out}/") or f"{out}/".startswith(f"{dep}/") for dep in self.deps)


def read_pipeline(path: Path = PIPELINE_FILE) -> tuple[PipelineStage, ...]:
    """All stages in the order of the file.

    Raises:
        InputError: the file is missing or not a pipeline.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing; run from the project's root")
    try:
        stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
        return tuple(_stage(name, fields) for name, fields in stages.items())
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no stages ({' '.join(str(error).split())}); restore it from git") from error


def _stage(name: str, fields: dict[str, Any]) -> PipelineStage:
    per_target = "foreach" in fields
    own = fields["do"] if per_target else fields
    deps, outs = (
        tuple(found for found in map(_path, own.get(kind, [])) if found.startswith("artifacts/"))
        for kind in ("deps", "outs")
    )
    return PipelineStage(name, deps, outs, per_target)


def _path(entry: str | dict[str, Any]) -> str:
    """A dep or out may carry settings: `path: {persist: true}`."""
    return entry if isinstance(entry, str) else next(iter(entry))
