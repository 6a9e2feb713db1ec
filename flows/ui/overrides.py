"""Changes of params.yaml for one run of `compress`, which leaves the file as it is: a profile, and typed constraints.

The form's limits are the rows of storage/metrics.py. A change is a dotted key and its value; DVC takes them as
`--set-param`.
"""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, create_model, model_serializer

from storage.fields import Section
from storage.files import InputError
from storage.metrics import METRICS, BlockCount, Metric
from storage.params import Params, load, parse
from storage.paths import Paths
from storage.targets import Count, Positive
from storage.yaml_files import read_yaml
from tasks.targets.deployments import Deployment, deployments, planned_deployments

PROFILES = Path("params")
NO_PROFILE = "none"


def target_names() -> list[str]:
    """Return keys of the targets in params.yaml, none if it cannot be read (whoever needs it says why)."""
    try:
        return list(load().targets)
    except InputError:
        return []


def profile_names() -> list[str]:
    """Return names of the files of overrides under params/, after `none`."""
    return [NO_PROFILE, *sorted(path.stem for path in PROFILES.glob("*.yaml"))]


def deployment_names() -> list[str]:
    """Return hardware with engine and precision that limits on speeds can name, none if no table can be read."""
    try:
        return [deployment.text for deployment in deployments(load(), Paths())]
    except InputError:
        return []


def one_of(names: Callable[[], list[str]]) -> dict[str, Any]:
    """Return the part of a field's schema that makes it a choice between names, if there are any."""
    choices = names()
    return {"enum": choices} if choices else {}


def _optional(schema: dict[str, Any]) -> None:
    """Make an optional field a plain one that may stay empty: the UI draws `number or null` as two tabs."""
    schema |= schema.pop("anyOf")[0]
    del schema["default"]


def _deployment_choice(schema: dict[str, Any]) -> None:
    _optional(schema)
    schema |= one_of(deployment_names)


def _field(title: str, description: str, schema: Callable[[dict[str, Any]], None] = _optional) -> Any:
    return Field(None, title=title, description=description, json_schema_extra=schema)


Share = Annotated[float, Field(gt=0, le=1)]
_EMPTY = "Empty: as the target's constraint says."


@dataclass(frozen=True)
class _FormLimit:
    """A field of the form that limits a metric from one side, `at_most` or `at_least`."""

    metric: Metric
    side: str

    @property
    def name(self) -> str:
        """Return the name of the field; a metric that may be limited from either side has two."""
        name = f"{self.metric.name}_ratio" if self.metric.relative_in_form else self.metric.name
        return f"{name}_{self.side}" if self.metric.direction == "either" else name

    @property
    def kind(self) -> str:
        """Return the key of the constraint that the field sets."""
        return f"{self.side}_ratio" if self.metric.relative_in_form else self.side

    @property
    def type(self) -> Any:
        """Return the type of the field."""
        if isinstance(self.metric.parts, BlockCount):
            return Count | None
        return Share | None if self.kind == "at_most_ratio" else Positive | None

    @property
    def field(self) -> Any:
        """Return the field with title, unit and description."""
        unit = self.metric.unit
        if self.metric.relative_in_form:
            unit = f"{'share of' if self.side == 'at_most' else 'times'} the parent's {unit}"
        words = self.metric.description[0].upper() + self.metric.description[1:]
        if self.metric.speed:
            words += ", on the hardware and scenario below"
        elif self.metric.needs_context:
            words += " (below)"
        return _field(f"{self.metric.title}: {self.side.replace('_', ' ')} ({unit})", f"{words}.")


def _form_limits() -> tuple[_FormLimit, ...]:
    limits = []
    for metric in METRICS.values():
        sides = ("at_most", "at_least") if metric.direction == "either" else (metric.direction,)
        limits += [_FormLimit(metric, side) for side in sides]
    return tuple(limits)


_LIMITS = _form_limits()
if TYPE_CHECKING:
    _Limits = Section
else:
    _Limits = create_model("_Limits", __base__=Section, **{limit.name: (limit.type, limit.field) for limit in _LIMITS})


class Constraints(_Limits):
    """Limits of the one chosen target for this run. An empty field leaves what params.yaml says."""

    hardware: str | None = _field(
        "Hardware, engine and precision of the speed limits",
        f"Measured on a timed machine, or modelled for a GPU. {_EMPTY}",
        _deployment_choice,
    )
    scenario: str | None = _field("Scenario of the speed limits (input/output tokens)", f"Such as 128/128. {_EMPTY}")
    batch: Count | None = _field("Batch (sequences at once)", f"For speed and memory. {_EMPTY}")
    context: Count | None = _field("Context (tokens per sequence)", f"For memory. {_EMPTY}")

    @model_serializer
    def typed(self) -> dict[str, Any]:
        """Return the fields that are not empty."""
        return {name: value for name, value in self if value is not None}


def _conditions_of(metric: Metric) -> set[str]:
    """Return fields of the form that say where a metric is limited."""
    conditions = {"hardware", "scenario", "batch"} if metric.speed else set()
    return conditions | {"batch", "context"} if metric.needs_context else conditions


def changes_of(params: Params, targets: list[str], profile: str, constraints: Constraints) -> dict[str, Any]:
    """Return dotted key -> value of everything that differs from params.yaml in this run.

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
    """Return the params with a file of overrides.

    Raises:
        InputError: the file is missing or no mapping, or the params would be refused with it.
    """
    profile = _mapping(path, f"profiles here: {', '.join(profile_names()[1:]) or 'none'}")
    values = params.model_dump(mode="json", exclude_unset=True)
    return parse(_changed(values, _leaves(profile)), f"params.yaml with {path}")


def as_arguments(changes: dict[str, Any]) -> list[str]:
    """Return the changes as arguments of `dvc exp run`; `++` sets a key whether or not params.yaml has it."""
    arguments = []
    for key, value in changes.items():
        arguments += ["--set-param", f"++{_key(key)}={_hydra(value)}"]
    return arguments


def _profile(name: str) -> dict[str, Any]:
    if name == NO_PROFILE:
        return {}
    path = PROFILES / f"{name}.yaml"
    if name not in profile_names():
        raise InputError(
            f"unknown profile {name!r}; known: {', '.join(profile_names())} (files {PROFILES}/<name>.yaml)"
        )
    return _mapping(path, "check the path")


def _mapping(path: Path, missing: str) -> dict[str, Any]:
    values = read_yaml(path, missing)
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold sections like params.yaml, found {type(values).__name__}")
    return values


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of a nested mapping."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        leaves |= _leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return leaves


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of nested `values` with the changes made."""
    values = copy.deepcopy(values)
    for dotted, value in changes.items():
        *above, key = dotted.split(".")
        section = values
        for name in above:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise InputError(f"{dotted} cannot be set: {name} is a value of params.yaml, not a section")
        section[key] = value
    return values


def _constraint_changes(params: Params, target_name: str, typed: dict[str, Any]) -> dict[str, Any]:
    """Return changes: a typed limit takes the place of the target's constraint on its metric, or becomes a new one."""
    limits = [limit for limit in _LIMITS if limit.name in typed]
    _check_conditions(typed, limits)
    changes: dict[str, Any] = {}
    for limit in limits:
        metric = limit.metric.name
        if sum(other.metric == limit.metric for other in limits) > 1:
            raise InputError(f"{metric} was limited from both sides; leave one of the fields empty")
        constraints = params.target(target_name).constraints
        replaced = [name for name, constraint in constraints.items() if constraint.metric == metric]
        if len(replaced) > 1:
            raise InputError(
                f"target {target_name} has {len(replaced)} constraints on {metric} ({', '.join(replaced)}), the form "
                "one field; change them in params.yaml"
            )
        values = {"metric": metric, limit.kind: typed[limit.name]}
        conditions = _conditions_of(limit.metric) & typed.keys()
        values |= {condition: typed[condition] for condition in typed if condition in conditions}
        if "hardware" in conditions:
            deployment = _deployment(params, typed["hardware"])
            values |= {
                "hardware": deployment.hardware,
                "engine": deployment.engine,
                "precision": deployment.precision,
            }
        if replaced:
            constraint = constraints[replaced[0]]
            for kind in ("at_least", "at_least_ratio", "at_most", "at_most_ratio"):
                if kind != limit.kind and getattr(constraint, kind) is not None:
                    values[kind] = None
        name = replaced[0] if replaced else metric
        changes |= {f"targets.{target_name}.constraints.{name}.{key}": value for key, value in values.items()}
    return changes


def _check_conditions(typed: dict[str, Any], limits: list[_FormLimit]) -> None:
    """Raise InputError for a condition that belongs to none of the typed limits."""
    for condition in ("hardware", "scenario", "batch", "context"):
        if condition in typed and not any(condition in _conditions_of(limit.metric) for limit in limits):
            fields = [limit.name for limit in _LIMITS if condition in _conditions_of(limit.metric)]
            raise InputError(f"`{condition}` was typed without a limit that it belongs to: {', '.join(fields)}")


def _deployment(params: Params, text: str) -> Deployment:
    """Return the deployment with this text: one of costs.parquet, or one that these params give it."""
    choices = {*deployments(params, Paths()), *planned_deployments(params)}
    for deployment in sorted(choices):
        if deployment.text == text:
            return deployment
    raise InputError(
        f"no costs on {text!r}; choose one of {'; '.join(sorted(deployment.text for deployment in choices)) or 'none'}"
    )


def _hydra(value: Any) -> str:
    """Spell a value in the grammar of `--set-param`: JSON with other escapes, and keys of mappings without quotes."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_key(key)}:{_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    if isinstance(value, str):  # a backslash is one, unless a quote or ${ follows, which would be an interpolation
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
        return '"' + re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + match[2].replace('"', '\\"'), text) + '"'
    return json.dumps(value)


def _key(key: str) -> str:
    """Spell a key that means the same to `--set-param`."""
    if not re.fullmatch(r"[\w./ -]+", key):
        raise InputError(f"{key!r} cannot be the name of a parameter that DVC sets; use letters, digits, - and _")
    return key
