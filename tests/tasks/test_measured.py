"""What was measured of a child: counted on tensors, and speeds beside what the tables and the bytes say."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.checkpoints import Checkpoint
from storage.records import Phase, ThroughputRow
from tasks.measured import Counted, count, speed_ratios
from tasks.puzzle.costs import ModelSizes
from tasks.puzzle.variants import parent_attention, parent_ffn
from tests.tiny import save_child, save_tiny

COUNTED = {
    "parent": Counted(ModelSizes(params=600, block_params=400, weight_bytes=1200, kv_bytes_per_token=8), 2, 200),
    "assembled": Counted(ModelSizes(params=400, block_params=200, weight_bytes=800, kv_bytes_per_token=4), 1, 200),
}


def rows(predicted: float | None = 90.0) -> Iterator[ThroughputRow]:
    """Parent and child at 8/4, batch 3: the child generates 1.5 times and reads 1.25 times as many tokens/s."""
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
    setting = {"engine": "llama.cpp", "precision": "float16", "scenario": "8/4", "batch": 3}
    assert prefill.items() >= {**setting, "phase": "prefill", "measured": 1.25, "read_bytes": None}.items()
    assert decode.items() >= {**setting, "phase": "decode", "measured": 1.5, "measured_spread": 0.03}.items()
    assert decode["predicted"] == 2.0
    assert decode["drift"] == pytest.approx(100 / 90)
    assert decode["read_bytes"] == pytest.approx((1200 - 200 + 3 * 10 * 8) / (800 - 200 + 3 * 10 * 4))


def test_what_was_not_predicted_has_no_ratio_and_a_modelled_row_none_at_all() -> None:
    modelled = dataclasses.replace(next(rows()), measured_ms=None, modelled_tokens_per_s=1.0)
    found = list(speed_ratios([modelled, *rows(None)], COUNTED))
    assert [(one["predicted"], one["drift"]) for one in found] == [(None, None)] * 2
    assert list(speed_ratios([row for row in rows() if row.model == "parent"], COUNTED)) == []


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama3-untied-head_dim-bias", False)])
def test_an_embedding_that_is_not_the_head_is_looked_up(family: str, tied: bool, tmp_path: Path) -> None:
    """A step reads all of a tied one, as its head, but single rows of one that is not."""
    _, config = save_tiny(family, tmp_path / "parent")
    attention = parent_attention(config)
    model = save_child(tmp_path / "child", config, [(attention, parent_ffn(config))] * config.num_blocks)
    checkpoint = Checkpoint(tmp_path / "child", "the test")
    found = count(checkpoint, config, [attention] * config.num_blocks)
    assert config.tie_embeddings == tied
    assert found.sizes.params == sum(one.numel() for one in model.parameters())
    assert found.sizes.block_params == sum(one.numel() for one in model.model.layers.parameters())
    assert found.sizes.kv_bytes_per_token == 2 * config.num_blocks * attention.num_kv_heads * config.head_dim * 4
    assert found.looked_up_bytes == (0 if tied else 4 * config.vocab_size * config.hidden_size)
