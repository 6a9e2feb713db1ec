"""Time this machine: milliseconds of every component in an engine -> storage/timings/NAME.parquet, input for git."""

import itertools
import statistics
import tempfile
from collections.abc import Iterator, Mapping
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
from storage.records import ANY_VARIANT, Attention, Component, Ffn, Precision, TimingRow
from storage.sections import MeasureCosts
from storage.tables import read_timings, write_timings
from tasks.engines import designs, llamacpp
from tasks.puzzle.child import DeciLMForCausalLM, build
from tasks.puzzle.device import Compute, compute
from tasks.puzzle.timing import ENGINE, Components, Timing, Workload, fit_to_whole, line, machine, software, spread
from tasks.puzzle.variants import attention_variants, component_sizes, ffn_variants, parent_attention, parent_ffn

Timings = dict[tuple[Component, str], Timing]


def time_torch(params: Params, paths: Paths, name: str, path: Path) -> None:
    """Time every component in torch, in the device and dtype of `run`, and add the rows to `path`."""
    settings = params.measure_costs
    kept = _others(path, ENGINE)
    device, parent = compute(params.run.device, params.run.dtype, settings.threads), Parent(paths.parent)
    precision: Precision = "bfloat16" if device.dtype == torch.bfloat16 else "float32"
    about = _About(name, ENGINE, precision, machine(device.device), software(), settings)
    rows: list[TimingRow] = []
    for scenario, batch in itertools.product(settings.scenarios, settings.batches):
        timings, fit = _in_torch(params, parent, Workload.of(scenario, batch), scenario, device)
        rows += about.rows(parent.config, scenario, batch, timings, {of: how + fit for of, how in _HOW.items()})
    write_timings(path, [*kept, *rows])


def time_llamacpp(params: Params, paths: Paths, name: str, path: Path) -> None:
    """Time random architectures and the parent in llama.cpp, divide them into components, add the rows to `path`.

    Raises:
        InputError: xllamacpp is not installed, or a scenario is longer than the parent was made for.
    """
    llamacpp.check_installed()
    kept = _others(path, llamacpp.ENGINE)
    settings, config = params.measure_costs, Parent(paths.parent).config
    points = list(itertools.product(settings.scenarios, settings.batches))
    works = [_llamacpp_work(Workload.of(*at)) for at in points]
    asked = {f"measure_costs.scenarios, {at}": work for (at, _), work in zip(points, works, strict=True)}
    llamacpp.check_room(asked, config.context)
    where = machine(torch.device("cpu"))
    about = _About(name, llamacpp.ENGINE, llamacpp.PRECISION, where, llamacpp.software(), settings)
    rows: list[TimingRow] = []
    for (scenario, batch), work in zip(points, works, strict=True):
        timings, how = _in_llamacpp(params, config, work, scenario, paths.root)
        rows += about.rows(config, scenario, batch, timings, dict.fromkeys(_HOW, how))
    write_timings(path, [*kept, *rows])


def _llamacpp_work(work: Workload) -> llamacpp.Work:
    return llamacpp.Work(work.batch, work.input_tokens, work.mean_context)


def _others(path: Path, engine: str) -> list[TimingRow]:
    """Rows of other engines that the table has and keeps; read before anything is timed.

    Raises:
        InputError: the table is damaged, or one that a user brought, or another file has its name.
    """
    for suffix in (".csv", ".json"):
        if path.with_suffix(suffix).is_file():
            raise InputError(f"{path.with_suffix(suffix)} has that name; choose another for this machine")
    return [row for row in read_timings(path) if row.engine != engine] if path.is_file() else []


@dataclass(frozen=True)
class _About:
    """What all rows of an engine share."""

    hardware: str
    engine: str
    precision: Precision
    machine: str
    versions: str
    settings: MeasureCosts

    def rows(
        self, config: ModelConfig, scenario: str, batch: int, timings: Timings, how: Mapping[Component, str]
    ) -> Iterator[TimingRow]:
        """A row for every timing."""
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
                scenario=scenario,
                batch=batch,
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


def _in_torch(params: Params, parent: Parent, work: Workload, scenario: str, device: Compute) -> tuple[Timings, str]:
    """Each subblock variant, embedding and head in one setting; how they were fitted to the whole."""
    settings, config = params.measure_costs, parent.config
    bld = params.distill_blocks
    ffns = ffn_variants(config, bld.ffn_ratios, bld.width_multiple, linear=True)
    variants: list[Attention | Ffn] = [*attention_variants(config, linear=True), *ffns]
    copies = min(settings.copies, max(1, config.num_blocks // 2))
    timings: Timings = {}
    timed = Components(config, work, device, copies, settings.repeats)
    for variant in tqdm(variants, desc=f"timing {scenario}, batch {work.batch}", unit="variant", disable=None):
        component: Component = "attention" if isinstance(variant, Attention) else "ffn"
        timings[component, variant.name] = timed.subblock(variant)
    timings |= _smooth({variant: timings["ffn", variant.name] for variant in variants if isinstance(variant, Ffn)})
    embedding, head = timed.outside()
    timings["embedding", ANY_VARIANT], timings["head", ANY_VARIANT] = embedding, head
    counts: dict[tuple[Component, str], int] = {
        ("attention", parent_attention(config).name): config.num_blocks,
        ("ffn", parent_ffn(config).name): config.num_blocks,
        ("embedding", ANY_VARIANT): 1,
        ("head", ANY_VARIANT): 1,
    }
    fit = fit_to_whole(timings, counts, timed.whole(_whole_parent(parent, device)))
    return {**fit.parts, ("step", ANY_VARIANT): Timing(0.0, 0.0, 0.0)}, fit.text


_DESIGNS = 14
"""Random architectures that are timed beside the parent: twice as many as there are usual unknowns."""


def _in_llamacpp(
    params: Params, config: ModelConfig, work: llamacpp.Work, scenario: str, disk: Path
) -> tuple[Timings, str]:
    """As :func:`_in_torch`, but of whole models, each in turn with one that stays: a wandering speed cancels."""
    settings, bld = params.measure_costs, params.distill_blocks
    attentions = attention_variants(config, linear=True)
    ffns = ffn_variants(config, bld.ffn_ratios, bld.width_multiple, linear=False)
    own = (attentions[0], ffns[0])
    models: list[designs.Blocks] = [[own] * config.num_blocks]
    models += designs.designs(attentions, ffns, config.num_blocks, _DESIGNS, params.run.seed)
    times: dict[str, list[list[float]]] = {"prefill": [], "decode": []}
    speed: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=disk) as scratch:
        files = {"reference": Path(scratch) / "reference.gguf", "model": Path(scratch) / "model.gguf"}
        write_gguf(files["reference"], config, [own] * max(1, config.num_blocks // 4), None, "F16")
        label = f"timing llama.cpp, {scenario}, batch {work.batch}"
        for blocks in tqdm(models, desc=label, unit="model", disable=None):
            write_gguf(files["model"], config, blocks, None, "F16")
            rounds = llamacpp.time_files(files, work, settings.repeats, settings.threads)
            for phase, found in times.items():
                speed.setdefault(phase, statistics.median(rounds["reference"][phase]))
                pairs = zip(rounds["model"][phase], rounds["reference"][phase], strict=True)
                found.append([speed[phase] * model / reference for model, reference in pairs])
    medians = {phase: [statistics.median(rounds) for rounds in found] for phase, found in times.items()}
    stand_in = STAND_IN_FFN.intermediate_size
    costs = {phase: designs.solve(models, found, stand_in) for phase, found in medians.items()}
    usual = statistics.median(spread(rounds) for found in times.values() for rounds in found)
    prefill, decode = costs["prefill"], costs["decode"]
    parts: Timings = {}
    for attention in attentions:
        both = prefill.of_attention(attention), decode.of_attention(attention)
        parts["attention", attention.name] = Timing(*both, usual)
    for ffn in ffns:
        width = ffn.intermediate_size or stand_in
        parts["ffn", ffn.name] = Timing(prefill.of_ffn(width), decode.of_ffn(width), usual)
    parts["embedding", ANY_VARIANT] = parts["head", ANY_VARIANT] = Timing(0.0, 0.0, 0.0)
    parts["step", ANY_VARIANT] = Timing(prefill.rest, decode.rest, usual)
    counts: dict[tuple[Component, str], int] = {
        ("attention", own[0].name): config.num_blocks,
        ("ffn", own[1].name): config.num_blocks,
        ("step", ANY_VARIANT): 1,
    }
    whole = Timing(medians["prefill"][0], medians["decode"][0], usual)
    fit = fit_to_whole(parts, counts, whole)
    how = f"least squares over {len(models)} whole models{fit.text}; embedding and head are in step; a removed FFN as "
    return fit.parts, f"{how}the file has it, {stand_in} channels"


def _smooth(widths: Mapping[Ffn, Timing]) -> dict[tuple[Component, str], Timing]:
    """Gated FFNs on the line through the medians of all widths: neighbours differ by less than a machine's noise."""
    gated = [variant for variant in widths if variant.kind == "gated"]
    if len(gated) < 3:
        return {}
    sizes = [variant.intermediate_size for variant in gated]
    prefill = line(sizes, [widths[variant].prefill_ms for variant in gated])
    decode = line(sizes, [widths[variant].decode_ms for variant in gated])
    return {
        ("ffn", variant.name): Timing(
            prefill(variant.intermediate_size), decode(variant.intermediate_size), widths[variant].spread
        )
        for variant in gated
    }


_MEDIAN = "median difference of stacks with 2N and N copies, interleaved"
_HOW: dict[Component, str] = {
    "attention": _MEDIAN,
    "ffn": f"{_MEDIAN}; line through all widths (Theil-Sen)",
    "embedding": "median of the lookup alone",
    "head": "median of norm, logits of the last position and argmax",
    "step": "nothing: what the parent takes beyond its parts is in their factor",
}


def _whole_parent(parent: Parent, device: Compute) -> DeciLMForCausalLM:
    config = parent.config
    tensors = {name: parent.checkpoint.tensor(name) for name in parent.checkpoint.files}
    return build(config, [(parent_attention(config), parent_ffn(config))] * config.num_blocks, tensors, device)
