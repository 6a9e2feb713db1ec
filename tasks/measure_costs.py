"""measure_costs: timings in git + a modelled GPU -> artifacts/costs.parquet.

Timings are input data: this stage reads storage/timings/<hardware>.parquet and never takes them again, so the same
params give the same children. tasks/time_machine.py takes them.
"""

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.files import InputError
from storage.params import Params
from storage.parent import Parent
from storage.paths import TIMINGS, Paths
from storage.records import CostRow
from storage.tables import read_timings, write_costs
from tasks.puzzle.cost_model import modelled_rows
from tasks.puzzle.costs import from_timings
from tasks.puzzle.hardware import device_named
from tasks.puzzle.variants import attention_variants, ffn_variants


@task(cache_policy=NO_CACHE)
def write_cost_table(params: Params, paths: Paths) -> None:
    """Join the named timings with the modelled hardware and write costs.parquet."""
    settings, config = params.measure_costs, Parent(paths.parent).config
    rows: list[CostRow] = []
    for name in settings.timings:
        path = TIMINGS / f"{name}.parquet"
        if not path.is_file():
            has = ", ".join(sorted(file.stem for file in TIMINGS.glob("*.parquet"))) or "none"
            raise InputError(
                f"measure_costs.timings names {name!r}, but {path} is missing (has: {has}); time that machine with "
                f"`python -m flows.measure_costs --time {name}`, or take the name out"
            )
        rows += from_timings(read_timings(path), config)
    variants = params.distill_blocks
    attentions = attention_variants(config, variants.linear)
    ffns = ffn_variants(config, variants.ffn_ratios, variants.width_multiple, variants.linear)
    for name in settings.hardware:
        device = device_named(name)
        for scenario in settings.scenarios:
            for batch in settings.batches:
                rows += modelled_rows(config, attentions, ffns, device, settings.precision, scenario, batch)
    write_costs(paths.costs, rows)
