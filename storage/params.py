"""params.yaml as typed records (its sections: storage/sections.py); unknown keys are refused.

The same models are the form that the Prefect UI shows.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, StringConstraints, ValidationError, model_validator

from storage.fields import Section
from storage.files import InputError
from storage.sections import (
    AssembleChild,
    BenchmarkThroughput,
    CacheActivations,
    DistillBlocks,
    DistillChild,
    EvaluateChild,
    ExportChild,
    ExportParent,
    MeasureAccuracy,
    MeasureCosts,
    PrepareCorpus,
    PrepareParent,
    Report,
    Run,
    ScoreBlocks,
    SearchArchitecture,
    SearchBaselines,
)
from storage.targets import Target

PARAMS_FILE = Path("params.yaml")
S = TypeVar("S", bound=Section)


class Params(Section):
    """The whole of params.yaml: one section per stage, named like it."""

    run: Run
    prepare_parent: PrepareParent
    prepare_corpus: PrepareCorpus
    cache_activations: CacheActivations
    distill_blocks: DistillBlocks
    score_blocks: ScoreBlocks
    measure_costs: MeasureCosts
    search_architecture: SearchArchitecture
    search_baselines: SearchBaselines
    assemble_child: AssembleChild
    distill_child: DistillChild
    export_child: ExportChild
    export_parent: ExportParent
    benchmark_throughput: BenchmarkThroughput
    evaluate_child: EvaluateChild
    measure_accuracy: MeasureAccuracy
    report: Report
    targets: dict[Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$")], Target] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        corpus, seq_len = self.prepare_corpus, self.prepare_corpus.seq_len
        wanted = {
            "distill_child.tokens + the most of distill_blocks.tokens, variant_tokens, fit_tokens": (
                self.distill_blocks.used_tokens + self.distill_child.tokens,
                corpus.train_tokens,
                "train_tokens",
            ),
            "distill_child.held_out_tokens": (
                self.distill_child.held_out_tokens,
                corpus.calibration_tokens,
                "calibration_tokens",
            ),
            "score_blocks.tokens + distill_blocks.held_out_tokens": (
                self.score_blocks.tokens + self.distill_blocks.held_out_tokens,
                corpus.calibration_tokens,
                "calibration_tokens",
            ),
            "evaluate_child.tokens": (self.evaluate_child.tokens, corpus.validation_tokens, "validation_tokens"),
        }
        problems = [
            f"{name} is {tokens}, more than prepare_corpus.{budget} = {available}"
            for name, (tokens, available, budget) in wanted.items()
            if tokens > available
        ]
        step, batch = self.distill_blocks.sequences_per_step * seq_len, self.score_blocks.sequences_per_batch * seq_len
        multiples = {
            "prepare_corpus.train_tokens": (corpus.train_tokens, seq_len),
            "prepare_corpus.calibration_tokens": (corpus.calibration_tokens, seq_len),
            "prepare_corpus.validation_tokens": (corpus.validation_tokens, seq_len),
            "distill_blocks.fit_tokens": (self.distill_blocks.fit_tokens, seq_len),
            "distill_blocks.tokens": (self.distill_blocks.tokens, step),
            **{
                f"distill_blocks.variant_tokens.{name}": (tokens, step)
                for name, tokens in self.distill_blocks.variant_tokens.items()
            },
            "score_blocks.tokens": (self.score_blocks.tokens, batch),
            "score_blocks.initial_tokens": (self.score_blocks.initial_tokens, batch),
            "distill_child.tokens": (
                self.distill_child.tokens,
                self.distill_child.sequences_per_step * seq_len,
            ),
            "distill_child.held_out_tokens": (self.distill_child.held_out_tokens, seq_len),
            "evaluate_child.tokens": (self.evaluate_child.tokens, seq_len),
            "evaluate_child.baseline_tokens": (self.evaluate_child.baseline_tokens, seq_len),
            "evaluate_child.export_tokens": (self.evaluate_child.export_tokens, seq_len),
        }
        problems += [
            f"{name} is {tokens}, expected a multiple of {unit} (seq_len x sequences at once)"
            for name, (tokens, unit) in multiples.items()
            if tokens % unit
        ]
        if self.score_blocks.initial_tokens > self.score_blocks.tokens:
            problems.append("score_blocks.initial_tokens must not exceed score_blocks.tokens")
        if self.evaluate_child.baseline_tokens > self.evaluate_child.tokens:
            problems.append("evaluate_child.baseline_tokens must not exceed evaluate_child.tokens")
        if self.evaluate_child.export_tokens > self.evaluate_child.tokens:
            problems.append("evaluate_child.export_tokens must not exceed evaluate_child.tokens")
        if "parent" in self.targets:
            problems.append("targets.parent: `parent` stands for the parent itself; choose another name")
        problems += [
            f"{who} measures in llama.cpp, which runs gguf-f16; add it to {section}.formats"
            for who in self._in_llama_cpp()
            for section, formats in (
                ("export_child", self.export_child.formats),
                ("export_parent", self.export_parent.formats),
            )
            if "gguf-f16" not in formats
        ]
        if problems:
            raise ValueError("\n  ".join(problems))
        return self

    def _in_llama_cpp(self) -> Iterator[str]:
        """Keys of what makes benchmark_throughput measure in llama.cpp."""
        if "llama.cpp" in self.benchmark_throughput.engines:
            yield "benchmark_throughput.engines"
        for name, of in self.targets.items():
            limits = of.constraints.items()
            yield from (f"targets.{name}.constraints.{key}" for key, one in limits if one.engine == "llama.cpp")

    def target(self, name: str) -> Target:
        """The target with this key, or InputError with the nearest one."""
        if name not in self.targets:
            raise InputError(
                f"unknown target {name!r}{_nearest(name, list(self.targets))}; known: {', '.join(self.targets)}"
            )
        return self.targets[name]


def load(path: Path = PARAMS_FILE) -> Params:
    """Read and check params.yaml.

    Raises:
        InputError: the file is missing, not YAML, or a key or value is wrong; one line per problem, each with the
            full name of the key, what was expected and the nearest known key for a misspelt one.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing; run from the project's root")
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold sections, found {type(raw).__name__}")
    return parse(raw, str(path))


def load_target(path: Path) -> Target:
    """A target in a file of its own: what stands under a key of `targets` in params.yaml.

    Raises:
        InputError: as :func:`load`.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing")
    return parse_section(read_yaml(path), str(path), Target)


def parse_section(raw: Any, where: str, section: type[S]) -> S:
    """Check the values of one section; errors as :func:`load`."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise InputError(_problems(error, where, section)) from None


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        InputError: it is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def parse(raw: dict[str, Any], where: str) -> Params:
    """Check a params mapping; see :func:`load`."""
    return parse_section(raw, where, Params)


def _problems(error: ValidationError, where: str, root: type[BaseModel]) -> str:
    """One line per problem."""
    lines = [
        _problem(root, detail["loc"], detail["type"], detail["msg"], detail.get("input")) for detail in error.errors()
    ]
    return f"{where}: " + "\n  ".join(lines)


def _problem(root: type[BaseModel], location: tuple[int | str, ...], kind: str, message: str, found: Any) -> str:
    name = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        known = sorted(_fields_at(root, location[:-1]))
        return f"unknown key {name}{_nearest(str(location[-1]), known)} (known here: {', '.join(known)})"
    shown = f" (found {found!r})" if isinstance(found, str | int | float | bool) else ""
    text = message.removeprefix("Value error, ") + shown
    return f"{name}: {text}" if name else text


def _fields_at(root: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Names of the fields of the section at `location` (keys of dicts and indices of lists are stepped over)."""
    section = root
    for part in location:
        field = section.model_fields.get(str(part))
        section = _section_in(field.annotation) or section if field else section
    return set(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The first section within a field's type: itself, or an argument of its dict, tuple or union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _section_in(argument))), None)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]}?" if close else ""
