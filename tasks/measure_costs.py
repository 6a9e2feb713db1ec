"""measure_costs: timings in git + a modelled GPU -> artifacts/costs.parquet.

Timings are input data: this stage reads storage/timings/<hardware>.parquet and never takes them again, so the same
params give the same children. tasks/time_machine.py takes them.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.files import InputError
from storage.library import refuse_unknown
from storage.params import Params
from storage.parent import Parent
from storage.paths import TIMINGS, Paths
from storage.records import ANY_VARIANT, Attention, CostRow, Ffn
from storage.tables import read_timings, write_costs
from tasks.puzzle.cost_model import modelled_rows
from tasks.puzzle.costs import FIXED_COMPONENTS, from_timings
from tasks.puzzle.hardware import check_precision, device_named
from tasks.puzzle.variants import attention_variants, ffn_variants


@task(cache_policy=NO_CACHE)
def write_cost_table(params: Params, paths: Paths) -> None:
    """Join the named timings with the modelled hardware and write costs.parquet."""
    settings, variants, config = params.measure_costs, params.distill_blocks, Parent(paths.parent).config
    attentions = attention_variants(config, variants.linear)
    ffns = ffn_variants(config, variants.ffn_ratios, variants.width_multiple, variants.linear)
    refuse_unknown(variants.variant_tokens, [*attentions, *ffns])  # here, since this stage comes before any long one
    rows: list[CostRow] = []
    for name in settings.timings:
        path = TIMINGS / f"{name}.parquet"
        if not path.is_file():
            has = ", ".join(sorted(file.stem for file in TIMINGS.glob("*.parquet"))) or "none"
            raise InputError(
                f"measure_costs.timings names {name!r}, but {path} is missing (has: {has}); time that machine with "
                f"`python -m flows.measure_costs --time {name}`, or take the name out"
            )
        timings = from_timings(read_timings(path), config)
        _check_that_all_are_timed(timings, attentions, ffns, name, path)
        rows += timings
    for name in settings.hardware:
        check_precision(device_named(name), settings.precision)
    places = [(engine, degree) for engine in settings.engines for degree in settings.degrees(engine)]
    for name, place, scenario, batch in itertools.product(
        settings.hardware, places, settings.scenarios, settings.batches
    ):
        rows += modelled_rows(config, attentions, ffns, device_named(name), settings.precision, scenario, batch, *place)
    write_costs(paths.costs, rows)


def _check_that_all_are_timed(
    rows: Sequence[CostRow], attentions: Sequence[Attention], ffns: Sequence[Ffn], name: str, path: Path
) -> None:
    """Every setting of a table must have every variant: one without a cost would end the search, hours later."""
    wanted = {("attention", of.name) for of in attentions} | {("ffn", of.name) for of in ffns}
    wanted |= {(component, ANY_VARIANT) for component in FIXED_COMPONENTS}
    there: dict[tuple[str, int, str], set[tuple[str, str]]] = {}
    for row in rows:
        there.setdefault((row.scenario, row.batch, row.precision), set()).add((row.component, row.variant))
    for (scenario, batch, precision), timed in there.items():
        if missing := sorted(wanted - timed):
            raise InputError(
                f"{path} has no {', '.join(map(' '.join, missing))} at {scenario}, batch {batch}, in {precision}, but "
                f"a child may have it; time it with `python -m flows.measure_costs --time {name}` on that machine, or "
                "leave it out of distill_blocks (linear, ffn_ratios)"
            )
