"""A target's constraints as limits of the search. No torch.

At each operating point (:attr:`TargetLimits.points`) a constraint becomes a Quantity (its metric there), then a Bound
(with the user's number), then the solver's Limit (`Bound.as_limit`). predictions.py computes what a child reached.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from storage.files import InputError
from storage.metrics import METRICS
from storage.scenario import Place, Setting
from storage.targets import Constraint
from storage.variants import Replacement
from tasks.puzzle.costs.cost_model import usable_bytes, workspace_bytes
from tasks.puzzle.costs.cost_table import GIB, CostTable
from tasks.puzzle.costs.hardware import DEVICES
from tasks.puzzle.search.bounds import Bound
from tasks.puzzle.search.operating_points import NOTHING_OPEN, OpenSetting, OperatingPoint, operating_points
from tasks.puzzle.search.quantities import Quantity, measure, memory_in
from tasks.targets.parent_facts import ParentFacts


@dataclass(frozen=True)
class TargetLimits:
    """The constraints of a target, which the cost table turns into limits.

    Attributes:
        target_name: key in params.yaml.
        constraints: the constraints by name.
        parent: the parent, to whose values relative limits refer.
        costs: sizes and milliseconds.
        speed_margin: share by which the search tightens limits on speeds.
    """

    target_name: str
    constraints: Mapping[str, Constraint]
    parent: ParentFacts
    costs: CostTable
    speed_margin: float

    @cached_property
    def points(self) -> tuple[OperatingPoint, ...]:
        """List the operating points that the constraints leave open.

        Raises:
            InputError: the cost table has no setting for one that is to be chosen.
        """
        open_settings: list[OpenSetting] = []
        for constraint in self.constraints.values():
            if constraint.is_open:
                batch = None if constraint.batch == "best" else constraint.batch
                degree = None if constraint.tensor_parallel == "best" else constraint.tensor_parallel
                open_settings += [OpenSetting(place, batch, degree) for place in _places(constraint)]
        return operating_points(open_settings, self.costs) if open_settings else (NOTHING_OPEN,)

    def point_with(self, settings: Sequence[Setting]) -> OperatingPoint:
        """Find the operating point that architecture.json names.

        Raises:
            InputError: the constraints no longer leave it open.
        """
        for point in self.points:
            if point.settings == tuple(settings):
                return point
        raise InputError(
            f"the child of {self.target_name} has an operating point that its constraints or the cost table no longer "
            f"have; run `dvc repro search_architecture@{self.target_name}`"
        )

    def bounds(self, point: OperatingPoint) -> tuple[Bound, ...]:
        """Return all limits at an operating point: the constraints, then the memory of each device that was chosen for.

        Raises:
            InputError: the cost table lacks a row that a constraint needs.
        """
        bounds = [self._bound(name, constraint, point) for name, constraint in self.constraints.items()]
        return (*bounds, *self._device_bounds(point))

    def _bound(self, name: str, constraint: Constraint, point: OperatingPoint) -> Bound:
        quantity = quantity_at(constraint, point)
        return Bound(
            name=name,
            quantity=quantity,
            limit=constraint.limit,
            lower=constraint.is_lower,
            relative=constraint.is_relative,
            parent_value=self._parent_values[name],
            margin=self.speed_margin if quantity.metric.speed else 0.0,
        )

    def _device_bounds(self, point: OperatingPoint) -> Iterator[Bound]:
        """Yield bounds that fit weights, KV cache at the requests' end and workspace into devices with a data sheet."""
        for setting in point.settings:
            if device := DEVICES.get(setting.hardware):
                workspace = workspace_bytes(self.parent.config, setting) if self.parent.config else 0.0
                memory = memory_in(setting, workspace)
                yield Bound(
                    f"fits {setting.hardware} at {setting.scenario}", memory, usable_bytes(device, setting) / GIB
                )

    @cached_property
    def _parent_values(self) -> dict[str, float | None]:
        """Return each constraint's metric of the parent: where the batch is open, at the parent's own best point.

        None where the parent fits at no operating point and the limit is absolute.
        """
        values: dict[str, float | None] = {}
        for name, constraint in self.constraints.items():
            value = self.best_value(name, self.parent.blocks)
            if value is None and constraint.is_relative:
                raise InputError(
                    f"{self.target_name}: {name} is relative to the parent, which fits into {constraint.hardware} at "
                    "no batch of the cost table; give an absolute limit"
                )
            if constraint.is_relative and value is not None and not 0 < value < math.inf:
                raise InputError(
                    f"{self.target_name}: {name} is relative to the parent, whose {constraint.metric} is {value:g} by "
                    "the cost table; correct the table, or give an absolute limit"
                )
            values[name] = value
        return values

    def best_value(self, name: str, blocks: Sequence[Replacement]) -> float | None:
        """Return a constraint's metric of a model at the operating point that suits it best; None if it fits none."""
        constraint = self.constraints[name]
        values = [
            measure(self.costs, blocks, quantity_at(constraint, point))
            for point in self.points
            if not constraint.is_open or self._fits(blocks, point)
        ]
        best = max if METRICS[constraint.metric].more_is_better else min
        return best(values, default=None)

    def _fits(self, blocks: Sequence[Replacement], point: OperatingPoint) -> bool:
        """Tell whether a model fits into the devices of an operating point."""
        return all(bound.value(self.costs, blocks) <= bound.limit for bound in self._device_bounds(point))


def quantity_at(constraint: Constraint, point: OperatingPoint) -> Quantity:
    """Return a constraint's metric at an operating point."""
    metric = METRICS[constraint.metric]
    settings = [_setting(constraint, place, point) for place in _places(constraint)]
    if metric.speed:
        mix = tuple(zip(settings, constraint.scenarios.values(), strict=True))
        return Quantity(metric, constraint.precision, constraint.hardware, constraint.engine, mix)
    engine = constraint.engine if constraint.hardware else None
    if not metric.needs_context:
        return Quantity(metric, constraint.precision, constraint.hardware, engine)
    batch, degree, context = constraint.batch, constraint.tensor_parallel, constraint.context
    if settings:
        batch, degree = settings[0].batch, settings[0].tensor_parallel
        context = context or settings[0].lengths.total_tokens
    assert batch != "best"
    assert degree != "best"
    return Quantity(
        metric,
        constraint.precision,
        constraint.hardware,
        engine,
        batch=batch,
        context=context,
        tensor_parallel=degree,
    )


def _places(constraint: Constraint) -> list[Place]:
    """List the places of a constraint, one for each of its scenarios."""
    return [
        Place(str(constraint.hardware), constraint.engine, constraint.precision, scenario)
        for scenario in constraint.scenarios
    ]


def _setting(constraint: Constraint, place: Place, point: OperatingPoint) -> Setting:
    """Return the setting at a place: the constraint's own, or the operating point's where the constraint is open."""
    if constraint.batch == "best" or constraint.tensor_parallel == "best":
        return point.setting(place)
    return Setting(
        place.hardware,
        place.engine,
        place.precision,
        constraint.tensor_parallel,
        place.scenario,
        constraint.batch,
    )
