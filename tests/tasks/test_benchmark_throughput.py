"""benchmark_throughput on a tiny parent and child: what every row says, predictions, this machine's name, errors."""

import itertools
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.architecture import read_architecture, write_architecture
from storage.checkpoints import Checkpoint
from storage.files import InputError, sha256, write_sealed
from storage.gguf_child import write_gguf
from storage.model_config import LM_HEAD
from storage.params import Params
from storage.parent import Parent
from storage.paths import EXPORTS_OVERVIEW, Paths
from storage.records import ANY_VARIANT, Component, ThroughputRow, TimingRow
from storage.scenario import Setting
from storage.tables import read_costs, read_throughput, write_costs, write_timings
from storage.variants import Replacement
from tasks.benchmark_throughput import measure_throughput, model_throughput, parent_and_child, throughput_text
from tasks.engines.machine import machine
from tasks.measure_costs import write_cost_table
from tasks.puzzle.costs.cost_table import FIXED_COMPONENTS
from tasks.puzzle.costs.sizes import component_sizes
from tasks.puzzle.model.device import prepare_compute
from tasks.puzzle.search_space import parent_blocks
from tests.chosen import speed_limit
from tests.settings import tiny_params
from tests.stages import assemble, benchmark
from tests.tiny import flip_byte

HERE = machine(torch.device("cpu"))
SPEED = {"metric": "decode_throughput", "at_least_ratio": 0.01, "scenario": "8/4", "batch": 2, "precision": "float32"}
SPEED_SETTING = Setting("unit", "torch", "float32", 1, "8/4", 2)
PUBLISHED = {"128/128", "128/1024", "128/2048", "128/4096", "2048/128", "2048/2048"}


def _params(**section: Any) -> Params:
    """Make params of two targets: `small` limits no speed, `fast` names timings called unit."""
    limits = {"size": {"metric": "block_params", "at_most_ratio": 0.7}}
    return tiny_params(
        measure_costs={"hardware": ["h100-sxm"], "scenarios": ["8/4"], "threads": 1},
        benchmark_throughput={"scenarios": ["8/4"], "batches": [1, 2], "repeats": 2, **section},
        targets={"fast": {"label": "Fast", "constraints": {**limits, "speed": {**SPEED, "hardware": "unit"}}}},
    )


@pytest.fixture
def built(finished: tuple[Params, Paths]) -> Paths:
    """Make artifacts with a child of both targets."""
    _, paths = finished
    write_cost_table.fn(_params(), paths)
    assemble(_params(), paths, [("kv_2", "ffn_96"), ("kv_1", "ffn_48"), ("no_op", "ffn_24")])
    shutil.copytree(paths.child("small"), paths.child("fast"))
    _limit_speed(paths, SPEED_SETTING)
    return paths


def _limit_speed(paths: Paths, setting: Setting) -> None:
    """Give the child of `fast` a limit on its speed in this setting."""
    limit = speed_limit("decode_throughput", 0.01, setting)
    chosen = replace(read_architecture("small", paths), constraints=(limit,))
    write_architecture(paths.architecture("fast"), chosen)


def _blocks(paths: Paths) -> dict[str, tuple[Replacement, ...]]:
    parent = parent_blocks(Parent(paths.parent).config)
    return {"parent": parent, "child": read_architecture("small", paths).blocks}


def _parts(paths: Paths, model: str) -> list[tuple[Component, str]]:
    """Return component and variant of everything in a model."""
    parts: list[tuple[Component, str]] = [(component, ANY_VARIANT) for component in FIXED_COMPONENTS]
    for block in _blocks(paths)[model]:
        parts += [("attention", block.attention.name), ("ffn", block.ffn.name)]
    return parts


def test_every_row_is_either_measured_here_or_modelled(built: Paths) -> None:
    params = _params()
    benchmark(params, built, "small")
    rows = read_throughput(built.throughput("small"))
    measured = {(row.model, row.phase, row.batch): row for row in rows if row.modelled_tokens_per_s is None}
    assert measured.keys() == {(m, p, b) for m in ("parent", "child") for p in ("prefill", "decode") for b in (1, 2)}
    for (_, phase, batch), row in measured.items():
        assert row.measured_ms is not None and row.measured_tokens_per_s is not None
        tokens = batch * (8 if phase == "prefill" else 1)
        assert row.measured_tokens_per_s == pytest.approx(1e3 * tokens / row.measured_ms)
        assert (row.scenario, row.engine, row.precision, row.threads) == ("8/4", "torch", "float32", 1)
        assert row.hardware == row.machine == HERE
        assert f"median of {2 if phase == 'prefill' else 32} rounds" in row.how
        assert row.predicted_tokens_per_s is None and "limits no speed" in row.how
    modelled = {(row.model, row.scenario): row for row in rows if row.modelled_tokens_per_s is not None}
    assert modelled.keys() == {(model, scenario) for model in ("parent", "child") for scenario in PUBLISHED}
    assert len(measured) + len(modelled) == len(rows)
    for row in modelled.values():
        assert (row.phase, row.hardware, row.engine, row.precision) == (
            "request",
            "h100-sxm",
            "tensorrt-llm",
            "bfloat16",
        )
        assert (row.measured_ms, row.machine, row.threads) == (None, None, None)
    text = throughput_text("small", params, built)
    for words in (HERE, "float32, 1 threads", "per h100-sxm, MODELLED", "chatbot 128/128", "stress 2048/2048"):
        assert words in text


def test_params_name_the_engine_that_is_modelled(built: Paths) -> None:
    rows = model_throughput.fn("small", _params(modelled_engine="tensorrt-llm-inflight"), built)
    assert {row.engine for row in rows} == {"tensorrt-llm-inflight"}
    assert {row.batch for row in rows} == {2048}, "of so small a model all that the scheduler takes fits"
    assert all("the best batch of 1, 2, 3 ... 2048" in row.how for row in rows)


def test_the_models_that_are_timed_are_parent_and_child(built: Paths) -> None:
    """Told apart by their parameters: those that the variants have."""
    config = Parent(built.parent).config
    models = parent_and_child(
        Parent(built.parent), Checkpoint(built.assembled("small"), ""), prepare_compute("cpu", "auto", 1)
    )
    for name, model in models.items():
        expected = sum(component_sizes(config, *part, "float32").params for part in _parts(built, name))
        counted = {key: value.numel() for key, value in model.named_parameters() if key != LM_HEAD}  # tied
        assert sum(counted.values()) == expected


def test_a_child_like_its_parent_is_modelled_as_exactly_as_fast(built: Paths) -> None:
    chosen = read_architecture("small", built)
    differ = model_throughput.fn("small", _params(), built)
    write_architecture(built.architecture("small"), replace(chosen, blocks=_blocks(built)["parent"]))
    same = model_throughput.fn("small", _params(), built)
    assert _modelled_ratios(same) == dict.fromkeys(PUBLISHED, 1.0)
    assert min(_modelled_ratios(differ).values()) > 1


def _modelled_ratios(rows: list[ThroughputRow]) -> dict[str, float]:
    speed = {(row.scenario, row.model): row.modelled_tokens_per_s or 0.0 for row in rows}
    return {scenario: speed[scenario, "child"] / speed[scenario, "parent"] for scenario in PUBLISHED}


def _time_unit(paths: Paths, precision: Any = "float32") -> None:
    """Add made-up timings of batch 2 on hardware unit to the cost table."""
    rows = read_costs(paths.costs)
    timed = [
        replace(
            row,
            hardware="unit",
            engine="torch",
            precision=precision,
            batch=2,
            origin="measured",
            prefill_ms=1.5**index,
            decode_ms=1.25**index,
        )
        for index, row in enumerate(row for row in rows if row.batch == 8)
    ]
    write_costs(paths.costs, [*rows, *timed])


def test_predictions_are_sums_over_the_timings_of_the_targets_hardware(built: Paths) -> None:
    _time_unit(built)
    ms = {
        (row.component, row.variant): {"prefill": row.prefill_ms, "decode": row.decode_ms}
        for row in read_costs(built.costs)
        if row.hardware == "unit"
    }
    for row in measure_throughput.fn("fast", _params(), built):
        if row.batch == 1:
            assert row.predicted_tokens_per_s is None and "no float32 timings of unit" in row.how
            continue
        tokens = 2 * 8 if row.phase == "prefill" else 2
        total = math.fsum(ms[part][row.phase] for part in _parts(built, row.model))
        assert row.predicted_tokens_per_s == pytest.approx(1e3 * tokens / total)
        assert row.predicted_hardware == "unit"


def test_a_speed_limit_is_measured_where_it_holds(built: Paths) -> None:
    rows = measure_throughput.fn("fast", _params(batches=[1], repeats=2), built)
    assert {(row.scenario, row.batch) for row in rows} == {("8/4", 1), ("8/4", SPEED["batch"])}


def test_timings_of_another_precision_predict_nothing(built: Paths) -> None:
    _time_unit(built, "bfloat16")
    rows = measure_throughput.fn("fast", _params(), built)
    assert {row.predicted_tokens_per_s for row in rows} == {None}
    assert all("no float32 timings of unit (NOT this machine)" in row.how for row in rows)


@pytest.mark.parametrize("timed_on", [HERE, "another machine"])
def test_every_row_says_whether_this_is_the_timed_machine(
    built: Paths, timed_on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _time_unit(built)
    monkeypatch.chdir(tmp_path)
    row = read_costs(built.costs)[0]
    timing = TimingRow(
        **(vars(row) | {"engine": "torch"}),
        machine=timed_on,
        versions="torch",
        dtype="float32",
        threads=1,
        repeats=2,
        spread=0.0,
    )
    elsewhere = replace(timing, engine="llama.cpp", machine="a third machine")  # on a GPU's host both are right
    write_timings(Path("storage/timings/unit.parquet"), [timing, elsewhere])
    rows = [row for row in measure_throughput.fn("fast", _params(), built) if row.batch == 2]
    like = timed_on == HERE
    assert {row.hardware for row in rows} == {"unit" if like else HERE}
    assert {row.machine for row in rows} == {HERE}
    assert all(("a machine like this one" if like else "NOT this machine") in row.how for row in rows)


@pytest.mark.parametrize(
    ("section", "missing", "words"),
    [
        ({"hardware": "h100"}, "", ["'h100'", "no data sheet", "did you mean h100-sxm?"]),
        ({}, "architecture.json", ["architecture.json is missing", "dvc repro search_architecture@small"]),
        ({}, "assembled/config.json", ["config.json is missing", "dvc repro assemble_child@small"]),
        ({}, "assembled/model.safetensors", ["model.safetensors", "dvc repro assemble_child@small"]),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(
    built: Paths, section: dict[str, Any], missing: str, words: list[str]
) -> None:
    if missing:
        (built.child("small") / missing).unlink()
    with pytest.raises(InputError) as caught:
        benchmark(_params(**section), built, "small")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not built.throughput("small").exists()


def test_rows_go_through_the_table(built: Paths) -> None:
    """What is written is read back, and in the table's order parent and child of a setting are side by side."""
    benchmark(_params(), built, "small")
    rows: tuple[ThroughputRow, ...] = read_throughput(built.throughput("small"))
    settings = [(row.hardware, row.scenario, row.batch, row.phase) for row in rows if row.measured_ms is not None]
    assert settings[::2] == settings[1::2]


def _export(paths: Paths) -> None:
    """Export parent and child of `fast` as GGUF, of noise: what they say plays no part."""
    config, blocks = Parent(paths.parent).config, _blocks(paths)
    for name, folder in (("parent", paths.parent_exports), ("fast", paths.exports("fast"))):
        variants = [(block.attention, block.ffn) for block in blocks["parent" if name == "parent" else "child"]]
        (folder / "gguf-f16").mkdir(parents=True)
        file = f"gguf-f16/{name}-F16.gguf"
        write_gguf(folder / file, config, variants, None, "F16")
        write_sealed(
            folder / EXPORTS_OVERVIEW, {"formats": {"gguf-f16": {"files": {file: {"sha256": sha256(folder / file)}}}}}
        )


def test_llama_cpp_measures_parent_and_child_as_well(built: Paths) -> None:
    """In 16 bit, where the speed limit holds too."""
    _export(built)
    params = _params(engines=["torch", "llama.cpp"], batches=[1])
    rows = measure_throughput.fn("fast", params, built)
    measured = {(row.engine, row.model, row.phase, row.batch): row for row in rows}
    both = list(itertools.product(("parent", "child"), ("prefill", "decode")))
    assert measured.keys() == {("llama.cpp", *pair, 1) for pair in both} | {
        ("torch", *pair, batch) for pair in both for batch in (1, SPEED["batch"])
    }
    for (engine, _, phase, batch), row in measured.items():
        assert row.precision == ("float32" if engine == "torch" else "float16")
        assert row.versions is not None and engine.split(".")[0] in row.versions
        assert row.measured_ms is not None and row.measured_ms > 0
        tokens = batch * (8 if phase == "prefill" else 1)
        assert row.measured_tokens_per_s == pytest.approx(1e3 * tokens / row.measured_ms)


def test_a_limit_on_llama_cpp_is_measured_in_it(built: Paths) -> None:
    _export(built)
    _limit_speed(built, replace(SPEED_SETTING, engine="llama.cpp", precision="float16"))
    rows = measure_throughput.fn("fast", _params(batches=[1]), built)
    assert {(row.engine, row.batch) for row in rows} == {("torch", 1), ("llama.cpp", 1), ("llama.cpp", SPEED["batch"])}


def test_a_machine_that_wanders_between_rounds_cancels(built: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child takes half of the parent's time in all rounds but one, whatever that is; their own medians say 0.8."""
    parent = [10.0, 50.0, 10.0, 40.0, 20.0]
    child = [5.0, 25.0, 5.0, 20.0, 16.0]
    rounds = {model: {"prefill": ms, "decode": ms} for model, ms in (("parent", parent), ("child", child))}
    monkeypatch.setattr("tasks.benchmark_throughput.time_models", lambda *_: rounds)
    rows = measure_throughput.fn("small", _params(engines=["torch"], batches=[1]), built)
    measured = {(row.model, row.phase): row for row in rows}
    for phase in ("prefill", "decode"):
        assert (measured["parent", phase].measured_ms, measured["child", phase].measured_ms) == (20.0, 10.0)
    assert measured["child", "decode"].measured_spread == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("context", "scenarios, 120/8: timing it in llama.cpp needs 158 tokens of context; the parent has 128"),
        ("limit", r"fast.constraints.\w+: timing it in llama.cpp needs 158 tokens of context; the parent has 128"),
        ("damaged", r"fast-F16.gguf is damaged .*; run `dvc repro export_child@fast`"),
        ("missing", "llama.cpp is not installed"),
        ("not exported", r"no GGUF file of fast is in .*; run `dvc repro export_child@fast`"),
    ],
)
def test_what_llama_cpp_cannot_do_is_said_before_anything_is_timed(
    built: Paths, fault: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _export(built)
    monkeypatch.setattr("tasks.benchmark_throughput.time_models", lambda *_: pytest.fail("timed"))
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "xllamacpp", None)
    elif fault == "not exported":
        shutil.rmtree(built.exports("fast"))
    elif fault == "damaged":
        flip_byte(built.exports("fast") / "gguf-f16/fast-F16.gguf")
    elif fault == "limit":
        _limit_speed(built, replace(SPEED_SETTING, engine="llama.cpp", scenario="120/8"))
    scenarios = ["120/8" if fault == "context" else "8/4"]
    with pytest.raises(InputError, match=words):
        measure_throughput.fn("fast", _params(engines=["torch", "llama.cpp"], scenarios=scenarios), built)


def test_lengths_are_scaled_for_a_small_machine_and_tables_say_so(built: Paths) -> None:
    params = _params(scenarios=["128/64"], length_scale=0.0625, batches=[1])
    benchmark(params, built, "fast")
    measured = [row for row in read_throughput(built.throughput("fast")) if row.measured_ms is not None]
    assert {(row.scenario, row.batch) for row in measured} == {("8/4", 1), ("8/4", SPEED["batch"])}
    assert "lengths are SCALED: 128/64 as 8/4" in throughput_text("fast", params, built)
