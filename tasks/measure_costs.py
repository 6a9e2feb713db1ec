"""measure_costs: timings in git, tables that a user brings, modelled GPUs -> artifacts/costs.parquet.

Timings are input data: this stage reads storage/timings/<name>.parquet and never takes them again, so the same params
give the same children. `puzzle time-machine NAME` takes them. A user's own measurements (of TensorRT-LLM, say) lie in
the same folder as Parquet, CSV or JSON with the columns of costs.parquet.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.files import InputError
from storage.library import refuse_unknown
from storage.model_config import ModelConfig
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.records import ANY_VARIANT, CostRow
from storage.scenario import Setting
from storage.sections import MeasureCosts
from storage.tables import read_timings_or_costs, timings_named, write_costs
from storage.variants import Attention, Ffn
from tasks.puzzle.costs.cost_model import modelled_rows
from tasks.puzzle.costs.cost_table import FIXED_COMPONENTS, from_table
from tasks.puzzle.costs.hardware import check_precision, device_named
from tasks.puzzle.runtimes.rules import variants_refused
from tasks.puzzle.search_space import block_variants


@task(cache_policy=NO_CACHE)
def write_cost_table(params: Params, paths: Paths) -> None:
    """Join the named timings with the modelled hardware and write costs.parquet."""
    settings, variants, config = params.measure_costs, params.distill_blocks, Parent(paths.parent).config
    attentions, ffns = block_variants(config, variants)
    refuse_unknown(variants.variant_tokens, [*attentions, *ffns])  # this stage comes before any long one
    rows: list[CostRow] = []
    for name in settings.timings:
        path = timings_named(name)
        costs = from_table(read_timings_or_costs(path), config)
        _check_that_all_have_costs(costs, config, attentions, ffns, name, path)
        rows += costs
    for name in settings.hardware:
        check_precision(device_named(name), settings.precision)
    for setting in _modelled_settings(settings):
        rows += modelled_rows(config, attentions, ffns, device_named(setting.hardware), setting)
    write_costs(paths.costs, rows)


def _modelled_settings(settings: MeasureCosts) -> Iterator[Setting]:
    """Yield every setting of params.yaml whose milliseconds are modelled."""
    engines = [(engine, degree) for engine in settings.engines for degree in settings.degrees(engine)]
    for name, (engine, degree), scenario, batch in itertools.product(
        settings.hardware, engines, settings.scenarios, settings.batches
    ):
        yield Setting(name, engine, settings.precision, degree, scenario, batch)


def _check_that_all_have_costs(
    rows: Sequence[CostRow],
    config: ModelConfig,
    attentions: Sequence[Attention],
    ffns: Sequence[Ffn],
    name: str,
    path: Path,
) -> None:
    """Every setting of a table must have every variant: one without a cost would end the search, hours later.

    Of llama.cpp it must have those that llama.cpp computes.
    """
    needed = {("attention", attention.name) for attention in attentions} | {("ffn", ffn.name) for ffn in ffns}
    needed |= {(component, ANY_VARIANT) for component in FIXED_COMPONENTS}
    costed: dict[Setting, set[tuple[str, str]]] = {}
    for row in rows:
        costed.setdefault(Setting.from_row(row), set()).add((row.component, row.variant))
    refused = variants_refused("llama.cpp", config, attentions, ffns)
    for setting, components in costed.items():
        computed = needed - refused if setting.engine == "llama.cpp" else needed
        if missing := sorted(computed - components):
            raise InputError(
                f"{path} has no {', '.join(map(' '.join, missing))} on {setting.text}, but a child may have it; add "
                f"it (`puzzle time-machine {name}` times the machine that it runs on), or leave it out of "
                "distill_blocks (linear, ffn_ratios)"
            )
