"""The real llama.cpp: children that it computes as torch does, and the client against its server."""

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.files import InputError
from storage.gguf import embedded_parent
from storage.gguf_child import write_gguf
from storage.model_config import to_nemotron_nas
from storage.records import Attention, Ffn
from tasks.benchmark_server import Load, Server, benchmark_servers, serving_text
from tasks.engines.client import Endpoint, load, models
from tasks.engines.llamacpp import LlamaCpp, Work, time_files
from tasks.puzzle.child import DeciLMForCausalLM, NemotronNasConfig
from tests.tiny import save_tiny

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
"""The most that RUNTIMES.md found in float32; usual is a quarter of it."""


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", CHILDREN)
def test_it_computes_what_torch_computes(name: str, family: str, tmp_path: Path) -> None:
    _, config = save_tiny(family, tmp_path / "parent")
    blocks = CHILDREN[name]
    torch.manual_seed(1)
    model = DeciLMForCausalLM(NemotronNasConfig(**to_nemotron_nas(config, blocks, {}, "float32")))
    for key, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in key else 0.0, 0.1)
    tensors = model.state_dict()
    write_gguf(tmp_path / "child.gguf", config, blocks, lambda key: tensors[key].numpy(), "F32")
    engine = LlamaCpp(tmp_path / "child.gguf", threads=1, sequences=1, context=64, exact=True)
    prompt = torch.randint(config.vocab_size, (1, 24))
    with torch.inference_mode():
        wanted = torch.log_softmax(model(input_ids=prompt).logits[0, -1], -1)
    found = engine.complete(prompt[0].tolist(), 1, logprobs=20)["choices"][0]["logprobs"]["content"][0]
    assert len(found["top_logprobs"]) == 20
    for token in found["top_logprobs"]:
        assert token["logprob"] == pytest.approx(wanted[token["id"]].item(), abs=LOG_PROBABILITY_ERROR)


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
    work = Work(batch=2, input_tokens=16, mean_context=24)
    found = time_files({"parent": embedded_parent()[0]}, work, repeats=2, threads=1)
    assert {phase: len(rounds) for phase, rounds in found["parent"].items()} == {"prefill": 2, "decode": 2}
    assert min(found["parent"]["prefill"] + found["parent"]["decode"]) > 0
    counts = [(one["timings"]["cache_n"], one["timings"]["prompt_n"], one["timings"]["predicted_n"]) for one in answers]
    assert counts.count((0, 16, 1)) == 6  # three prefills of two prompts
    assert counts.count((11, 1, 25)) == 6  # three times 24 steps behind 12 tokens, of two


def test_the_client_against_its_server(tmp_path: Path) -> None:
    """The embedded parent under load: every request whole, lengths as asked for, one row a concurrency."""
    engine = LlamaCpp(embedded_parent()[0], threads=1, sequences=2, context=64)
    (model,) = asyncio.run(models(engine.url, None, 10.0))
    prompts = [[1000 + 7 * slot + token for token in range(16)] for slot in range(4)]
    answers = asyncio.run(load(Endpoint(engine.url, model), prompts, 8, 2, 60.0, lambda: None))
    assert [(one.error, one.input_tokens, one.output_tokens) for one in answers] == [(None, 16, 8)] * 4
    for answer in answers:
        assert len(answer.arrivals) == 8
        assert all(earlier <= later for earlier, later in itertools.pairwise(answer.arrivals))
    wanted = Load(("128/128",), 1 / 16, (1, 2), rounds=2, devices=1, stall_s=60.0, vocabulary=30_000)
    rows = benchmark_servers([Server("parent", engine.url, None)], wanted, tmp_path / "serving.parquet")
    assert [(row.concurrency, row.requests, row.errors) for row in rows] == [(1, 2, 0), (2, 4, 0)]
    assert all(row.counted_input_tokens == row.input_tokens == row.output_tokens == 8 for row in rows)
    assert "SCALED: 128/128 as 8/8" in serving_text(rows, ["parent"])
