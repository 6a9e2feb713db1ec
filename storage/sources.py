"""The project's own Python sources, parsed and never run: what each module defines and imports.

Two readers share it: storage/code_digest.py (the code in the key of a piece) and storage/pipeline.py (the code deps in
dvc.yaml).
"""

import ast
import copy
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("flows", "tasks", "storage")
SOURCES = Path(__file__).parents[1]
"""The folder that holds the three packages."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A definition: `name` is that of a function, class or constant, or `Class.method`; "" is what runs on import."""

    module: str
    name: str


@dataclass(frozen=True)
class Module:
    """A parsed module.

    Attributes:
        definitions: name at module level or `Class.method` -> its statements, in order; a class is without its methods.
        bases: class -> its base classes, as written.
        bound_imports: name that an import binds, anywhere in the file -> full dotted name.
        import_time_statements: other statements at module level, which run when it is imported.
        imported_modules: full names of what it imports, as written.
    """

    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    bases: dict[str, list[str]] = field(default_factory=dict)
    bound_imports: dict[str, str] = field(default_factory=dict)
    import_time_statements: list[ast.stmt] = field(default_factory=list)
    imported_modules: set[str] = field(default_factory=set)

    def statements(self, name: str) -> list[ast.stmt]:
        """Return the statements of a definition, or with "" those that run on import."""
        return self.definitions[name] if name else self.import_time_statements


class Sources:
    """The modules under a folder, parsed when they are first read."""

    def __init__(self, folder: Path = SOURCES) -> None:
        self.folder = folder
        self._modules: dict[str, Module | None] = {}

    def path(self, module: str) -> Path | None:
        """Return the file of a module or package, None if the project has none of that name."""
        if module.split(".")[0] not in PACKAGES:
            return None
        base = self.folder.joinpath(*module.split("."))
        candidates = (base.with_name(f"{base.name}.py"), base / "__init__.py")
        return next((path for path in candidates if path.is_file()), None)

    def module(self, name: str) -> Module | None:
        """Return a module of the project, None if it has none of that name."""
        if name not in self._modules:
            path = self.path(name)
            self._modules[name] = None if path is None else _read(path)
        return self._modules[name]

    def need(self, name: str) -> Module:
        """Return a module that is known to be there."""
        module = self.module(name)
        assert module is not None, name
        return module

    def find(self, full_name: str) -> Definition | None:
        """Return `package.module.name`'s definition, through modules that only pass it on; None outside the project."""
        module_name, _, name = full_name.rpartition(".")
        module = self.module(module_name)
        if module is None:
            return None
        if name in module.definitions:
            return Definition(module_name, name)
        passed_on = module.bound_imports.get(name)
        return self.find(passed_on) if passed_on and passed_on != full_name else None

    def methods(self, definition: Definition) -> list[Definition]:
        """Return methods and properties of a class; no definitions where it is no class."""
        names = self.need(definition.module).definitions if definition.name else {}
        return [Definition(definition.module, name) for name in names if name.startswith(f"{definition.name}.")]

    def is_function(self, definition: Definition) -> bool:
        """Tell whether a definition is a function or method."""
        statements = self.need(definition.module).statements(definition.name)
        return all(isinstance(statement, Function) for statement in statements)

    def implied_by(self, definition: Definition) -> list[Definition]:
        """Return the definitions that one needs to exist: a method's class, and what its module runs on import."""
        class_name = definition.name.rpartition(".")[0]
        implied = [Definition(definition.module, class_name)] if class_name else []
        if self.need(definition.module).import_time_statements:
            implied.append(Definition(definition.module, ""))
        return implied

    def has_foreign_base(self, definition: Definition) -> bool:
        """Tell whether a class, or a base of it, has a base that is not the project's."""
        module = self.need(definition.module)
        for name in module.bases.get(definition.name, ()):
            first, _, rest = name.partition(".")
            base = self.find(f"{module.bound_imports.get(first)}.{rest}" if rest else f"{definition.module}.{name}")
            if base is None or self.has_foreign_base(base):
                return True
        return False

    def imports_behind(self, module: str, but: Set[str] = frozenset()) -> list[Path]:
        """Return source files of `module` and of all project modules that it imports, directly or not, sorted.

        Modules of `but`, and what is imported through them alone, are left out.
        """
        files: dict[str, Path] = {}
        waiting = [module]
        while waiting:
            name = waiting.pop()
            path, parsed = self.path(name), self.module(name)
            if name not in files and name not in but and path and parsed:
                files[name] = path
                waiting += parsed.imported_modules
        return sorted(files.values())


def _read(path: Path) -> Module:
    tree, module = ast.parse(path.read_text(encoding="utf-8")), Module()
    for node in ast.walk(tree):
        _take_import(node, module)
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef):
            _take_class(statement, module)
        elif names := list(_defined_names(statement)):
            for name in names:
                module.definitions.setdefault(name, []).append(copy.deepcopy(statement) if names[1:] else statement)
        elif (
            not isinstance(statement, ast.Import | ast.ImportFrom)
            and not is_text(statement)
            and not _is_main(statement)
        ):
            module.import_time_statements.append(statement)
    return module


def _take_class(statement: ast.ClassDef, module: Module) -> None:
    methods = [node for node in statement.body if isinstance(node, Function)]
    statement.body = [node for node in statement.body if not isinstance(node, Function)]
    module.definitions[statement.name] = [statement]
    for method in methods:
        module.definitions.setdefault(f"{statement.name}.{method.name}", []).append(method)
    module.bases[statement.name] = [
        ast.unparse(base.value if isinstance(base, ast.Subscript) else base) for base in statement.bases
    ]


def _take_import(node: ast.AST, module: Module) -> None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            module.bound_imports[alias.asname or alias.name.split(".")[0]] = (
                alias.name if alias.asname else alias.name.split(".")[0]
            )
            module.imported_modules.add(alias.name)
    elif isinstance(node, ast.ImportFrom) and node.module:
        module.imported_modules.add(node.module)
        for alias in node.names:
            module.bound_imports[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            module.imported_modules.add(f"{node.module}.{alias.name}")


def _defined_names(statement: ast.stmt) -> Iterator[str]:
    """Yield names that a statement at module level defines: a function's, or those that it assigns."""
    if isinstance(statement, Function):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def is_text(statement: ast.stmt) -> bool:
    """Tell whether a statement is a string alone: a docstring of a module, class, function or attribute."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _is_main(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"
