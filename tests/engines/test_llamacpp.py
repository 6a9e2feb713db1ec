"""The real llama.cpp: children that it computes as torch does, and the client against its server."""

import asyncio
import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.files import InputError
from storage.gguf import embedded_parent
from storage.gguf_child import write_gguf
from storage.model_config import ModelConfig
from storage.scenario import Scenario
from storage.variants import Attention, Ffn
from tasks.commands.benchmark_server import API_KEY_VARIABLE, LoadSweep, Server, benchmark_servers, serving_text
from tasks.engines.client import Endpoint, load, models
from tasks.engines.hidden_states import hidden_states
from tasks.engines.llamacpp import LlamaCpp, time_files
from tasks.engines.timings import Workload
from tasks.puzzle.runtimes.rules import reasons_against, refusals
from tests.tiny import FAMILIES, LLAMA3_ROPE, random_child, save_tiny

NO_ATTENTION, LINEAR, NO_FFN = Attention("no_op"), Attention("linear"), Ffn("no_op")
FULL, ONE = Attention("gqa", 2), Attention("gqa", 1)
WIDE, NARROW = Ffn("gated", 96), Ffn("gated", 40)
Blocks = Sequence[tuple[Attention, Ffn]]
CHILDREN: dict[str, Blocks] = {
    "alike": [(FULL, WIDE)] * 3,
    "kv heads and widths": [(FULL, WIDE), (ONE, NARROW), (FULL, NARROW)],
    "linear first": [(LINEAR, WIDE), (FULL, WIDE)],
    "stand-ins at both ends": [(NO_ATTENTION, WIDE), (FULL, NO_FFN), (LINEAR, NO_FFN), (ONE, NO_FFN)],
    "blocks that vanish": [(NO_ATTENTION, NO_FFN), (ONE, WIDE), (NO_ATTENTION, NARROW), (NO_ATTENTION, NO_FFN)],
    "all attention removed": [(NO_ATTENTION, WIDE), (NO_ATTENTION, NARROW)],
}
LOG_PROBABILITY_ERROR = 1.3e-3
"""The most that docs/runtimes.md found in float32; usual is a quarter of it."""


def check_parity(config: ModelConfig, blocks: Blocks, folder: Path, tokens: int = 24) -> None:
    """Check that the 20 likeliest next tokens of llama.cpp have torch's log-probabilities."""
    model = random_child(config, blocks)
    tensors = model.state_dict()
    write_gguf(folder / "child.gguf", config, blocks, lambda key: iter([tensors[key].numpy()]), "F32")
    engine = LlamaCpp(folder / "child.gguf", threads=1, sequences=1, context=2 * tokens, exact=True)
    prompt = torch.randint(config.vocab_size, (1, tokens))
    with torch.inference_mode():
        expected = torch.log_softmax(model(input_ids=prompt).logits[0, -1], -1)
    content = engine.complete(prompt[0].tolist(), 1, logprobs=20)["choices"][0]["logprobs"]["content"][0]
    assert len(content["top_logprobs"]) == 20
    for token in content["top_logprobs"]:
        assert token["logprob"] == pytest.approx(expected[token["id"]].item(), abs=LOG_PROBABILITY_ERROR)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CHILDREN)
def test_it_computes_what_torch_computes(name: str, family: str, tmp_path: Path) -> None:
    _, config = save_tiny(family, tmp_path / "parent")
    blocks = CHILDREN[name]
    if config.qk_norm:  # its archs have no linear attention
        blocks = [(NO_ATTENTION if attention == LINEAR else attention, ffn) for attention, ffn in blocks]
    assert refusals(config, blocks)["llama.cpp"] == []
    check_parity(config, blocks, tmp_path)


def test_blocks_alike_with_qk_norm_have_a_head_of_their_own(tmp_path: Path) -> None:
    """An untied Qwen3 that only lost whole blocks; where blocks differ it is refused, as the search refuses it."""
    config = replace(save_tiny("qwen3", tmp_path / "parent")[1], tie_embeddings=False)
    lost: Blocks = [(ONE, NARROW), (NO_ATTENTION, NO_FFN), (ONE, NARROW)]
    assert refusals(config, lost)["llama.cpp"] == []
    check_parity(config, lost, tmp_path)
    (refusal,) = refusals(config, [(FULL, NARROW), (ONE, NARROW)])["llama.cpp"]
    assert "has the embedding as its head" in refusal.reason
    assert refusal.way_out.endswith("export it as padded-qwen3")
    assert reasons_against("llama.cpp", config, 0, FULL, NARROW) == (refusal.reason,)


_ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0},
    LLAMA3_ROPE,
]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *itertools.product(["llama"], ["alike", "kv heads and widths", "stand-ins at both ends"]),
        *itertools.product(["qwen3"], ["alike", "kv heads and widths"]),
    ],
)
@pytest.mark.parametrize("rope", _ROPES)
def test_scaled_rotary_positions(rope: dict[str, Any], family: str, name: str, tmp_path: Path) -> None:
    """Over 100 tokens, beyond what the position scaling calls the original context."""
    _, config = save_tiny(family, tmp_path / "parent")
    config = replace(config, rope={"rope_theta": 10000.0, **rope}, context=128)
    if config.qk_norm and (rope is LLAMA3_ROPE or "beta_fast" in rope):
        (refusal,) = refusals(config, CHILDREN[name])["llama.cpp"]
        assert refusal.reason.startswith("beside qk-norm it takes no llama3 rotary positions")
        return
    check_parity(config, CHILDREN[name], tmp_path, tokens=100)


_ANY_ATTENTION = st.sampled_from([FULL, ONE, Attention("gqa", 4), LINEAR, NO_ATTENTION])
_ANY_FFN = st.sampled_from([WIDE, NARROW, Ffn("gated", 33), NO_FFN])


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.tuples(_ANY_ATTENTION, _ANY_FFN), min_size=1, max_size=7),
    family=st.sampled_from(FAMILIES),
)
def test_random_architectures(blocks: Blocks, family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the rules say that llama.cpp runs it computes right, and what they refuse is not written."""
    folder = tmp_path_factory.mktemp("random")
    _, config = save_tiny(family, folder / "parent")
    if config.qk_norm and any(attention == LINEAR for attention, _ in blocks):
        assert any("no linear attention" in refusal.reason for refusal in refusals(config, blocks)["llama.cpp"])
        return
    if reasons := refusals(config, blocks)["llama.cpp"]:
        assert [refusal.reason for refusal in reasons] == ["it loads no model without kv heads"]
        with pytest.raises(InputError, match="no block has an attention with kv heads"):
            write_gguf(folder / "child.gguf", config, blocks, None, "F32")
        return
    check_parity(config, blocks, folder)


def test_a_damaged_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "child.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(InputError, match=r"llama.cpp does not load .*child.gguf"):
        LlamaCpp(tmp_path / "child.gguf", 1, 1, 64)


def test_what_is_timed_are_the_steps_and_the_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By llama.cpp's own counts: nothing cached in prefill; in decode all but a token, and so many steps."""
    answers: list[dict[str, Any]] = []
    complete = LlamaCpp.complete

    def counted(*args: Any, **how: Any) -> dict[str, Any]:
        answers.append(complete(*args, **how))
        return answers[-1]

    monkeypatch.setattr(LlamaCpp, "complete", counted)
    workload = Workload(Scenario(16, 16), batch=2)  # 24 tokens of context on average
    timed = time_files({"parent": embedded_parent()[0]}, workload, repeats=2, threads=1)
    assert {phase: len(rounds) for phase, rounds in timed["parent"].items()} == {"prefill": 2, "decode": 2}
    assert min(timed["parent"]["prefill"] + timed["parent"]["decode"]) > 0
    timings = [answer["timings"] for answer in answers]
    counts = [(timing["cache_n"], timing["prompt_n"], timing["predicted_n"]) for timing in timings]
    assert counts.count((0, 16, 1)) == 6  # three prefills of two prompts
    assert counts.count((11, 1, 25)) == 6  # three times 24 steps behind 12 tokens, of two


def test_the_client_against_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded parent under load: every request whole, lengths as asked for, one row a concurrency."""
    engine = LlamaCpp(embedded_parent()[0], threads=1, sequences=2, context=64)
    (model,) = asyncio.run(models(engine.url, engine.key, 10.0))
    prompts = [[1000 + 7 * slot + token for token in range(16)] for slot in range(4)]
    answers = asyncio.run(load(Endpoint(engine.url, model, engine.key), prompts, 8, 2, 60.0, lambda: None))
    assert [(answer.error, answer.input_tokens, answer.output_tokens) for answer in answers] == [(None, 16, 8)] * 4
    for answer in answers:
        assert len(answer.arrivals) == 8
        assert all(earlier <= later for earlier, later in itertools.pairwise(answer.arrivals))
    sweep = LoadSweep(("128/128",), 1 / 16, (1, 2), rounds=2, devices=1, stall_s=60.0, vocabulary=30_000)
    monkeypatch.setenv(API_KEY_VARIABLE, engine.key)
    rows = benchmark_servers([Server("parent", engine.url, None)], sweep, tmp_path / "serving.parquet")
    assert [(row.concurrency, row.requests, row.errors) for row in rows] == [(1, 2, 0), (2, 4, 0)]
    assert all(row.counted_input_tokens == row.input_tokens == row.output_tokens == 8 for row in rows)
    assert "SCALED: 128/128 as 8/8" in serving_text(rows, ["parent"])


def _add_letters(writer: GGUFWriter, count: int, template: str) -> None:
    """Add a tokenizer of single letters."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(0x100 + index) for index in range(count)])
    writer.add_token_types([TokenType.NORMAL] * count)
    writer.add_token_merges([f"{chr(0x100)} {chr(0x101)}"])
    writer.add_chat_template(template)


@pytest.mark.parametrize("excess", [-3, 2])
def test_a_vocabulary_that_is_not_the_embeddings_is_one_error(excess: int, tmp_path: Path) -> None:
    _, config = save_tiny("llama", tmp_path / "parent")
    add = functools.partial(_add_letters, count=config.vocab_size + excess, template="{{ messages }}")
    write_gguf(tmp_path / "a.gguf", config, CHILDREN["alike"], None, "F32", tokenizer=add)
    with pytest.raises(InputError, match=r"llama.cpp does not load .*a.gguf"):
        LlamaCpp(tmp_path / "a.gguf", threads=1, sequences=1, context=16)


@pytest.mark.parametrize("template", ["{{ raise_exception('no system turn') }}", "{% for %}"])
def test_a_chat_template_that_raises_stops_chats_and_nothing_else(template: str, tmp_path: Path) -> None:
    """It stopped the timing and the evaluation of files, too."""
    _, config = save_tiny("llama", tmp_path / "parent")
    path, blocks = tmp_path / "a.gguf", CHILDREN["alike"]
    add = functools.partial(_add_letters, count=config.vocab_size, template=template)
    write_gguf(path, config, blocks, None, "F32", tokenizer=add)
    with pytest.raises(InputError, match=r"does not load .*a.gguf .*another chat template"):
        LlamaCpp(path, threads=1, sequences=1, context=16)
    engine = LlamaCpp(path, threads=1, sequences=1, context=16, chats=False)
    assert engine.complete([1], 1)["usage"]["total_tokens"] == 2
    [states] = hidden_states(path, [[1, 2, 3]], threads=1)
    assert states.shape == (3, config.hidden_size)
    timed = time_files({"a": path}, Workload(Scenario(2, 2), batch=1), repeats=1, threads=1)
    assert {phase: len(rounds) for phase, rounds in timed["a"].items()} == {"prefill": 1, "decode": 1}
