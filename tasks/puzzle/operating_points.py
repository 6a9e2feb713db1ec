"""Batches and tensor-parallel degrees that the search may choose, one pair for each place. No torch.

In: what constraints leave open, and the settings that the cost table has. Out: every combination. A place is a
hardware, engine, precision and scenario; places that differ only in the scenario are one deployment, which is loaded
with one tensor-parallel degree.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from storage.files import InputError
from storage.records import Precision
from tasks.puzzle.costs import CostTable, Setting

_MOST_POINTS = 10_000


@dataclass(frozen=True, order=True)
class Place:
    """Where a model is served; `scenario` is input/output length in tokens."""

    hardware: str
    engine: str
    precision: Precision
    scenario: str


@dataclass(frozen=True, order=True)
class Operation:
    """How it is served there: sequences at once, devices that share the model."""

    batch: int
    tensor_parallel: int


@dataclass(frozen=True)
class OperatingPoint:
    """One operation for each place that is left open."""

    operations: Mapping[Place, Operation]

    def setting(self, place: Place) -> Setting:
        """Where milliseconds are looked up."""
        chosen = self.operations[place]
        return Setting(
            place.hardware, place.engine, place.precision, chosen.tensor_parallel, place.scenario, chosen.batch
        )

    @property
    def text(self) -> str:
        """For people."""
        return ", ".join(
            f"{place.scenario} batch {chosen.batch}"
            + (f" on {chosen.tensor_parallel} devices" if chosen.tensor_parallel > 1 else "")
            for place, chosen in self.operations.items()
        )


NOWHERE = OperatingPoint({})
"""The only point where nothing is left open."""


@dataclass(frozen=True)
class Wish:
    """A place that a constraint leaves open: the batch and degree that it names, None for those that it does not."""

    place: Place
    batch: int | None
    tensor_parallel: int | None


def operating_points(wishes: Iterable[Wish], table: CostTable) -> tuple[OperatingPoint, ...]:
    """All points, small batches first; constraints on the same place share its operation.

    Raises:
        InputError: the table has no setting for a place, or there are too many combinations.
    """
    possible: dict[Place, set[Operation]] = {}
    for wish in wishes:
        found = set(_operations(wish, table))
        possible[wish.place] = possible.get(wish.place, found) & found
        if not possible[wish.place]:
            raise _nothing(wish, table)
    if math.prod(len(operations) for operations in possible.values()) > _MOST_POINTS:
        counts = ", ".join(f"{len(operations)} at {place.scenario}" for place, operations in possible.items())
        raise InputError(
            f"`best` leaves more than {_MOST_POINTS} combinations of batches and devices open ({counts}); name some of "
            "them in the constraints"
        )
    points = itertools.product(*(sorted(operations) for operations in possible.values()))
    return tuple(
        OperatingPoint(dict(zip(possible, point, strict=True))) for point in points if _is_one(possible, point)
    )


def _operations(wish: Wish, table: CostTable) -> Iterable[Operation]:
    for at in table.settings:
        here = Place(at.hardware, at.engine, at.precision, at.scenario) == wish.place
        if here and wish.batch in (None, at.batch) and wish.tensor_parallel in (None, at.tensor_parallel):
            yield Operation(at.batch, at.tensor_parallel)


def _is_one(places: Iterable[Place], point: tuple[Operation, ...]) -> bool:
    """Whether places of one deployment have one tensor-parallel degree."""
    degrees: dict[tuple[str, str, str], int] = {}
    return all(
        degrees.setdefault((place.hardware, place.engine, place.precision), chosen.tensor_parallel)
        == chosen.tensor_parallel
        for place, chosen in zip(places, point, strict=True)
    )


def _nothing(wish: Wish, table: CostTable) -> InputError:
    place = wish.place
    fixed = [f"batch {wish.batch}"] if wish.batch else []
    fixed += [f"{wish.tensor_parallel} devices"] if wish.tensor_parallel else []
    has = "; ".join(known.text for known in table.settings) or "no rows"
    return InputError(
        f"no costs for {', '.join([place.hardware, place.engine, place.precision, place.scenario, *fixed])}, of which "
        f"the search is to choose the best; the table has {has}. Add the scenario and batches to measure_costs, and "
        "run `dvc repro measure_costs`"
    )
