"""Time this machine: milliseconds of every component in an engine -> storage/timings/NAME.parquet, input for git.

Run: `puzzle time-machine NAME [--engine llama.cpp]`. In torch each variant is timed in stacks of blocks; llama.cpp runs
whole models only, so there random architectures are timed and divided into components (tasks/engines/designs.py).
"""

import itertools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from storage.files import InputError
from storage.gguf_child import STAND_IN_FFN, write_gguf
from storage.model_config import ModelConfig
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.records import ANY_VARIANT, Component, Precision, TimingRow
from storage.scenario import Scenario
from storage.sections import MeasureCosts
from storage.tables import read_timings, write_timings
from storage.variants import Attention, Ffn
from tasks.engines import designs, llamacpp
from tasks.engines.in_torch import ENGINE, Components, load_model
from tasks.engines.machine import machine, software
from tasks.engines.timings import Timing, Workload, fit_to_whole, line, spread
from tasks.puzzle.costs.sizes import component_sizes
from tasks.puzzle.model.device import Compute, prepare_compute
from tasks.puzzle.runtimes.rules import variants_refused
from tasks.puzzle.search_space import block_variants, parent_attention, parent_ffn

ComponentTimings = dict[tuple[Component, str], Timing]
"""(component, variant) -> its timing."""

_MEDIAN = "median difference of stacks with 2N and N copies, interleaved"
_HOW: dict[Component, str] = {
    "attention": _MEDIAN,
    "ffn": f"{_MEDIAN}; line through all widths (Theil-Sen)",
    "embedding": "median of the lookup alone",
    "head": "median of norm, logits of the last position and argmax",
    "step": "nothing: what the parent takes beyond its parts is in their factor",
}
_DESIGNS = 14
"""Random architectures that are timed beside the parent: twice as many as there are usual unknowns."""


def time_torch(params: Params, paths: Paths, name: str, path: Path) -> None:
    """Time every component in torch, in the device and dtype of `run`, and add the rows to `path`."""
    settings = params.measure_costs
    other_rows = _rows_of_other_engines(path, ENGINE)
    compute, parent = prepare_compute(params.run.device, params.run.dtype, settings.threads), Parent(paths.parent)
    precision: Precision = "bfloat16" if compute.dtype == torch.bfloat16 else "float32"
    columns = _TableColumns(name, ENGINE, precision, machine(compute.device), software(), settings)
    rows: list[TimingRow] = []
    for scenario, batch in itertools.product(settings.scenarios, settings.batches):
        workload = Workload(Scenario.parse(scenario), batch)
        timings, fit = _component_timings(params, parent, workload, compute)
        how = {component: text + fit for component, text in _HOW.items()}
        rows += columns.rows(parent.config, workload, timings, how)
    write_timings(path, [*other_rows, *rows])


def time_llamacpp(params: Params, paths: Paths, name: str, path: Path) -> None:
    """Time random architectures and the parent in llama.cpp, divide them into components, add the rows to `path`.

    Raises:
        InputError: xllamacpp is not installed, or a scenario is longer than the parent was made for.
    """
    llamacpp.check_installed()
    other_rows = _rows_of_other_engines(path, llamacpp.ENGINE)
    settings, config = params.measure_costs, Parent(paths.parent).config
    scenarios = [Scenario.parse(text) for text in settings.scenarios]
    workloads = [Workload(lengths, batch) for lengths in scenarios for batch in settings.batches]
    llamacpp.check_room(
        {f"measure_costs.scenarios, {workload.lengths}": workload for workload in workloads}, config.context
    )
    processor = machine(torch.device("cpu"))
    columns = _TableColumns(name, llamacpp.ENGINE, llamacpp.PRECISION, processor, llamacpp.software(), settings)
    rows: list[TimingRow] = []
    for workload in workloads:
        timings, how = _timings_of_designs(params, config, workload, paths.root)
        rows += columns.rows(config, workload, timings, dict.fromkeys(_HOW, how))
    write_timings(path, [*other_rows, *rows])


def _rows_of_other_engines(path: Path, engine: str) -> list[TimingRow]:
    """Read the rows of other engines, which the table keeps; they are read before anything is timed.

    Raises:
        InputError: the table is damaged or a user brought it, or another file has its name.
    """
    for suffix in (".csv", ".json"):
        if path.with_suffix(suffix).is_file():
            raise InputError(f"{path.with_suffix(suffix)} has that name; choose another for this machine")
    return [row for row in read_timings(path) if row.engine != engine] if path.is_file() else []


@dataclass(frozen=True)
class _TableColumns:
    """Columns that all rows of an engine share, and the params of the timing."""

    hardware: str
    engine: str
    precision: Precision
    machine: str
    versions: str
    settings: MeasureCosts

    def rows(
        self,
        config: ModelConfig,
        workload: Workload,
        timings: ComponentTimings,
        how: Mapping[Component, str],
    ) -> Iterator[TimingRow]:
        """Yield a row for every timing."""
        for (component, variant), timing in timings.items():
            sizes = component_sizes(config, component, variant, self.precision)
            yield TimingRow(
                component=component,
                variant=variant,
                first_block=None,
                span=1,
                hardware=self.hardware,
                engine=self.engine,
                precision=self.precision,
                tensor_parallel=1,
                scenario=str(workload.lengths),
                batch=workload.batch,
                prefill_ms=timing.prefill_ms,
                decode_ms=timing.decode_ms,
                weight_bytes=sizes.weight_bytes,
                kv_bytes_per_token=sizes.kv_bytes_per_token,
                params=sizes.params,
                origin="measured",
                how=how[component],
                machine=self.machine,
                versions=self.versions,
                dtype=self.precision,
                threads=self.settings.threads,
                repeats=self.settings.repeats,
                spread=timing.spread,
            )


def _component_timings(
    params: Params, parent: Parent, workload: Workload, compute: Compute
) -> tuple[ComponentTimings, str]:
    """Time each subblock variant, embedding and head in torch; return a text too that says how they were fitted."""
    settings, config = params.measure_costs, parent.config
    attentions, ffns = block_variants(config, params.distill_blocks, linear=True)
    copies = min(settings.copies, max(1, config.num_blocks // 2))
    timings: ComponentTimings = {}
    components = Components(config, workload, compute, copies, settings.repeats)
    label = f"timing {workload.lengths}, batch {workload.batch}"
    variants: list[Attention | Ffn] = [*attentions, *ffns]
    for variant in tqdm(variants, desc=label, unit="variant", disable=None):
        component: Component = "attention" if isinstance(variant, Attention) else "ffn"
        timings[component, variant.name] = components.subblock(variant)
    timings |= _smooth({ffn: timings["ffn", ffn.name] for ffn in ffns})
    timings["embedding", ANY_VARIANT], timings["head", ANY_VARIANT] = components.outside()
    blocks = [(parent_attention(config), parent_ffn(config))] * config.num_blocks
    counts: dict[tuple[Component, str], int] = {
        ("attention", parent_attention(config).name): config.num_blocks,
        ("ffn", parent_ffn(config).name): config.num_blocks,
        ("embedding", ANY_VARIANT): 1,
        ("head", ANY_VARIANT): 1,
    }
    whole = components.whole(load_model(parent.checkpoint, config, blocks, compute))
    fit = fit_to_whole(timings, counts, whole)
    return {**fit.parts, ("step", ANY_VARIANT): Timing(0.0, 0.0, 0.0)}, fit.text


def _smooth(timings: Mapping[Ffn, Timing]) -> ComponentTimings:
    """Put gated FFNs on a line through the medians of all widths: neighbours differ by less than a machine's noise."""
    gated = [ffn for ffn in timings if ffn.kind == "gated"]
    if len(gated) < 3:
        return {}
    widths = [ffn.intermediate_size for ffn in gated]
    prefill = line(widths, [timings[ffn].prefill_ms for ffn in gated])
    decode = line(widths, [timings[ffn].decode_ms for ffn in gated])
    return {
        ("ffn", ffn.name): Timing(prefill(ffn.intermediate_size), decode(ffn.intermediate_size), timings[ffn].spread)
        for ffn in gated
    }


def _timings_of_designs(
    params: Params, config: ModelConfig, workload: Workload, disk: Path
) -> tuple[ComponentTimings, str]:
    """Time each subblock variant in llama.cpp, from whole models; return a text too that says how they were fitted."""
    every_attention, every_ffn = block_variants(config, params.distill_blocks, linear=True)
    refused = variants_refused("llama.cpp", config, every_attention, every_ffn)
    attentions = [attention for attention in every_attention if ("attention", attention.name) not in refused]
    ffns = [ffn for ffn in every_ffn if ("ffn", ffn.name) not in refused]
    models: list[designs.Blocks] = [[(attentions[0], ffns[0])] * config.num_blocks]
    models += designs.designs(attentions, ffns, config.num_blocks, _DESIGNS, params.run.seed)
    times = _time_designs(params.measure_costs, config, models, workload, disk)
    prefill_ms = [statistics.median(rounds) for rounds in times["prefill"]]
    decode_ms = [statistics.median(rounds) for rounds in times["decode"]]
    usual = statistics.median(spread(rounds) for rounds in [*times["prefill"], *times["decode"]])
    stand_in = STAND_IN_FFN.intermediate_size
    prefill, decode = designs.solve(models, prefill_ms, stand_in), designs.solve(models, decode_ms, stand_in)
    parts: ComponentTimings = {}
    for attention in attentions:
        both = prefill.attention_ms(attention), decode.attention_ms(attention)
        parts["attention", attention.name] = Timing(*both, usual)
    for ffn in ffns:
        width = ffn.intermediate_size or stand_in
        parts["ffn", ffn.name] = Timing(prefill.ffn_ms(width), decode.ffn_ms(width), usual)
    parts["embedding", ANY_VARIANT] = parts["head", ANY_VARIANT] = Timing(0.0, 0.0, 0.0)
    parts["step", ANY_VARIANT] = Timing(prefill.rest, decode.rest, usual)
    counts: dict[tuple[Component, str], int] = {
        ("attention", attentions[0].name): config.num_blocks,
        ("ffn", ffns[0].name): config.num_blocks,
        ("step", ANY_VARIANT): 1,
    }
    fit = fit_to_whole(parts, counts, Timing(prefill_ms[0], decode_ms[0], usual))
    how = f"least squares over {len(models)} whole models{fit.text}; embedding and head are in step; a removed FFN as "
    return fit.parts, f"{how}the file has it, {stand_in} channels"


def _time_designs(
    settings: MeasureCosts, config: ModelConfig, models: Sequence[designs.Blocks], workload: Workload, disk: Path
) -> dict[str, list[list[float]]]:
    """Time each model in turn with a reference that stays, at the reference's first speed: a wandering speed cancels.

    Returns:
        phase -> model -> milliseconds of each round.
    """
    times: dict[str, list[list[float]]] = {"prefill": [], "decode": []}
    first_speed: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=disk) as scratch:
        files = {"reference": Path(scratch) / "reference.gguf", "model": Path(scratch) / "model.gguf"}
        reference = [(parent_attention(config), parent_ffn(config))] * max(1, config.num_blocks // 4)
        write_gguf(files["reference"], config, reference, None, "F16")
        label = f"timing llama.cpp, {workload.lengths}, batch {workload.batch}"
        for blocks in tqdm(models, desc=label, unit="model", disable=None):
            write_gguf(files["model"], config, blocks, None, "F16")
            rounds = llamacpp.time_files(files, workload, settings.repeats, settings.threads)
            for phase in times:
                speed = first_speed.setdefault(phase, statistics.median(rounds["reference"][phase]))
                pairs = zip(rounds["model"][phase], rounds["reference"][phase], strict=True)
                times[phase].append([speed * model_ms / reference_ms for model_ms, reference_ms in pairs])
    return times
