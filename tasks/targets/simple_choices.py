"""What simpler ways than the search choose for a target, at the operating point that suits each best. No torch.

In: a target with its tables. Out: blocks and their point. Shared by search_baselines, which compares them with the
target's child, and by search_architecture, where a target asks for one of them (`chosen_by`), so that the rest of the
pipeline heals it as it heals any child.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from storage.records import ChosenBy
from storage.variants import Replacement
from tasks.puzzle.search.baselines import depth, greedy, uniform
from tasks.puzzle.search.infeasible import InfeasibleError
from tasks.puzzle.search.operating_points import OperatingPoint
from tasks.puzzle.search.problem import Choice, Problem
from tasks.targets.target_tables import WEIGHTS, TargetTables

SimpleSearch = Callable[[Problem[Replacement], Sequence[Replacement]], tuple[Choice[Replacement], ...]]
Child = tuple[tuple[Replacement, ...], OperatingPoint]
"""Blocks, and the operating point where they were chosen."""


def simple_searches(tables: TargetTables) -> Mapping[ChosenBy, SimpleSearch]:
    """Return the simple searches by name."""
    return {"uniform": uniform, "greedy": greedy, "depth": partial(depth, order=tables.removal_order)}


def simple_choice(tables: TargetTables, name: ChosenBy) -> Child:
    """Return the choice of a simple search at the operating point where its sum of scores is least.

    Raises:
        InfeasibleError: it keeps the limits at no point.
        InputError: the cost table lacks a row that a constraint needs, or a runtime cannot load any child.
    """
    simple_search = simple_searches(tables)[name]
    problem, points = tables.problem(WEIGHTS)
    children, last_error = [], None
    for index, point in enumerate(points):
        try:
            chosen = simple_search(replace(problem, limits=(*problem.limits, *point.limits)), tables.parent.blocks)
        except InfeasibleError as error:
            last_error = error
            continue
        children.append((math.fsum(choice.score for choice in chosen), index, chosen))
    if not children:
        assert last_error is not None
        raise last_error
    _, index, chosen = min(children, key=lambda child: child[:2])
    return tuple(choice.replacement for choice in chosen), tables.limits.points[index]
