"""params.yaml as typed records: read, checked, and refused with every problem in one error.

In: params.yaml, or a target in a file of its own. Out: :class:`Params`, a field a section. What a key means is said in
storage/sections.py and storage/targets.py; what the sections must agree on is checked here. Unknown keys are refused.
The same models are the form that the Prefect UI shows.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import BaseModel, Field, StringConstraints, ValidationError, model_validator

from storage.accuracy_sections import MeasureAccuracy
from storage.execution import Execution
from storage.fields import MAX_NUMBER, Section, expecting
from storage.files import InputError, did_you_mean
from storage.formats import LLAMACPP_FORMAT
from storage.sections import (
    AssembleChild,
    BenchmarkThroughput,
    CacheActivations,
    DistillBlocks,
    DistillChild,
    EvaluateChild,
    ExportChild,
    ExportParent,
    MeasureCosts,
    PrepareCorpus,
    PrepareParent,
    RefineChild,
    Report,
    Run,
    ScoreBlocks,
    SearchArchitecture,
    SearchBaselines,
    Storage,
    WriteText,
)
from storage.targets import Target
from storage.yaml_files import read_yaml

PARAMS_FILE = Path("params.yaml")
_MOST_PROBLEMS = 20
_MOST_CHARACTERS = 80
_IN_WORDS = {
    "model_type": "expected a section, which holds KEY: VALUE lines",
    "dict_type": "expected KEY: VALUE lines",
    "tuple_type": "expected a list",
}
"""What pydantic says in names of Python's types."""
_TargetName = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,59}$"),
    expecting("a name of at most 60 lowercase letters, digits and -, a letter first"),
]
S = TypeVar("S", bound=Section)


class Params(Section):
    """The whole of params.yaml: one section per stage, named like it; before them what all stages share."""

    run: Run
    execution: Execution = Execution.model_validate({})  # these two may be left out: no result depends on them
    storage: Storage = Storage.model_validate({})
    prepare_parent: PrepareParent
    write_text: WriteText
    prepare_corpus: PrepareCorpus
    cache_activations: CacheActivations
    distill_blocks: DistillBlocks
    score_blocks: ScoreBlocks
    measure_costs: MeasureCosts
    search_architecture: SearchArchitecture
    search_baselines: SearchBaselines
    assemble_child: AssembleChild
    refine_child: RefineChild
    distill_child: DistillChild
    export_child: ExportChild
    export_parent: ExportParent
    benchmark_throughput: BenchmarkThroughput
    evaluate_child: EvaluateChild
    measure_accuracy: MeasureAccuracy
    report: Report
    targets: dict[_TargetName, Target] = Field(min_length=1)

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        """Check what one section alone cannot check; all problems are in one error."""
        checks = (_too_short_splits, _broken_sequences, _parts_above_their_whole, _target_names, _formats_for_llamacpp)
        problems = [problem for check in checks for problem in check(self)]
        if problems:
            raise ValueError("\n  ".join(problems))
        return self

    def target(self, name: str) -> Target:
        """Return the target with this key; raises InputError with the nearest one."""
        if name not in self.targets:
            raise InputError(
                f"unknown target {name!r}{did_you_mean(name, self.targets)}; known: {', '.join(self.targets)}"
            )
        return self.targets[name]


def _too_short_splits(params: Params) -> Iterator[str]:
    """Yield budgets of tokens that are larger than their split of the corpus."""
    corpus, bld, score = params.prepare_corpus, params.distill_blocks, params.score_blocks
    refine, gkd, evaluate = params.refine_child, params.distill_child, params.evaluate_child
    scored = score.tokens // score.length(corpus.seq_len)
    held_out_by_gkd = gkd.held_out_tokens if gkd.tokens else 0
    budgets = (
        (
            "distill_child.tokens + the most of distill_blocks.tokens, variant_tokens, fit_tokens, refine_child.tokens",
            max(bld.used_tokens, refine.tokens) + gkd.tokens,
            "train_tokens",
            corpus.train_tokens,
        ),
        (
            "seq_len x the sequences of score_blocks.tokens + the most of held_out_tokens of distill_blocks, "
            "refine_child, distill_child",
            scored * corpus.seq_len + max(bld.held_out_tokens, refine.held_out_tokens, held_out_by_gkd),
            "calibration_tokens",
            corpus.calibration_tokens,
        ),
        ("evaluate_child.tokens", evaluate.tokens, "validation_tokens", corpus.validation_tokens),
    )
    for key, tokens, split, available in budgets:
        if tokens > available:
            yield f"{key} is {tokens}, more than prepare_corpus.{split} = {available}"


def _broken_sequences(params: Params) -> Iterator[str]:
    """Yield budgets of tokens that are not a whole number of sequences, or of the sequences that are taken at once."""
    corpus, bld, score = params.prepare_corpus, params.distill_blocks, params.score_blocks
    gkd, evaluate, seq_len = params.distill_child, params.evaluate_child, params.prepare_corpus.seq_len
    whole = (seq_len, "prepare_corpus.seq_len")
    bld_step = (bld.sequences_per_step * seq_len, "seq_len x distill_blocks.sequences_per_step")
    gkd_step = (gkd.sequences_per_step * seq_len, "seq_len x distill_child.sequences_per_step")
    score_batch = (score.length(seq_len), "score_blocks.sequence_tokens")
    if score.sequences_per_batch != "auto":
        per_batch = score.sequences_per_batch * score.length(seq_len)
        score_batch = (per_batch, "a sequence x score_blocks.sequences_per_batch")
    budgets = [
        ("prepare_corpus.train_tokens", corpus.train_tokens, whole),
        ("prepare_corpus.calibration_tokens", corpus.calibration_tokens, whole),
        ("prepare_corpus.validation_tokens", corpus.validation_tokens, whole),
        ("distill_blocks.fit_tokens", bld.fit_tokens, whole),
        ("distill_blocks.tokens", bld.tokens, bld_step),
    ]
    for name, domain in corpus.domains.items():
        budgets.append((f"prepare_corpus.domains.{name}.tokens", domain.tokens, whole))
    for variant, tokens in bld.variant_tokens.items():
        budgets.append((f"distill_blocks.variant_tokens.{variant}", tokens, bld_step))
    budgets += [
        ("score_blocks.tokens", score.tokens, score_batch),
        ("score_blocks.initial_tokens", score.initial_tokens, score_batch),
        ("score_blocks.depth_tokens", score.depth_tokens, score_batch),
        ("distill_child.tokens", gkd.tokens, gkd_step),
        ("distill_child.held_out_tokens", gkd.held_out_tokens, whole),
        ("refine_child.tokens", params.refine_child.tokens, whole),
        ("refine_child.held_out_tokens", params.refine_child.held_out_tokens, whole),
        ("evaluate_child.tokens", evaluate.tokens, whole),
        ("evaluate_child.baseline_tokens", evaluate.baseline_tokens, whole),
        ("evaluate_child.domain_baseline_tokens", evaluate.domain_baseline_tokens, whole),
        ("evaluate_child.export_tokens", evaluate.export_tokens, whole),
    ]
    for key, tokens, (multiple, product) in budgets:
        if tokens % multiple:
            yield f"{key} is {tokens}, expected a multiple of {multiple} ({product})"


def _parts_above_their_whole(params: Params) -> Iterator[str]:
    """Yield budgets of the first tokens of another budget that are larger than it."""
    score, evaluate, seq_len = params.score_blocks, params.evaluate_child, params.prepare_corpus.seq_len
    if score.length(seq_len) > seq_len:
        yield f"score_blocks.sequence_tokens must not exceed prepare_corpus.seq_len = {seq_len}"
    parts = (
        ("score_blocks", "initial_tokens", score.initial_tokens, score.tokens),
        ("score_blocks", "depth_tokens", score.depth_tokens, score.tokens),
        ("evaluate_child", "baseline_tokens", evaluate.baseline_tokens, evaluate.tokens),
        ("evaluate_child", "domain_baseline_tokens", evaluate.domain_baseline_tokens, evaluate.tokens),
        ("evaluate_child", "export_tokens", evaluate.export_tokens, evaluate.tokens),
    )
    for section, key, part, whole in parts:
        if part > whole:
            yield f"{section}.{key} must not exceed {section}.tokens"


def _target_names(params: Params) -> Iterator[str]:
    """Yield names and labels of targets that already name something else."""
    if "parent" in params.targets:
        yield "targets.parent: `parent` stands for the parent itself; choose another name"
    keys: dict[str, str] = {}
    for key, target in params.targets.items():
        if (twin := keys.setdefault(target.label, key)) != key:
            yield f"targets.{key}.label is that of {twin} too; tables and figures tell children by it, so change one"


def _formats_for_llamacpp(params: Params) -> Iterator[str]:
    """Yield exports that benchmark_throughput needs to measure in llama.cpp."""
    needed_by = ["benchmark_throughput.engines"] if "llama.cpp" in params.benchmark_throughput.engines else []
    for target, wishes in params.targets.items():
        for key, constraint in wishes.constraints.items():
            if constraint.engine == "llama.cpp":
                needed_by.append(f"targets.{target}.constraints.{key}")
    exports = (("export_child", params.export_child.formats), ("export_parent", params.export_parent.formats))
    for needing in needed_by:
        for section, formats in exports:
            if LLAMACPP_FORMAT not in formats:
                yield f"{needing} measures in llama.cpp, which runs {LLAMACPP_FORMAT}; add it to {section}.formats"


def load(path: Path = PARAMS_FILE) -> Params:
    """Read and check params.yaml.

    Raises:
        InputError: the file is missing, not YAML, or a key or value is wrong; one line per problem, each with the
            full name of the key, what was expected and the nearest known key for a misspelt one.
    """
    raw = read_yaml(path, "run from the project's root")
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold sections, found {type(raw).__name__}")
    return parse(raw, str(path))


def load_target(path: Path) -> Target:
    """Read a target from a file of its own, in the form of a value of `targets` in params.yaml.

    Raises:
        InputError: the file is refused, as by :func:`load`.
    """
    return parse_section(read_yaml(path), str(path), Target)


def parse_section(raw: Any, where: str, section: type[S]) -> S:
    """Check the values of one section; errors as :func:`load`."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise InputError(_problems(error, where, section)) from None


def parse(raw: dict[str, Any], where: str) -> Params:
    """Check a params mapping; see :func:`load`."""
    return parse_section(raw, where, Params)


def _problems(error: ValidationError, where: str, root: type[BaseModel]) -> str:
    """Return one line for each of the first problems."""
    details = error.errors(include_url=False, include_context=False)
    lines = [
        _problem(root, detail["loc"], detail["type"], detail["msg"], detail.get("input"))
        for detail in details[:_MOST_PROBLEMS]
    ]
    if len(details) > len(lines):
        lines.append(f"and {len(details) - len(lines):,} more problems")
    return f"{where}: " + "\n  ".join(lines)


def _problem(root: type[BaseModel], location: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    """Return a problem of pydantic's in words: the key in full, what was expected, what was found."""
    key = ".".join(_shown(part) for part in location if part != "[key]")
    if kind == "extra_forbidden":
        fields = sorted(_fields_at(root, location[:-1]))
        return f"unknown key {key}{did_you_mean(str(location[-1]), fields)} (known here: {', '.join(fields)})"
    text = _IN_WORDS.get(kind, message.removeprefix("Value error, ")) + _found(kind, value)
    return f"{key}: {text}" if key else text


def _found(kind: str, value: object) -> str:
    """Return the end of a line: a value that was found, a list of them where no other line names its items."""
    if value is None:
        return " (found nothing)"
    items = value[:_MOST_CHARACTERS] if isinstance(value, list) and kind == "expecting" else [value]
    if not all(isinstance(item, str | int | float | bool) for item in items):
        return ""
    text = ", ".join(_shown(item, repr) for item in items)
    return f" (found {_cut(f'[{text}]') if isinstance(value, list) else text})"


def _shown(value: object, form: Callable[[object], str] = str) -> str:
    """Return a value in a message, not longer than a line."""
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        return "a very large number"  # Python refuses to print one of more than 4,300 digits
    text = form(value[: 2 * _MOST_CHARACTERS] if isinstance(value, str) else value)
    return _cut(text)


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def _fields_at(root: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Return the names of fields of the section at `location` (keys of dicts and indices of lists are stepped over)."""
    section = root
    for part in location:
        field = section.model_fields.get(str(part))
        section = _section_in(field.annotation) or section if field else section
    return set(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the first section within a field's type: the type itself, or an argument of its dict, tuple or union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        section = _section_in(argument)
        if section is not None:
            return section
    return None
