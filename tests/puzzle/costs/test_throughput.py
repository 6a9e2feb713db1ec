"""Modelled throughput against the published table and brute force over settings; predictions against plain sums."""

import math
from dataclasses import replace

import pytest

from storage.files import InputError
from storage.model_config import ModelConfig
from storage.records import CostRow, Precision
from storage.scenario import Scenario, Setting
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.costs.cost_model import ENGINE, modelled_rows
from tasks.puzzle.costs.cost_table import GIB
from tasks.puzzle.costs.engine_model import TENSORRT_LLM, Estimate, Model, Platform, estimate
from tasks.puzzle.costs.hardware import device_named
from tasks.puzzle.costs.throughput import best_modelled, predict
from tasks.puzzle.search_space import parent_blocks
from tests.puzzle.test_search_space import LLAMA_70B, SMOLLM2

PARENT = parent_blocks(SMOLLM2)
H100_BYTES = device_named("h100-sxm").memory_bytes
# Ten of 30 blocks lack attention, ten have half of the FFN.
CHILD = (
    *(Replacement(index, 1, Attention("no_op"), Ffn("gated", 1536)) for index in range(10)),
    *(Replacement(index, 1, Attention("gqa", 3), Ffn("gated", 768)) for index in range(10, 20)),
    *PARENT[20:],
)


def _best(
    blocks: tuple[Replacement, ...], scenario: str, config: ModelConfig = SMOLLM2, precision: Precision = "bfloat16"
) -> Estimate:
    return best_modelled(config, blocks, device_named("h100-sxm"), precision, scenario)[0]


def test_the_published_table_is_what_is_modelled() -> None:
    """It is the 70B where four H100s are best, as published: tokens/s per H100 (docs/costs.md has the other rows)."""
    for scenario, published in (("128/2048", 2786), ("128/4096", 1828), ("2048/2048", 1336)):
        best = _best(parent_blocks(LLAMA_70B), scenario, LLAMA_70B, "fp8")
        assert best.tokens_per_s_per_gpu == pytest.approx(published, rel=0.02)
        assert best.tensor_parallel == 4


@pytest.mark.parametrize("scenario", ["128/128", "2048/2048"])
def test_no_batch_and_number_of_devices_that_fits_is_better(scenario: str) -> None:
    model = Model(SMOLLM2, tuple((block.attention, block.ffn) for block in CHILD))
    platform = Platform(device_named("h100-sxm"), TENSORRT_LLM, "bfloat16")
    tried = [
        estimate(model, platform, Scenario.parse(scenario), degree, batch)
        for degree in (1, 2, 4, 8)
        for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    ]
    best = _best(CHILD, scenario)
    fitting = [estimated for estimated in tried if (estimated.weights_gib + estimated.kv_gib) * GIB <= H100_BYTES]
    assert len(fitting) >= 30
    assert best.tokens_per_s_per_gpu == max(estimated.tokens_per_s_per_gpu for estimated in fitting)


def test_a_smaller_child_is_never_slower_and_the_parent_as_a_child_is_as_fast() -> None:
    for scenario in ("128/128", "2048/2048"):
        assert _best(PARENT[:], scenario) == _best(PARENT, scenario)
        assert _best(CHILD, scenario).tokens_per_s_per_gpu > _best(PARENT, scenario).tokens_per_s_per_gpu


def test_what_does_not_fit_says_what_to_do() -> None:
    """A 70B in 16 bit has 131.4 GiB of weights; a device of 8 GiB is too small even eight times."""
    small = replace(device_named("h100-sxm"), memory_bytes=8 * GIB)
    with pytest.raises(InputError) as caught:
        best_modelled(LLAMA_70B, parent_blocks(LLAMA_70B), small, "bfloat16", "128/128")
    for word in ("131.4", "8.0 GiB of h100-sxm", "128/128 in bfloat16", "benchmark_throughput", "narrower precision"):
        assert word in str(caught.value)


def _measured() -> list[CostRow]:
    """Make up timings of batch 2, a different number in every row."""
    attentions, ffns = [Attention("gqa", 3), Attention("no_op")], [Ffn("gated", 1536), Ffn("gated", 768)]
    modelled = Setting("h100-sxm", ENGINE, "bfloat16", 1, "8/4", 2)
    rows = modelled_rows(SMOLLM2, attentions, ffns, device_named("h100-sxm"), modelled)
    return [
        replace(row, hardware="unit", engine="torch", origin="measured", prefill_ms=1.5**index, decode_ms=1.25**index)
        for index, row in enumerate(rows)
    ]


TIMED = Setting("unit", "torch", "bfloat16", 1, "8/4", 2)


def test_a_prediction_is_the_sum_over_the_cost_table() -> None:
    rows = _measured()
    by_name = {(row.component, row.variant): row for row in rows}
    parts = [by_name["embedding", "parent"], by_name["head", "parent"], by_name["step", "parent"]]
    parts += 10 * [by_name["attention", "no_op"]] + 20 * [by_name["attention", "kv_3"]]
    parts += 20 * [by_name["ffn", "ffn_1536"]] + 10 * [by_name["ffn", "ffn_768"]]
    speed = predict(rows, CHILD, TIMED)
    assert speed is not None
    assert speed.prefill_throughput == pytest.approx(1e3 * 2 * 8 / math.fsum(row.prefill_ms for row in parts))
    assert speed.decode_throughput == pytest.approx(1e3 * 2 / math.fsum(row.decode_ms for row in parts))


def test_nothing_is_predicted_from_other_settings_other_variants_or_a_model() -> None:
    rows = _measured()
    for setting in (replace(TIMED, batch=1), replace(TIMED, precision="float32"), replace(TIMED, hardware="other")):
        assert predict(rows, CHILD, setting) is None
    assert predict([row for row in rows if row.variant != "ffn_768"], CHILD, TIMED) is None
    assert predict([replace(row, origin="modelled") for row in rows], CHILD, TIMED) is None
