"""Every metric on its way through the figure of quality, the report, the closing table and the form."""

import json
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from flows.closing_table import closing_table
from flows.ui.overrides import Constraints
from storage.architecture import read_architecture
from storage.documents import TRAINING_MIX
from storage.evaluation import MeasuredLimit, read_evaluation, write_evaluation
from storage.metrics import METRICS, Metric
from storage.paths import Paths
from storage.records import ThroughputRow
from storage.tables import read_throughput, write_throughput
from tasks.drawing.figure_data import panel
from tasks.drawing.reported_child import ReportedChild
from tasks.report import write_report
from tasks.targets.measured import measured_speed
from tests.report_run import speed_constraints, write_run


def _constraints(metric: Metric) -> dict[str, Any]:
    """Return constraints that limit this metric, loosely."""
    if metric.speed:
        return {"speed": speed_constraints(metric.name)["speed"]}
    side = "at_least_ratio" if metric.direction == "at_least" else "at_most_ratio"
    where = {"batch": 2, "context": 64} if metric.needs_context else {}
    return {"size": {"metric": metric.name, side: 1.0, "precision": "float32", **where}}


def _twice_as_fast(rows: tuple[ThroughputRow, ...]) -> list[ThroughputRow]:
    """Return the rows with a child that takes half of the parent's time."""
    parent = {(row.engine, row.batch, row.phase): row.measured_ms for row in rows if row.model == "parent"}
    halved = []
    for row in rows:
        milliseconds = parent[row.engine, row.batch, row.phase] if row.measured_ms is not None else None
        if row.model == "child" and milliseconds is not None:
            row = replace(row, measured_ms=milliseconds / 2)
        halved.append(row)
    return halved


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_a_target_can_limit_any_metric(metric: Metric, tmp_path: Path) -> None:
    """A child that is measured to be twice as fast reads 2.0, whether more or less of the metric is better."""
    paths = Paths(tmp_path / "artifacts")
    constraints = _constraints(metric)
    params = write_run(paths, targets={"small": {"label": "Small", "constraints": constraints}})
    chosen, evaluation = read_architecture("small", paths), read_evaluation("small", paths)
    rows = _twice_as_fast(read_throughput(paths.throughput("small")))
    write_throughput(paths.throughput("small"), rows)
    (limit,) = chosen.constraints
    measured = 2.0 if metric.more_is_better else 0.5
    evaluation = replace(
        evaluation,
        speed=measured_speed(limit, rows) if metric.speed else None,
        constraints=(MeasuredLimit.from_limit(limit, measured),),
    )
    write_evaluation(paths.evaluation("small"), evaluation)

    quality = panel(ReportedChild(chosen, evaluation, {}, None, rows), TRAINING_MIX)
    expected = 2.0 if metric.speed else None
    assert [point.measured_ratio for point in quality.points[1:4]] == [expected] * 3
    table = closing_table(paths, ["small"])
    assert f"{metric.name} ({limit.name})" in table and f"{measured:>9.3f}  {limit.unit}" in table
    assert (" 2.00 x" in table) == (metric.speed is not None)
    write_report.fn(params, paths)
    page = unescape((paths.report / "index.html").read_text(encoding="utf-8"))
    assert metric.name in page
    assert ("2.00 times the parent's speed" in page) == (metric.speed is not None)
    form = json.dumps(Constraints.model_json_schema())
    assert f'"{metric.name}' in form and f"{metric.unit})" in form
