"""What `auto` means on a machine: batches that fit it, whole ones of every budget, a number that was given kept."""

import json
from typing import Any

import pytest

from storage.fields import resolved
from storage.model_config import ModelConfig
from storage.params import load
from tasks.engines.machine import blocks_per_group, bytes_of_replacements, on_this_machine
from tests.clone import ROOT
from tests.settings import SEQ_LEN, tiny_params

LLAMA_8B = ROOT / "params/llama-3.1-8b.config.json"
AUTO: dict[str, dict[str, Any]] = {
    "cache_activations": {"sequences_per_batch": "auto"},
    "score_blocks": {"sequences_per_batch": "auto", "blocks_per_group": "auto"},
    "evaluate_child": {"sequences_per_batch": "auto"},
}
TOKENS = {85_900_000_000: 32_768, 84_900_000_000: 32_768, 16_900_000_000: 4_096, 1_000_000_000: 256}
"""Tokens of a forward pass by the bytes of a GPU; the first two are of one kind, under two drivers."""


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """Return the geometry of an 8B."""
    return ModelConfig.from_hf(json.loads(LLAMA_8B.read_text(encoding="utf-8")), str(LLAMA_8B))


@pytest.fixture(params=TOKENS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Have the machine a GPU of so many bytes."""
    monkeypatch.setattr("tasks.engines.machine.gpu_bytes", lambda _: request.param)
    size: int = request.param
    return size


def test_the_demo_takes_a_few_sequences_on_a_cpu() -> None:
    params = on_this_machine(load(ROOT / "params.yaml").model_copy(update={"run": tiny_params().run}))
    assert params.cache_activations.sequences_per_batch == 8  # of 256 tokens
    assert params.score_blocks.sequences_per_batch == 4  # of 96, which divide the 16 and the 4 that are scored
    assert params.evaluate_child.sequences_per_batch == 4


@pytest.mark.parametrize("scored", [1, 7, 12, 4096])
def test_a_batch_on_a_gpu_goes_by_its_memory_and_divides_what_is_scored(scored: int, gpu: int) -> None:
    tokens = {"tokens": scored * SEQ_LEN, "initial_tokens": 0}
    corpus = {"calibration_tokens": (scored + 16) * SEQ_LEN}
    score = {**AUTO["score_blocks"], **tokens}
    wanted = tiny_params(run={"device": "cuda"}, prepare_corpus=corpus, **{**AUTO, "score_blocks": score})
    params = on_this_machine(wanted)
    assert params.cache_activations.sequences_per_batch == TOKENS[gpu] // SEQ_LEN
    in_batch = resolved(params.score_blocks.sequences_per_batch)
    most = TOKENS[gpu] // 2 // SEQ_LEN
    assert scored % in_batch == 0
    assert in_batch == max(size for size in range(1, most + 1) if scored % size == 0)


def test_numbers_that_were_given_stay(gpu: int) -> None:
    params = tiny_params(run={"device": "cuda"})
    same = on_this_machine(params)
    assert gpu and same.score_blocks == params.score_blocks
    assert (same.cache_activations, same.evaluate_child) == (params.cache_activations, params.evaluate_child)


def test_a_sequence_is_the_least(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.engines.machine.gpu_bytes", lambda _: 1)
    params = on_this_machine(tiny_params(run={"device": "cuda"}, **AUTO))
    sections = (params.cache_activations, params.score_blocks, params.evaluate_child)
    assert [section.sequences_per_batch for section in sections] == [1, 1, 1]
    assert blocks_per_group(params, config) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_replacements_of_a_group_fill_a_quarter_of_a_gpu_at_most(workers: int, config: ModelConfig, gpu: int) -> None:
    params = on_this_machine(tiny_params(run={"device": "cuda", "workers": workers}, **AUTO))
    size, of_a_block = blocks_per_group(params, config), workers * bytes_of_replacements(params, config)
    assert size * of_a_block <= gpu / 4 or size == 1
    assert (size + 1) * of_a_block > gpu / 4 or size == 8


def test_the_bytes_of_replacements_by_hand(config: ModelConfig) -> None:
    """8, 4, 2, 1 or no kv heads; the whole FFN, a half, a quarter or none of it; 2 sequences, 4 bytes a number."""
    assert bytes_of_replacements(tiny_params(), config) == (5 + 4) * 2 * SEQ_LEN * 4096 * 4


def test_a_group_in_rolling_mode_begins_where_two_boundaries_are(config: ModelConfig) -> None:
    params = tiny_params(cache_activations={"mode": "rolling"}, score_blocks={"blocks_per_group": 5})
    assert blocks_per_group(params, config) == 2
