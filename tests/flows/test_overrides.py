"""What a form changes of params.yaml: the target's own constraint, checked before work, in DVC's grammar."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from flows.overrides import NO_PROFILE, Constraints, as_arguments, changes_of, profile_names
from storage.files import InputError
from storage.params import Params, load, parse
from tests.settings import tiny_values

VALUES = {
    **tiny_values(measure_costs={"hardware": ["h100-sxm"], "timings": ["desk"]}),
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


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """params.yaml of a folder, and one profile beside it."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(VALUES, sort_keys=False), encoding="utf-8")
    Path("params").mkdir()
    profile = {
        "run": {"seed": 7},
        "prepare_corpus": {"sources": [{"kind": "files", "path": "my texts, all/*.jsonl"}]},
        "targets": {"small": {"label": "Größer {1}: $x", "constraints": {"size": {"at_most": 6000.0}}}},
    }
    Path("params/big.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    return load()


def _as_dvc_changes(changes: dict[str, Any]) -> Params:
    """params.yaml after DVC itself has applied the arguments."""
    apply_overrides("params.yaml", [one for one in as_arguments(changes) if one != "--set-param"])
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
        "hardware": "h100-sxm",
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


def test_a_profiles_leaves_are_overrides_and_typed_limits_come_last(params: Params) -> None:
    assert profile_names() == ["none", "big"]
    typed = Constraints.model_validate({"block_params_ratio": 0.6})
    after = _as_dvc_changes(changes_of(params, ["small"], "big", typed))
    assert after.run.seed == 7
    assert after.run.dtype == params.run.dtype
    assert [source.path for source in after.prepare_corpus.sources] == ["my texts, all/*.jsonl"]
    assert after.targets["small"].label == "Größer {1}: $x"
    size = after.targets["small"].constraints["size"]
    assert (size.at_most, size.at_most_ratio) == (None, 0.6)


@pytest.mark.parametrize(
    ("targets", "typed", "message"),
    [
        ([], {"kv_ratio": 0.5}, "constraints belong to one target; choose one of small, twice"),
        (["small", "twice"], {"kv_ratio": 0.5}, "belong to one target"),
        (["small"], {"memory_gib": 1}, "constraints.memory_gib: memory_gib needs `context`"),
        (["small"], {"latency_ms": 1}, "latency_ms needs `hardware` and `scenario`"),
        (["small"], {"block_params_ratio": 0.5, "context": 64}, "`context` was typed without a limit"),
        (["small"], {"decode_throughput_ratio": 2, "scenario": "8x8"}, "constraints.decode.scenario"),
        (["twice"], {"latency_ms": 1}, "2 constraints on latency_ms (8/8, 8/16)"),
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
        ("[1, 2]", "params/mine.yaml must hold sections like params.yaml, found list"),
        ("{", "params/mine.yaml is not valid YAML"),
        ("run: {sed: 1}", "unknown key run.sed, did you mean seed?"),
    ],
)
def test_a_profile_that_cannot_work_is_one_message(params: Params, text: str | None, message: str) -> None:
    if text is not None:
        Path("params/mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)):
        changes_of(params, [], "mine", Constraints.model_validate(NOTHING))
