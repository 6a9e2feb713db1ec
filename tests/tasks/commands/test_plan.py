"""The plan of this repository's own params and of the 70B profile, without weights; bytes against a small run's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.commands.plan import plan_text
from flows.ui.overrides import with_profile
from storage.files import InputError, write_sealed
from storage.params import Params, load
from storage.parent import Parent
from storage.paths import Paths
from storage.pipeline import read_pipeline
from tasks import distill_child
from tasks.checkpoints.exports import read_checkpoint
from tasks.commands import machine_rates
from tasks.commands.plan import Plan, plan
from tasks.engines.machine import on_this_machine
from tasks.estimates.stage_estimates import Rates, estimate_stages
from tasks.prepare_parent import prepare_parent
from tests.clone import ROOT
from tests.settings import SEQ_LEN, tiny_params
from tests.stages import assemble, cache, distill, refine
from tests.tasks.checkpoints.test_exports import FULL, WIDE, geometry
from tests.tasks.checkpoints.test_exports import write as export
from tests.tiny import SIZES, save_child, save_tokenizer, tiny_corpus, tiny_model

CONFIG_70B = ROOT / "params/llama-3.1-70b.config.json"
RATES = Rates(1e11, 1e11, 1e11, 1e10, 1e9, 1e10, 1e9, 5.0)


def _plan(params: Params, config_json: Path | None, folder: Path) -> Plan:
    return plan(on_this_machine(params), config_json, Paths(folder / "artifacts"))


def test_every_stage_of_the_demo_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From rates that were timed for a moment."""
    monkeypatch.setattr(machine_rates, "_SECONDS", 0.05)
    monkeypatch.setattr(machine_rates, "_CHILDREN", 1)
    monkeypatch.chdir(ROOT)
    params = load()
    write_sealed(tmp_path / "artifacts/seconds.json", {"score_blocks": 100.0})
    demo = _plan(params, None, tmp_path)
    names = list(dict.fromkeys(estimate.stage.partition("@")[0] for estimate in demo.stages))
    assert names == [stage.name for stage in read_pipeline()]
    assert all(estimate.seconds > 0 and estimate.memory_bytes > 0 for estimate in demo.stages)
    assert demo.materialised_bytes == 31 * (49_152 + 5_120 + 4_096) * 576 * 2
    text = plan_text(demo)
    assert max(map(len, text.splitlines())) <= 100
    (line,) = (line for line in text.splitlines() if line.startswith("score_blocks"))
    assert "2 min" in line  # what it took
    disk = 2 * sum(stage.disk_bytes for stage in demo.stages) / 2**30
    assert f"DVC's cache holds every artifact a second time: {disk:,.1f} GiB in all" in text
    assert not list((tmp_path / "artifacts").glob(".plan-*"))
    assert "healing: refine_child holds one block at a time" in text
    assert demo.num_benchmarks == 0 and "not estimated" not in text
    accuracy = with_profile(params, ROOT / "params/accuracy.yaml")
    asked = _plan(accuracy, None, tmp_path)
    assert f"not estimated: the {asked.num_benchmarks} benchmarks of measure_accuracy" in plan_text(asked)
    assert asked.num_benchmarks == len(accuracy.measure_accuracy.tasks) + 1, "HumanEval, and no judge for MT-Bench"


def test_the_70b_is_planned_from_its_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From given rates: a laptop without bfloat16 instructions takes minutes for one block in it."""
    monkeypatch.setattr(machine_rates, "calibrate", lambda *_: RATES)
    monkeypatch.chdir(ROOT)
    params = with_profile(load(), ROOT / "params/llama-3.1-70b.yaml")
    on_cpu = params.model_copy(update={"run": params.run.model_copy(update={"device": "cpu"})})
    threads = params.distill_child.model_copy(update={"ranks": 0, "offload": False, "sequences_per_batch": 1})
    profile = _plan(on_cpu.model_copy(update={"distill_child": threads}), CONFIG_70B, tmp_path)
    parent = next(estimate for estimate in profile.stages if estimate.stage == "prepare_parent")
    assert parent.disk_bytes == pytest.approx(2 * 70.55e9, rel=1e-3)  # 70.55 billion parameters in 16 bit
    assert profile.live_teacher and "GKD's teacher: live" in plan_text(profile)
    healing = plan_text(profile).partition("healing: ")[2]
    assert "distill_child holds the whole child" in healing
    ranks = params.distill_child.model_copy(update={"ranks": 16})
    text = plan_text(_plan(on_cpu.model_copy(update={"distill_child": ranks}), CONFIG_70B, tmp_path))
    assert "each rank of distill_child holds its share of child, gradients, moments (" in text
    nothing = params.distill_child.model_copy(update={"tokens": 0})
    text = plan_text(_plan(on_cpu.model_copy(update={"distill_child": nothing}), CONFIG_70B, tmp_path))
    assert "GKD's teacher" not in text and "distill_child trains nothing (distill_child.tokens: 0)" in text
    tokens = params.distill_blocks.tokens + 2 * 1_048_576  # GKD's train tokens are not cached
    assert profile.materialised_bytes == 81 * 2.0 * 8192 * tokens
    window = 2 * (params.distill_blocks.tokens + params.prepare_corpus.calibration_tokens)
    assert profile.rolling and profile.rolling_bytes == 2.0 * 8192 * (2 * tokens + window)
    assert "needs more than there is: set fewer tokens or a larger disk" in plan_text(profile)
    hour_each = [replace(stage, seconds=3600.0, devices=1) for stage in profile.stages]
    on_eight = [replace(stage, devices=8) if "distill_child" in stage.stage else stage for stage in hour_each]
    hours = len(hour_each) + 2 * 7
    text = plan_text(replace(profile, device="cuda", stages=tuple(on_eight)), 2.0)
    assert f"{hours}.0 GPU hours, ${2 * hours}.00 at $2.00 an hour" in text
    roomy = replace(profile, rolling=False, free_disk_bytes=3 * profile.rolling_bytes)
    assert "materialised needs more than there is: set cache_activations.mode: rolling" in plan_text(roomy)
    assert "needs more" not in plan_text(replace(roomy, rolling=True))


def test_without_a_geometry_it_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    params = with_profile(load(), ROOT / "params/llama-3.1-70b.yaml")
    on_cpu = params.model_copy(update={"run": params.run.model_copy(update={"device": "cpu"})})
    with pytest.raises(InputError, match="give its geometry with --parent CONFIG_JSON"):
        _plan(on_cpu, None, tmp_path)
    other = tmp_path / "config.json"
    other.write_text(json.dumps({"architectures": ["MambaForCausalLM"]}), encoding="utf-8")
    with pytest.raises(InputError, match="MambaForCausalLM is not supported"):
        _plan(on_cpu, other, tmp_path)
    with pytest.raises(InputError, match=r"none.yaml is missing; profiles here: accuracy, accuracy_files, full"):
        with_profile(load(), tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"is a folder, expected a YAML file"):
        with_profile(load(), tmp_path)


TOLERANCE = 0.1
"""Headers, indices and channel orders are not modelled; they are up to 5 % of files as small as these."""


def _data_bytes(folder: Path) -> int:
    """Return bytes of the files that hold tensors or tokens: a tiny tokenizer is larger than a tiny model."""
    suffixes = {".safetensors", ".arrow", ".parquet", ".gguf"}
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in suffixes)


def test_stages_leave_the_bytes_that_are_modelled(tmp_path: Path) -> None:
    """The parent is in 16 bit and has spans; the child keeps all blocks."""
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    params = _keeps_all(prepare_parent={"source": str(tmp_path / "source")}, distill_blocks={"spans": [2]})
    paths = Paths(tmp_path / "artifacts")
    prepare_parent.fn(params, paths)
    tiny_corpus(paths.corpus, SIZES["vocab_size"], SEQ_LEN)
    cache(params, paths)
    distill(params, paths)
    assemble(params, paths, [("kv_2", "ffn_96")] * 3)
    refine(params, paths)
    distill_child.distill.fn("small", params, paths)
    folders = {
        "prepare_parent": paths.parent,
        "prepare_corpus": paths.corpus,
        "cache_activations": paths.activations,
        "distill_blocks": paths.library,
        "assemble_child@small": paths.assembled("small"),
        "refine_child@small": paths.refined("small"),
        "distill_child@small": paths.distilled("small"),
    }
    estimates = estimate_stages(read_pipeline(), Parent(paths.parent).config, params, RATES)
    modelled = {estimate.stage: estimate.disk_bytes for estimate in estimates if estimate.stage in folders}
    assert modelled == pytest.approx({stage: _data_bytes(folder) for stage, folder in folders.items()}, rel=TOLERANCE)


def test_exports_have_the_bytes_that_are_modelled(tmp_path: Path) -> None:
    """GGUF files of 16 and 32 bit; Q8_0 needs rows that are longer than these."""
    config = geometry("llama", tmp_path / "parent")
    save_child(tmp_path / "child", config, [(FULL, WIDE)] * 3)
    formats = ("gguf-f16", "gguf-f32")
    export(read_checkpoint("tiny", tmp_path / "child", "the test"), tmp_path / "exports", *formats)
    estimates = estimate_stages(read_pipeline(), config, _keeps_all(export_child={"formats": formats}), RATES)
    modelled = next(estimate.disk_bytes for estimate in estimates if estimate.stage == "export_child@small")
    assert modelled == pytest.approx(_data_bytes(tmp_path / "exports"), rel=TOLERANCE)


def _keeps_all(**overrides: dict[str, Any]) -> Params:
    """Return Params whose target keeps all blocks."""
    limit = {"metric": "block_params", "at_most_ratio": 1.0}
    return tiny_params(**overrides, targets={"small": {"label": "All", "constraints": {"size": limit}}})
