"""What the artifacts hold, as the records that the figures draw. In: parsed JSON and table rows. Out: records.

Children are described by what evaluate_child measured and search_architecture predicted; no number is made up here,
only ratios, sums over blocks and means over shards are taken.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from storage.model_config import ModelConfig
from storage.records import Architecture, Attention, Component, CostRow, Ffn, Replacement, ThroughputRow
from tasks.drawing.blocks import BlockRuntime, Runtime
from tasks.drawing.quality import Panel, Point, Series, Speed
from tasks.drawing.scores import ScoreCell
from tasks.drawing.training import BldLoss, Gkd
from tasks.puzzle.costs import CostTable, ModelSpeed, Setting
from tasks.puzzle.score_rule import Scores
from tasks.puzzle.variants import parent_attention, parent_blocks, parent_ffn

PHASES = {"decode_throughput": "decode", "throughput": "whole requests", "latency_ms": "whole requests"}


@dataclass(frozen=True)
class Child:
    """One target's artifacts as they were read; None or empty for what a run does not have."""

    target: str
    chosen: dict[str, Any]
    evaluation: dict[str, Any] | None
    baselines: dict[str, Any] | None
    gkd: dict[str, Any] | None
    throughput: Sequence[ThroughputRow]

    @property
    def label(self) -> str:
        """The name that people see."""
        return str(self.chosen["label"])

    @property
    def blocks(self) -> tuple[Replacement, ...]:
        """Its architecture."""
        return Architecture.from_json(self.chosen["blocks"]).blocks

    @property
    def setting(self) -> Setting | None:
        """Where its speed limit holds; None if the target limits no speed."""
        at = self.chosen["predicted"]["speed"]
        return Setting(**{name: at[name] for name in Setting.__dataclass_fields__}) if at else None

    @property
    def final(self) -> str:
        """The key in evaluation.json of the child as a user gets it: after GKD, if there was one."""
        return "distilled" if self.evaluation and self.evaluation.get("distilled") else "assembled"

    @property
    def measured_ratio(self) -> float | None:
        """Speed over the parent's, measured on the assembled child at the speed limit's setting; None if it was not."""
        at, limit = (self.evaluation or {}).get("speed"), self.chosen["predicted"]["speed"]
        if not at or not limit or any(at[key] != limit[key] for key in ("hardware", "engine", "scenario", "batch")):
            return None
        child, parent = at["assembled"][limit["metric"]], at["parent"][limit["metric"]]
        return float(parent / child if limit["metric"] == "latency_ms" else child / parent)

    @property
    def machine(self) -> str:
        """What the speed was measured on; a sentence that says so where the tables were timed on another machine."""
        assert self.evaluation and self.evaluation["speed"], self.target
        speed = self.evaluation["speed"]
        other = "" if speed["is_timed_machine"] else f" (not the machine of the timings {speed['hardware']})"
        return f"{speed['machine']}{other}"


def model_names(child: Child) -> list[tuple[str, str, Series]]:
    """(key in evaluation.json, name, kind) of every model of a target that was evaluated."""
    assert child.evaluation is not None, child.target
    own: list[tuple[str, str, Series]] = [("parent", "parent", "parent"), ("assembled", "before GKD", "assembled")]
    if child.evaluation.get("distilled"):
        own.append(("distilled", "after GKD", "distilled"))
    return own + [(name, name.replace("_", " "), "baseline") for name in child.evaluation.get("baselines") or {}]


def quality_of(child: Child, key: str) -> dict[str, Any]:
    """{kl, kl_stderr, perplexity, top1_agreement} of a model of evaluation.json."""
    assert child.evaluation is not None, child.target
    found: dict[str, Any] = child.evaluation.get(key) or child.evaluation["baselines"][key]
    return found


def predicted_of(child: Child, key: str) -> dict[str, Any]:
    """What the tables say of a model: score, block_params_ratio, kv_ratio, throughput_ratio (any may be missing)."""
    if key == "parent":
        return {"block_params_ratio": 1.0, "kv_ratio": 1.0, "throughput_ratio": 1.0}
    if key in ("assembled", "distilled"):
        predicted: dict[str, Any] = child.chosen["predicted"]
        return predicted if key == "assembled" else {**predicted, "score": None}
    return dict((child.baselines or {}).get("baselines", {}).get(key, {}).get("predicted", {}))


def infeasible(child: Child) -> list[str]:
    """Baselines that found no child within the target's limits."""
    found = (child.baselines or {}).get("baselines", {})
    return [name.replace("_", " ") for name, one in found.items() if "infeasible" in one]


def measured_ratio_of(child: Child, key: str) -> float | None:
    """Measured speed over the parent's: baselines are not timed; GKD does not change what a child computes."""
    if key == "parent":
        return 1.0 if child.measured_ratio is not None else None
    return child.measured_ratio if key in ("assembled", "distilled") else None


def panel(child: Child) -> Panel | None:
    """A target's models for the figures of quality; None where it was not evaluated."""
    if child.evaluation is None:
        return None
    points = []
    for key, name, series in model_names(child):
        quality, predicted = quality_of(child, key), predicted_of(child, key)
        points.append(
            Point(
                name=name,
                series=series,
                kl=quality["kl"],
                kl_stderr=quality["kl_stderr"],
                measured_ratio=measured_ratio_of(child, key),
                predicted_ratio=predicted.get("throughput_ratio") if child.setting and key != "parent" else None,
                score=predicted.get("score"),
            )
        )
    if child.setting and child.measured_ratio is None:
        points[0] = Point("parent", "parent", points[0].kl, points[0].kl_stderr, predicted_ratio=1.0)
    return Panel(child.label, _where(child), _tables(child), points)


def _where(child: Child) -> str:
    if child.setting is None:
        return "no speed limit"
    metric = PHASES[child.chosen["predicted"]["speed"]["metric"]]
    return f"{metric}, {child.setting.scenario}, batch {child.setting.batch}, {child.setting.engine}"


def _tables(child: Child) -> str:
    if child.setting is None:
        return "nothing"
    return f"{child.chosen['predicted']['speed']['origin']} timings of {child.setting.hardware}"


def runtime(child: Child, rows: Sequence[CostRow], config: ModelConfig) -> Runtime:
    """Milliseconds of every subblock of a child and of the parent's in its place, as the cost table has them.

    In the setting of the target's speed limit (for a limit on decoding: of a decode step, else of whole requests),
    or in the table's first measured setting.
    """
    table, parents = CostTable(rows), parent_blocks(config)
    measured = [Setting.of(row) for row in rows if row.origin == "measured"]
    setting = child.setting or (measured or [Setting.of(row) for row in rows])[0]
    decode_only = child.setting is None or child.chosen["predicted"]["speed"]["metric"] == "decode_throughput"

    def milliseconds(block: Replacement, component: Component) -> float:
        variant = (block.attention if component == "attention" else block.ffn).name
        row = table.row(setting, component, variant, block.first_block, block.span)
        return row.decode_ms if decode_only else ModelSpeed(setting, row.prefill_ms, row.decode_ms).latency_ms

    components: tuple[Component, ...] = ("attention", "ffn")
    blocks = [
        BlockRuntime(
            block.parent_blocks,
            component,
            milliseconds(block, component),
            sum(milliseconds(parents[index], component) for index in block.parent_blocks),
        )
        for block in child.blocks
        for component in components
    ]
    what = "a decode step" if decode_only else "whole requests"
    return Runtime(child.label, f"ms of {what}, {table.origin(setting)} timings: {setting.text}", blocks)


def gkd_curve(child: Child) -> Gkd | None:
    """A child's GKD; None where it was not distilled."""
    if child.gkd is None:
        return None
    steps = [(one["tokens"], one["kl"], one["cosine"]) for one in child.gkd["steps"]]
    held_out = [(one["tokens"], one["kl"]) for one in child.gkd["held_out"]]
    best = next(one["tokens"] for one in child.gkd["held_out"] if one["step"] == child.gkd["best_step"])
    return Gkd(child.label, steps, held_out, best)


def speeds(children: Iterable[Child]) -> list[Speed]:
    """Every throughput that was measured and predicted; the parent's and each child's."""
    return [
        Speed(row.model, row.predicted_tokens_per_s, row.measured_tokens_per_s)
        for child in children
        for row in child.throughput
        if row.predicted_tokens_per_s is not None and row.measured_tokens_per_s is not None
    ]


def bld_losses(index: Iterable[dict[str, Any]]) -> list[BldLoss]:
    """Rows of the library's index, large variants first, spans last."""
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
    """A whole block and large variants before small ones, a linear layer after them, a no-op last."""
    return {"whole": -(1 << 40), "linear": 1, "no_op": 2}.get(variant) or -int(variant.rpartition("_")[2])


def score_cells(scores: Scores, config: ModelConfig) -> list[ScoreCell]:
    """Scores of single subblocks, the other one being the parent's, and of spans, in the order of the map's rows."""
    attention, ffn = parent_attention(config), parent_ffn(config)
    kept = [
        one for one in scores.replacements("decoupled") if one.span > 1 or one.attention == attention or one.ffn == ffn
    ]

    def order(one: Replacement) -> tuple[int, bool, int, int, int]:
        return (one.span, one.attention == attention, _rank(one.attention.name), _rank(one.ffn.name), one.first_block)

    return [
        ScoreCell(_row(one, attention, ffn), one.first_block, scores.score(one, "decoupled").mean)
        for one in sorted(kept, key=order)
    ]


def _row(one: Replacement, attention: Attention, ffn: Ffn) -> str:
    if one.span > 1:
        return f"{one.span} blocks: {one.attention.name} + {one.ffn.name}"
    return f"FFN {one.ffn.name}" if one.attention == attention else f"attention {one.attention.name}"
