"""The deployments that limits on speeds can name: a hardware with an engine and a precision. No torch.

In: costs.parquet, or before it exists params.yaml and the tables in storage/timings. Out: the choices of the UI's form.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from storage.params import Params
from storage.paths import Paths
from storage.records import CostRow, Origin, Precision
from storage.tables import read_costs, read_timings_or_costs, timings_named


@dataclass(frozen=True, order=True)
class Deployment:
    """Hardware, engine and precision, and whether milliseconds there are measured or modelled."""

    hardware: str
    engine: str
    precision: Precision
    origin: Origin

    @property
    def text(self) -> str:
        """Return the deployment as text for people: `xeon-icelake-2t, llama.cpp, float16 (measured)`."""
        return f"{self.hardware}, {self.engine}, {self.precision} ({self.origin})"


def deployments(params: Params, paths: Paths) -> tuple[Deployment, ...]:
    """Read the deployments of costs.parquet, measured ones first; before it exists, those measure_costs will give it.

    Raises:
        InputError: a table is missing or damaged.
    """
    if paths.costs.is_file():
        return _measured_first(_deployments(read_costs(paths.costs)))
    return planned_deployments(params)


def planned_deployments(params: Params) -> tuple[Deployment, ...]:
    """Return the deployments that measure_costs gives costs.parquet: those of the named timings, and the modelled ones.

    Raises:
        InputError: a table of timings is missing or damaged.
    """
    settings = params.measure_costs
    planned = {
        Deployment(hardware, engine, settings.precision, "modelled")
        for hardware in settings.hardware
        for engine in settings.engines
    }
    for name in settings.timings:
        planned.update(_deployments(read_timings_or_costs(timings_named(name))))
    return _measured_first(planned)


def _deployments(rows: Iterable[CostRow]) -> Iterator[Deployment]:
    for row in rows:
        yield Deployment(row.hardware, row.engine, row.precision, row.origin)


def _measured_first(choices: Iterable[Deployment]) -> tuple[Deployment, ...]:
    return tuple(sorted(set(choices), key=lambda deployment: (deployment.origin != "measured", deployment)))
