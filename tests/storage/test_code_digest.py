"""The code in the key of a piece: what changes it, what does not, in a small project and in a copy of this one."""

import ast
import builtins
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from storage.code_digest import ProjectCode, code_digest
from storage.sources import SOURCES

# --- a small project -------------------------------------------------------------------------------------------------

STAGE = '''"""A stage."""

import logging
import math

from prefect import task
from tqdm import tqdm

from storage.packing import pack
from tasks.parts import Box, scaled

WIDTH = 3
"""Channels."""
UNUSED = 4
_log = logging.getLogger(__name__)


@task(retries=0)
def root(values: list[float], *, label: str = "a", missing: int = 7) -> float:
    """Add up square roots."""
    total = 0.0
    for value in tqdm(values, desc="adding", unit="value"):
        total += math.sqrt(value) * WIDTH
    lowest = min(values)
    if total < 0:  # never
        raise ValueError(f"the lowest is {lowest}, of {label}")
    assert total, "nothing to add"
    _log.info("added %s", total)
    return scaled(total, factor=2) + Box(total).area() + sum(pack(other) for other in values)


def beside(values: list[float]) -> float:
    return root(values) + UNUSED
'''
PARTS = '''"""What the stage is made of."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Box:
    """A square."""

    size: float
    """Its side."""
    scale: int = 1

    def area(self) -> float:
        return self.side ** 2

    @property
    def side(self) -> float:
        return self.size * self.scale

    def perimeter(self) -> float:
        return 4 * self.size


class Layer(nn.Module):
    def forward(self, hidden):
        return hidden + 1


def scaled(value: float, factor: int) -> float:
    layer = Layer()
    return factor * layer(value)
'''
PACKING = '''"""How numbers are stored."""


def pack(value: float) -> int:
    return round(value, 2)
'''
FILES = {"tasks/stage.py": STAGE, "tasks/parts.py": PARTS, "storage/packing.py": PACKING}


def small_digest(folder: Path, files: dict[str, str]) -> list[str]:
    """Return what `root` reaches in a project of these files."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text, encoding="utf-8")
    return ProjectCode(folder).reached(["tasks.stage:root"])


def edited(old: str, new: str) -> dict[str, str]:
    """Return the files with the one place of `old` replaced."""
    assert sum(text.count(old) for text in FILES.values()) == 1, old
    return {name: text.replace(old, new) for name, text in FILES.items()}


WORDS = {
    "comment": ("# never", "# it cannot be"),
    "docstring": ('"""Add up square roots."""', '"""Sum of square roots."""'),
    "docstring of a module": ('"""How numbers are stored."""', '"""Packing."""'),
    "docstring of a class": ('"""A square."""', ""),
    "docstring of an attribute": ('"""Its side."""', '"""Length of a side."""'),
    "docstring of a constant": ('"""Channels."""', '"""How many channels."""'),
    "layout": ("math.sqrt(value) * WIDTH", "(math.sqrt(value)\n            * WIDTH)"),
    "annotation": ("values: list[float], *", "values: tuple[float, ...], *"),
    "error text": ('f"the lowest is {lowest}, of {label}"', 'f"{label}: {lowest} is too low for {total}"'),
    "what only an error reads": ("lowest = min(values)", "lowest = sorted(values)[0]"),
    "message of an assert": ('"nothing to add"', 'f"nothing in {values}"'),
    "log line": ('_log.info("added %s", total)', "pass"),
    "words of progress": ('desc="adding", unit="value"', 'desc="sums"'),
    "loop variable": (
        'for value in tqdm(values, desc="adding", unit="value"):\n        total += math.sqrt(value)',
        'for number in tqdm(values, desc="adding", unit="value"):\n        total += math.sqrt(number)',
    ),
    "variable of a comprehension": ("pack(other) for other in", "pack(number) for number in"),
    "parameter": (
        "def pack(value: float) -> int:\n    return round(value, 2)",
        "def pack(number: float) -> int:\n    return round(number, 2)",
    ),
    "decorator of Prefect": ("@task(retries=0)", "@task(retries=3)"),
    "definition that is not reached": ("return root(values) + UNUSED", "return UNUSED"),
    "constant that is not reached": ("UNUSED = 4", "UNUSED = 5"),
    "method that is not called": ("4 * self.size", "8 * self.size"),
    "import inside a function": ("    layer = Layer()", "    import math as maths\n\n    layer = Layer()"),
}

ARITHMETIC = {
    "arithmetic": ("math.sqrt(value) * WIDTH", "math.sqrt(value) + WIDTH"),
    "order of a sum": ("self.size * self.scale", "self.scale * self.size"),
    "constant": ("WIDTH = 3", "WIDTH = 4"),
    "type of a constant": ("WIDTH = 3", "WIDTH = 3.0"),
    "default of a parameter": ("missing: int = 7", "missing: int = 8"),
    "default of a field": ("scale: int = 1", "scale: int = 2"),
    "another field": ("    scale: int = 1", "    depth: int = 3\n    scale: int = 1"),
    "argument": ("factor=2", "factor=3"),
    "condition of an error": ("if total < 0", "if total <= 0"),
    "method by attribute": ("self.side ** 2", "self.side ** 3"),
    "property": ("self.size * self.scale", "self.size / self.scale"),
    "method that a foreign base calls": ("hidden + 1", "hidden + 2"),
    "decorator": ("@dataclass(frozen=True)", "@dataclass"),
    "rounding in storage": ("round(value, 2)", "round(value, 3)"),
    "import of another": ("import math\n", "import cmath as math\n"),
    "two locals swapped": ("lowest = min(values)", "values, total = total, values"),
    "a module's statement on import": ("_log = logging.getLogger(__name__)", "import os\nos.environ.clear()"),
}


@pytest.mark.parametrize("edit", WORDS)
def test_words_are_no_part_of_a_key(edit: str, tmp_path: Path) -> None:
    assert small_digest(tmp_path / "edited", edited(*WORDS[edit])) == small_digest(tmp_path / "plain", FILES)


@pytest.mark.parametrize("edit", ARITHMETIC)
def test_what_computes_is_part_of_a_key(edit: str, tmp_path: Path) -> None:
    assert small_digest(tmp_path / "edited", edited(*ARITHMETIC[edit])) != small_digest(tmp_path / "plain", FILES)


def test_moving_definitions_changes_no_key(tmp_path: Path) -> None:
    """`scaled` and `Layer` go to a module of their own, `pack` comes under another name, the order turns round."""
    head, _, layer = PARTS.partition("class Layer")
    moved = {
        "tasks/deeper/layers.py": "from torch import nn\n\n\nclass Layer" + layer,
        "tasks/parts.py": head + "from tasks.deeper.layers import scaled\n",
        "tasks/stage.py": STAGE.replace("import pack", "import pack as packed").replace("pack(other)", "packed(other)"),
        "storage/packing.py": PACKING,
    }
    (tmp_path / "moved/tasks").mkdir(parents=True)
    assert small_digest(tmp_path / "moved", moved) == small_digest(tmp_path / "plain", FILES)
    through_the_module = STAGE.replace("from storage.packing import pack", "from storage import packing")
    files = {**FILES, "tasks/stage.py": through_the_module.replace("pack(other)", "packing.pack(other)")}
    assert any("round" in text for text in small_digest(tmp_path / "through", files))


def test_a_definition_of_the_same_name_elsewhere_is_another(tmp_path: Path) -> None:
    """Both are reached before and after; which of them the stage calls has changed."""
    other = {**FILES, "storage/coarse.py": PACKING.replace("2)", "1)")}
    both = "from storage.coarse import pack as second\nfrom storage.packing import pack as first\n"
    use = "first(other) - second(other) for"
    stage = STAGE.replace("from storage.packing import pack\n", both).replace("pack(other) for", use)
    swapped = stage.replace("storage.coarse", "storage.x").replace("storage.packing", "storage.coarse")
    before = small_digest(tmp_path / "before", {**other, "tasks/stage.py": stage})
    after = small_digest(
        tmp_path / "after", {**other, "tasks/stage.py": swapped.replace("storage.x", "storage.packing")}
    )
    assert before != after


def test_a_root_that_is_not_there_is_our_mistake(tmp_path: Path) -> None:
    small_digest(tmp_path, FILES)
    with pytest.raises(AssertionError, match=r"tasks.stage:gone is not defined"):
        ProjectCode(tmp_path).reached(["tasks.stage:gone"])


# --- a copy of this project ------------------------------------------------------------------------------------------


class Copy:
    """The project's packages in a folder of their own, to edit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for package in ("storage", "tasks"):
            shutil.copytree(
                SOURCES / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "timings")
            )
        self.files = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
        self.roots = {path.stem: roots for path in self.files if (roots := _roots_in((folder / path).read_text()))}
        self.plain = self.keys()

    def keys(self) -> dict[str, list[str]]:
        """Return the code in the keys of each module that makes pieces."""
        code = ProjectCode(self.folder)
        return {name: code.reached(roots) for name, roots in self.roots.items()}

    def changed(self) -> set[str]:
        """Return modules whose pieces have another key than in the unedited copy."""
        keys = self.keys()
        return {name for name in keys if keys[name] != self.plain[name]}


def _roots_in(text: str) -> list[str]:
    """Return what a module hands to `code_digest`."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    arguments = [call.args for call in calls if isinstance(call.func, ast.Name) and call.func.id == "code_digest"]
    return [
        ast.literal_eval(argument) for group in arguments for argument in group if isinstance(argument, ast.Constant)
    ]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("project"))


class _OtherWords(ast.NodeTransformer):
    """Rewrites what people read: docstrings, texts of errors, messages of asserts."""

    def visit(self, node: ast.AST) -> ast.AST:
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                node.value = ast.Constant("Other words.")
            case ast.Raise(exc=ast.Call(func=error, args=[_, *_])):
                node.exc = ast.Call(error, [ast.Constant("other words")], [])
                node.cause = None
            case ast.Assert():
                node.msg = ast.Constant("other words")
        return super().generic_visit(node)


class _OtherNames(ast.NodeTransformer):
    """Renames local variables, but those whose name the file also uses for anything else."""

    def __init__(self, tree: ast.Module) -> None:
        nodes = list(ast.walk(tree))
        stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        elsewhere = {name for statement in tree.body for name in _outside_functions(statement)} | set(dir(builtins))
        for node in nodes:
            match node:
                case ast.arg():
                    elsewhere.add(node.arg)
                case ast.alias():
                    elsewhere.add(node.asname or node.name)
                case ast.FunctionDef() | ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar():
                    elsewhere.add(str(node.name))
        self._renamed = stored - elsewhere

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Name) and node.id in self._renamed:
            node.id = f"renamed_{node.id}"
        return super().generic_visit(node)


def _outside_functions(node: ast.AST) -> Iterator[str]:
    """Yield names in a statement at module level, but not those within functions."""
    if isinstance(node, ast.Name):
        yield node.id
    if not isinstance(node, ast.FunctionDef):
        for child in ast.iter_child_nodes(node):
            yield from _outside_functions(child)


class _OtherNumbers(ast.NodeTransformer):
    """Adds one to every whole number."""

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            node.value += 1
        return super().generic_visit(node)


def _rewritten(text: str, transformers: Iterable[Callable[[ast.Module], ast.NodeTransformer]]) -> str:
    tree = ast.parse(text)
    for transformer in transformers:
        transformer(tree).visit(tree)
    return ast.unparse(tree)


def test_other_words_and_names_in_every_file_change_no_key(project: Copy) -> None:
    """Comments and layout go as well, since every file is written anew from its tree."""
    rewritten = {
        str(file): _rewritten(
            (project.folder / file).read_text(encoding="utf-8"), [lambda _: _OtherWords(), _OtherNames]
        )
        for file in project.files
    }
    assert sum(text.count("renamed_") for text in rewritten.values()) > 1000
    assert _changed_by(project, rewritten) == set()


GKD = {"threads", "ranks"}
"""Modules of tasks/gkd that train."""
MODEL = {"cache_activations", "distill_blocks", "score_blocks", "refine_child"} | GKD

BENCHMARKS = {"questions", "human_eval", "mt_bench"}
"""Modules of tasks/accuracy that name what asks a benchmark; how models compute is measure_accuracy's."""
PARENT_TOO = MODEL | {"write_text", "measure_accuracy"}


@pytest.mark.parametrize(
    ("file", "expected"),
    {
        "tasks/puzzle/model/blocks.py": PARENT_TOO,
        "tasks/puzzle/model/rotary.py": PARENT_TOO,
        "tasks/puzzle/model/head.py": {"score_blocks", "measure_accuracy"} | GKD,
        "tasks/puzzle/distill/bld.py": {"distill_blocks"},
        "tasks/puzzle/distill/output_layers.py": {"distill_blocks", "refine_child"},
        "tasks/puzzle/distill/correction.py": {"refine_child"},
        "tasks/puzzle/distill/optimizer.py": {"distill_blocks"} | GKD,
        "tasks/puzzle/distill/gkd.py": GKD,
        "tasks/puzzle/distill/sharded.py": {"ranks"},
        "tasks/tensors/activations.py": MODEL - GKD,
        "tasks/tensors/replacements.py": {"distill_blocks", "score_blocks"},
        "tasks/puzzle/corpus/packing.py": {"prepare_corpus"},
        "storage/activations.py": MODEL,
        "storage/gguf_child.py": {"exports"},
    }.items(),
)
def test_a_number_changes_the_keys_of_the_stages_that_compute_with_it(
    file: str, expected: set[str], project: Copy
) -> None:
    assert _changed_by(project, {file: _with_other_numbers(project, file)}) == expected


def test_sizes_cards_the_search_and_plumbing_are_part_of_no_key(project: Copy) -> None:
    """Rewording the card must not discard a distillation under way, nor another count of bytes the activation cache."""
    rooms = ("tasks/puzzle/costs", "tasks/puzzle/runtimes", "tasks/puzzle/search", "tasks/drawing", "tasks/targets")
    files = [str(file) for file in project.files if str(file.parent) in rooms]
    files += ["tasks/checkpoints/children.py", "storage/sections.py", "storage/tables.py", "storage/paths.py"]
    assert {"tasks/puzzle/costs/sizes.py", "tasks/puzzle/runtimes/model_card.py"} <= set(files)
    edited_files = {file: _with_other_numbers(project, file) for file in files}
    edited_files = {file: text.replace("the ", "some ") for file, text in edited_files.items()}
    assert _changed_by(project, edited_files) == set()


def _with_other_numbers(project: Copy, file: str) -> str:
    return _rewritten((project.folder / file).read_text(encoding="utf-8"), [lambda _: _OtherNumbers()])


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("storage/activations.py", "hidden.contiguous().view(view)", "hidden.view(view)", MODEL - GKD),
        ("storage/library.py", "tensor.cpu().contiguous()", "tensor.cpu().half()", {"distill_blocks"}),
        (
            "tasks/puzzle/model/blocks.py",
            "return hidden + attended",
            "return attended + hidden",
            PARENT_TOO,
        ),
    ],
)
def test_packing_rounding_and_the_order_of_a_sum(
    file: str, old: str, new: str, expected: set[str], project: Copy
) -> None:
    text = (project.folder / file).read_text(encoding="utf-8")
    assert old in text
    assert _changed_by(project, {file: text.replace(old, new)}) == expected


def _changed_by(project: Copy, edited_files: Mapping[str, str]) -> set[str]:
    """Return modules whose keys change when files of the copy hold other texts; they are as before afterwards."""
    originals = {file: (project.folder / file).read_text(encoding="utf-8") for file in edited_files}
    try:
        for file, text in edited_files.items():
            (project.folder / file).write_text(text, encoding="utf-8")
        return project.changed()
    finally:
        for file, text in originals.items():
            (project.folder / file).write_text(text, encoding="utf-8")


def test_every_stage_with_pieces_names_the_code_that_makes_them(project: Copy) -> None:
    assert project.roots.keys() == PARENT_TOO | {"prepare_corpus", "exports", *BENCHMARKS}


def test_the_versions_are_part_of_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    root = "tasks.puzzle.distill.losses:cosine"
    before = code_digest(root)
    assert code_digest(root) == before
    code_digest.cache_clear()
    monkeypatch.setattr("storage.code_digest.metadata.version", lambda name: f"{name} of tomorrow")
    try:
        assert code_digest(root) != before
    finally:
        code_digest.cache_clear()
