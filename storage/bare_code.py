"""A definition as what it computes: without words for people, with local names replaced by their position.

Dropped are docstrings (of attributes too), annotations, imports, the arguments of what is raised, the messages of
asserts, calls of loggers and of `warnings`, the words of a progress bar, Prefect's decorators, and assignments of
locals that nothing else reads. A class keeps the names and defaults of its fields.
"""

import ast
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field

from storage.sources import Definition, Function, Sources, is_text

_Comprehension = ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp
_LOGGERS = {"_log", "log", "logger", "logging", "warnings"}
_PROGRESS_CALLS = {"set_postfix", "set_description"}
_PROGRESS_WORDS = {"desc", "unit", "unit_scale"}
_PARAMETER = re.compile(r"‹(\w+)›(\d+)")
_DEFINITION = re.compile(r"‹([\w.]+):([\w.]+)›")
_NO_ANNOTATION = ast.Constant(None)


@dataclass
class BareCode:
    """The part of a definition that counts.

    Attributes:
        text: its syntax trees; a local name is its position, a parameter `‹name›position`, one of the project's
            definitions `‹module:name›`, any other imported name its full name.
        uses: the project's definitions that it names.
        types: the project's definitions that its annotations name; they are no part of the text, but say whose methods
            it may call.
        attributes: names of all attributes that it reads or calls.
        keywords: names of all arguments that it passes by keyword.
    """

    text: str = ""
    uses: set[Definition] = field(default_factory=set)
    types: set[Definition] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    keywords: set[str] = field(default_factory=set)

    def text_with(self, keywords: Set[str], digests: Mapping[Definition, str]) -> str:
        """Return the final text: no paths of modules, and parameters by position unless `keywords` has their names.

        A definition of the project is written with its digest, if `digests` has it, so that two of one name differ.
        """

        def definition(match: re.Match[str]) -> str:
            return f"{match[2]} {digests.get(Definition(match[1], match[2]), '')}"

        def parameter(match: re.Match[str]) -> str:
            return match[1] if match[1] in keywords else f"_{match[2]}"

        return _PARAMETER.sub(parameter, _DEFINITION.sub(definition, self.text))


def bare_code(definition: Definition, sources: Sources) -> BareCode:
    """Return the part of a definition that counts; its trees in `sources` are changed, so ask once.

    Parameters of methods that code outside the project may call keep their names, since it may pass them by keyword.
    """
    module, class_name = sources.need(definition.module), definition.name.rpartition(".")[0]
    named_parameters = sources.has_foreign_base(Definition(definition.module, class_name))
    words, names = _Words(module.bound_imports), _Names(definition.module, sources, named_parameters)
    trees = []
    for statement in module.statements(definition.name):
        bare = words.visit(statement)
        if bare is not None:
            if isinstance(bare, Function):
                _drop_unread(bare)
            names.visit(bare)
            trees.append(ast.dump(bare))
    code = names.code
    code.text = "\n".join(trees)
    types = (sources.find(f"{definition.module}.{name}") for name in words.types)
    code.types = {type_ for type_ in types if type_ is not None}
    return code


def _read_names(tree: ast.AST) -> Iterator[str]:
    return (node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and _is_read(node))


def _is_read(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Load)


def _drop_unread(function: Function) -> None:
    """Drop assignments of locals that nothing reads any more, now that the words have gone."""
    dropping = _Unread(set(_read_names(function)))
    dropping.visit(function)
    if dropping.dropped:
        _drop_unread(function)


class _Words(ast.NodeTransformer):
    """Drops what people read, annotations and imports."""

    def __init__(self, imports: Mapping[str, str]) -> None:
        self._imports = imports
        self.types: set[str] = set()

    def visit(self, node: ast.AST) -> ast.AST | None:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Pass():
                return None
            case ast.Expr() if is_text(node) or _is_for_people(node.value):
                return None
            case ast.AnnAssign() if node.annotation is not _NO_ANNOTATION:
                self._take_types(node.annotation)
                assigned = ast.Assign([node.target], node.value) if node.value else None
                return assigned and self.visit(assigned)
            case ast.ClassDef():
                for statement in node.body:
                    if isinstance(statement, ast.AnnAssign):
                        self._take_types(statement.annotation)
                        statement.annotation = _NO_ANNOTATION
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._take_types(node.returns)
                node.returns = None
                decorators = node.decorator_list
                node.decorator_list = [decorator for decorator in decorators if not self._is_prefects(decorator)]
            case ast.arg():
                self._take_types(node.annotation)
                node.annotation = None
            case ast.Assert():
                node.msg = None
            case ast.Raise():
                node.cause = None
                node.exc = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            case ast.Call(func=ast.Name("tqdm") | ast.Attribute(attr="tqdm")):
                node.keywords = [keyword for keyword in node.keywords if keyword.arg not in _PROGRESS_WORDS]
        return self.generic_visit(node)

    def _take_types(self, annotation: ast.expr | None) -> None:
        """Keep the names in an annotation, also where it is quoted."""
        if annotation is not None:
            self.types.update(re.findall(r"\w+", ast.unparse(annotation)))

    def _is_prefects(self, decorator: ast.expr) -> bool:
        names = [self._imports.get(name, "") for name in _read_names(decorator)]
        return any(name.split(".")[0] == "prefect" for name in names)


def _is_for_people(value: ast.expr) -> bool:
    """Tell whether a statement calls a logger, `warnings`, or what a progress bar says."""
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return False
    speaker = value.func.value
    return value.func.attr in _PROGRESS_CALLS or (isinstance(speaker, ast.Name) and speaker.id in _LOGGERS)


class _Unread(ast.NodeTransformer):
    """Drops assignments of names that are not in `read`; `x := value` becomes `value`."""

    def __init__(self, read: set[str]) -> None:
        self._read = read
        self.dropped = 0

    def visit(self, node: ast.AST) -> ast.AST | None:
        match node:
            case ast.Assign() if all(self._is_unread(target) for target in node.targets):
                self.dropped += 1
                return None
            case ast.NamedExpr() if self._is_unread(node.target):
                self.dropped += 1
                return self.visit(node.value)
            case ast.ExceptHandler() if node.name and node.name not in self._read:
                self.dropped += 1
                node.name = None
        return self.generic_visit(node)

    def _is_unread(self, target: ast.expr) -> bool:
        if isinstance(target, ast.Tuple):
            return all(map(self._is_unread, target.elts))
        return isinstance(target, ast.Name) and target.id not in self._read


class _Names(ast.NodeVisitor):
    """Gives local names their position, within the trees, and collects what a definition uses of others."""

    def __init__(self, module: str, sources: Sources, named_parameters: bool) -> None:
        self.code = BareCode()
        self._module, self._sources, self._named_parameters = module, sources, named_parameters
        self._imports = sources.need(module).bound_imports
        self._scopes: list[dict[str, str]] = []
        self._positions = itertools.count()

    def visit(self, node: ast.AST) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                self._visit_function(node)
                return
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                self._visit_comprehension(node)
                return
            case ast.Attribute():
                self._visit_attribute(node)
            case ast.Name():
                node.id = self._local(node.id) or (self._global(node.id) if _is_read(node) else node.id)
            case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar() if node.name:
                node.name = self._local(node.name)
            case ast.MatchMapping() if node.rest:
                node.rest = self._local(node.rest)
            case ast.Nonlocal():
                node.names = [self._local(name) or name for name in node.names]
            case ast.keyword() if node.arg:
                self.code.keywords.add(node.arg)
        self.generic_visit(node)

    def _local(self, name: str) -> str | None:
        """Return the position of a local name, None if it is not local."""
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), None)

    def _global(self, name: str) -> str:
        """Return the full name that a name stands for: the project's as defined, others' with their module."""
        definition = self._sources.find(f"{self._module}.{name}")
        if definition is not None:
            self.code.uses.add(definition)
            return f"‹{definition.module}:{definition.name}›"
        return self._imports.get(name, name)

    def _visit_attribute(self, node: ast.Attribute) -> None:
        """Visit an attribute, or a definition of a module of the project that is named through the module."""
        self.code.attributes.add(node.attr)
        if isinstance(node.value, ast.Name) and self._local(node.value.id) is None:
            definition = self._sources.find(f"{self._imports.get(node.value.id, '')}.{node.attr}")
            if definition is not None:
                self.code.uses.add(definition)
                node.value, node.attr = ast.Constant("module"), f"‹{definition.module}:{definition.name}›"

    def _visit_function(self, node: Function | ast.Lambda) -> None:
        for outside in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(outside)
        if not isinstance(node, ast.Lambda):
            node.name = self._local(node.name) or node.name
            for decorator in node.decorator_list:
                self.visit(decorator)
        body = [node.body] if isinstance(node, ast.Lambda) else node.body
        scope = {}
        for argument in _arguments(node.args):
            name, position = argument.arg, next(self._positions)
            if not self._named_parameters:
                argument.arg = f"‹{name}›{position}"
            scope[name] = argument.arg
        self._scopes.append(self._bind(_bound(body), scope))
        for statement in body:
            self.visit(statement)
        self._scopes.pop()

    def _visit_comprehension(self, node: _Comprehension) -> None:
        self.visit(node.generators[0].iter)  # it runs outside
        targets = [name for generator in node.generators for name in _bound([generator.target])]
        self._scopes.append(self._bind(targets, {}))
        for index, generator in enumerate(node.generators):
            self.visit(generator.target)
            for inside in ([] if index == 0 else [generator.iter]) + generator.ifs:
                self.visit(inside)
        for result in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
            self.visit(result)
        self._scopes.pop()

    def _bind(self, names: Iterable[str], scope: dict[str, str]) -> dict[str, str]:
        for name in names:
            if name not in scope:
                scope[name] = f"_{next(self._positions)}"
        return scope


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    extra = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *extra]


def _bound(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield names that code binds in its own scope, in order."""
    for node in nodes:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
                continue
            case ast.Lambda():
                continue
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                walrus = [inside.target for inside in ast.walk(node) if isinstance(inside, ast.NamedExpr)]
                yield from _bound(walrus)
                continue
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar() if node.name:
                yield node.name
            case ast.MatchMapping() if node.rest:
                yield node.rest
        yield from _bound(ast.iter_child_nodes(node))
