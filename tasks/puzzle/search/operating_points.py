"""Batches and tensor-parallel degrees that the search may choose, one pair for each place. No torch.

In: what constraints leave open, and the settings that the cost table has. Out: every combination. A place is a
hardware, engine, precision and scenario; places that differ only in the scenario are one deployment, which is loaded
with one tensor-parallel degree.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from storage.files import InputError
from storage.scenario import Place, Setting
from tasks.puzzle.costs.cost_table import CostTable

_MOST_POINTS = 10_000


@dataclass(frozen=True)
class OpenSetting:
    """A place where a constraint leaves the batch or the tensor-parallel degree to the search: None for these."""

    place: Place
    batch: int | None
    tensor_parallel: int | None

    def admits(self, setting: Setting) -> bool:
        """Tell whether a setting is at this place and has what the constraint names."""
        has_batch = self.batch in (None, setting.batch)
        has_degree = self.tensor_parallel in (None, setting.tensor_parallel)
        return setting.place == self.place and has_batch and has_degree


@dataclass(frozen=True)
class OperatingPoint:
    """A setting for each place that constraints leave open."""

    settings: tuple[Setting, ...]

    def setting(self, place: Place) -> Setting:
        """Return the setting at a place that was left open."""
        return next(setting for setting in self.settings if setting.place == place)

    @property
    def text(self) -> str:
        """Return the settings in words, for messages."""
        parts = []
        for setting in self.settings:
            devices = f" on {setting.tensor_parallel} devices" if setting.tensor_parallel > 1 else ""
            parts.append(f"{setting.scenario} batch {setting.batch}{devices}")
        return ", ".join(parts)


NOTHING_OPEN = OperatingPoint(())
"""The only operating point of a target that leaves no place open."""


def operating_points(open_settings: Iterable[OpenSetting], table: CostTable) -> tuple[OperatingPoint, ...]:
    """List all operating points, small batches first; constraints on the same place share its setting.

    Raises:
        InputError: the table has no setting for a place, or there are too many combinations.
    """
    possible: dict[Place, set[Setting]] = {}
    for open_setting in open_settings:
        settings = {setting for setting in table.settings if open_setting.admits(setting)}
        place = open_setting.place
        possible[place] = possible.get(place, settings) & settings
        if not possible[place]:
            raise _nothing_possible(open_setting, table)
    if math.prod(len(settings) for settings in possible.values()) > _MOST_POINTS:
        counts = ", ".join(f"{len(settings)} at {place.scenario}" for place, settings in possible.items())
        raise InputError(
            f"`best` leaves more than {_MOST_POINTS} combinations of batches and devices open ({counts}); name some of "
            "them in the constraints"
        )
    ordered = [sorted(settings, key=_batch_first) for settings in possible.values()]
    return tuple(OperatingPoint(settings) for settings in itertools.product(*ordered) if _has_one_degree_each(settings))


def _batch_first(setting: Setting) -> tuple[int, int]:
    return setting.batch, setting.tensor_parallel


def _has_one_degree_each(settings: Iterable[Setting]) -> bool:
    """Tell whether the settings of each deployment have one tensor-parallel degree."""
    degrees: dict[tuple[str, str, str], int] = {}
    for setting in settings:
        deployment = (setting.hardware, setting.engine, setting.precision)
        if degrees.setdefault(deployment, setting.tensor_parallel) != setting.tensor_parallel:
            return False
    return True


def _nothing_possible(open_setting: OpenSetting, table: CostTable) -> InputError:
    place = open_setting.place
    words = [place.hardware, place.engine, place.precision, place.scenario]
    if open_setting.batch:
        words.append(f"batch {open_setting.batch}")
    if open_setting.tensor_parallel:
        words.append(f"{open_setting.tensor_parallel} devices")
    settings = "; ".join(setting.text for setting in table.settings) or "no rows"
    return InputError(
        f"no costs for {', '.join(words)}, at which the search is to choose the best; the table has {settings}. Add "
        "the scenario and batches to measure_costs, and run `dvc repro measure_costs`"
    )
