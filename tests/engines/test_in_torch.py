"""What is timed computes what the model computes, as often as it is called."""

import contextlib
import gc
import itertools
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from storage.nemotron_nas import to_nemotron_nas
from storage.scenario import Scenario
from storage.variants import Attention, Ffn
from tasks.engines.in_torch import Components, Whole, captured
from tasks.engines.timings import Workload
from tasks.puzzle.model.child import DeciLMForCausalLM, NemotronNasConfig
from tasks.puzzle.model.device import prepare_compute
from tasks.puzzle.model.kv_cache import KvCache
from tests.tiny import save_tiny

BLOCKS = [
    (Attention("no_op"), Ffn("gated", 96)),
    (Attention("gqa", 1), Ffn("no_op")),
    (Attention("linear"), Ffn("linear")),
    (Attention("gqa", 2), Ffn("gated", 48)),
]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_timed_step_is_the_models_next_token_however_often_it_is_taken(family: str, tmp_path: Path) -> None:
    _, config = save_tiny(family, tmp_path)
    torch.manual_seed(7)
    model = DeciLMForCausalLM(NemotronNasConfig(**to_nemotron_nas(config, BLOCKS, {}, "float32")))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    workload = Workload(Scenario(10, 6), batch=2)
    with torch.inference_mode():
        whole = Whole(config, model, workload, prepare_compute("cpu", "float32", 1))
        calls = whole.calls()
        positions = (*range(workload.context_at_midpoint), 0)
        ids = torch.tensor([[position * 7919 % config.vocab_size for position in positions]] * 2)
        for phase in ("prefill", "decode", "decode", "prefill", "decode"):
            tokens, position = (workload.input_tokens, 0) if phase == "prefill" else (1, workload.context_at_midpoint)
            expected = model(input_ids=ids[:, : position + tokens], logits_to_keep=1).logits
            torch.testing.assert_close(whole.logits(tokens, position), expected)
            assert torch.equal(torch.as_tensor(calls[phase]()), expected.argmax(-1))


def test_the_cache_copies_nothing_to_make_room() -> None:
    cache = KvCache(5)
    first, _ = cache.update(torch.ones(1, 2, 4, 3), torch.ones(1, 2, 4, 3), 0)
    cache.position = 4
    keys, values = cache.update(torch.full((1, 2, 1, 3), 7.0), torch.full((1, 2, 1, 3), 8.0), 0)
    assert keys.data_ptr() == first.data_ptr()
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 1, 7]
    assert values[0, 1, :, 2].tolist() == [1, 1, 1, 1, 8]


def test_a_graph_holds_what_it_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph has the addresses of weights and cache: they must live as long as the replay. The GPU is made up."""
    replayed: list[object] = []

    class Graph:
        def replay(self) -> None:
            replayed.append(self)

    class Call:
        count = 0

        def __call__(self) -> None:
            self.count += 1

    def nothing(*_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    call = Call()
    alive, replay = weakref.ref(call), captured(call, torch.device("cuda:1"))
    assert call.count == 4  # three times to warm up, once to capture
    del call
    gc.collect()
    replay()
    assert alive() is not None and len(replayed) == 1


def test_only_a_gpu_captures() -> None:
    def call() -> None:
        pass

    assert captured(call, torch.device("cpu")) is call


def test_components_are_timed_at_one_speed_though_the_machine_wanders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is slower each time: equal work has raw times that differ, and scaled ones that do not.

    Prefill of the reference takes 30 ms at first and decode 3; what is timed takes twice as much. Decode slows more.
    """
    _, config = save_tiny("llama", tmp_path)
    timed = Components(config, Workload(Scenario(4, 2), 1), prepare_compute("cpu", "float32", 1), copies=2, repeats=2)
    timed._speed = {"reference prefill": 30.0, "reference decode": 3.0}
    slower = itertools.count(1)

    def rounds(calls: dict[str, object], *_: object) -> dict[str, list[float]]:
        pace = next(slower)
        ms = {name: (3.0 if "decode" in name else 30.0) * (1 if "reference" in name else 2) for name in calls}
        slow = {name: 3 * pace if "decode" in name else pace for name in calls}
        return {name: [slow[name] * value, 2 * slow[name] * value] for name, value in ms.items()}

    monkeypatch.setattr("tasks.engines.in_torch.phases", rounds)
    for _ in range(2):
        scaled = timed._rounds({"a prefill": print, "a decode": print})
        assert scaled == {"a prefill": [60.0, 60.0], "a decode": [6.0, 6.0]}
