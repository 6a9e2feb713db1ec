"""The report against artifacts whose numbers are known: what it shows, what it says it lacks, and its bytes."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.files import InputError, read_json, write_json
from storage.params import Params
from storage.paths import Paths
from storage.pipeline import read_pipeline
from storage.records import ANY_VARIANT, Architecture, Attention, Ffn, Replacement
from storage.tables import read_costs, read_throughput
from tasks.drawing.blocks import Model, architectures
from tasks.drawing.facts import Child, bld_losses, runtime
from tasks.drawing.pipeline import BOX_HEIGHT, BOX_WIDTH, position, route
from tasks.drawing.quality import Panel, Point, quality_throughput
from tasks.drawing.style import spread
from tasks.drawing.training import bld_losses as draw_bld_losses
from tasks.puzzle.costs import FIXED_COMPONENTS, CostTable, Setting, model_speed
from tasks.puzzle.variants import parent_blocks
from tasks.report import write_report
from tests.report_run import BASELINES, CONFIG, TARGETS, write_run
from tests.stages import checksums

FIGURES = {
    "pipeline",
    "quality_throughput",
    "architecture",
    "runtime_per_block",
    "bld_losses",
    "scores",
    "gkd",
    "predicted_measured",
}
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page as a browser would see it: text, attributes, ids; it fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        """Values of an attribute, wherever it is."""
        return [value for _, found, value in self.attributes if found == name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Paths]:
    """A reported run; tests read it."""
    paths = Paths(tmp_path_factory.mktemp("run") / "artifacts")
    params = write_run(paths)
    write_report.fn(params, paths)
    return params, paths


@pytest.fixture
def fresh(tmp_path: Path) -> tuple[Params, Paths]:
    """A run without its report; tests change it."""
    paths = Paths(tmp_path / "artifacts")
    return write_run(paths), paths


def html(paths: Paths) -> str:
    return (paths.report / "index.html").read_text(encoding="utf-8")


def child(target: str, paths: Paths) -> Child:
    return Child(target, read_json(paths.architecture(target), "the test"), None, None, None, [])


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
        found = read_json(paths.evaluation(target), "the test")
        for quality in (found["parent"], found["assembled"], found["distilled"], *found["baselines"].values()):
            assert f"{quality['kl']:.3f} ± {quality['kl_stderr']:.3f}" in text
            assert f"{quality['perplexity']:.2f}" in text
        assert f"after GKD KL {found['distilled']['kl']:.3f}" in text
        for name, quality in found["baselines"].items():
            assert f"{name.replace('_', ' ')} {quality['kl']:.3f}" in text, "label in the figure"
        for one in found["paired"].values():
            assert f"{one['kl_difference']:+.3f} ± {one['stderr']:.3f}" in text
        for one in found["constraints"]:
            assert f"{one['predicted']:.4g}" in text and f"{one['measured']:.4g}" in text
        for one in found["exports"]["formats"].values():
            assert f"{one['kl']:.6f} ± {one['kl_stderr']:.6f}" in text and f"{one['torch_perplexity']:.3f}" in text
        predicted = read_json(paths.architecture(target), "the test")["predicted"]
        assert f"{predicted['params']:,}" in text
        for row in read_throughput(paths.throughput(target)):
            rate = row.measured_tokens_per_s or row.modelled_tokens_per_s or 0.0
            assert (f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}") in text
    assert text.count("1.23 times the parent's speed") == len(TARGETS)


def test_names_are_escaped(run: tuple[Params, Paths]) -> None:
    assert escape("Large <child>") in html(run[1])
    assert "<child>" not in html(run[1])


LACKS: dict[str, tuple[str, str]] = {
    "library/index.parquet": ("losses of blockwise local distillation", "bld_losses"),
    "scores.parquet": ("replace-1-block scores", "scores"),
    "costs.parquet": ("runtime per block", "runtime_per_block"),
    "children/*/gkd.json": ("global distillation (GKD) of Small", "gkd"),
    "children/*/throughput.parquet": ("measured throughput of Small by scenario", ""),
    "children/*/evaluation.json": ("quality of Large", "quality_throughput"),
    "children/small": ("the child of Small", ""),
}


@pytest.mark.parametrize("pieces", [list(LACKS)[:3], list(LACKS)[3:6], list(LACKS)[6:], list(LACKS)])
def test_what_is_missing_is_named(fresh: tuple[Params, Paths], pieces: list[str]) -> None:
    params, paths = fresh
    for path in [path for piece in pieces for path in paths.root.glob(piece)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_report.fn(params, paths)
    drawn = {path.stem for path in paths.report.glob("*.svg")}
    text = Page(html(paths)).text.partition("Not in this run:")[2].partition("Pipeline")[0]
    for piece, (said, figure) in LACKS.items():
        gone = piece in pieces and not ("children/small" in pieces and "Small" in said and piece != "children/small")
        assert (said in text) == gone, piece
        assert figure not in drawn or piece not in pieces, piece


def change(path: Path, edit: Callable[[Any], object]) -> None:
    value = read_json(path, "the test")
    edit(value)
    write_json(path, value)


def test_an_early_run_claims_no_more_than_it_has(fresh: tuple[Params, Paths]) -> None:
    """No GKD, no baselines, and a speed that was timed on another machine than the limit's."""
    params, paths = fresh
    for target in TARGETS:
        change(paths.evaluation(target), lambda found: [found.pop(key) for key in ("distilled", "baselines", "paired")])
        change(paths.evaluation(target), lambda found: found["speed"].update(hardware="elsewhere"))
    write_report.fn(params, paths)
    text = Page(html(paths)).text
    assert f"before GKD KL {read_json(paths.evaluation('small'), 'the test')['assembled']['kl']:.3f}" in text
    assert "baselines of Small" in text
    assert "child after GKD" not in text
    assert "measured throughput of Small: its speed limit holds for tiny-cpu" in text
    figure = (paths.report / "quality_throughput.svg").read_text(encoding="utf-8")
    assert "throughput predicted" in figure and "throughput measured" not in figure


def test_a_target_without_a_speed_limit_has_no_place_on_the_throughput_axis(fresh: tuple[Params, Paths]) -> None:
    params, paths = fresh
    change(paths.architecture("small"), lambda found: found["predicted"].update(speed=None, throughput_ratio=None))
    change(paths.evaluation("small"), lambda found: found.update(speed=None))
    write_report.fn(params, paths)
    assert "its target limits no speed" in Page(html(paths)).text
    figure = (paths.report / "quality_throughput.svg").read_text(encoding="utf-8")
    assert "Large" in figure and "Small" not in figure
    assert "Small" in (paths.report / "runtime_per_block.svg").read_text(encoding="utf-8")


def test_same_inputs_give_same_bytes(run: tuple[Params, Paths], tmp_path: Path) -> None:
    """In another process too, whatever the order of its sets."""
    again = Paths(tmp_path / "artifacts")
    code = (
        "from pathlib import Path; from storage.paths import Paths; from tasks.report import write_report; "
        "from tests.report_run import write_run; import sys; paths = Paths(Path(sys.argv[1])); "
        "write_report.fn(write_run(paths), paths)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code, str(again.root)], env=environment, check=True)
    assert checksums(again.report) == checksums(run[1].report)


# --- figures ---------------------------------------------------------------------------------------------------------


def cells(svg: str, key: str) -> list[tuple[str, int, str]]:
    """(subblock, first block, variant) of the cells of one model."""
    found = re.findall(rf'id="architecture-{key}-(attention|ffn)-(\d+)-(\w+)"', svg)
    return [(part, int(index), variant) for part, index, variant in found]


def expected_cells(blocks: tuple[Replacement, ...]) -> set[tuple[str, int, str]]:
    pairs = ((block, (("attention", block.attention.name), ("ffn", block.ffn.name))) for block in blocks)
    return {(part, block.first_block, name) for block, halves in pairs for part, name in halves}


def test_the_architecture_has_a_cell_per_subblock(run: tuple[Params, Paths]) -> None:
    _, paths = run
    svg = (paths.report / "architecture.svg").read_text(encoding="utf-8")
    models = {"parent": parent_blocks(CONFIG)} | {
        target: Architecture.from_json(read_json(paths.architecture(target), "the test")["blocks"]).blocks
        for target in TARGETS
    }
    for key, blocks in models.items():
        assert len(cells(svg, key)) == 2 * CONFIG.num_blocks
        assert set(cells(svg, key)) == expected_cells(blocks)


def test_spans_and_linear_layers_are_drawn() -> None:
    blocks = (
        Replacement(0, 1, Attention("gqa", 1), Ffn("linear")),
        Replacement(1, 3, Attention("linear"), Ffn("gated", 48)),
        Replacement(4, 1, Attention("no_op"), Ffn("no_op")),
    )
    svg = architectures([Model("Parent", "parent", parent_blocks(CONFIG)), Model("Child", "child", blocks)], 50).svg
    assert set(cells(svg, "child")) == expected_cells(blocks)
    assert "1 of 3 replace several blocks" in svg


def test_a_spans_whole_block_has_a_panel_of_its_own() -> None:
    row = {"first_block": 0, "span": 2, "loss": "token_mse", "loss_before": 0.2, "loss_fitted": 0.1, "loss_after": 0.05}
    kinds = [("whole", "whole"), ("ffn", "linear"), ("ffn", "ffn_24"), ("attention", "kv_1")]
    rows = [{**row, "subblock": subblock, "variant": variant} for subblock, variant in kinds]
    titles = [f"{own}, for 2 blocks" for own in ("kv_1", "ffn_24", "ffn linear", "whole block")]
    losses = bld_losses(rows)
    assert [loss.title for loss in losses] == titles
    assert "relative MSE, token by token" in draw_bld_losses(losses, 50).svg


@pytest.mark.parametrize("target", TARGETS)
def test_runtimes_add_up_to_the_cost_table(run: tuple[Params, Paths], target: str) -> None:
    _, paths = run
    rows, one = read_costs(paths.costs), child(target, paths)
    table, setting = CostTable(rows), one.setting
    assert setting is not None
    fixed = sum(table.row(setting, component, ANY_VARIANT).decode_ms for component in FIXED_COMPONENTS)
    drawn = runtime(one, rows, CONFIG)
    totals = [drawn.total("attention"), drawn.total("ffn")]
    for which, blocks in enumerate((one.blocks, parent_blocks(CONFIG))):
        whole = model_speed(table, blocks, setting).decode_ms - fixed
        assert sum(total[which] for total in totals) == pytest.approx(whole)
    assert f"{totals[1][0]:.3g} ms of the parent's {totals[1][1]:.3g} ms" in Page(html(paths)).text


def test_a_span_takes_the_place_of_all_its_blocks(run: tuple[Params, Paths]) -> None:
    """One child block against the two parent blocks that it replaces; a limit on whole requests counts the prefill."""
    _, paths = run
    rows, one = read_costs(paths.costs), child("small", paths)
    whole = parent_blocks(CONFIG)
    blocks = Architecture((Replacement(0, 2, whole[0].attention, whole[0].ffn), *whole[2:]))
    predicted = {**one.chosen["predicted"], "speed": {**one.chosen["predicted"]["speed"], "metric": "latency_ms"}}
    chosen = {**one.chosen, "blocks": blocks.to_json(), "predicted": predicted}
    drawn = runtime(Child("small", chosen, None, None, None, []), rows, CONFIG)
    setting = Setting(**{name: predicted["speed"][name] for name in Setting.__dataclass_fields__})
    row = CostTable(rows).row(setting, "ffn", whole[0].ffn.name)
    once = row.prefill_ms + setting.output_tokens * row.decode_ms
    mine, parents = drawn.total("ffn")
    assert (mine, parents) == pytest.approx(((CONFIG.num_blocks - 1) * once, CONFIG.num_blocks * once))
    assert drawn.blocks[1].parent_ms == pytest.approx(2 * once)
    assert "whole requests" in drawn.what


def test_measured_and_predicted_throughput_are_different_series() -> None:
    points = [
        Point("parent", "parent", 0.0, 0.0, measured_ratio=1.0),
        Point("before GKD", "assembled", 0.5, 0.01, measured_ratio=1.2, predicted_ratio=1.3),
        Point("uniform", "baseline", 0.9, 0.02, predicted_ratio=1.3),
    ]
    svg = quality_throughput([Panel("Child", "decode", "tables", points)], 50).svg
    for series in ("child before GKD, throughput measured", "child before GKD, throughput predicted"):
        assert series in svg
    assert "baseline, before GKD, throughput predicted" in svg
    assert "baseline, before GKD, throughput measured" not in svg


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


def test_a_missing_or_broken_pipeline_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run from the project's root"):
        read_pipeline(tmp_path / "dvc.yaml")
    (tmp_path / "dvc.yaml").write_text("stages: 3", encoding="utf-8")
    with pytest.raises(InputError, match="restore it from git"):
        read_pipeline(tmp_path / "dvc.yaml")


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12), st.floats(0.01, 2))
def test_labels_keep_their_order_and_distance(positions: list[float], gap: float) -> None:
    placed = spread(positions, gap)
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    steps = [placed[later] - placed[earlier] for earlier, later in itertools.pairwise(order)]
    assert all(step >= gap - 1e-9 for step in steps)
    assert sum(placed) == pytest.approx(sum(positions), abs=1e-6)


def test_labels_that_do_not_collide_stay() -> None:
    assert spread([0.0, 1.0, 0.5], 0.2) == [0.0, 1.0, 0.5]
    assert spread([1.0, 1.0], 0.2) == pytest.approx([0.9, 1.1])


def test_a_baseline_without_a_child_is_said(fresh: tuple[Params, Paths]) -> None:
    params, paths = fresh
    change(paths.baselines("small"), lambda found: found["baselines"].update(depth={"infeasible": "too tight"}))
    change(paths.evaluation("small"), lambda found: found["baselines"].pop("depth"))
    write_report.fn(params, paths)
    text = Page(html(paths)).text
    assert "baseline depth of Small: none keeps the limits" in text
    assert text.count("baseline: depth") == len(TARGETS) - 1


def test_every_baseline_is_in_the_table(run: tuple[Params, Paths]) -> None:
    text = Page(html(run[1])).text
    for name in BASELINES:
        assert text.count(f"baseline: {name.replace('_', ' ')}") == len(TARGETS)
