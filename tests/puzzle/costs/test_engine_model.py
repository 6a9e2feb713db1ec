"""The engine model: by hand at its limits, additive, monotonic, and as close to the published table as it claims."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.files import InputError
from storage.records import ANY_VARIANT, Component
from storage.scenario import Scenario
from storage.variants import Attention, Ffn
from tasks.puzzle.costs.engine_model import (
    ENGINES,
    TENSORRT_LLM,
    TENSORRT_LLM_INFLIGHT,
    Engine,
    Model,
    Platform,
    Shape,
    best_estimate,
    component_ms,
    estimate,
    fits,
)
from tasks.puzzle.costs.hardware import DEVICES, device_named
from tests.benchmarks.bench_engine_model import (
    BEST,
    CHILD,
    CHILD_BEST,
    CHILD_ROWS,
    CONFIG,
    IN_FLIGHT_START,
    ONE_GPU,
    PARENT,
    PublishedRow,
    compare_in_flight,
    fit_in_flight,
    in_flight_rows,
    modelled,
)

H100 = device_named("h100-sxm")
IDEAL = Engine("ideal", compute=1.0, memory=1.0, sharpness=64.0, launch_ms=0.0, reduce_ms=0.0, fitted="not at all")
GEMM = 3 * 8192 * 28672


def on_h100(engine: Engine = TENSORRT_LLM) -> Platform:
    return Platform(H100, engine, "fp8")


def ffn_ms(engine: Engine, tokens: int, degree: int = 1) -> float:
    return component_ms(CONFIG, "ffn", "ffn_28672", on_h100(engine), degree, Shape(1, tokens, 0.0, 0.0))


def test_many_tokens_are_bound_by_computing_and_one_by_reading_the_weights() -> None:
    """In an ideal engine, beside six passes of 16-bit hidden states through memory."""
    moved = 6 * 2 * 8192 / 3.35e9
    many = ffn_ms(IDEAL, 1 << 16)
    assert many == pytest.approx(2 * GEMM * (1 << 16) / 1979e9 + moved * (1 << 16), rel=1e-6)
    assert ffn_ms(IDEAL, 1) == pytest.approx((GEMM + 2 * 8192) / 3.35e9 + moved, rel=1e-6)  # the norm is 16 bit


def test_where_both_bind_a_product_takes_as_much_longer_as_the_sharpness_says() -> None:
    tokens = 1979e12 / (2 * 3.35e12)  # FLOPs per byte of fp8 weights
    soft = replace(IDEAL, sharpness=2.0)
    moved = 6 * 2 * 8192 * round(tokens) / 3.35e9
    assert (ffn_ms(soft, round(tokens)) - moved) / (GEMM / 3.35e9) == pytest.approx(2**0.5, rel=1e-2)


def test_kernels_and_sums_over_devices_cost_what_the_constants_say() -> None:
    slow = replace(IDEAL, launch_ms=1.0, reduce_ms=10.0)
    assert ffn_ms(slow, 1) - ffn_ms(IDEAL, 1) == pytest.approx(1.0)
    assert ffn_ms(slow, 1, degree=2) - ffn_ms(IDEAL, 1, degree=2) == pytest.approx(11.0)
    assert component_ms(CONFIG, "attention", "no_op", on_h100(slow), 2, Shape(1, 1, 1, 1)) == 0.0


def test_kv_is_read_at_the_mean_context() -> None:
    shapes = [Shape(8, 1, context, context) for context in (100.0, 1100.0)]
    short, long = (component_ms(CONFIG, "attention", "kv_8", on_h100(IDEAL), 1, shape) for shape in shapes)
    assert long - short == pytest.approx(8 * 1000 * 2 * 8 * 128 / 3.35e9)


@pytest.mark.parametrize("degree", [1, 4])
def test_a_model_is_the_sum_of_its_components(degree: int) -> None:
    whole = estimate(CHILD, on_h100(), Scenario(128, 1024), degree, 64)
    shapes = (Shape(64, 128, 64, 128), Shape(64, 1, 640, 640))
    names: list[tuple[Component, str]] = [("embedding", ANY_VARIANT), ("head", ANY_VARIANT)]
    for attention, ffn in CHILD.blocks:
        names += [("attention", attention.name), ("ffn", ffn.name)]
    sums = [
        sum(component_ms(CONFIG, component, variant, on_h100(), degree, shape) for component, variant in names)
        for shape in shapes
    ]
    assert [whole.prefill_ms, whole.step_ms] == pytest.approx(sums, rel=1e-12)


def test_published_sizes_of_the_70b_and_the_51b() -> None:
    """GB of FP8 weights and kB of KV per token."""
    for model, weights, per_token in ((PARENT, 72.7, 163.8), (CHILD, 53.6, 95.0)):
        sizes = estimate(model, on_h100(), Scenario(1, 1), 1, 1)
        assert sizes.weights_gib * 2**30 / 1e9 == pytest.approx(weights, abs=0.05)
        assert sizes.kv_gib * 2**30 / 2 / 1e3 == pytest.approx(per_token, abs=0.05)


def test_the_70b_steps_in_25_ms_whatever_the_scenario() -> None:
    """At the batches that fit on one GPU: 32, 16, 8, 8."""
    batches = {Scenario(128, 1024): 32, Scenario(128, 2048): 16, Scenario(128, 4096): 8, Scenario(2048, 2048): 8}
    for scenario, batch in batches.items():
        best = modelled(PARENT, TENSORRT_LLM, scenario, [1])
        assert best.batch == batch
        assert best.step_ms == pytest.approx(25, abs=1)


def test_the_51b_is_predicted_by_constants_of_the_70b() -> None:
    """The aim is 5 % on average, 12 % each, ratios to the 70B on one GPU within 15 %, the right tensor parallelism."""
    errors = []
    for scenario, (tokens, degree) in CHILD_BEST.items():
        best = modelled(CHILD, TENSORRT_LLM, scenario)
        assert best.tensor_parallel == degree
        errors.append(abs(best.tokens_per_s_per_gpu / tokens - 1))
        ratio = best.tokens_per_s_per_gpu / modelled(PARENT, TENSORRT_LLM, scenario, [1]).tokens_per_s_per_gpu
        assert ratio == pytest.approx(tokens / ONE_GPU[scenario], rel=0.15)
    assert fmean(errors) < 0.05 and max(errors) < 0.12
    for scenario, (tokens, degree) in BEST.items():
        best = modelled(PARENT, TENSORRT_LLM, scenario, [degree])
        assert best.tokens_per_s_per_gpu == pytest.approx(tokens, rel=0.06)


SIZES = st.sampled_from([Attention("gqa", 8), Attention("gqa", 2), Attention("linear"), Attention("no_op")])
WIDTHS = st.sampled_from([Ffn("gated", 28_672), Ffn("gated", 7_168), Ffn("linear"), Ffn("no_op")])


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.lists(st.tuples(SIZES, WIDTHS), min_size=1, max_size=5),
    batch=st.sampled_from([1, 16, 256]),
    inputs=st.sampled_from([16, 512]),
    outputs=st.sampled_from([16, 512]),
    degree=st.sampled_from([1, 2, 8]),
    name=st.sampled_from(sorted(DEVICES)),
    engine=st.sampled_from(list(ENGINES.values())),
)
def test_more_of_anything_takes_no_less_time_and_memory(
    blocks: list[tuple[Attention, Ffn]], batch: int, inputs: int, outputs: int, degree: int, name: str, engine: Engine
) -> None:
    platform = Platform(device_named(name), engine, "bfloat16")
    model = Model(CONFIG, tuple(blocks))

    def amounts(model: Model, batch: int, scenario: Scenario) -> tuple[float, float, float, float]:
        estimated = estimate(model, platform, scenario, degree, batch)
        return estimated.prefill_ms, estimated.step_ms, estimated.weights_gib, estimated.kv_gib

    deeper = Model(CONFIG, (*blocks, (Attention("gqa", 8), Ffn("gated", 28_672))))
    before = amounts(model, batch, Scenario(inputs, outputs))
    for after in (
        amounts(model, 2 * batch, Scenario(inputs, outputs)),
        amounts(model, batch, Scenario(2 * inputs, outputs)),
        amounts(model, batch, Scenario(inputs, 2 * outputs)),
        amounts(deeper, batch, Scenario(inputs, outputs)),
    ):
        assert all(more >= less for less, more in zip(before, after, strict=True))


def test_what_fits_nowhere_says_so() -> None:
    with pytest.raises(InputError, match=r"GiB of weights.*do not fit into 1 x .* of rtx-4090; take more devices"):
        best_estimate(PARENT, Platform(device_named("rtx-4090"), TENSORRT_LLM, "fp8"), Scenario(128, 128), [1])
    whole = estimate(PARENT, on_h100(), Scenario(128, 1024), 1, 64)
    assert not fits(whole, PARENT, on_h100(), Scenario(128, 1024))


IN_FLIGHT = Platform(H100, TENSORRT_LLM_INFLIGHT, "fp8")


@pytest.mark.parametrize("scenario", [Scenario(1000, 1000), Scenario(2048, 128)])
def test_in_flight_batches_are_all_that_whole_requests_leave_room_for(scenario: Scenario) -> None:
    """By hand: 96.5 % of the H100's memory, less weights and workspace, over the bytes of a whole request."""
    best = best_estimate(PARENT, IN_FLIGHT, scenario, [2])
    tokens, total = 8192, 0.965 * 81559 * 2**20
    workspace = 2 * tokens * (2 * 8192 + 2 * 28672 / 2)
    free = total - best.weights_gib * 2**30 - workspace
    request = scenario.total_tokens * 80 * 2 * 8 * 128 / 2 + 4 * 128256 / 2
    assert best.batch == int(free / request)
    assert best.batch not in TENSORRT_LLM.batches


@pytest.mark.parametrize("engine", [TENSORRT_LLM, TENSORRT_LLM_INFLIGHT])
@pytest.mark.parametrize("hardware", ["h100-sxm", "h200-sxm"])
@pytest.mark.parametrize("scenario", [Scenario(128, 128), Scenario(20_000, 2_000)])
def test_the_best_batch_is_that_of_a_search_over_all(engine: Engine, hardware: str, scenario: Scenario) -> None:
    platform = Platform(device_named(hardware), engine, "fp8")
    tried = [estimate(CHILD, platform, scenario, 2, batch) for batch in engine.batches]
    speeds = [estimated.tokens_per_s_per_gpu for estimated in tried]
    assert speeds == sorted(speeds), "a sequence more is never slower"
    fitting = [estimated for estimated in tried if fits(estimated, CHILD, platform, scenario)]
    assert best_estimate(CHILD, platform, scenario, [2]) == max(fitting, key=lambda one: one.tokens_per_s_per_gpu)


def test_each_engine_fills_a_device_by_its_own_rule() -> None:
    """The static engine goes by the data sheet's usable memory, the other by what the driver reports."""
    for name, filled in (("h100-sxm", 82.5e9), ("h200-sxm", 145.5e9)):
        device = device_named(name)
        assert Platform(device, TENSORRT_LLM, "fp8").memory_bytes == device.memory_bytes
        assert Platform(device, TENSORRT_LLM_INFLIGHT, "fp8").memory_bytes == pytest.approx(filled, rel=1e-3)


def test_the_announced_51b_is_in_flight_within_15_percent_and_on_two_gpus_within_2() -> None:
    """No fit has its rows; on average they are 8.4 % off, where 7 were aimed at (docs/costs.md)."""
    errors = {row.scenario: abs(row.error(TENSORRT_LLM_INFLIGHT)) for row in CHILD_ROWS}
    assert max(errors.values()) < 0.15 and fmean(errors.values()) < 0.09
    assert errors[Scenario(128, 4096)] < 0.02


def test_the_fit_finds_the_constants_that_made_its_rows() -> None:
    """Rows are made by known constants; with one device alone, the sum over devices keeps its start."""
    truth = replace(TENSORRT_LLM_INFLIGHT, compute=0.45, memory=0.7, reduce_ms=0.05)
    settings = [("llama-3.1-8b", 1, Scenario(128, 2048)), ("llama-3.3-70b", 2, Scenario(2048, 128))]
    settings += [("llama-3.3-70b", 2, Scenario(128, 4096)), ("llama-3.1-8b", 1, Scenario(2048, 128))]
    rows = [PublishedRow(model, "h100-sxm", degree, scenario, 1.0) for model, degree, scenario in settings]
    rows = [replace(row, tokens_per_s=row.modelled(truth).tokens_per_s_per_gpu) for row in rows]
    found = fit_in_flight(rows)
    for field in ("compute", "memory", "reduce_ms"):
        assert getattr(found, field) == pytest.approx(getattr(truth, field), rel=1e-3)
    alone = fit_in_flight([row for row in rows if row.degree == 1])
    assert alone.compute == pytest.approx(0.45, rel=1e-3)
    assert alone.reduce_ms == IN_FLIGHT_START["reduce_ms"]


def test_without_the_second_table_the_benchmark_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tests.benchmarks.bench_engine_model.IN_FLIGHT_TABLE", tmp_path / "none.csv")
    assert compare_in_flight(is_fitted=True).keys() == {"in-flight, 51B"}
    assert "none.csv: tensorrt-llm-inflight is compared with the announcement's 51B alone" in capsys.readouterr().out
    header = "model,hardware,tensor_parallel,scenario,output_tokens_per_s_total\n"
    (tmp_path / "none.csv").write_text(f"{header}llama-3.1-8b,h100-sxm,2,128/128,100\n")
    assert in_flight_rows() == [PublishedRow("llama-3.1-8b", "h100-sxm", 2, Scenario(128, 128), 50.0)]
