"""Write the costs of every variant to artifacts/costs.parquet. Run: `puzzle stage measure_costs`.

It times nothing: `puzzle time-machine NAME` does, and writes a table that params name.
"""

from prefect import flow

from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import measure_costs as tasks


@flow(
    name="measure_costs",
    description="Parameters, bytes and milliseconds of every variant: timed tables and a modelled GPU.",
)
def measure_costs(params: Params, paths: Paths) -> None:
    """Join the timings that params name with the modelled hardware."""
    tasks.write_cost_table(params, paths)


if __name__ == "__main__":
    main(measure_costs)
