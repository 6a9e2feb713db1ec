"""Finished pieces of a stage: how every long stage resumes after kill -9.

A stage splits into pieces (a shard, a block, a group of replacements). A piece has a *key of content*: a digest of
its inputs, the params that matter and the code that computes it. When a piece's files are written, its record
`<folder>/.pieces/<name>.json` follows, last. On start a stage keeps the pieces whose key and checksums match and
deletes all others, so nothing stale survives a change of params, parent or code.
"""

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from storage.files import DamagedFileError, InputError, digest_of, read_json, sha256, write_json

_PACKAGES = ("flows", "tasks", "storage")


@dataclass(frozen=True)
class Pieces:
    """The finished pieces in `folder`; `rebuild` is the command that makes them anew."""

    folder: Path
    rebuild: str

    def _path(self, name: str) -> Path:
        return self.folder / ".pieces" / f"{name}.json"

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of a finished piece {key, files: {path: sha256}, facts}, None if there is none.

        Raises:
            DamagedFileError: the record itself was altered.
        """
        if not self._path(name).is_file():
            return None
        record: Any = read_json(self._path(name), self.rebuild)
        if not isinstance(record, dict) or record.pop("seal", None) != digest_of(record):
            raise DamagedFileError(f"{self._path(name)} is damaged (its seal does not fit); run `{self.rebuild}`")
        return record

    def done(self, name: str, key: str) -> bool:
        """Whether the piece exists under this key with every byte as written."""
        try:
            record = self.record(name)
        except DamagedFileError:
            return False
        return (
            record is not None
            and record["key"] == key
            and all(
                (self.folder / file).is_file() and sha256(self.folder / file) == checksum
                for file, checksum in record["files"].items()
            )
        )

    def finish(
        self, name: str, key: str, files: Iterable[Path] | Mapping[Path, str], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Record a piece whose `files` (inside the folder, with their checksums if known) are written.

        `facts` are small JSON values kept with it.
        """
        known = files if isinstance(files, Mapping) else {file: sha256(file) for file in files}
        checksums = {str(file.relative_to(self.folder)): checksum for file, checksum in known.items()}
        record = {"key": key, "files": checksums, "facts": dict(facts or {})}
        write_json(self._path(name), {**record, "seal": digest_of(record)})

    def get(self, name: str) -> dict[str, Any]:
        """The record of a piece that must be there.

        Raises:
            InputError: it is not, with the command that makes it.
        """
        record = self.record(name)
        if record is None:
            known = self.names()
            raise InputError(
                f"{self.folder} has no piece {name!r} (has {len(known)}: {', '.join(known[:3])}…); run `{self.rebuild}`"
            )
        return record

    def names(self) -> list[str]:
        """Names of all finished pieces, sorted."""
        return sorted(path.stem for path in (self.folder / ".pieces").glob("*.json"))

    def keep_only(self, keys: Mapping[str, str]) -> list[str]:
        """Delete every file that no piece of `keys` (name -> key) accounts for; return the names still to make."""
        done = {name for name, key in keys.items() if self.done(name, key)}
        kept = {self._path(name) for name in done}
        kept |= {self.folder / file for name in done for file in self.get(name)["files"]}
        if self.folder.is_dir():
            for path in sorted(self.folder.rglob("*"), reverse=True):
                if path.is_file() and path not in kept:
                    path.unlink()
                elif path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
        return [name for name in keys if name not in done]


def project_imports(module: str) -> list[Path]:
    """Source files of `module` and of all project modules that it imports, transitively, sorted."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        spec = importlib.util.find_spec(name) if name not in found else None
        if spec is None or spec.origin is None:
            continue
        found[name] = Path(spec.origin)
        for node in ast.walk(ast.parse(found[name].read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            waiting += [n for n in names if n.split(".")[0] in _PACKAGES and _is_module(n)]
    return sorted(found.values())


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # `package.module.attribute`: the parent is a module, not a package
        return False


@functools.cache
def code_digest(*modules: str) -> str:
    """Digest of the code behind `modules`: syntax trees of themselves and of the `tasks.puzzle` modules they reach.

    Comments and docstrings do not count, so editing one leaves every finished piece valid; editing arithmetic does
    not. The versions of torch and transformers are part of it, since the same source gives other bytes under another.
    """
    own = {tuple(module.split(".")[-2:]) for module in modules}
    reached = {path for module in modules for path in project_imports(module)}
    files = {path for path in reached if path.parent.name == "puzzle" or (path.parent.name, path.stem) in own}
    trees = {f"{path.parent.name}.{path.stem}": _bare_tree(path) for path in sorted(files)}
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return digest_of({"trees": trees, "versions": versions, "python": sys.version_info[:2]})


def _bare_tree(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return ast.dump(tree)
