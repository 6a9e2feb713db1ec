"""A target as limits of the search, and what the tables predict for a choice of blocks.

Shared by search_architecture and search_baselines: the parent's facts, which replacements the target allows, each
constraint at its operating point, the problem that the solver gets, and the predicted sizes and speeds of a child.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from storage.files import DamagedFileError, InputError, read_json
from storage.model_config import ModelConfig
from storage.params import Params
from storage.paths import Paths
from storage.records import Attention, CostRow, ExportFormat, Ffn, Replacement, Runtime, ScoreRow, Weights
from storage.sections import SearchArchitecture
from storage.tables import read_costs, read_scores
from storage.targets import SPEED_METRICS, Constraint, Target
from tasks.puzzle.bounds import Bound, setting_json
from tasks.puzzle.cost_model import workspace_bytes
from tasks.puzzle.costs import GIB, CostTable, Setting, model_sizes
from tasks.puzzle.hardware import DEVICES
from tasks.puzzle.mip import Settings
from tasks.puzzle.operating_points import NOWHERE, OperatingPoint, Place, Wish, operating_points
from tasks.puzzle.problem import Choice, Limit, Problem
from tasks.puzzle.quantities import Quantity, measure
from tasks.puzzle.runtimes import reasons_against, refusals
from tasks.puzzle.score_rule import Scores
from tasks.puzzle.search import Best, Point, alternatives, best_child
from tasks.puzzle.variants import parent_blocks

WEIGHTS: Weights = "decoupled"
"""The training whose scores count: the child is assembled from the library's trained variants."""


@dataclass(frozen=True)
class ParentFacts:
    """The parent of the search: its blocks as replacements, and its geometry where that is known."""

    name: str
    digest: str
    blocks: tuple[Replacement, ...]
    config: ModelConfig | None

    @classmethod
    def of_tables(cls, scores: Sequence[ScoreRow], costs: Sequence[CostRow], config: ModelConfig | None) -> Self:
        """The parent that tables of a user's are of; without a config, its variants are the largest in the costs.

        Raises:
            InputError: the costs have no attention or no FFN.
        """
        if config is not None:
            return cls("the parent", "", parent_blocks(config), config)
        largest: dict[str, str] = {}
        for component in ("attention", "ffn"):
            sizes = {row.variant: row.params for row in costs if row.component == component}
            if not sizes:
                raise InputError(f"the cost table has no rows of component {component}; a child cannot be costed")
            largest[component] = max(sizes, key=lambda variant: (sizes[variant], variant))
        attention, ffn = Attention.parse(largest["attention"]), Ffn.parse(largest["ffn"])
        count = max(row.first_block + row.span for row in scores)
        return cls("the parent", "", tuple(Replacement(index, 1, attention, ffn) for index in range(count)), None)


@dataclass(frozen=True)
class Child:
    """What a search chose: the blocks, the operating point, and how it went."""

    blocks: tuple[Replacement, ...]
    point: OperatingPoint
    best: Best[Replacement]


_AND_FORMATS = ", and gguf formats out of export_child.formats"


def exportable(wanted: Target, formats: Iterable[ExportFormat]) -> Target:
    """A target that also asks for what the child's exports need: llama.cpp for GGUF, no linear layers for a Llama."""
    runtimes, allowed = wanted.runtimes, wanted.allowed
    if "llama.cpp" not in runtimes and any(one.startswith("gguf-") for one in formats):
        runtimes = (*runtimes, "llama.cpp")
    if "padded-llama" in formats:
        attention = tuple(kind for kind in allowed.attention if kind != "linear")
        ffn = tuple(kind for kind in allowed.ffn if kind != "linear")
        allowed = allowed.model_copy(update={"attention": attention, "ffn": ffn})
    return wanted.model_copy(update={"runtimes": runtimes, "allowed": allowed})


def solver_settings(section: SearchArchitecture, seed: int) -> Settings:
    """How params ask to solve."""
    return Settings(section.solver, section.relative_gap, section.node_limit, seed)


@dataclass(frozen=True)
class TargetTables:
    """A target with all that its search reads: the parent's facts, scores, costs, and what the target asks for."""

    target: str
    wanted: Target
    parent: ParentFacts
    scores: Scores
    costs: CostTable
    speed_margin: float

    @classmethod
    def read(cls, target: str, params: Params, paths: Paths) -> Self:
        """Read the tables.

        Raises:
            InputError: a table is missing or wrong.
        """
        found = exportable(params.target(target), params.export_child.formats)
        scores, costs = read_scores(paths.scores), read_costs(paths.costs)
        return cls.of(target, found, _read_parent(paths), scores, costs, params.search_architecture.speed_margin)

    @classmethod
    def of(
        cls,
        target: str,
        wanted: Target,
        parent: ParentFacts,
        scores: Sequence[ScoreRow],
        costs: Sequence[CostRow],
        speed_margin: float,
    ) -> Self:
        """Tables from anywhere."""
        own = parent.blocks[0]
        return cls(target, wanted, parent, Scores(scores, own.attention, own.ffn), CostTable(costs), speed_margin)

    @cached_property
    def points(self) -> tuple[OperatingPoint, ...]:
        """The operating points that the constraints leave open.

        Raises:
            InputError: the cost table has no setting for one that is to be chosen.
        """
        wishes = [
            Wish(
                Place(str(of.hardware), of.engine, of.precision, scenario),
                None if of.batch == "best" else of.batch,
                None if of.tensor_parallel == "best" else of.tensor_parallel,
            )
            for of in self.wanted.constraints.values()
            if of.is_open
            for scenario in of.scenarios
        ]
        return operating_points(wishes, self.costs) if wishes else (NOWHERE,)

    def point_of(self, settings: Sequence[Mapping[str, Any]]) -> OperatingPoint:
        """The operating point that architecture.json names.

        Raises:
            InputError: the constraints no longer leave it open.
        """
        for point in self.points:
            if [setting_json(point.setting(place)) for place in point.operations] == list(settings):
                return point
        raise InputError(
            f"the child of {self.target} has an operating point that its constraints or the cost table no longer have; "
            f"run `dvc repro search_architecture@{self.target}`"
        )

    def bounds(self, point: OperatingPoint) -> tuple[Bound, ...]:
        """All limits at an operating point: the constraints, and that the model fits into each device it is chosen for.

        Raises:
            InputError: the cost table lacks a row that a constraint needs.
        """
        own = [self._bound(name, of, point) for name, of in self.wanted.constraints.items()]
        return (*own, *self._fits(point))

    def _bound(self, name: str, of: Constraint, point: OperatingPoint) -> Bound:
        given = (of.at_most, of.at_least, of.at_most_ratio, of.at_least_ratio)
        return Bound(
            name=name,
            quantity=self._quantity(of, point),
            limit=next(limit for limit in given if limit is not None),
            lower=of.at_least is not None or of.at_least_ratio is not None,
            relative=of.at_most_ratio is not None or of.at_least_ratio is not None,
            parent_value=self._parent_values[name],
            margin=self.speed_margin if of.metric in SPEED_METRICS else 0.0,
        )

    def _quantity(self, of: Constraint, point: OperatingPoint) -> Quantity:
        places = [Place(str(of.hardware), of.engine, of.precision, scenario) for scenario in of.scenarios]
        if of.is_open:
            settings = [point.setting(place) for place in places]
        else:
            assert of.batch != "best"
            assert of.tensor_parallel != "best"
            settings = [
                Setting(at.hardware, at.engine, at.precision, of.tensor_parallel, at.scenario, of.batch)
                for at in places
            ]
        if of.metric in SPEED_METRICS:
            mix = tuple(zip(settings, of.scenarios.values(), strict=True))
            return Quantity(of.metric, of.precision, of.hardware, of.engine, mix)
        engine = of.engine if of.hardware else None
        if of.metric != "memory_gib":
            return Quantity(of.metric, of.precision, of.hardware, engine)
        at = settings[0] if settings else None
        batch, degree = (at.batch, at.tensor_parallel) if at else (of.batch, of.tensor_parallel)
        context = of.context or (at.input_tokens + at.output_tokens if at else None)
        assert batch != "best"
        assert degree != "best"
        return Quantity(
            of.metric, of.precision, of.hardware, engine, batch=batch, context=context, tensor_parallel=degree
        )

    def _fits(self, point: OperatingPoint) -> list[Bound]:
        """That weights, KV cache at the requests' end and workspace fit into each device that has a data sheet."""
        bounds = []
        for place in point.operations:
            if device := DEVICES.get(place.hardware):
                at = point.setting(place)
                held = Quantity(
                    "memory_gib",
                    place.precision,
                    place.hardware,
                    place.engine,
                    batch=at.batch,
                    context=at.input_tokens + at.output_tokens,
                    tensor_parallel=at.tensor_parallel,
                    workspace_bytes=workspace_bytes(self.parent.config, at) if self.parent.config else 0.0,
                )
                bounds.append(Bound(f"fits {place.hardware} at {place.scenario}", held, device.memory_bytes / GIB))
        return bounds

    @cached_property
    def _parent_values(self) -> dict[str, float]:
        """Each constraint's metric of the parent: where the batch is open, at the parent's own best point."""
        values = {}
        for name, of in self.wanted.constraints.items():
            best = self.best_value(name, self.parent.blocks)
            if best is None and (of.at_most_ratio is not None or of.at_least_ratio is not None):
                raise InputError(
                    f"{self.target}: {name} is relative to the parent, which fits into {of.hardware} at no batch of "
                    "the cost table; give an absolute limit"
                )
            values[name] = 1.0 if best is None else best
        return values

    def best_value(self, name: str, blocks: Sequence[Replacement]) -> float | None:
        """A constraint's metric of a model at the operating point that suits it best; None if it fits at none."""
        of, costs = self.wanted.constraints[name], self.costs
        fitting = (
            point
            for point in self.points
            if not of.is_open or all(bound.measured(costs, blocks) <= bound.limit for bound in self._fits(point))
        )
        values = [measure(costs, blocks, self._quantity(of, point)) for point in fitting]
        return (max if of.metric in ("throughput", "decode_throughput") else min)(values, default=None)

    def problem(self, weights: Weights) -> tuple[Problem[Replacement], tuple[Point, ...]]:
        """All allowed replacements with a score, the parent's own blocks (which score 0), and the limits on them.

        Raises:
            InputError: the cost table lacks a row that a constraint needs, or a runtime cannot load any child.
        """
        scored = sorted({*self.parent.blocks, *self.scores.replacements(weights)})
        replacements = [of for of in scored if self._is_allowed(of)]
        self._check_parent()
        choices = tuple(Choice(of, self.scores.score(of, weights).mean) for of in replacements)
        fixed = {name for name, of in self.wanted.constraints.items() if not of.is_open}

        def limits(point: OperatingPoint, always: bool) -> tuple[Limit, ...]:
            bounds = (bound for bound in self.bounds(point) if (bound.name in fixed) == always)
            return tuple(bound.as_limit(self.costs, replacements) for bound in bounds)

        where = f"targets.{self.target}.constraints"
        always = limits(self.points[0], always=True)
        problem = Problem(self.target, len(self.parent.blocks), choices, always, where)
        return problem, tuple(Point(point.text, limits(point, always=False)) for point in self.points)

    def search(self, weights: Weights, settings: Settings) -> Child:
        """The best child.

        Raises:
            InfeasibleError: no child keeps all constraints.
            InputError: the cost table lacks a row that a constraint needs, or a runtime cannot load any child.
        """
        problem, points = self.problem(weights)
        best = best_child(problem, settings, points)
        return Child(tuple(one.replacement for one in best.solution.chosen), self.points[best.point], best)

    def alternatives(
        self, child: Child, weights: Weights, settings: Settings, count: int, min_distance: float
    ) -> Iterator[Child]:
        """Further children, best first, each differing from all before it in a share of the parent's blocks."""
        problem, points = self.problem(weights)
        for best in alternatives(problem, settings, points, child.best, count, min_distance):
            yield Child(tuple(one.replacement for one in best.solution.chosen), self.points[best.point], best)

    def _check_parent(self) -> None:
        """Raise InputError if a runtime refuses every child, or a pin names a block that the parent does not have."""
        if self.wanted.runtimes and not self.parent.config:
            raise InputError(f"targets.{self.target}.runtimes needs the parent's geometry; give --parent CONFIG_JSON")
        for runtime in self.wanted.runtimes:
            assert self.parent.config is not None
            always = reasons_against(runtime, self.parent.config, 1, Attention("no_op"), Ffn("no_op"))
            if always:
                raise InputError(
                    f"{self.target}: no child of {self.parent.name} runs in {runtime}: {'; '.join(always)}; "
                    f"take it out of targets.{self.target}.runtimes{_AND_FORMATS if runtime == 'llama.cpp' else ''}"
                )
        last = len(self.parent.blocks) - 1
        for pin in self.wanted.pins:
            if max(pin.blocks) > last:
                raise InputError(
                    f"targets.{self.target}.pins names block {max(pin.blocks)}; {self.parent.name} has blocks 0 to "
                    f"{last}"
                )

    def _is_allowed(self, of: Replacement) -> bool:
        """Whether pins, kinds and runtimes of the target let a replacement be chosen."""
        allowed, own = self.wanted.allowed, self.parent.blocks[of.first_block]
        if of.span > 1 and not allowed.spans:
            return False
        for pin in self.wanted.pins:
            kept = {"attention": of.attention == own.attention, "ffn": of.ffn == own.ffn, "block": of == own}
            if set(pin.blocks) & set(of.parent_blocks) and (of.span > 1 or not kept[pin.keep]):
                return False
        kinds = of.attention == own.attention or of.attention.kind in allowed.attention
        kinds = kinds and (of.ffn == own.ffn or of.ffn.kind in allowed.ffn)
        config = self.parent.config
        return kinds and not any(
            config and reasons_against(runtime, config, of.first_block, of.attention, of.ffn)
            for runtime in self._runtimes
        )

    def check_runtimes(self, blocks: Sequence[Replacement]) -> None:
        """Raise InputError where a runtime refuses a child as a whole, which none of its blocks shows."""
        config, halves = self.parent.config, [(of.attention, of.ffn) for of in blocks]
        for runtime in self._runtimes if config else ():
            assert config is not None
            if against := refusals(config, halves)[runtime]:
                reasons = "; ".join(f"{one.text} ({one.way_out})" for one in against)
                raise InputError(f"{self.target}: the best child does not run in {runtime}: {reasons}")

    @property
    def _runtimes(self) -> tuple[Runtime, ...]:
        """Those that the target names, and llama.cpp where a speed limit holds in it."""
        named, limits = self.wanted.runtimes, self.wanted.constraints.values()
        holds = any(of.metric in SPEED_METRICS and of.engine == "llama.cpp" for of in limits)
        return (*named, "llama.cpp") if holds and "llama.cpp" not in named else named

    def predict(self, blocks: Sequence[Replacement], weights: Weights, point: OperatingPoint) -> dict[str, Any]:
        """What the tables say of a child, absolute and relative to the parent."""
        score, bounds = self.scores.total(blocks, weights), self.bounds(point)
        memory = _memory_point(bounds, self.parent)
        child, whole = (
            model_sizes(self.costs, of, memory.precision, memory.hardware, memory.engine)
            for of in (blocks, self.parent.blocks)
        )
        assert memory.context is not None, memory
        speed = next((bound for bound in bounds if bound.quantity.mix), None)
        return {
            "score": score.mean,
            "score_stderr": score.stderr,
            "params": child.params,
            "params_ratio": child.params / whole.params,
            "block_params": child.block_params,
            "block_params_ratio": child.block_params / whole.block_params,
            "weight_gib": child.weight_bytes / GIB,
            "kv_bytes_per_token": child.kv_bytes_per_token,
            "kv_ratio": child.kv_bytes_per_token / whole.kv_bytes_per_token,
            "memory_gib": child.memory_gib(memory.batch, memory.context, memory.tensor_parallel),
            "batch": memory.batch,
            "context": memory.context,
            "tensor_parallel": memory.tensor_parallel,
            "precision": memory.precision,
            "throughput_ratio": speed.speed_ratio(self.costs, blocks) if speed else None,
            "speed": speed.speed_json(self.costs, blocks) if speed else None,
        }

    def constraints_json(self, blocks: Sequence[Replacement], point: OperatingPoint) -> list[dict[str, Any]]:
        """Every limit with where it holds and what the tables predict."""
        return [bound.to_json(self.costs, blocks) for bound in self.bounds(point)]


def _read_parent(paths: Paths) -> ParentFacts:
    path = paths.parent / "puzzle_parent.json"
    found = read_json(path, "dvc repro prepare_parent")
    try:
        config = ModelConfig.from_json(found["config"])
        return ParentFacts(found["name"], found["digest"], parent_blocks(config), config)
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} lacks a field ({error}); run `dvc repro prepare_parent`") from error


def _memory_point(bounds: Sequence[Bound], parent: ParentFacts) -> Quantity:
    """Where memory is reported: at the memory constraint, else at the speed constraint's, else one full context."""
    quantities = [bound.quantity for bound in bounds]
    for quantity in quantities:
        if quantity.metric == "memory_gib":
            return quantity
    for quantity in quantities:
        if setting := quantity.setting:
            context = setting.input_tokens + setting.output_tokens
            return Quantity(
                "memory_gib",
                precision=setting.precision,
                hardware=setting.hardware,
                engine=setting.engine,
                batch=setting.batch,
                context=context,
                tensor_parallel=setting.tensor_parallel,
            )
    precision = quantities[0].precision
    return Quantity("memory_gib", precision=precision, context=parent.config.context if parent.config else 1)
