"""A target with the tables that its search reads, and the search itself. No torch.

In: scores.parquet, costs.parquet and puzzle_parent.json, or a user's own tables; a target of params.yaml. Out: the
problem that the solver gets, the best child, what the tables predict of it. Shared by search_architecture,
search_baselines, and the commands explain and frontier.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from storage.architecture import Predicted, ReachedLimit
from storage.params import Params
from storage.paths import Paths
from storage.records import CostRow, ScoreRow, Weights
from storage.sections import SearchArchitecture
from storage.tables import read_costs, read_scores
from storage.targets import Target
from storage.variants import Replacement
from tasks.puzzle.costs.cost_table import CostTable
from tasks.puzzle.removals import removal_order
from tasks.puzzle.search.best_child import BestChild, PointLimits, alternatives, best_child
from tasks.puzzle.search.mip import SolverSettings
from tasks.puzzle.search.operating_points import OperatingPoint
from tasks.puzzle.search.problem import Choice, Limit, Problem
from tasks.puzzle.search.score_rule import Scores
from tasks.targets.allowed import AllowedReplacements, with_export_needs
from tasks.targets.constraints import TargetLimits
from tasks.targets.parent_facts import ParentFacts
from tasks.targets.predictions import predict, reached_limit

WEIGHTS: Weights = "decoupled"
"""The training whose scores count: the child is assembled from the library's trained variants."""


@dataclass(frozen=True)
class SearchedChild:
    """The child that a search chose: its blocks, its operating point, and how the search went."""

    blocks: tuple[Replacement, ...]
    point: OperatingPoint
    best: BestChild[Replacement]


def solver_settings(section: SearchArchitecture, seed: int) -> SolverSettings:
    """Return the solver's settings that params ask for."""
    return SolverSettings(section.relative_gap, section.node_limit, seed)


@dataclass(frozen=True)
class TargetTables:
    """A target with all that its search reads.

    Attributes:
        target_name: key in params.yaml.
        target: constraints, pins, kinds, runtimes.
        parent: the parent.
        scores: replace-1-block scores.
        removal_order: whole blocks in the order in which the joint KL of their removal grows least, as far as measured.
        costs: sizes and milliseconds.
        speed_margin: share by which the search tightens limits on speeds.
    """

    target_name: str
    target: Target
    parent: ParentFacts
    scores: Scores
    removal_order: tuple[int, ...]
    costs: CostTable
    speed_margin: float

    @classmethod
    def read(cls, target_name: str, params: Params, paths: Paths) -> Self:
        """Read the tables of the pipeline.

        Raises:
            InputError: a table is missing or wrong.
        """
        target = with_export_needs(params.target(target_name), params.export_child.formats)
        scores, costs = read_scores(paths.scores), read_costs(paths.costs)
        margin = params.search_architecture.speed_margin
        return cls.from_rows(target_name, target, ParentFacts.read(paths), scores, costs, margin)

    @classmethod
    def from_rows(
        cls,
        target_name: str,
        target: Target,
        parent: ParentFacts,
        scores: Sequence[ScoreRow],
        costs: Sequence[CostRow],
        speed_margin: float,
    ) -> Self:
        """Make the tables from rows that were read elsewhere."""
        block = parent.blocks[0]
        return cls(
            target_name,
            target,
            parent,
            Scores(scores, block.attention, block.ffn),
            removal_order(scores, parent.blocks),
            CostTable(costs),
            speed_margin,
        )

    @cached_property
    def limits(self) -> TargetLimits:
        """Return the constraints as limits."""
        return TargetLimits(self.target_name, self.target.constraints, self.parent, self.costs, self.speed_margin)

    @property
    def allowed(self) -> AllowedReplacements:
        """Return the replacements that may be chosen."""
        return AllowedReplacements(self.target_name, self.target, self.parent)

    def problem(self, weights: Weights) -> tuple[Problem[Replacement], tuple[PointLimits, ...]]:
        """Return all allowed replacements with a score, the parent's own blocks (which score 0), and their limits.

        Raises:
            InputError: the cost table lacks a row that a constraint needs, or a runtime cannot load any child.
        """
        self.allowed.check_target()
        scored = sorted({*self.parent.blocks, *self.scores.replacements(weights)})
        replacements = [replacement for replacement in scored if self.allowed.allows(replacement)]
        choices = tuple(
            Choice(replacement, self.scores.score(replacement, weights).mean) for replacement in replacements
        )
        fixed, points = self._fixed_limits(replacements), self._point_limits(replacements)
        where = f"targets.{self.target_name}.constraints"
        rules = self.allowed.rules(replacements)
        return Problem(self.target_name, len(self.parent.blocks), choices, fixed, where, rules), points

    @property
    def _fixed_names(self) -> set[str]:
        """Return the names of the constraints that leave nothing open."""
        return {name for name, constraint in self.target.constraints.items() if not constraint.is_open}

    def _fixed_limits(self, replacements: Sequence[Replacement]) -> tuple[Limit, ...]:
        """Return the limits that are the same at every operating point."""
        bounds = [bound for bound in self.limits.bounds(self.limits.points[0]) if bound.name in self._fixed_names]
        return tuple(bound.as_limit(self.costs, replacements) for bound in bounds)

    def _point_limits(self, replacements: Sequence[Replacement]) -> tuple[PointLimits, ...]:
        """Return the other limits at each operating point."""
        points = []
        for point in self.limits.points:
            bounds = [bound for bound in self.limits.bounds(point) if bound.name not in self._fixed_names]
            points.append(PointLimits(point.text, tuple(bound.as_limit(self.costs, replacements) for bound in bounds)))
        return tuple(points)

    def search(self, weights: Weights, settings: SolverSettings) -> SearchedChild:
        """Find the best child.

        Raises:
            InfeasibleError: no child keeps all constraints.
            InputError: the cost table lacks a row that a constraint needs, or a runtime cannot load any child.
        """
        problem, points = self.problem(weights)
        return self._searched(best_child(problem, settings, points))

    def alternatives(
        self, child: SearchedChild, weights: Weights, settings: SolverSettings, count: int, min_distance: float
    ) -> Iterator[SearchedChild]:
        """Find further children, best first, each differing from all before it in a share of the parent's blocks."""
        problem, points = self.problem(weights)
        for best in alternatives(problem, settings, points, child.best, count, min_distance):
            yield self._searched(best)

    def _searched(self, best: BestChild[Replacement]) -> SearchedChild:
        blocks = tuple(choice.replacement for choice in best.solution.chosen)
        return SearchedChild(blocks, self.limits.points[best.point_index], best)

    def predict(self, blocks: Sequence[Replacement], weights: Weights, point: OperatingPoint) -> Predicted:
        """Predict a child by the tables, absolute and relative to the parent."""
        score = self.scores.total(blocks, weights)
        return predict(blocks, score, self.limits.bounds(point), self.parent, self.costs)

    def reached_limits(self, blocks: Sequence[Replacement], point: OperatingPoint) -> tuple[ReachedLimit, ...]:
        """Return every limit with where it holds and what the tables predict of a child."""
        return tuple(reached_limit(bound, self.costs, blocks) for bound in self.limits.bounds(point))
