"""The sections of the report's page: a run's artifacts as text, figures and tables, and what a run does not have.

In: the records of a run. Out: a Part for each section. A stage that has not run, or a target without a speed limit,
gives a line of `missing` and no error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from storage.documents import TRAINING_MIX
from storage.gkd import GkdCurve
from storage.model_config import ModelConfig
from storage.records import CostRow
from tasks.drawing import tables, throughput_tables
from tasks.drawing.accuracy_tables import accuracy_table, positions_table
from tasks.drawing.accuracy_text import NO_BENCHMARK
from tasks.drawing.blocks import DrawnModel, architectures, runtimes
from tasks.drawing.figure_data import bld_losses, healed_child, panel, runtime, score_cells, speed_points
from tasks.drawing.healing import healing
from tasks.drawing.page import PageSection
from tasks.drawing.pipeline import StageBox, pipeline
from tasks.drawing.quality import predicted_measured, quality_throughput
from tasks.drawing.refinement import error_along_depth
from tasks.drawing.reported_child import ReportedChild
from tasks.drawing.scores import score_map
from tasks.drawing.tables import Table
from tasks.drawing.training import bld_losses as draw_bld_losses
from tasks.drawing.training import gkd_curves
from tasks.puzzle.search.score_rule import Scores
from tasks.puzzle.search_space import parent_blocks

_T = TypeVar("_T")


@dataclass(frozen=True)
class ReportedRun:
    """The artifacts of a run; None or empty for those that it does not have.

    Attributes:
        parent: the parent's name.
        config: the parent's geometry.
        children: the targets that were searched.
        stages: the stages of dvc.yaml.
        costs: rows of costs.parquet.
        scores: replace-1-block scores.
        library: rows of the library's index.
        dpi: pixels per inch of the PNGs.
    """

    parent: str
    config: ModelConfig
    children: tuple[ReportedChild, ...]
    stages: tuple[StageBox, ...]
    costs: Sequence[CostRow]
    scores: Scores | None
    library: Sequence[Mapping[str, Any]] | None
    dpi: int


@dataclass(frozen=True)
class Part:
    """A section of the page, None if the run has nothing to show in it, and the results that the run lacks for it."""

    section: PageSection | None
    missing: tuple[str, ...] = ()


def lacking(result: str, stage: str) -> str:
    """Say that a run lacks a result, and which stage makes it."""
    return f"{result} (`dvc repro {stage}` makes it)"


def all_parts(run: ReportedRun) -> list[Part]:
    """Make every section, in the page's order."""
    builders = (
        *(pipeline_part, healing_part, quality_part, accuracy_part, architecture_part, runtime_part, bld_part),
        *(scores_part, refinement_part, gkd_part, throughput_part, exports_part, predicted_part),
    )
    return [build(run) for build in builders]


def pipeline_part(run: ReportedRun) -> Part:
    """Draw the stages and their artifacts."""
    text = "The stages and what each hands on under artifacts/, from dvc.yaml; the filled ones run for each target."
    return Part(PageSection("pipeline", "Pipeline", text, pipeline(run.stages, run.dpi)))


def healing_part(run: ReportedRun) -> Part:
    """Draw KL and perplexity of every evaluated child in each of its states."""
    evaluated = [healed_child(child.label, child.evaluation) for child in run.children if child.evaluation]
    if not evaluated:
        return Part(None)
    text = (
        "Each child as the search composed it (assembled), after the correction of the whole child in closed form "
        "(refined) and after global distillation (distilled), measured on held-out text of each domain. No stage "
        "trains on another domain than training: the others show whether what the child learnt holds beyond it."
    )
    return Part(PageSection("healing", "From assembled to distilled", text, healing(evaluated, run.dpi)))


def quality_part(run: ReportedRun) -> Part:
    """Draw quality against throughput of every model of every evaluated target."""
    evaluated = [child for child in run.children if child.evaluation]
    if not evaluated:
        return Part(None)
    limited = [child for child in evaluated if child.setting]
    domains = list(dict.fromkeys(domain for child in limited for domain in child.domains))
    rows = [[panel(child, domain) for child in limited] for domain in domains]
    machines = dict.fromkeys(child.machine for child in evaluated if child.measured_ratio is not None)
    text = (
        "KL to the parent (measured on held-out text, bars are standard errors) over throughput relative to the "
        f"parent: filled markers were measured{' on ' + ' and '.join(machines) if machines else ''}, hollow ones are "
        "predicted from the cost table. Neither correction nor GKD changes what a child computes, so a target's child "
        "has in all states the speed that was measured as it was assembled. No baseline was corrected or distilled: "
        "compare them with the assembled child, and on the same sequences, as the tables' third column does, since "
        "baselines may be measured on fewer."
    )
    drawing = quality_throughput(rows, run.dpi) if rows else None
    models = [table for child in evaluated for table in tables.quality_tables(child)]
    return Part(PageSection("quality", "Quality against throughput", text, drawing, models))


def accuracy_part(run: ReportedRun) -> Part:
    """Tabulate the parent's accuracy that each child keeps on benchmarks, and log-loss by position."""
    shown, missing = [], []
    for child in run.children:
        if child.accuracy is None:
            missing.append(lacking(f"accuracy of {child.label}", f"measure_accuracy@{child.target}"))
            continue
        if child.accuracy.benchmarks:
            shown.append(accuracy_table(child.label, child.accuracy))
        if child.accuracy.positions:
            shown.append(positions_table(child.label, child.accuracy))
        if not child.accuracy.benchmarks:
            missing.append(f"accuracy of {child.label}: {NO_BENCHMARK}")
    if not shown:
        return Part(None, tuple(missing))
    text = (
        "Parent and children answered the same questions; preserved is child / parent, as published, and above chance "
        "kept is the same of what exceeds a guesser's accuracy. ± is one standard error, of differences and ratios "
        "that of paired answers. A parent that is not two standard errors above chance has nothing to preserve."
    )
    return Part(PageSection("accuracy", "Accuracy preserved", text, None, shown), tuple(missing))


def architecture_part(run: ReportedRun) -> Part:
    """Draw parent and children block by block."""
    models = [DrawnModel(f"Parent, {run.parent}", "parent", parent_blocks(run.config))]
    models += [DrawnModel(child.label, child.target, child.blocks) for child in run.children]
    text = (
        "Block by block, attention above FFN. The frame is the parent's size, the filled part is what the child keeps: "
        "kv heads and FFN channels as the numbers say, lin for one linear layer, – for nothing."
    )
    return Part(PageSection("architecture", "Architecture", text, architectures(models, run.dpi)))


def runtime_part(run: ReportedRun) -> Part:
    """Draw the milliseconds of every subblock, child against parent."""
    if not run.costs:
        return Part(None, (lacking("runtime per block", "measure_costs"),))
    if not run.children:
        return Part(None)
    drawn = [runtime(child, run.costs, run.config) for child in run.children]
    meanings = "; ".join(dict.fromkeys(child.meaning for child in drawn))
    text = (
        "What each block's attention and FFN take in the child and in the parent, from the cost table; the shaded part "
        f"is saved. In {meanings}."
    )
    return Part(PageSection("runtime", "Runtime per block", text, runtimes(drawn, run.dpi)))


def bld_part(run: ReportedRun) -> Part:
    """Draw the losses of blockwise local distillation."""
    if run.library is None:
        return Part(None, (lacking("losses of blockwise local distillation (BLD)", "distill_blocks"),))
    text = (
        "Held-out loss of every trained variant, measured, between its output and the parent block's: with the initial "
        "weights, after the closed-form fit, and with the weights kept."
    )
    drawing = draw_bld_losses(bld_losses(run.library), run.dpi)
    return Part(PageSection("bld", "BLD: loss before and after", text, drawing))


def scores_part(run: ReportedRun) -> Part:
    """Draw the map of replace-1-block scores."""
    if run.scores is None:
        return Part(None, (lacking("replace-1-block scores", "score_blocks"),))
    cells = score_cells(run.scores, run.config)
    text = (
        "KL(parent || child) with one block of the parent replaced by a trained variant, measured on calibration text; "
        "lower is better. The search adds these up."
    )
    drawing = score_map(cells, run.config.num_blocks, run.dpi)
    return Part(PageSection("scores", "Replace-1-block scores", text, drawing))


def refinement_part(run: ReportedRun) -> Part:
    """Draw the error along depth before and after the correction in closed form."""
    corrections, missing = _of_children(run, lambda child: child.refinement, "correction", "refine_child")
    if not corrections:
        return Part(None, missing)
    text = (
        "After assembly every output layer is refitted on the child's own hidden states, towards the parent's at the "
        "same place. Measured on held-out text: how far the states behind each block are from the parent's."
    )
    drawing = error_along_depth(corrections, run.dpi)
    return Part(PageSection("refinement", "Whole-child correction", text, drawing), missing)


def gkd_part(run: ReportedRun) -> Part:
    """Draw the curves of global distillation."""
    found, missing = _of_children(run, lambda child: child.gkd, "global distillation (GKD)", "distill_child")
    curves = {label: curve for label, curve in found.items() if curve.held_out}
    untrained = [label for label in found if label not in curves]
    missing += tuple(f"global distillation (GKD) of {label}: distill_child.tokens is 0" for label in untrained)
    if not curves:
        return Part(None, missing)
    text = (
        "The child learns from the parent's hidden states and logits. Measured on the fly: KL on each training batch "
        "and on held-out text, and the norm of the gradient before it is clipped; the weights that are kept are those "
        f"of the dotted line. {_longer_training(curves)}"
    )
    drawing = gkd_curves(curves, run.dpi)
    return Part(PageSection("gkd", "Global distillation (GKD)", text, drawing), missing)


def _of_children(
    run: ReportedRun, result_of: Callable[[ReportedChild], _T | None], name: str, stage: str
) -> tuple[dict[str, _T], tuple[str, ...]]:
    """Return a result of the children that have it, by label, and a line of `missing` for each of the others."""
    results = {child.label: result for child in run.children if (result := result_of(child)) is not None}
    others = [child for child in run.children if child.label not in results]
    return results, tuple(lacking(f"{name} of {child.label}", f"{stage}@{child.target}") for child in others)


def _longer_training(curves: Mapping[str, GkdCurve]) -> str:
    """Say what the fitted curves predict for more tokens."""
    modelled = [
        f"{label}: KL {curve.modelled.kl:.3f} after {curve.modelled.tokens:,} tokens, {curve.best.kl:.3f} measured "
        f"after {curve.best.tokens:,} (the fit's error is {curve.modelled.rms_error:.3f})"
        for label, curve in curves.items()
        if curve.modelled
    ]
    if not modelled:
        return "The held-out measurements are too few, or lie on no power law, to say what more tokens would give."
    return f"Modelled by a power law with an offset through the held-out KL, not measured: {'; '.join(modelled)}."


def throughput_part(run: ReportedRun) -> Part:
    """Tabulate tokens/s of parent and child by scenario."""
    shown: list[Table] = []
    missing = []
    for child in run.children:
        measured, modelled = throughput_tables.measured_throughput(child), throughput_tables.modelled_throughput(child)
        stage = f"benchmark_throughput@{child.target}"
        if not measured:
            missing.append(lacking(f"measured throughput of {child.label} by scenario", stage))
        if modelled is None:
            missing.append(lacking(f"modelled throughput of {child.label} on a GPU", stage))
        shown += [*measured, *([modelled] if modelled else [])]
    if not shown:
        return Part(None, tuple(missing))
    text = (
        "Tokens per second of parent and child: measured ones beside what the cost table predicts for the same "
        "setting; and, in tables of their own, modelled ones for a GPU that was not at hand."
    )
    return Part(PageSection("throughput", "Throughput", text, tables=shown), tuple(missing))


def exports_part(run: ReportedRun) -> Part:
    """Tabulate the quality of the exported files."""
    table = tables.exports_table(run.children)
    if table is None:
        return Part(None, (lacking("quality of exported GGUF files", "evaluate_child"),))
    text = "What a user of the file gets: 16 bit changes hardly anything, eight bit a little; a broken file would show."
    return Part(PageSection("exports", "Exports", text, tables=[table]))


def predicted_part(run: ReportedRun) -> Part:
    """Draw predictions against measurements, and tabulate every limit."""
    if not run.children:
        return Part(None)
    evaluated = [panel(child, TRAINING_MIX) for child in run.children if child.evaluation]
    text = (
        "On the line, the tables were right. Left: the sum of replace-1-block scores against the measured KL of models "
        "as assembled, on held-out training text. Right: tokens per second from the cost table against the clock. "
        "Below: each limit."
    )
    drawing = predicted_measured(evaluated, speed_points(run.children), run.dpi) if evaluated else None
    limits = tables.limits_table(run.children)
    return Part(PageSection("predicted", "Predicted against measured", text, drawing, [limits]))
