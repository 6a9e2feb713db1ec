"""What a run of `compress` changes of params.yaml without touching it: a profile and constraints typed into the form.

A change is a dotted key and its value; DVC takes them as `--set-param`.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_serializer

from storage.fields import Section
from storage.files import InputError
from storage.params import Params, load, parse, read_yaml

PROFILES = Path("params")
NO_PROFILE = "none"

_SPEED = ("throughput_ratio", "decode_throughput_ratio", "latency_ms")
_LIMITS = {
    "block_params_ratio": ("block_params", "at_most_ratio"),
    "kv_ratio": ("kv_bytes", "at_most_ratio"),
    "memory_gib": ("memory_gib", "at_most"),
    "throughput_ratio": ("throughput", "at_least_ratio"),
    "decode_throughput_ratio": ("decode_throughput", "at_least_ratio"),
    "latency_ms": ("latency_ms", "at_most"),
}
_CONDITIONS = {
    "hardware": _SPEED,
    "scenario": _SPEED,
    "batch": (*_SPEED, "memory_gib"),
    "context": ("memory_gib",),
}
"""Field of the form -> the limits that it says more about."""


def target_names() -> list[str]:
    """Keys of the targets in params.yaml, none if it cannot be read (whoever needs it says why)."""
    try:
        return list(load().targets)
    except InputError:
        return []


def profile_names() -> list[str]:
    """Names of the files of overrides under params/, after `none`."""
    return [NO_PROFILE, *sorted(path.stem for path in PROFILES.glob("*.yaml"))]


def hardware_names() -> list[str]:
    """Hardware that speed limits can name: timed machines, then modelled GPUs."""
    try:
        costs = load().measure_costs
    except InputError:
        return []
    return [*costs.timings, *costs.hardware]


def one_of(names: Callable[[], list[str]]) -> dict[str, Any]:
    """The part of a field's schema that makes it a choice between names, if there are any."""
    found = names()
    return {"enum": found} if found else {}


def _optional(schema: dict[str, Any]) -> None:
    """An optional field as a plain one that may stay empty: the UI draws `number or null` as two tabs."""
    schema |= schema.pop("anyOf")[0]
    del schema["default"]


def _hardware(schema: dict[str, Any]) -> None:
    _optional(schema)
    schema |= one_of(hardware_names)


def _field(title: str, description: str, schema: Callable[[dict[str, Any]], None] = _optional) -> Any:
    return Field(None, title=title, description=description, json_schema_extra=schema)


Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
_SPEEDS = "the hardware and scenario below."
_ELSE = "Empty: as the target's constraint says."


class Constraints(Section):
    """Limits of the one chosen target for this run. An empty field leaves what params.yaml says."""

    block_params_ratio: Share | None = _field(
        "Block parameters: at most (share of the parent's)", "0.73 keeps at most 73 % of the parameters in blocks."
    )
    kv_ratio: Share | None = _field(
        "KV cache: at most (share of the parent's bytes per token)", "0.85 keeps at most 85 % of the bytes per token."
    )
    memory_gib: Positive | None = _field(
        "Memory: at most (GiB)", "Weights and KV cache, at the batch and context below."
    )
    throughput_ratio: Positive | None = _field(
        "Throughput: at least (times the parent's tokens/s)", f"Generated tokens/s of whole requests, on {_SPEEDS}"
    )
    decode_throughput_ratio: Positive | None = _field(
        "Decode throughput: at least (times the parent's tokens/s)", f"Tokens/s of decoding alone, on {_SPEEDS}"
    )
    latency_ms: Positive | None = _field("Latency: at most (ms)", f"Of a whole request, on {_SPEEDS}")
    hardware: str | None = _field(
        "Hardware of the speed limits", f"A timed machine (measured) or a GPU (modelled). {_ELSE}", _hardware
    )
    scenario: str | None = _field("Scenario of the speed limits (input/output tokens)", f"Such as 128/128. {_ELSE}")
    batch: Count | None = _field("Batch (sequences at once)", f"For speed and memory. {_ELSE}")
    context: Count | None = _field("Context (tokens per sequence)", f"For memory. {_ELSE}")

    @model_serializer
    def typed(self) -> dict[str, Any]:
        """The fields that are not empty."""
        return {name: value for name, value in self if value is not None}


def changes_of(params: Params, targets: list[str], profile: str, constraints: Constraints) -> dict[str, Any]:
    """Dotted key -> value of everything that differs from params.yaml in this run.

    Raises:
        InputError: the profile is missing or no mapping, constraints were typed for more than one target, or
            params.yaml with these changes would be refused; the message says which key and why.
    """
    changes = _leaves(_profile(profile))
    values = params.model_dump(mode="json", exclude_unset=True)
    where = f"params.yaml with profile {profile}"
    params = parse(_changed(values, changes), where)
    if typed := constraints.typed():
        if len(targets) != 1:
            raise InputError(
                f"constraints belong to one target; choose one of {', '.join(params.targets)} and start again"
            )
        changes |= _constraint_changes(params, targets[0], typed)
        parse(_changed(values, changes), f"{where} and the constraints typed")
    return changes


def with_profile(params: Params, path: Path) -> Params:
    """The params with a file of overrides.

    Raises:
        InputError: the file is missing or no mapping, or the params would be refused with it.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing; profiles here: {', '.join(profile_names()[1:]) or 'none'}")
    values = params.model_dump(mode="json", exclude_unset=True)
    return parse(_changed(values, _leaves(_mapping(path))), f"params.yaml with {path}")


def as_arguments(changes: dict[str, Any]) -> list[str]:
    """The changes as arguments of `dvc exp run`; `++` sets a key whether or not params.yaml has it."""
    return [part for key, value in changes.items() for part in ("--set-param", f"++{key}={_hydra(value)}")]


def _profile(name: str) -> dict[str, Any]:
    if name == NO_PROFILE:
        return {}
    path = PROFILES / f"{name}.yaml"
    if name not in profile_names():
        raise InputError(
            f"unknown profile {name!r}; known: {', '.join(profile_names())} (files {PROFILES}/<name>.yaml)"
        )
    return _mapping(path)


def _mapping(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold sections like params.yaml, found {type(values).__name__}")
    return values


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a nested mapping."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        found |= _leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested `values` with the changes made."""
    values = copy.deepcopy(values)
    for dotted, value in changes.items():
        *above, key = dotted.split(".")
        section = values
        for name in above:
            section = section.setdefault(name, {})
        section[key] = value
    return values


def _constraint_changes(params: Params, target: str, typed: dict[str, Any]) -> dict[str, Any]:
    """A typed limit takes the place of the target's constraint on the same metric, or becomes a new one."""
    changes: dict[str, Any] = {}
    for condition, fields in _CONDITIONS.items():
        if condition in typed and not typed.keys() & set(fields):
            raise InputError(f"`{condition}` was typed without a limit that it belongs to: {', '.join(fields)}")
    for field, (metric, kind) in _LIMITS.items():
        if field not in typed:
            continue
        there = {name: one for name, one in params.target(target).constraints.items() if one.metric == metric}
        if len(there) > 1:
            raise InputError(
                f"target {target} has {len(there)} constraints on {metric} ({', '.join(there)}), the form one field; "
                "change them in params.yaml"
            )
        name = next(iter(there), metric)
        values = {"metric": metric, kind: typed[field]}
        values |= {key: typed[key] for key, fields in _CONDITIONS.items() if key in typed and field in fields}
        if "hardware" in values:
            values["engine"] = "roofline" if values["hardware"] in params.measure_costs.hardware else "torch"
        others = {"at_most", "at_least", "at_most_ratio", "at_least_ratio"} - {kind}
        values |= {other: None for other in sorted(others) if name in there and getattr(there[name], other) is not None}
        changes |= {f"targets.{target}.constraints.{name}.{key}": value for key, value in values.items()}
    return changes


def _hydra(value: Any) -> str:
    """A value in the grammar of `--set-param`: JSON, but keys of mappings without quotes."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
