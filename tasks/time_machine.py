"""Time this machine: milliseconds of every component with torch -> a table in storage/timings/, input data for git."""

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from storage.files import InputError
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.records import ANY_VARIANT, Attention, Component, Ffn, TimingRow
from storage.tables import read_timings, write_timings
from tasks.puzzle.child import DeciLMForCausalLM, build
from tasks.puzzle.device import Compute, compute
from tasks.puzzle.timing import ENGINE, Components, Timing, Workload, fit_to_whole, line, machine, software
from tasks.puzzle.variants import attention_variants, component_sizes, ffn_variants, parent_attention, parent_ffn


def time_this_machine(params: Params, paths: Paths, name: str, path: Path, parent_only: bool) -> None:
    """Time every component on this machine and write the table to `path`; `parent_only` leaves out the variants.

    Raises:
        InputError: torch has no kernels for measure_costs.precision.
    """
    settings = params.measure_costs
    if settings.precision not in ("bfloat16", "float32"):
        raise InputError(
            f"measure_costs.precision is {settings.precision}, but torch is timed in bfloat16 or float32; set one of "
            "them to time this machine"
        )
    device = compute(params.run.device, settings.precision, settings.threads)
    workloads = [
        (scenario, Workload.of(scenario, batch)) for scenario in settings.scenarios for batch in settings.batches
    ]
    rows: list[TimingRow] = []
    for scenario, work in workloads:
        rows += _time_scenario(params, Parent(paths.parent), name, scenario, work, device, parent_only)
    write_timings(path, rows)


def _time_scenario(
    params: Params, parent: Parent, name: str, scenario: str, work: Workload, device: Compute, parent_only: bool
) -> Iterator[TimingRow]:
    """Rows of one scenario and batch: each subblock variant, embedding, head, and the step's rest."""
    settings, config = params.measure_costs, parent.config
    bld = params.distill_blocks
    variants: list[Attention | Ffn] = [parent_attention(config), parent_ffn(config)]
    if not parent_only:
        ffns = ffn_variants(config, bld.ffn_ratios, bld.width_multiple, linear=True)
        variants = [*attention_variants(config, linear=True), *ffns]
    copies = min(settings.copies, max(1, config.num_blocks // 2))
    timings: dict[tuple[Component, str], Timing] = {}
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
    timings = {**fit.parts, ("step", ANY_VARIANT): fit.rest}
    for (component, variant_name), timing in timings.items():
        sizes = component_sizes(config, component, variant_name, settings.precision)
        yield TimingRow(
            component=component,
            variant=variant_name,
            first_block=None,
            span=1,
            hardware=name,
            engine=ENGINE,
            precision=settings.precision,
            tensor_parallel=1,
            scenario=scenario,
            batch=work.batch,
            prefill_ms=timing.prefill_ms,
            decode_ms=timing.decode_ms,
            weight_bytes=sizes.weight_bytes,
            kv_bytes_per_token=sizes.kv_bytes_per_token,
            params=sizes.params,
            origin="measured",
            how=_HOW[component] + fit.text,
            machine=machine(device.device),
            versions=software(),
            dtype=settings.precision,
            threads=settings.threads,
            repeats=settings.repeats,
            spread=timing.spread,
        )


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
    "step": "rest of the parent's measured end-to-end time over the sum of its parts",
}


def _whole_parent(parent: Parent, device: Compute) -> DeciLMForCausalLM:
    config = parent.config
    tensors = {name: parent.checkpoint.tensor(name) for name in parent.checkpoint.files}
    return build(config, [(parent_attention(config), parent_ffn(config))] * config.num_blocks, tensors, device)


def drift(scratch: Path, kept: Path) -> str:
    """How far this machine's timings are from the table in git, as text; nothing reads the scratch table."""
    here = {(row.component, row.variant, row.scenario, row.batch): row for row in read_timings(scratch)}
    if not kept.is_file():
        return f"timed this machine to {scratch}; there is no {kept} to compare with\n"
    table = {(row.component, row.variant, row.scenario, row.batch): row for row in read_timings(kept)}
    ratios = [
        here[key].decode_ms / row.decode_ms
        for key, row in table.items()
        if key in here and key[0] in ("attention", "ffn", "head") and row.decode_ms > 0
    ]
    ours, theirs = (next(iter(rows.values())).machine for rows in (here, table))
    return (
        f"measured decode time of components on this machine ({ours}) / in {kept} ({theirs}): "
        f"median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}\n"
    )
