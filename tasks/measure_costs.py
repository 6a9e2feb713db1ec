"""measure_costs: timings in git, tables that a user brings, modelled GPUs -> artifacts/costs.parquet.

Timings are input data: this stage reads storage/timings/<name>.parquet and never takes them again, so the same params
give the same children. tasks/time_machine.py takes them. A user's own measurements (of TensorRT-LLM, say) lie there as
Parquet, CSV or JSON with the columns of costs.parquet.
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
from storage.tables import read_timings_or_costs, write_costs
from tasks.puzzle.cost_model import modelled_rows
from tasks.puzzle.costs import FIXED_COMPONENTS, Setting, from_table
from tasks.puzzle.hardware import check_precision, device_named
from tasks.puzzle.variants import attention_variants, ffn_variants

_SUFFIXES = (".parquet", ".csv", ".json")


@task(cache_policy=NO_CACHE)
def write_cost_table(params: Params, paths: Paths) -> None:
    """Join the named timings with the modelled hardware and write costs.parquet."""
    settings, variants, config = params.measure_costs, params.distill_blocks, Parent(paths.parent).config
    attentions = attention_variants(config, variants.linear)
    ffns = ffn_variants(config, variants.ffn_ratios, variants.width_multiple, variants.linear)
    refuse_unknown(variants.variant_tokens, [*attentions, *ffns])  # here, since this stage comes before any long one
    rows: list[CostRow] = []
    for name in settings.timings:
        path = _table_named(name)
        costs = from_table(read_timings_or_costs(path), config)
        _check_that_all_have_costs(costs, attentions, ffns, name, path)
        rows += costs
    for name in settings.hardware:
        check_precision(device_named(name), settings.precision)
    places = [(engine, degree) for engine in settings.engines for degree in settings.degrees(engine)]
    for name, place, scenario, batch in itertools.product(
        settings.hardware, places, settings.scenarios, settings.batches
    ):
        rows += modelled_rows(config, attentions, ffns, device_named(name), settings.precision, scenario, batch, *place)
    write_costs(paths.costs, rows)


def _table_named(name: str) -> Path:
    """The file in storage/timings with this name.

    Raises:
        InputError: there is none, or more than one.
    """
    found = [path for suffix in _SUFFIXES if (path := TIMINGS / f"{name}{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"measure_costs.timings names {name!r}, which {' and '.join(map(str, found))} are; keep one of them"
        )
    has = ", ".join(sorted(file.stem for file in TIMINGS.glob("*") if file.suffix in _SUFFIXES)) or "none"
    raise InputError(
        f"measure_costs.timings names {name!r}, but {TIMINGS / name}.parquet is missing (has: {has}); time that "
        f"machine with `python -m flows.measure_costs --time {name}`, bring a table of that name (.parquet, .csv, "
        ".json), or take the name out"
    )


def _check_that_all_have_costs(
    rows: Sequence[CostRow], attentions: Sequence[Attention], ffns: Sequence[Ffn], name: str, path: Path
) -> None:
    """Every setting of a table must have every variant: one without a cost would end the search, hours later."""
    wanted = {("attention", of.name) for of in attentions} | {("ffn", of.name) for of in ffns}
    wanted |= {(component, ANY_VARIANT) for component in FIXED_COMPONENTS}
    there: dict[Setting, set[tuple[str, str]]] = {}
    for row in rows:
        there.setdefault(Setting.of(row), set()).add((row.component, row.variant))
    for setting, known in there.items():
        runs = wanted - {("ffn", "linear")} if setting.engine == "llama.cpp" else wanted  # it knows no linear FFN
        if missing := sorted(runs - known):
            raise InputError(
                f"{path} has no {', '.join(map(' '.join, missing))} on {setting.text}, but a child may have it; add "
                f"it (`python -m flows.measure_costs --time {name}` times the machine it runs on), or leave it out of "
                "distill_blocks (linear, ffn_ratios)"
            )
