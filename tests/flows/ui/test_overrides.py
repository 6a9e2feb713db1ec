"""What a form changes of params.yaml: the target's own constraint, checked before work, in DVC's grammar."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from flows.ui.overrides import NO_PROFILE, Constraints, as_arguments, changes_of, deployment_names, profile_names
from storage.files import InputError
from storage.metrics import METRICS, Metric
from storage.params import Params, load, parse
from storage.paths import TIMINGS
from storage.records import Precision
from storage.tables import write_costs
from tests.search_tables import costs
from tests.settings import tiny_values

VALUES = {
    **tiny_values(measure_costs={"hardware": ["h100-sxm"], "timings": []}),
    "targets": {
        "small": {
            "label": "Small",
            "constraints": {
                "size": {"metric": "block_params", "at_most": 5000.0},
                "decode": {
                    "metric": "decode_throughput",
                    "at_least_ratio": 1.2,
                    "hardware": "desk",
                    "scenario": "8/8",
                    "batch": 2,
                },
            },
        },
        "twice": {
            "label": "Twice",
            "constraints": {
                name: {"metric": "latency_ms", "at_most": 9.0, "hardware": "desk", "scenario": name}
                for name in ("8/8", "8/16")
            },
        },
    },
}
NOTHING: dict[str, Any] = {}
LABEL = 'Größer {1}: $\\foo$ ${x} \\${y} "q" \\"r\\'


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Write params.yaml of a folder, and one profile beside it."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(VALUES, sort_keys=False), encoding="utf-8")
    Path("params").mkdir()
    profile = {
        "run": {"seed": 7},
        "prepare_corpus": {"sources": [{"kind": "files", "path": "my texts, all/*.jsonl"}]},
        "targets": {"small": {"label": LABEL, "constraints": {"size": {"at_most": 6000.0}}}},
    }
    Path("params/big.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    return load()


def _as_dvc_changes(changes: dict[str, Any]) -> Params:
    """Return params.yaml after DVC itself has applied the arguments."""
    apply_overrides("params.yaml", [argument for argument in as_arguments(changes) if argument != "--set-param"])
    return parse(yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8")), "changed")


def test_nothing_typed_changes_nothing(params: Params) -> None:
    assert changes_of(params, ["small"], NO_PROFILE, Constraints.model_validate({})) == {}


def test_a_typed_limit_replaces_the_targets_own(params: Params) -> None:
    """Whatever kind that one is of, and under its name; what was not typed stays."""
    typed = Constraints.model_validate({"block_params_ratio": 0.6, "decode_throughput_ratio": 1.5})
    after = _as_dvc_changes(changes_of(params, ["small"], NO_PROFILE, typed)).targets["small"].constraints
    assert set(after) == {"size", "decode"}
    assert (after["size"].at_most, after["size"].at_most_ratio) == (None, 0.6)
    assert after["decode"] == params.targets["small"].constraints["decode"].model_copy(update={"at_least_ratio": 1.5})


def test_a_limit_that_the_target_lacks_is_added_with_its_conditions(params: Params) -> None:
    fields = {
        "memory_gib": 2.5,
        "latency_ms": 40,
        "hardware": "h100-sxm, roofline, bfloat16 (modelled)",
        "scenario": "16/8",
        "batch": 4,
        "context": 64,
    }
    typed = Constraints.model_validate(fields)
    after = _as_dvc_changes(changes_of(params, ["small"], NO_PROFILE, typed)).targets["small"].constraints
    assert set(after) == {"size", "decode", "memory_gib", "latency_ms"}
    memory, latency = after["memory_gib"], after["latency_ms"]
    assert (memory.at_most, memory.batch, memory.context, memory.hardware) == (2.5, 4, 64, None)
    assert (latency.at_most, latency.hardware, latency.engine, latency.scenario) == (40, "h100-sxm", "roofline", "16/8")


def _write_measured_costs(path: Path) -> None:
    """Write costs of a machine called desk in two engines, as `puzzle time-machine` measures them."""
    engines: tuple[tuple[str, Precision], ...] = (("llama.cpp", "float16"), ("torch", "float32"))
    write_costs(
        path,
        [
            dataclasses.replace(row, hardware="desk", engine=engine, precision=precision, origin="measured")
            for engine, precision in engines
            for row in costs()
        ],
    )


def test_a_speed_limit_names_a_deployment_that_has_costs(params: Params) -> None:
    """Hardware, engine and precision are one choice: a timed machine in llama.cpp, as the demo's own, and no other."""
    assert deployment_names() == ["h100-sxm, roofline, bfloat16 (modelled)"]
    _write_measured_costs(Path("artifacts/costs.parquet"))
    measured = ["desk, llama.cpp, float16 (measured)", "desk, torch, float32 (measured)"]
    assert deployment_names() == measured
    typed = Constraints.model_validate({"decode_throughput_ratio": 1.5, "hardware": measured[0]})
    decode = _as_dvc_changes(changes_of(params, ["small"], NO_PROFILE, typed)).targets["small"].constraints["decode"]
    assert (decode.hardware, decode.engine, decode.precision) == ("desk", "llama.cpp", "float16")
    assert (decode.scenario, decode.batch, decode.at_least_ratio) == ("8/8", 2, 1.5)


def test_before_there_are_costs_the_timings_in_git_say_what_they_will_have(params: Params) -> None:
    assert params.measure_costs.timings == ()
    values = {**VALUES, "measure_costs": {**VALUES["measure_costs"], "timings": ["desk"]}}
    Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    assert deployment_names() == []
    _write_measured_costs(TIMINGS / "desk.parquet")
    assert deployment_names() == [
        "desk, llama.cpp, float16 (measured)",
        "desk, torch, float32 (measured)",
        "h100-sxm, roofline, bfloat16 (modelled)",
    ]


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_every_metric_has_a_field_with_its_unit(metric: Metric, params: Params) -> None:
    """Typed, it is a constraint on the metric; the schema is simple enough for the UI to draw one input each."""
    fields = Constraints.model_json_schema()["properties"]
    names = [name for name in fields if name.startswith(metric.name)]
    assert len(names) == (2 if metric.direction == "either" else 1)
    conditions: dict[str, Any] = {}
    if metric.speed:
        conditions = {"hardware": "h100-sxm, roofline, bfloat16 (modelled)", "scenario": "16/8"}
    elif metric.needs_context:
        conditions = {"context": 64}
    for name in names:
        assert metric.unit in fields[name]["title"]
        assert fields[name]["type"] in ("number", "integer")
        Path("params.yaml").write_text(yaml.safe_dump(VALUES, sort_keys=False), encoding="utf-8")
        typed = Constraints.model_validate({name: 1, **conditions})
        after = _as_dvc_changes(changes_of(params, ["small"], NO_PROFILE, typed)).targets["small"].constraints
        (constraint,) = (constraint for constraint in after.values() if constraint.metric == metric.name)
        assert constraint.limit == 1
        assert constraint.is_lower == (name.endswith("at_least") or metric.direction == "at_least")
        assert constraint.is_relative == metric.relative_in_form


def test_a_profiles_leaves_are_overrides_and_typed_limits_come_last(params: Params) -> None:
    assert profile_names() == ["none", "big"]
    typed = Constraints.model_validate({"block_params_ratio": 0.6})
    after = _as_dvc_changes(changes_of(params, ["small"], "big", typed))
    assert after.run.seed == 7
    assert after.run.dtype == params.run.dtype
    assert [source.path for source in after.prepare_corpus.sources] == ["my texts, all/*.jsonl"]
    assert after.targets["small"].label == LABEL, "no sign of it means anything to DVC"
    size = after.targets["small"].constraints["size"]
    assert (size.at_most, size.at_most_ratio) == (None, 0.6)


@pytest.mark.parametrize(
    ("targets", "typed", "message"),
    [
        ([], {"kv_bytes_ratio": 0.5}, "constraints belong to one target; choose one of small, twice"),
        (["small", "twice"], {"kv_bytes_ratio": 0.5}, "belong to one target"),
        (["small"], {"memory_gib": 1}, "constraints.memory_gib: memory_gib needs `context`"),
        (["small"], {"latency_ms": 1}, "latency_ms needs `hardware` and `scenario`"),
        (["small"], {"block_params_ratio": 0.5, "context": 64}, "`context` was typed without a limit"),
        (["small"], {"decode_throughput_ratio": 2, "scenario": "8x8"}, "constraints.decode.scenario"),
        (["twice"], {"latency_ms": 1}, "2 constraints on latency_ms (8/8, 8/16)"),
        (["small"], {"latency_ms": 1, "hardware": "h100-sxm"}, "choose one of h100-sxm, roofline, bfloat16 (modelled)"),
        (["small"], {"attention_blocks_at_least": 1, "attention_blocks_at_most": 2}, "limited from both sides"),
    ],
)
def test_what_cannot_work_is_one_message(
    params: Params, targets: list[str], typed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        changes_of(params, targets, NO_PROFILE, Constraints.model_validate(typed))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "unknown profile 'mine'; known: none, big"),
        ("run: {threads: {deep: 1}}", "run.threads.deep cannot be set: threads is a value of params.yaml"),
        ("[1, 2]", "params/mine.yaml must hold sections like params.yaml, found list"),
        ("{", "params/mine.yaml, line 2, column 1: this is not valid YAML"),
        ("run: {sed: 1}", "unknown key run.sed, did you mean seed?"),
    ],
)
def test_a_profile_that_cannot_work_is_one_message(params: Params, text: str | None, message: str) -> None:
    if text is not None:
        Path("params/mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)):
        changes_of(params, [], "mine", Constraints.model_validate(NOTHING))
