"""report: every table and measurement -> artifacts/report/index.html, and its figures as SVG and PNG.

A stage that has not run, or a target without a speed limit, leaves a line on the page and no error. The same artifacts
give the same bytes. Run: `python -m flows.report`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.files import read_json, write_whole
from storage.model_config import ModelConfig
from storage.params import Params
from storage.paths import Paths
from storage.pipeline import PipelineStage, read_pipeline
from storage.records import CostRow
from storage.tables import read_costs, read_scores, read_throughput
from tasks.drawing import tables
from tasks.drawing.blocks import Model, architectures, runtimes
from tasks.drawing.facts import (
    PHASES,
    Child,
    bld_losses,
    gkd_curve,
    infeasible,
    panel,
    quality_of,
    runtime,
    score_cells,
    speeds,
)
from tasks.drawing.page import Page, Section, render
from tasks.drawing.pipeline import Stage, pipeline
from tasks.drawing.quality import predicted_measured, quality_throughput
from tasks.drawing.scores import score_map
from tasks.drawing.training import bld_losses as draw_bld_losses
from tasks.drawing.training import gkd_curves
from tasks.puzzle.score_rule import Scores
from tasks.puzzle.variants import parent_blocks


@dataclass
class _Run:
    """What a run has, and (filled while the page is written) what it has not."""

    name: str
    config: ModelConfig
    children: tuple[Child, ...]
    costs: Sequence[CostRow]
    dpi: int
    missing: list[str] = field(default_factory=list)

    def lacks(self, what: str, stage: str) -> None:
        """Note that `what` is not there, and which stage makes it."""
        self.missing.append(f"{what} (`dvc repro {stage}` makes it)")


@task(cache_policy=NO_CACHE)
def write_report(params: Params, paths: Paths) -> None:
    """Read what exists, draw it, and write the page and its figures."""
    run = _read(params, paths)
    sections = [
        _pipeline(run),
        _quality(run),
        _architecture(run),
        _runtime(run),
        _bld(run, paths),
        _scores(run, paths),
        _gkd(run),
        _throughput(run),
        _exports(run),
        _predicted(run),
    ]
    page = Page(
        title=f"Puzzle Pipeline: {run.name} and its children",
        parent=_parent_line(run),
        lines=[_line(child) for child in run.children],
        summary=tables.children_table(run.children),
        sections=[section for section in sections if section],
        missing=run.missing,
    )
    for section in page.sections:
        if section.drawing:
            _write(paths.report / f"{section.drawing.name}.svg", section.drawing.svg.encode())
            _write(paths.report / f"{section.drawing.name}.png", section.drawing.png)
    _write(paths.report / "index.html", render(page).encode())


def _write(path: Path, content: bytes) -> None:
    with write_whole(path) as temporary:
        temporary.write_bytes(content)


def _read(params: Params, paths: Paths) -> _Run:
    info = read_json(paths.parent / "puzzle_parent.json", "dvc repro prepare_parent")
    costs = read_costs(paths.costs) if paths.costs.is_file() else ()
    run = _Run(info["name"], ModelConfig.from_json(info["config"]), (), costs, params.report.png_dpi)
    children = []
    for target, wanted in params.targets.items():
        if paths.architecture(target).is_file():
            children.append(_child(target, paths))
        else:
            run.lacks(f"the child of {wanted.label}", f"search_architecture@{target}")
    run.children = tuple(children)
    for child in children:
        if child.evaluation is None:
            run.lacks(f"quality of {child.label}", f"evaluate_child@{child.target}")
        elif not child.evaluation.get("baselines"):
            run.lacks(f"baselines of {child.label}", f"evaluate_child@{child.target}")
        run.missing += [f"baseline {name} of {child.label}: none keeps the limits" for name in infeasible(child)]
        if child.setting is None:
            run.missing.append(f"throughput of {child.label} beside its quality: its target limits no speed")
        elif child.evaluation and child.measured_ratio is None:
            run.missing.append(f"measured throughput of {child.label}: its speed limit holds for {child.setting.text}")
    return run


def _child(target: str, paths: Paths) -> Child:
    throughput = paths.throughput(target)
    return Child(
        target,
        chosen=_optional(paths.architecture(target)),
        evaluation=_optional(paths.evaluation(target)),
        baselines=_optional(paths.baselines(target)),
        gkd=_optional(paths.gkd(target)),
        throughput=read_throughput(throughput) if throughput.is_file() else (),
    )


def _optional(path: Path) -> Any:
    return read_json(path, "dvc repro") if path.is_file() else None


def _parent_line(run: _Run) -> str:
    config = run.config
    shape = (
        f"{config.num_blocks} blocks, hidden size {config.hidden_size}, {config.num_heads} heads, "
        f"{config.num_kv_heads} kv heads, FFN {config.intermediate_size}, vocabulary {config.vocab_size}"
    )
    return f"Parent: {run.name}, {shape}"


def _line(child: Child) -> str:
    """One target's result as a sentence."""
    predicted = child.chosen["predicted"]
    sizes = (
        f"{child.label}: {predicted['block_params_ratio']:.1%} of the parent's block parameters and "
        f"{predicted['kv_ratio']:.1%} of its KV cache"
    )
    if child.evaluation is None:
        return f"{sizes}; not evaluated in this run."
    quality, parent = quality_of(child, child.final), quality_of(child, "parent")
    when = "after" if child.final == "distilled" else "before"
    result = (
        f"{sizes}; {when} GKD KL {quality['kl']:.3f} ± {quality['kl_stderr']:.3f} nats/token to the parent, "
        f"perplexity {quality['perplexity']:.2f} (parent {parent['perplexity']:.2f})"
    )
    if child.measured_ratio is None or child.setting is None:
        return f"{result}; its speed was not measured in this run."
    phase = PHASES[child.chosen["predicted"]["speed"]["metric"]]
    where = f"{child.setting.scenario}, batch {child.setting.batch}, on {child.machine}"
    return f"{result}; {child.measured_ratio:.2f} times the parent's speed ({phase}, {where}; measured)."


def _pipeline(run: _Run) -> Section:
    found = read_pipeline()
    stages = [
        Stage(
            stage.name,
            frozenset(earlier.name for earlier in found if earlier != stage and stage.reads(earlier)),
            _artifact(stage, found).removeprefix("artifacts/").replace("${key}", "<target>"),
            stage.per_target,
        )
        for stage in found
    ]
    text = "The stages and what each hands on under artifacts/, from dvc.yaml; the filled ones run for each target."
    return Section("pipeline", "Pipeline", text, pipeline(stages, run.dpi))


def _artifact(stage: PipelineStage, stages: Sequence[PipelineStage]) -> str:
    """The first artifact of a stage that another one reads."""
    read = (out for out in stage.outs if any(later.reads_path(out) for later in stages if later != stage))
    return next(read, stage.outs[0] if stage.outs else "")


def _quality(run: _Run) -> Section | None:
    evaluated = [child for child in run.children if child.evaluation]
    if not evaluated:
        return None
    shown = [own for child in evaluated if child.setting and (own := panel(child))]
    machines = dict.fromkeys(child.machine for child in evaluated if child.measured_ratio is not None)
    text = (
        "KL to the parent (measured on held-out text, bars are standard errors) over throughput relative to the "
        f"parent: filled markers were measured{' on ' + ' and '.join(machines) if machines else ''}, hollow ones are "
        "predicted from the cost table. GKD does not change what a child computes, so both children of a target share "
        "the speed that was measured before GKD. No baseline went through GKD: compare them with the child before it, "
        "and on the same sequences, as the tables' third column does, since baselines may be measured on fewer."
    )
    drawing = quality_throughput(shown, run.dpi) if shown else None
    return Section(
        "quality", "Quality against throughput", text, drawing, [tables.models_table(child) for child in evaluated]
    )


def _architecture(run: _Run) -> Section:
    models = [Model(f"Parent, {run.name}", "parent", parent_blocks(run.config))]
    models += [Model(child.label, child.target, child.blocks) for child in run.children]
    text = (
        "Block by block, attention above FFN. The frame is the parent's size, the filled part is what the child keeps: "
        "kv heads and FFN channels as the numbers say, lin for one linear layer, – for nothing."
    )
    return Section("architecture", "Architecture", text, architectures(models, run.dpi))


def _runtime(run: _Run) -> Section | None:
    if not run.costs:
        run.lacks("runtime per block", "measure_costs")
    if not run.costs or not run.children:
        return None
    drawn = [runtime(child, run.costs, run.config) for child in run.children]
    where = "; ".join(dict.fromkeys(one.what for one in drawn))
    text = (
        "What each block's attention and FFN take in the child and in the parent, from the cost table; the shaded part "
        f"is saved. In {where}."
    )
    return Section("runtime", "Runtime per block", text, runtimes(drawn, run.dpi))


def _bld(run: _Run, paths: Paths) -> Section | None:
    index = paths.library / "index.parquet"
    if not index.is_file():
        run.lacks("losses of blockwise local distillation (BLD)", "distill_blocks")
        return None
    losses = bld_losses(pq.ParquetFile(index).read().to_pylist())
    text = (
        "Held-out loss of every trained variant, measured, between its output and the parent block's: with the initial "
        "weights, after the closed-form fit, and with the weights kept."
    )
    return Section("bld", "BLD: loss before and after", text, draw_bld_losses(losses, run.dpi))


def _scores(run: _Run, paths: Paths) -> Section | None:
    if not paths.scores.is_file():
        run.lacks("replace-1-block scores", "score_blocks")
        return None
    cells = score_cells(Scores.of(read_scores(paths.scores), run.config), run.config)
    text = (
        "KL(parent || child) with one block of the parent replaced by a trained variant, measured on calibration text; "
        "lower is better. The search adds these up."
    )
    return Section("scores", "Replace-1-block scores", text, score_map(cells, run.config.num_blocks, run.dpi))


def _gkd(run: _Run) -> Section | None:
    curves = []
    for child in run.children:
        if curve := gkd_curve(child):
            curves.append(curve)
        else:
            run.lacks(f"global distillation (GKD) of {child.label}", f"distill_child@{child.target}")
    if not curves:
        return None
    text = (
        "The assembled child learns from the parent's hidden states and logits. Measured on the fly: KL on each "
        "training batch and on held-out text; the weights that are kept are those of the dotted line."
    )
    return Section("gkd", "Global distillation (GKD)", text, gkd_curves(curves, run.dpi))


def _exports(run: _Run) -> Section | None:
    table = tables.exports_table(run.children)
    if table is None:
        run.lacks("quality of exported GGUF files", "evaluate_child")
        return None
    text = "What a user of the file gets: 16 bit changes hardly anything, eight bit a little; a broken file would show."
    return Section("exports", "Exports", text, tables=[table])


def _throughput(run: _Run) -> Section | None:
    shown = []
    for child in run.children:
        here, modelled = tables.measured_throughput(child), tables.modelled_throughput(child)
        if not here:
            run.lacks(f"measured throughput of {child.label} by scenario", f"benchmark_throughput@{child.target}")
        if modelled is None:
            run.lacks(f"modelled throughput of {child.label} on a GPU", f"benchmark_throughput@{child.target}")
        shown += [*here, *([modelled] if modelled else [])]
    if not shown:
        return None
    text = (
        "Tokens per second of parent and child: measured ones beside what the cost table predicts for the same "
        "setting; and, in tables of their own, modelled ones for a GPU that was not at hand."
    )
    return Section("throughput", "Throughput", text, tables=shown)


def _predicted(run: _Run) -> Section | None:
    evaluated = [own for child in run.children if (own := panel(child))]
    if not run.children:
        return None
    text = (
        "On the line, the tables were right. Left: the sum of replace-1-block scores against the measured KL of models "
        "that had no GKD. Right: tokens per second from the cost table against the clock. Below: each limit."
    )
    drawing = predicted_measured(evaluated, speeds(run.children), run.dpi) if evaluated else None
    limits = tables.constraints_table(run.children)
    return Section("predicted", "Predicted against measured", text, drawing, [limits])
