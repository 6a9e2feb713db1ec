"""The report against artifacts whose numbers are known: what it shows, what it says it lacks, and its bytes."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from storage.architecture import (
    Baseline,
    Baselines,
    read_architecture,
    read_baselines,
    write_architecture,
    write_baselines,
)
from storage.documents import TRAINING_MIX
from storage.evaluation import BaselineQuality, read_evaluation, write_evaluation
from storage.files import InputError
from storage.gkd import GkdCurve, write_gkd
from storage.metrics import METRICS
from storage.params import Params
from storage.paths import Paths
from storage.pipeline import read_pipeline
from storage.records import ANY_VARIANT
from storage.tables import read_costs, read_throughput
from storage.variants import Attention, Ffn, Replacement
from tasks.drawing.blocks import DrawnModel, architectures
from tasks.drawing.figure_data import bld_losses, panel, runtime
from tasks.drawing.pipeline import BOX_HEIGHT, BOX_WIDTH, position, route
from tasks.drawing.quality import QualityPanel, QualityPoint, quality_throughput
from tasks.drawing.reported_child import ReportedChild
from tasks.drawing.style import spaced_apart
from tasks.drawing.training import bld_losses as draw_bld_losses
from tasks.puzzle.costs.cost_table import FIXED_COMPONENTS, CostTable, model_speed
from tasks.puzzle.runtimes.model_card import model_card
from tasks.puzzle.search_space import parent_blocks
from tasks.report import write_report
from tests.records import parent_info
from tests.report_run import BASELINES, CONFIG, TARGETS, speed_constraints, write_run
from tests.stages import checksums

FIGURES = {
    "pipeline",
    "healing",
    "quality_throughput",
    "architecture",
    "runtime_per_block",
    "bld_losses",
    "scores",
    "refinement",
    "gkd",
    "predicted_measured",
}
TABLES_OF_MODELS = 3
"""Tables in which every model of a target has a row: quality in two domains, sizes and speed."""
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page as a browser would see it: text, attributes, ids; it fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        """Return values of an attribute, wherever it is."""
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Paths]:
    """Return a reported run; tests read it."""
    paths = Paths(tmp_path_factory.mktemp("run") / "artifacts")
    params = write_run(paths)
    write_report.fn(params, paths)
    return params, paths


@pytest.fixture
def fresh(tmp_path: Path) -> tuple[Params, Paths]:
    """Return a run without its report; tests change it."""
    paths = Paths(tmp_path / "artifacts")
    return write_run(paths), paths


def html(paths: Paths) -> str:
    return (paths.report / "index.html").read_text(encoding="utf-8")


def child(target: str, paths: Paths) -> ReportedChild:
    return ReportedChild(read_architecture(target, paths), read_evaluation(target, paths), {}, None, [])


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(run: tuple[Params, Paths]) -> None:
    text = html(run[1])
    page = Page(text)
    links = page.values("href") + page.values("xlink:href") + page.values("src")
    assert all(link.startswith(("#", "data:")) for link in links)
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert set(re.findall(r"url\(#?([^)]*)\)", text)) <= set(ids)
    assert "<script" not in text and "@import" not in text
    assert set(re.findall(r'https?://[^"\s]*', text)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_every_figure_is_there_in_words_too(run: tuple[Params, Paths]) -> None:
    _, paths = run
    page = Page(html(paths))
    files = {path.name for path in paths.report.iterdir()}
    assert files == {"index.html", *(f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png"))}
    for path in paths.report.glob("*.svg"):
        described = re.findall(r'role="img" aria-label="([^"]{20,})"', path.read_text(encoding="utf-8"))
        assert len(described) == 1, path
        assert path.read_text(encoding="utf-8") in html(paths)
    for path in paths.report.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert page.values("role").count("img") == len(FIGURES)
    assert "Not in this run" not in page.text


def test_numbers_are_those_of_the_artifacts(run: tuple[Params, Paths]) -> None:
    _, paths = run
    text = Page(html(paths)).text
    for target in TARGETS:
        evaluation = read_evaluation(target, paths)
        for domain, measured in evaluation.domains.items():
            baselines, parent = measured.baselines, measured.parent.perplexity
            for quality in (*measured.models.values(), *baselines.values()):
                assert f"{quality.kl:.3f} ± {quality.kl_stderr:.3f}" in text
                assert f"{quality.perplexity:.2f}" in text and f"{quality.perplexity / parent:.2f}×" in text
            assert (
                f"perplexity {measured.distilled.perplexity:.2f} (parent {parent:.2f}) on 29 documents of {domain}"
                in text
            )
            for name, quality in baselines.items():
                assert f"{name.replace('_', ' ')} {quality.kl:.3f}" in text, "label in the figure"
            for paired in measured.paired.values():
                assert f"{paired.kl_difference:+.3f} ± {paired.stderr:.3f}" in text
        mean = sum(measured.distilled.kl for measured in evaluation.domains.values()) / 2
        assert f"{mean:.3f} ± " in text
        for limit in evaluation.constraints:
            assert f"{limit.predicted:.4g}" in text and f"{limit.measured:.4g}" in text
        for export in evaluation.exports.formats.values():
            assert f"{export.kl:.6f} ± {export.kl_stderr:.6f}" in text and f"{export.torch_perplexity:.3f}" in text
        assert f"{read_architecture(target, paths).predicted.params:,}" in text
        for row in read_throughput(paths.throughput(target)):
            rate = row.measured_tokens_per_s or row.modelled_tokens_per_s or 0.0
            assert (f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}") in text
    assert text.count("1.23 times the parent's speed") == len(TARGETS)


def test_the_page_shows_what_is_preserved(run: tuple[Params, Paths]) -> None:
    """As a ratio where the parent knows something, and not where it guesses."""
    text = Page(html(run[1])).text
    assert "hellaswagrefined50.0 ± 2.045.0 ± 2.090.0 ± 2.0-5.0 ± 1.080.0 ± 4.0" in text
    assert "25.0 ± 2.0at chance" in text
    assert "position 1 to 63630103.000+0.250 ± 0.050" in text


def test_names_are_escaped(run: tuple[Params, Paths]) -> None:
    assert escape("Large <child>") in html(run[1])
    assert "<child>" not in html(run[1])


def test_what_people_write_is_drawn_as_they_wrote_it(tmp_path: Path) -> None:
    """A label with two dollar signs was a formula to matplotlib, and ended the last stage."""
    labels = (r"_$\foo$ & \$ {{ 7*7 }}", 'id="x" url(#y) </svg><script>$')
    paths = Paths(tmp_path / "artifacts")
    targets = {key: {**target, "label": label} for (key, target), label in zip(TARGETS.items(), labels, strict=True)}
    write_report.fn(write_run(paths, targets=targets), paths)
    page = Page(html(paths))
    plain = Page(html(paths).replace(escape(labels[0]), "").replace(escape(labels[1]), ""))
    for label in labels:
        assert page.text.count(label) > 20, "in tables and figures"
        drawn = "".join(ElementTree.parse(paths.report / "predicted_measured.svg").getroot().itertext())
        assert label in drawn, "in the legend, which leaves out names that begin with an underscore"
    assert "script" not in page.tags and "49" not in plain.text.partition("Pipeline")[0]
    card = model_card(
        read_architecture("large", paths),
        replace(parent_info(CONFIG, 'a: "b" #c'), licence="yes"),
        hashes={},
        refusals={},
        training="",
    )
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front) | {"license": "yes", "base_model": 'a: "b" #c'} == yaml.safe_load(front)
    assert r"\_\$\\foo\$" in body


LACKS: dict[str, tuple[str, str]] = {
    "library/index.parquet": ("losses of blockwise local distillation", "bld_losses"),
    "scores.parquet": ("replace-1-block scores", "scores"),
    "costs.parquet": ("runtime per block", "runtime_per_block"),
    "children/*/gkd.json": ("global distillation (GKD) of Small", "gkd"),
    "children/*/refine.json": ("correction of Small", "refinement"),
    "children/*/throughput.parquet": ("measured throughput of Small by scenario", ""),
    "children/*/evaluation.json": ("quality of Large", "quality_throughput"),
    "children/*/accuracy.json": ("accuracy of Large", ""),
    "children/small": ("the child of Small", ""),
}


@pytest.mark.parametrize("pieces", [list(LACKS)[:3], list(LACKS)[3:7], list(LACKS)[7:], list(LACKS)])
def test_what_is_missing_is_named(fresh: tuple[Params, Paths], pieces: list[str]) -> None:
    params, paths = fresh
    for path in [path for piece in pieces for path in paths.root.glob(piece)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_report.fn(params, paths)
    drawn = {path.stem for path in paths.report.glob("*.svg")}
    text = Page(html(paths)).text.partition("Not in this run:")[2].partition("Pipeline")[0]
    for piece, (line, figure) in LACKS.items():
        gone = piece in pieces and not ("children/small" in pieces and "Small" in line and piece != "children/small")
        assert (line in text) == gone, piece
        assert figure not in drawn or piece not in pieces, piece


def test_a_child_that_was_not_distilled_has_no_curve(fresh: tuple[Params, Paths]) -> None:
    """distill_child.tokens: 0."""
    params, paths = fresh
    write_gkd(paths.gkd("small"), GkdCurve("small", (), (), 0))
    write_report.fn(params, paths)
    text = Page(html(paths)).text.partition("Not in this run:")[2].partition("Pipeline")[0]
    assert "global distillation (GKD) of Small: distill_child.tokens is 0" in text
    figure = (paths.report / "gkd.svg").read_text(encoding="utf-8")
    assert "Large" in figure and "Small" not in figure
    write_gkd(paths.gkd("large"), GkdCurve("large", (), (), 0))
    shutil.rmtree(paths.report)  # as DVC does
    write_report.fn(params, paths)
    assert not (paths.report / "gkd.svg").exists()


def change_evaluation(target: str, paths: Paths, **changes: Any) -> None:
    write_evaluation(paths.evaluation(target), replace(read_evaluation(target, paths), **changes))


def test_an_early_run_claims_no_more_than_it_has(fresh: tuple[Params, Paths]) -> None:
    """No baselines, and a speed that was timed on another machine than the limit's."""
    params, paths = fresh
    for target in TARGETS:
        evaluation = read_evaluation(target, paths)
        speed = evaluation.speed
        assert speed is not None
        elsewhere = replace(speed, hardware="elsewhere")
        domains = {name: replace(measured, baselines={}, paired={}) for name, measured in evaluation.domains.items()}
        change_evaluation(target, paths, domains=domains, speed=elsewhere)
    write_report.fn(params, paths)
    text = Page(html(paths)).text
    assert "baselines of Small" in text
    assert "measured throughput of Small: its speed limit holds for tiny-cpu" in text
    figure = (paths.report / "quality_throughput.svg").read_text(encoding="utf-8")
    assert "throughput predicted" in figure and "throughput measured" not in figure


def test_a_target_without_a_speed_limit_has_no_place_on_the_throughput_axis(fresh: tuple[Params, Paths]) -> None:
    params, paths = fresh
    chosen = read_architecture("small", paths)
    predicted = replace(chosen.predicted, speed=None, throughput_ratio=None)
    write_architecture(paths.architecture("small"), replace(chosen, predicted=predicted))
    change_evaluation("small", paths, speed=None)
    write_report.fn(params, paths)
    assert "its target limits no speed" in Page(html(paths)).text
    figure = (paths.report / "quality_throughput.svg").read_text(encoding="utf-8")
    assert "Large" in figure and "Small" not in figure
    assert "Small" in (paths.report / "runtime_per_block.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("metric", [metric.name for metric in METRICS.values() if metric.speed])
def test_any_speed_may_be_the_first_limit(metric: str, tmp_path: Path) -> None:
    """A child 1.23 times as fast reads 1.23, whether more or less of the metric is better.

    Two of five speed metrics once ended the report with a KeyError, and would have read 0.81.
    """
    paths = Paths(tmp_path / "artifacts")
    params = write_run(paths, targets={"small": {"label": "Small", "constraints": speed_constraints(metric)}})
    write_report.fn(params, paths)
    parts = METRICS[metric].speed
    assert parts is not None
    phase = parts.phase
    assert f"1.23 times the parent's speed ({phase}, 8/8, batch 2" in Page(html(paths)).text
    models = panel(child("small", paths), TRAINING_MIX)
    assert models.setting.startswith(phase)
    assert models.points[1].measured_ratio == pytest.approx(1.23)


def test_same_inputs_give_same_bytes(run: tuple[Params, Paths], tmp_path: Path) -> None:
    """In another process too, whatever the order of its sets and the taste of its user."""
    again = Paths(tmp_path / "artifacts")
    code = (
        "from pathlib import Path; from storage.paths import Paths; from tasks.report import write_report; "
        "from tests.report_run import write_run; import sys; paths = Paths(Path(sys.argv[1])); "
        "write_report.fn(write_run(paths), paths)"
    )
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 7\naxes.grid: True\nsavefig.facecolor: pink\n")
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "MATPLOTLIBRC": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(again.root)], env=environment, check=True)
    assert checksums(again.report) == checksums(run[1].report)


# --- figures ---------------------------------------------------------------------------------------------------------


def cells(svg: str, key: str) -> list[tuple[str, int, str]]:
    """Return (subblock, first block, variant) of the cells of one model."""
    ids = re.findall(rf'id="architecture-{key}-(attention|ffn)-(\d+)-(\w+)"', svg)
    return [(part, int(index), variant) for part, index, variant in ids]


def expected_cells(blocks: tuple[Replacement, ...]) -> set[tuple[str, int, str]]:
    attention = {("attention", block.first_block, block.attention.name) for block in blocks}
    return attention | {("ffn", block.first_block, block.ffn.name) for block in blocks}


def test_the_architecture_has_a_cell_per_subblock(run: tuple[Params, Paths]) -> None:
    _, paths = run
    svg = (paths.report / "architecture.svg").read_text(encoding="utf-8")
    models = {target: read_architecture(target, paths).blocks for target in TARGETS}
    models["parent"] = parent_blocks(CONFIG)
    for key, blocks in models.items():
        assert len(cells(svg, key)) == 2 * CONFIG.num_blocks
        assert set(cells(svg, key)) == expected_cells(blocks)


def test_spans_and_linear_layers_are_drawn() -> None:
    blocks = (
        Replacement(0, 1, Attention("gqa", 1), Ffn("linear")),
        Replacement(1, 3, Attention("linear"), Ffn("gated", 48)),
        Replacement(4, 1, Attention("no_op"), Ffn("no_op")),
    )
    svg = architectures(
        [DrawnModel("Parent", "parent", parent_blocks(CONFIG)), DrawnModel("Child", "child", blocks)], 50
    ).svg
    assert set(cells(svg, "child")) == expected_cells(blocks)
    assert "1 of 3 replace several blocks" in svg


def test_a_spans_whole_block_has_a_panel_of_its_own() -> None:
    row = {"first_block": 0, "span": 2, "loss": "token_mse", "loss_before": 0.2, "loss_fitted": 0.1, "loss_after": 0.05}
    kinds = [("whole", "whole"), ("ffn", "linear"), ("ffn", "ffn_24"), ("attention", "kv_1")]
    rows = [{**row, "subblock": subblock, "variant": variant} for subblock, variant in kinds]
    titles = [f"{name}, for 2 blocks" for name in ("kv_1", "ffn_24", "ffn linear", "whole block")]
    losses = bld_losses(rows)
    assert [loss.title for loss in losses] == titles
    assert "relative MSE, token by token" in draw_bld_losses(losses, 50).svg


@pytest.mark.parametrize("target", TARGETS)
def test_runtimes_add_up_to_the_cost_table(run: tuple[Params, Paths], target: str) -> None:
    _, paths = run
    rows, reported = read_costs(paths.costs), child(target, paths)
    table, setting = CostTable(rows), reported.setting
    assert setting is not None
    fixed = sum(table.row(setting, component, ANY_VARIANT).decode_ms for component in FIXED_COMPONENTS)
    drawn = runtime(reported, rows, CONFIG)
    totals = [drawn.total("attention"), drawn.total("ffn")]
    for model, blocks in enumerate((reported.blocks, parent_blocks(CONFIG))):
        whole = model_speed(table, blocks, setting).decode_ms - fixed
        assert sum(total[model] for total in totals) == pytest.approx(whole)
    assert f"{totals[1][0]:.3g} ms of the parent's {totals[1][1]:.3g} ms" in Page(html(paths)).text


def test_a_span_takes_the_place_of_all_its_blocks(run: tuple[Params, Paths]) -> None:
    """One child block against the two parent blocks that it replaces; a limit on whole requests counts the prefill."""
    _, paths = run
    rows, reported = read_costs(paths.costs), child("small", paths)
    whole, limited = parent_blocks(CONFIG), reported.chosen.predicted.speed
    assert limited is not None
    predicted = replace(reported.chosen.predicted, speed=replace(limited, metric="latency_ms"))
    blocks = (Replacement(0, 2, whole[0].attention, whole[0].ffn), *whole[2:])
    chosen = replace(reported.chosen, blocks=blocks, predicted=predicted)
    drawn = runtime(replace(reported, chosen=chosen), rows, CONFIG)
    setting = limited.setting
    row = CostTable(rows).row(setting, "ffn", whole[0].ffn.name)
    once = row.prefill_ms + setting.output_tokens * row.decode_ms
    mine, parents = drawn.total("ffn")
    assert (mine, parents) == pytest.approx(((CONFIG.num_blocks - 1) * once, CONFIG.num_blocks * once))
    assert drawn.blocks[1].parent_ms == pytest.approx(2 * once)
    assert "whole requests" in drawn.meaning


def test_measured_and_predicted_throughput_are_different_series() -> None:
    points = [
        QualityPoint("parent", "parent", 0.0, 0.0, measured_ratio=1.0),
        QualityPoint("assembled", "assembled", 0.5, 0.01, measured_ratio=1.2, predicted_ratio=1.3),
        QualityPoint("uniform", "baseline", 0.9, None, predicted_ratio=1.3),
    ]
    svg = quality_throughput([[QualityPanel("Child", "training", "decode", "tables", points)]], 50).svg
    for series in ("child, assembled, throughput measured", "child, assembled, throughput predicted"):
        assert series in svg
    assert "baseline, assembled, throughput predicted" in svg
    assert "baseline, assembled, throughput measured" not in svg


def test_the_pipeline_shows_every_stage_of_dvc_yaml(run: tuple[Params, Paths]) -> None:
    svg = (run[1].report / "pipeline.svg").read_text(encoding="utf-8")
    names = [stage.name for stage in read_pipeline()]
    assert re.findall(r'id="pipeline-stage-(\w+)"', svg) == names


@pytest.mark.parametrize("columns", [(0.0,), (-0.5, 0.5), (-1.0, 0.0, 1.0)])
@pytest.mark.parametrize("end", [-1.0, -0.5, 0.0, 0.5, 1.0])
def test_no_arrow_passes_through_a_box(columns: tuple[float, ...], end: float) -> None:
    between = [(1, column) for column in columns]
    corners = route((0, 0.0), (2, end), [(0, 0.0), *between, (2, end)])
    for x, y in (position(place) for place in between):
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):
            beside = max(x0, x1) < x - BOX_WIDTH / 2 or min(x0, x1) > x + BOX_WIDTH / 2
            assert beside or max(y0, y1) < y - BOX_HEIGHT / 2 or min(y0, y1) > y + BOX_HEIGHT / 2


def test_a_missing_or_broken_pipeline_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run from the project's root"):
        read_pipeline(tmp_path / "dvc.yaml")
    (tmp_path / "dvc.yaml").write_text("stages: 3", encoding="utf-8")
    with pytest.raises(InputError, match="restore it from git"):
        read_pipeline(tmp_path / "dvc.yaml")


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12), st.floats(0.01, 2))
def test_labels_keep_their_order_and_distance(positions: list[float], gap: float) -> None:
    placed = spaced_apart(positions, gap)
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    steps = [placed[later] - placed[earlier] for earlier, later in itertools.pairwise(order)]
    assert all(step >= gap - 1e-9 for step in steps)
    assert sum(placed) == pytest.approx(sum(positions), abs=1e-6)


def test_labels_that_do_not_collide_stay() -> None:
    assert spaced_apart([0.0, 1.0, 0.5], 0.2) == [0.0, 1.0, 0.5]
    assert spaced_apart([1.0, 1.0], 0.2) == pytest.approx([0.9, 1.1])


def without(baselines: Mapping[str, BaselineQuality], name: str) -> dict[str, BaselineQuality]:
    return {other: quality for other, quality in baselines.items() if other != name}


def test_a_baseline_without_a_child_is_named(fresh: tuple[Params, Paths]) -> None:
    params, paths = fresh
    baselines = {**read_baselines("small", paths), "depth": Baseline("decoupled", infeasible="too tight")}
    write_baselines(paths.baselines("small"), Baselines("small", baselines))
    domains = {
        domain: replace(measured, baselines=without(measured.baselines, "depth"))
        for domain, measured in read_evaluation("small", paths).domains.items()
    }
    change_evaluation("small", paths, domains=domains)
    write_report.fn(params, paths)
    text = Page(html(paths)).text
    assert "baseline depth of Small: none keeps the limits" in text
    assert text.count("baseline: depth") == TABLES_OF_MODELS * (len(TARGETS) - 1)


def test_every_baseline_is_in_the_table(run: tuple[Params, Paths]) -> None:
    text = Page(html(run[1])).text
    for name in BASELINES:
        assert text.count(f"baseline: {name.replace('_', ' ')}") == TABLES_OF_MODELS * len(TARGETS)
