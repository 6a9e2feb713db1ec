"""report: every table and measurement -> artifacts/report/index.html, and its figures as SVG and PNG.

A stage that has not run, or a target without a speed limit, leaves a line on the page and no error. The same artifacts
give the same bytes. Run: `puzzle stage report`.
"""

from collections.abc import Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.accuracy import read_accuracy
from storage.architecture import read_architecture, read_baselines
from storage.evaluation import read_evaluation
from storage.files import write_whole
from storage.gkd import read_gkd
from storage.params import Params
from storage.parent_info import read_parent_info
from storage.parquet_files import read_table
from storage.paths import Paths
from storage.pipeline import PipelineStage, read_pipeline
from storage.refinement import read_refinement
from storage.tables import read_costs, read_scores, read_throughput
from tasks.drawing.numbers import counted, with_error
from tasks.drawing.page import Page, render
from tasks.drawing.pipeline import StageBox
from tasks.drawing.reported_child import ReportedChild
from tasks.drawing.sections import ReportedRun, all_parts, lacking
from tasks.drawing.tables import children_table
from tasks.puzzle.search.score_rule import Scores


@task(cache_policy=NO_CACHE)
def write_report(params: Params, paths: Paths) -> None:
    """Read the artifacts that exist, draw them, and write the page and its figures."""
    run = _read(params, paths)
    parts = all_parts(run)
    page = Page(
        title=f"Puzzle Pipeline: {run.parent} and its children",
        parent=_parent_line(run),
        lines=[_child_line(child) for child in run.children],
        summary=children_table(run.children),
        sections=[part.section for part in parts if part.section],
        missing=[*_missing(params, run), *(line for part in parts for line in part.missing)],
    )
    for section in page.sections:
        if section.drawing:
            _write(paths.report / f"{section.drawing.name}.svg", section.drawing.svg.encode())
            _write(paths.report / f"{section.drawing.name}.png", section.drawing.png)
    _write(paths.report / "index.html", render(page).encode())


def _write(path: Path, content: bytes) -> None:
    with write_whole(path) as temporary:
        temporary.write_bytes(content)


def _read(params: Params, paths: Paths) -> ReportedRun:
    parent, index = read_parent_info(paths.parent), paths.library_index
    targets = [target for target in params.targets if paths.architecture(target).is_file()]
    return ReportedRun(
        parent=parent.name,
        config=parent.config,
        children=tuple(_read_child(target, paths) for target in targets),
        stages=tuple(_stage_boxes(read_pipeline())),
        costs=read_costs(paths.costs) if paths.costs.is_file() else (),
        scores=Scores.from_rows(read_scores(paths.scores), parent.config) if paths.scores.is_file() else None,
        library=read_table(index, "dvc repro distill_blocks").to_pylist() if index.is_file() else None,
        dpi=params.report.png_dpi,
    )


def _read_child(target: str, paths: Paths) -> ReportedChild:
    throughput = paths.throughput(target)
    return ReportedChild(
        chosen=read_architecture(target, paths),
        evaluation=read_evaluation(target, paths) if paths.evaluation(target).is_file() else None,
        baselines=read_baselines(target, paths) if paths.baselines(target).is_file() else {},
        gkd=read_gkd(target, paths) if paths.gkd(target).is_file() else None,
        throughput=read_throughput(throughput) if throughput.is_file() else (),
        refinement=read_refinement(target, paths) if paths.refinement(target).is_file() else None,
        accuracy=read_accuracy(target, paths) if paths.accuracy(target).is_file() else None,
    )


def _stage_boxes(stages: Sequence[PipelineStage]) -> list[StageBox]:
    """Return the stages of dvc.yaml as the figure draws them."""
    boxes = []
    for stage in stages:
        after = frozenset(earlier.name for earlier in stages if earlier != stage and stage.reads(earlier))
        artifact = _artifact(stage, stages).removeprefix("artifacts/").replace("${key}", "<target>")
        boxes.append(StageBox(stage.name, after, artifact, stage.per_target))
    return boxes


def _artifact(stage: PipelineStage, stages: Sequence[PipelineStage]) -> str:
    """Return the first artifact of a stage that another one reads."""
    others = [later for later in stages if later != stage]
    for out in stage.outs:
        if any(later.reads_path(out) for later in others):
            return out
    return stage.outs[0] if stage.outs else ""


def _missing(params: Params, run: ReportedRun) -> list[str]:
    """List the results of targets that the run lacks, other than those of one section."""
    searched = {child.target for child in run.children}
    missing = [
        lacking(f"the child of {target.label}", f"search_architecture@{key}")
        for key, target in params.targets.items()
        if key not in searched
    ]
    for child in run.children:
        missing += _missing_of(child)
    return missing


def _missing_of(child: ReportedChild) -> list[str]:
    missing = []
    if child.evaluation is None:
        missing.append(lacking(f"quality of {child.label}", f"evaluate_child@{child.target}"))
    elif not child.evaluation.training.baselines:
        missing.append(lacking(f"baselines of {child.label}", f"evaluate_child@{child.target}"))
    missing += [f"baseline {name} of {child.label}: none keeps the limits" for name in child.infeasible_baselines]
    if child.setting is None:
        missing.append(f"throughput of {child.label} beside its quality: its target limits no speed")
    elif child.evaluation and child.measured_ratio is None:
        missing.append(f"measured throughput of {child.label}: its speed limit holds for {child.setting.text}")
    return missing


def _parent_line(run: ReportedRun) -> str:
    """Describe the parent's geometry in a sentence."""
    config = run.config
    shape = (
        f"{config.num_blocks} blocks, hidden size {config.hidden_size}, {config.num_heads} heads, "
        f"{config.num_kv_heads} kv heads, FFN {config.intermediate_size}, vocabulary {config.vocab_size}"
    )
    return f"Parent: {run.parent}, {shape}"


def _child_line(child: ReportedChild) -> str:
    """Describe one target's result in a sentence."""
    predicted = child.chosen.predicted
    sizes = (
        f"{child.label}: {predicted.block_params_ratio:.1%} of the parent's block parameters and "
        f"{predicted.kv_ratio:.1%} of its KV cache"
    )
    if child.evaluation is None:
        return f"{sizes}; not evaluated in this run."
    qualities = [
        f"KL {with_error(measured.distilled.kl, measured.distilled.kl_stderr)} nats/token to the parent, perplexity "
        f"{measured.distilled.perplexity:.2f} (parent {measured.parent.perplexity:.2f}) on "
        f"{counted(measured.documents, 'document')} of {domain} text"
        for domain, measured in child.evaluation.domains.items()
    ]
    result = f"{sizes}; distilled: {'; '.join(qualities)}"
    if child.measured_ratio is None or child.setting is None:
        return f"{result}; its speed was not measured in this run."
    setting = f"{child.setting.scenario}, batch {child.setting.batch}, on {child.machine}"
    return f"{result}; {child.measured_ratio:.2f} times the parent's speed ({child.phase}, {setting}; measured)."
