"""The plan of this repository's own params and of the 70B profile, without weights; what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flows.overrides import with_profile
from flows.plan import plan_text
from storage.files import InputError, write_json
from storage.params import Params, load
from storage.paths import Paths
from tasks import plan as planning
from tasks.machine import on_this_machine
from tasks.plan import Plan, plan
from tasks.puzzle.plan import Rates
from tests.clone import ROOT

CONFIG_70B = ROOT / "params/llama-3.1-70b.config.json"


def _plan(params: Params, config_json: Path | None, folder: Path) -> Plan:
    return plan(on_this_machine(params), config_json, Paths(folder / "artifacts"))


def test_every_stage_of_the_demo_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From rates that were timed for a moment."""
    monkeypatch.setattr(planning, "_SECONDS", 0.05)
    monkeypatch.setattr(planning, "_CHILDREN", 1)
    monkeypatch.chdir(ROOT)
    params = load()
    write_json(tmp_path / "artifacts/seconds.json", {"score_blocks": 100.0})
    found = _plan(params, None, tmp_path)
    names = {one.stage.partition("@")[0] for one in found.stages}
    assert names == set(Params.model_fields) - {"run", "targets"}
    assert all(one.seconds > 0 and one.memory_bytes > 0 for one in found.stages)
    assert found.materialised_bytes == 31 * (20_480 + 2_048 + 4_096) * 576 * 2
    text = plan_text(found)
    assert max(map(len, text.splitlines())) <= 100
    (line,) = (line for line in text.splitlines() if line.startswith("score_blocks"))
    assert "2 min" in line  # what it took
    assert not list((tmp_path / "artifacts").glob(".plan-*"))


def test_the_70b_is_planned_from_its_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From given rates: a laptop without bfloat16 instructions takes minutes for one block in it."""
    monkeypatch.setattr(planning, "calibrate", lambda *_: Rates(1e11, 1e11, 1e11, 1e10, 1e9, 5.0))
    monkeypatch.chdir(ROOT)
    params = with_profile(load(), ROOT / "params/llama-3.1-70b.yaml")
    on_cpu = params.model_copy(update={"run": params.run.model_copy(update={"device": "cpu"})})
    found = _plan(on_cpu, CONFIG_70B, tmp_path)
    parent = next(one for one in found.stages if one.stage == "prepare_parent")
    assert parent.disk_bytes == pytest.approx(2 * 70.55e9, rel=1e-3)  # 70.55 billion parameters in 16 bit
    tokens = params.prepare_corpus.train_tokens + 2 * 1_048_576
    assert found.materialised_bytes == 81 * 2.0 * 8192 * tokens
    window = 2 * (params.distill_blocks.tokens + params.prepare_corpus.calibration_tokens)
    assert found.rolling and found.rolling_bytes == 2.0 * 8192 * (2 * tokens + window)
    assert "needs more than there is: set fewer tokens or a larger disk" in plan_text(found)
    roomy = replace(found, rolling=False, free_disk_bytes=3 * found.rolling_bytes)
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
    with pytest.raises(InputError, match=r"none.yaml is missing; profiles here: full"):
        with_profile(load(), tmp_path / "none.yaml")
