"""The numbers of the report's figures, from the artifacts. In: children, table rows. Out: records that figures draw.

Nothing is estimated here: only ratios and sums over blocks are taken.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from storage.evaluation import CHILD_STATES, Evaluation
from storage.metrics import METRICS, SpeedParts
from storage.model_config import ModelConfig
from storage.records import Component, CostRow
from storage.scenario import Setting
from storage.variants import Attention, Replacement
from tasks.drawing.blocks import BlockRuntime, ChildRuntime
from tasks.drawing.healing import HealedChild
from tasks.drawing.quality import QualityPanel, QualityPoint, SpeedPoint
from tasks.drawing.reported_child import ReportedChild, ReportedModel
from tasks.drawing.scores import ScoreCell
from tasks.drawing.training import BldLoss
from tasks.puzzle.costs.cost_table import CostTable
from tasks.puzzle.search.score_rule import Scores
from tasks.puzzle.search_space import parent_attention, parent_blocks, parent_ffn

_ONE_STEP = SpeedParts(reads_input=False, steps="one")
"""What is drawn of a target that limits decoding, or no speed: the milliseconds of one decode step."""


def panel(child: ReportedChild, domain: str) -> QualityPanel:
    """Return a target's models on the text of one domain for the figures of quality; none without an evaluation."""
    points = [_point(model) for model in child.models(domain)]
    if child.setting is None:
        return QualityPanel(child.label, domain, "no speed limit", "nothing", points)
    speed, setting = child.chosen.predicted.speed, child.setting
    assert speed is not None
    text = f"{child.phase}, {setting.scenario}, batch {setting.batch}, {setting.engine}"
    return QualityPanel(child.label, domain, text, f"{speed.origin} timings of {setting.hardware}", points)


def healed_child(label: str, evaluation: Evaluation) -> HealedChild:
    """Return a child's qualities in each state, by domain."""
    domains = {}
    for domain, measured in evaluation.domains.items():
        states = {name: measured.models[name] for name in CHILD_STATES}
        domains[domain] = states, measured.parent.perplexity
    return HealedChild(label, domains)


def _point(model: ReportedModel) -> QualityPoint:
    """Return a model as a point; the parent's own prediction, 1, is shown only where nothing was measured."""
    hidden = model.series == "parent" and model.measured_ratio is not None
    return QualityPoint(
        name=model.name,
        series=model.series,
        kl=model.quality.kl,
        kl_stderr=model.quality.kl_stderr,
        measured_ratio=model.measured_ratio,
        predicted_ratio=None if hidden else model.predicted_ratio,
        score=model.score,
    )


def runtime(child: ReportedChild, rows: Sequence[CostRow], config: ModelConfig) -> ChildRuntime:
    """Return the milliseconds of every subblock of a child and of the parent's in its place, from the cost table.

    They hold in the setting of the target's speed limit, for what that limit is about (for decoding, one decode step).
    Without a speed limit they are of a decode step in the table's first measured setting.
    """
    table, parents = CostTable(rows), parent_blocks(config)
    measured = [Setting.from_row(row) for row in rows if row.origin == "measured"]
    setting = child.setting or (measured or [Setting.from_row(row) for row in rows])[0]
    parts = _drawn_parts(child)

    def milliseconds(block: Replacement, component: Component) -> float:
        variant = (block.attention if component == "attention" else block.ffn).name
        row = table.row(setting, component, variant, block.first_block, block.span)
        return parts.milliseconds(row.prefill_ms, row.decode_ms, setting.output_tokens)

    components: tuple[Component, ...] = ("attention", "ffn")
    blocks = []
    for block, component in itertools.product(child.blocks, components):
        parent_ms = sum(milliseconds(parents[index], component) for index in block.parent_blocks)
        blocks.append(BlockRuntime(block.parent_blocks, component, milliseconds(block, component), parent_ms))
    part = "a decode step" if parts == _ONE_STEP else parts.phase
    return ChildRuntime(child.label, f"ms of {part}, {table.origin(setting)} timings: {setting.text}", blocks)


def _drawn_parts(child: ReportedChild) -> SpeedParts:
    """Return the milliseconds that are drawn: those that the target's speed limit counts, of decoding one step."""
    limited = child.chosen.predicted.speed
    parts = METRICS[limited.metric].speed if limited else None
    return parts if parts and parts.reads_input else _ONE_STEP


def speed_points(children: Iterable[ReportedChild]) -> list[SpeedPoint]:
    """Return every tokens/s that was measured and predicted, of the parent and of each child."""
    rows = itertools.chain.from_iterable(child.throughput for child in children)
    return [
        SpeedPoint(row.model, row.predicted_tokens_per_s, row.measured_tokens_per_s)
        for row in rows
        if row.predicted_tokens_per_s is not None and row.measured_tokens_per_s is not None
    ]


def bld_losses(index: Iterable[Mapping[str, Any]]) -> list[BldLoss]:
    """Return the losses of the rows of the library's index, large variants first, spans last."""
    losses = [
        BldLoss(
            row["first_block"],
            row["span"],
            row["subblock"],
            row["variant"],
            row["loss"],
            row["loss_before"],
            row["loss_fitted"],
            row["loss_after"],
        )
        for row in index
    ]
    return sorted(losses, key=lambda loss: (loss.span, loss.subblock, _rank(loss.variant), loss.first_block))


def _rank(variant: str) -> int:
    """Rank variants: a whole block and large variants before small ones, then a linear layer, then a no-op."""
    return {"whole": -(1 << 40), "linear": 1, "no_op": 2}.get(variant) or -int(variant.rpartition("_")[2])


def score_cells(scores: Scores, config: ModelConfig) -> list[ScoreCell]:
    """Return cells for single subblocks (the other one is the parent's) and spans, in the order of the map's rows."""
    attention, ffn = parent_attention(config), parent_ffn(config)
    shown = [
        replacement
        for replacement in scores.replacements("decoupled")
        if replacement.span > 1 or replacement.attention == attention or replacement.ffn == ffn
    ]

    def order(replacement: Replacement) -> tuple[int, bool, int, int, int]:
        is_ffn = replacement.attention == attention
        ranks = _rank(replacement.attention.name), _rank(replacement.ffn.name)
        return replacement.span, is_ffn, *ranks, replacement.first_block

    cells = []
    for replacement in sorted(shown, key=order):
        score = scores.score(replacement, "decoupled").mean
        cells.append(ScoreCell(_row(replacement, attention), replacement.first_block, score))
    return cells


def _row(replacement: Replacement, parent: Attention) -> str:
    """Return the name of a replacement's row in the map of scores."""
    if replacement.span > 1:
        return f"{replacement.span} blocks: {replacement.attention.name} + {replacement.ffn.name}"
    if replacement.attention == parent:
        return f"FFN {replacement.ffn.name}"
    return f"attention {replacement.attention.name}"
