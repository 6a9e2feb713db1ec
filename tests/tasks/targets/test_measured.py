"""What was measured of a child: counted on tensors, and speeds beside what the tables and the bytes say."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.architecture import ReachedLimit, SharedSetting
from storage.checkpoints import Checkpoint
from storage.metrics import METRICS, Metric
from storage.records import Phase, ThroughputRow
from storage.scenario import Setting
from storage.variants import Attention
from tasks.puzzle.costs.cost_table import ModelSizes
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tasks.targets.measured import Counted, count, measured_value, speed_ratios
from tests.chosen import speed_limit
from tests.tiny import save_child, save_tiny

GQA, NO_OP = Attention("gqa", 1), Attention("no_op")
COUNTED = {
    "parent": Counted(
        ModelSizes(params=600, block_params=400, weight_bytes=1200, kv_bytes_per_token=8), (GQA, GQA), 200
    ),
    "assembled": Counted(
        ModelSizes(params=400, block_params=200, weight_bytes=800, kv_bytes_per_token=4), (GQA, NO_OP), 200
    ),
}


SIZE_LIMIT = ReachedLimit(
    name="size",
    metric="memory_gib",
    kind="at_most",
    limit=1.0,
    predicted=1.0,
    relative=False,
    unit="GiB",
    batch=3,
    context=12,
    tensor_parallel=2,
    workspace_gib=0.0,
)


def rows(predicted: float | None = 90.0) -> Iterator[ThroughputRow]:
    """Yield parent and child at 8/4, batch 3: the child generates 1.5 times and reads 1.25 times as many tokens/s."""
    rates: dict[tuple[str, Phase], float] = {
        ("parent", "prefill"): 400.0,
        ("parent", "decode"): 100.0,
        ("child", "prefill"): 500.0,
        ("child", "decode"): 150.0,
    }
    for (model, phase), rate in rates.items():
        yield ThroughputRow(
            model=model,
            phase=phase,
            scenario="8/4",
            batch=3,
            hardware="laptop",
            engine="llama.cpp",
            precision="float16",
            tensor_parallel=1,
            threads=1,
            machine="made up",
            versions="none",
            measured_ms=1e3 / rate,
            measured_tokens_per_s=rate,
            measured_spread=0.03 if model == "child" else 0.02,
            predicted_tokens_per_s=predicted and (2 * predicted if model == "child" else predicted),
            predicted_hardware="laptop" if predicted else None,
            how="made up",
        )


def test_ratios_by_hand() -> None:
    """At 8/4 a step reads, beside the weights less the embedding's rows, 3 sequences of 8 + 4 / 2 tokens."""
    prefill, decode = speed_ratios(list(rows()), COUNTED)
    for ratio in (prefill, decode):
        assert (ratio.engine, ratio.precision, ratio.scenario, ratio.batch) == ("llama.cpp", "float16", "8/4", 3)
    assert (prefill.phase, prefill.measured, prefill.read_bytes) == ("prefill", 1.25, None)
    assert (decode.phase, decode.measured, decode.measured_spread) == ("decode", 1.5, 0.03)
    assert decode.predicted == 2.0
    assert decode.drift == pytest.approx(100 / 90)
    assert decode.read_bytes == pytest.approx((1200 - 200 + 3 * 10 * 8) / (800 - 200 + 3 * 10 * 4))


def test_what_was_not_predicted_has_no_ratio_and_a_modelled_row_none_at_all() -> None:
    modelled = dataclasses.replace(next(rows()), measured_ms=None, modelled_tokens_per_s=1.0)
    ratios = list(speed_ratios([modelled, *rows(None)], COUNTED))
    assert [(ratio.predicted, ratio.drift) for ratio in ratios] == [(None, None)] * 2
    assert list(speed_ratios([row for row in rows() if row.model == "parent"], COUNTED)) == []


MEASURED = {
    "params": (400, 600),
    "block_params": (200, 400),
    "attention_blocks": (1, 2),
    "weight_bytes": (800, 1200),
    "kv_bytes": (4, 8),
    "memory_gib": ((800 + 3 * 12 * 4) / 2 / 2**30, (1200 + 3 * 12 * 8) / 2 / 2**30),
    "throughput": (1e3 * 3 * 4 / (2.0 + 4 * 1e3 / 150), 1e3 * 3 * 4 / (2.5 + 4 * 10.0)),
    "decode_throughput": (3 * 150.0, 3 * 100.0),
    "latency_ms": (2.0 + 4 * 1e3 / 150, 2.5 + 4 * 10.0),
    "time_to_first_token_ms": (2.0, 2.5),
    "time_per_token_ms": (1e3 / 150, 10.0),
}
"""Values of child and parent by hand: COUNTED, at batch 3, context 12 and 2 devices for memory; `rows()` for speeds."""


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
@pytest.mark.parametrize("relative", [True, False])
def test_every_metric_is_measured_in_its_limits_unit(metric: Metric, relative: bool) -> None:
    setting = Setting("laptop", "llama.cpp", "float16", 1, "8/4", 3)
    limit = speed_limit(metric.name, 1.0, setting) if metric.speed else SIZE_LIMIT
    limit = dataclasses.replace(limit, metric=metric.name, relative=relative)
    child, parent = MEASURED[metric.name]
    expected = child / parent if relative else child
    assert measured_value(limit, COUNTED, list(rows())) == pytest.approx(expected)


def test_what_this_machine_cannot_measure_has_no_value() -> None:
    """Another engine, a mix of scenarios, and memory with a modelled workspace."""
    setting = Setting("laptop", "llama.cpp", "float16", 1, "8/4", 3)
    limit = speed_limit("throughput", 1.0, setting)
    share = SharedSetting(**dataclasses.asdict(setting), share=0.5)
    for lacking in (
        dataclasses.replace(limit, engine="torch"),
        dataclasses.replace(limit, mix=(share, share)),
        dataclasses.replace(SIZE_LIMIT, workspace_gib=0.1),
    ):
        assert measured_value(lacking, COUNTED, list(rows())) is None


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama3-untied-head_dim-bias", False)])
def test_an_embedding_that_is_not_the_head_is_looked_up(family: str, tied: bool, tmp_path: Path) -> None:
    """A step reads all of a tied one, as its head, but single rows of one that is not."""
    _, config = save_tiny(family, tmp_path / "parent")
    attention = parent_attention(config)
    model = save_child(tmp_path / "child", config, [(attention, parent_ffn(config))] * config.num_blocks)
    checkpoint = Checkpoint(tmp_path / "child", "the test")
    counted = count(checkpoint, config, [attention] * config.num_blocks)
    assert config.tie_embeddings == tied
    assert counted.sizes.params == sum(parameter.numel() for parameter in model.parameters())
    assert counted.sizes.block_params == sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert counted.sizes.kv_bytes_per_token == 2 * config.num_blocks * attention.num_kv_heads * config.head_dim * 4
    assert counted.looked_up_bytes == (0 if tied else 4 * config.vocab_size * config.hidden_size)
