"""Digest of the code behind a piece: the part of a piece's key that says how it is computed.

In: the functions and classes that compute a piece, such as `tasks.gkd.threads:_ThreadTrainer`. From them every name
that is a definition of the project is followed, through all modules; sources are parsed, none is run. Out: one digest.

It changes with the code that the piece's bytes come from:
- functions, classes and constants that are reached, with every default, decorator and number in them;
- methods and properties whose name is an attribute anywhere in reached code, of every class that reached code or its
  annotations name; special methods of reached classes; all methods where a class has a base outside the project, which
  may call any of them (`nn.Module.forward`);
- statements that a reached module runs on import;
- the versions of torch and transformers and Python's minor version, since the same source gives other bytes there.

It does not change with
- comments, layout, docstrings (of attributes too), annotations;
- what an error, an assert, a log line or a progress bar says, what only computes such a text, and `REBUILD`, the
  constant with the command that a module's errors name;
- names of locals, and of parameters that the reached code passes by keyword nowhere;
- the module that a definition is in, its place in the file, and how it is imported;
- whatever is not reached: the words of a model card, another stage, how sizes are counted;
- the plumbing below, where following ends.

Names of functions, classes, constants, attributes and fields do count.
"""

import functools
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from storage.bare_code import BareCode, bare_code
from storage.files import digest_of
from storage.sources import SOURCES, Definition, Sources

PLUMBING = frozenset(
    f"storage.{name}"
    for name in (
        *("params", "sections", "targets", "fields", "paths", "files", "records", "json_records", "pipeline"),
        *("accuracy_sections", "pieces", "stores", "bucket", "bucket_store", "file_cache"),
        *("code_digest", "bare_code", "sources"),
        *("json_files", "yaml_files", "config_fields", "side_files", "tokenizer_files", "tokenizer_probe", "weights"),
    )
)
"""Modules that say what params mean, where files lie and how a piece is recorded, and those that only read and check
what others wrote. Values of params are in a piece's key themselves, and nothing here touches a number of a tensor.
Storage that rounds or packs tensors is followed."""

_COMMANDS = frozenset({"REBUILD"})
"""Constants with the command that a message names."""


@functools.cache
def code_digest(*roots: str) -> str:
    """Return the digest of the code that definitions `module:name` reach; of a class named there, all methods count."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    code = _this_project().reached(roots)
    return digest_of({"code": code, "versions": versions, "python": sys.version_info[:2]})


class ProjectCode:
    """The code of the project in `folder`; every definition is read once."""

    def __init__(self, folder: Path = SOURCES) -> None:
        self.sources = Sources(folder)
        self._bare: dict[Definition, BareCode] = {}

    def bare(self, definition: Definition) -> BareCode:
        """Return the part of a definition that counts."""
        if definition not in self._bare:
            self._bare[definition] = bare_code(definition, self.sources)
        return self._bare[definition]

    def reached(self, roots: Iterable[str]) -> list[str]:
        """Return the bare text of every definition that `roots` reach, sorted."""
        reached = {definition: self.bare(definition) for definition in _Reach(self).follow(roots)}
        keywords = {name for code in reached.values() for name in code.keywords}
        shallow = {definition: digest_of(code.text_with(keywords, {})) for definition, code in reached.items()}
        return sorted(code.text_with(keywords, shallow) for code in reached.values())


@functools.cache
def _this_project() -> ProjectCode:
    return ProjectCode()


class _Reach:
    """Follows definitions to those that they use."""

    def __init__(self, code: ProjectCode) -> None:
        self._code, self._sources = code, code.sources
        self._reached: set[Definition] = set()
        self._types: set[Definition] = set()
        self._attributes: set[str] = set()

    def follow(self, roots: Iterable[str]) -> set[Definition]:
        """Return every definition that the roots reach, methods as far as they may be called."""
        waiting = [definition for root in roots for definition in self._root(root)]
        while waiting:
            definition = waiting.pop()
            if definition not in self._reached and not _ends_at(definition):
                self._reached.add(definition)
                code = self._code.bare(definition)
                waiting += [*code.uses, *self._sources.implied_by(definition)]
                self._attributes |= code.attributes
                self._take_types([definition, *code.types])
            waiting = waiting or [method for method in self._called_methods() if method not in self._reached]
        return self._reached

    def _root(self, root: str) -> list[Definition]:
        definition = self._sources.find(root.replace(":", "."))
        assert definition is not None, f"{root} is not defined; name the function or class that computes the piece"
        return [definition, *self._sources.methods(definition)]

    def _take_types(self, definitions: Iterable[Definition]) -> None:
        """Note the classes among `definitions`, and those of their bases and fields: their methods may be called."""
        waiting = list(definitions)
        while waiting:
            definition = waiting.pop()
            if definition not in self._types and not _ends_at(definition) and not self._sources.is_function(definition):
                self._types.add(definition)
                waiting += [*self._code.bare(definition).types, *self._code.bare(definition).uses]

    def _called_methods(self) -> Iterator[Definition]:
        """Yield methods that reached code may call, or code outside the project."""
        for class_place in self._types:
            for method in self._sources.methods(class_place):
                name = method.name.rpartition(".")[2]
                special = name.startswith("__") and class_place in self._reached
                if name in self._attributes or special or self._sources.has_foreign_base(class_place):
                    yield method


def _ends_at(definition: Definition) -> bool:
    """Tell whether following ends: at plumbing, at commands that messages name, and at classes of errors."""
    is_error = definition.name.split(".")[0].endswith("Error")
    return is_error or definition.module in PLUMBING or definition.name in _COMMANDS
