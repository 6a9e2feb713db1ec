"""Stages that do not fit are refused before any work, by name, bytes and what lowers them."""

import json

import pytest

from flows.ui.overrides import with_profile
from storage.execution import Execution
from storage.files import InputError
from storage.model_config import ModelConfig
from storage.params import Params, load
from storage.pipeline import read_pipeline
from tasks.engines.machine import Memory, memory_of, on_this_machine
from tasks.estimates.memory import check_memory
from tasks.estimates.parent_geometry import parent_geometry
from tasks.estimates.stage_estimates import estimate_memory
from tests.clone import ROOT

GIB = 2**30
LAPTOP = Memory(8 * GIB, 8 * GIB)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def refusal(stage: str, params: Params, config: ModelConfig, memory: Memory) -> str:
    """Return the message with which a stage is refused; empty where it is not."""
    try:
        check_memory(stage, read_pipeline(), config, on_this_machine(params), memory)
    except InputError as error:
        return str(error)
    return ""


def llama_70b() -> ModelConfig:
    path = ROOT / "params/llama-3.1-70b.config.json"
    return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")), str(path))


def test_the_demo_fits_a_laptop() -> None:
    _, config = parent_geometry(load().prepare_parent.source)
    assert not refusal("prepare_parent", load(), config, LAPTOP)
    assert "export_parent needs 1.1 GiB of memory" in refusal("prepare_parent", load(), config, Memory(GIB, GIB))


def on_gpus(profile: str) -> tuple[Params, ModelConfig]:
    """Return a profile's params as resolved on a machine with GPUs, and its parent's geometry."""
    params = with_profile(load(), ROOT / f"params/{profile}.yaml")
    run = params.run.model_copy(update={"device": "cuda", "dtype": "bfloat16"})
    path = ROOT / f"params/{profile}.config.json"
    config = ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")), str(path))
    return params.model_copy(update={"run": run}), config


@pytest.mark.parametrize(("profile", "host"), [("llama-3.1-8b", 256), ("llama-3.1-70b", 2048)])
def test_the_profiles_fit_what_they_name(profile: str, host: int) -> None:
    """GPUs of 80 GB: one for the 8B, eight for the 70B."""
    params, config = on_gpus(profile)
    assert not refusal("prepare_parent", params, config, Memory(host * GIB, 79 * GIB))


def test_what_comes_later_and_does_not_fit_is_refused_first() -> None:
    """Hours of scores are no help where the child then does not fit."""
    params, config = on_gpus("llama-3.1-70b")
    gkd = params.distill_child.model_copy(update={"offload": False})
    held = params.model_copy(update={"distill_child": gkd})
    message = refusal("cache_activations", held, config, Memory(2000 * GIB, 80 * GIB))
    assert (
        message.startswith("distill_child@like-51b needs 1")
        and "(modelled), cuda has 80.0 GiB: lower distill_child.sequences_per_batch, " in message
    )
    assert "distill_child.offload to true" in message and "distill_child.tokens to 0" in message
    message = refusal("cache_activations", params, config, Memory(500 * GIB, 80 * GIB))
    assert message.startswith("distill_child@like-51b needs ") and "this machine has 500.0 GiB" in message
    assert "distill_child.offload to false" in message, "that is what the machine's memory holds"


def test_ranks_on_several_machines_share_them() -> None:
    """64 ranks, eight on each machine as torchrun starts them: an eighth of them is here."""
    params, config = on_gpus("llama-3.1-70b")
    gkd = params.distill_child.model_copy(update={"ranks": 64})
    spread = params.model_copy(update={"distill_child": gkd})
    host = 300 * GIB
    assert "distill_child" in refusal("distill_child", spread, config, Memory(host, 80 * GIB, gpus=64))
    assert not refusal("distill_child", spread, config, Memory(host, 80 * GIB, gpus=8))


def test_on_ray_what_the_stage_computes_itself_is_still_compared() -> None:
    """Its pieces are put where they fit."""
    params, config = on_gpus("llama-3.1-70b")
    gkd = params.distill_child.model_copy(update={"offload": False})
    execution = Execution.model_validate({"runner": "ray", "address": "head:6379"})
    on_ray = params.model_copy(update={"distill_child": gkd, "execution": execution})
    memory = Memory(2000 * GIB, 30 * GIB)
    assert refusal("score_blocks", params, config, Memory(2000 * GIB, GIB)).startswith("score_blocks needs ")
    assert refusal("score_blocks", on_ray, config, memory).startswith(("refine_child@", "distill_child@"))


def test_every_worker_process_has_embedding_and_head() -> None:
    _, config = parent_geometry(load().prepare_parent.source)
    pipeline, memory = read_pipeline(), dict[str, float]()
    for runner in ("threads", "processes"):
        run = load().run.model_copy(update={"workers": 3, "dtype": "float32", "device": "cpu"})
        params = load().model_copy(update={"run": run, "execution": Execution.model_validate({"runner": runner})})
        memory[runner] = estimate_memory(pipeline, config, on_this_machine(params))["score_blocks"][0]
    outside = 4 * config.vocab_size * config.hidden_size  # tied
    assert memory["processes"] - memory["threads"] == 2 * (outside + 0.6e9)


def test_what_a_stage_holds_on_the_host_is_compared_with_the_host() -> None:
    params, config = load(), llama_70b()
    assert "export_parent needs" in refusal("export_parent", params, config, Memory(GIB, 10**15))


def test_a_stage_that_runs_before_is_not_asked() -> None:
    params, config = load(), llama_70b()
    assert refusal("write_text", params, config, LAPTOP).startswith("write_text needs")
    assert not refusal("report", params, config, LAPTOP)


def test_this_machine_has_memory() -> None:
    memory = memory_of("cpu")
    assert 2**29 < memory.host == memory.device < 2**50
    assert memory_of("cuda:99").device == memory.host  # a device that is not there is refused where it is used
