"""Say what every stage will take before any run: time, memory and disk, modelled from sizes and a minute of timing.

A profile (--params) or another parent (--parent) can be planned without its weights.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.arguments import positive
from flows.durations import duration_text
from flows.ui.overrides import with_profile
from storage.params import load
from storage.paths import Paths
from tasks.drawing.numbers import counted
from tasks.puzzle.costs.cost_table import GIB

if TYPE_CHECKING:
    from tasks.commands.plan import Plan

EXAMPLE = "puzzle plan --params params/full.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--params", type=Path, help="a profile (params/NAME.yaml) on top of params.yaml")
    parser.add_argument("--dollars", type=positive, metavar="RATE", help="dollars an hour of this machine or GPU")
    parser.add_argument("--parent", type=Path, metavar="CONFIG_JSON", help="the parent's config.json, no weights")


def run(args: argparse.Namespace) -> None:
    """Time this machine, estimate, print."""
    from tasks.commands.plan import plan  # imports torch, which times this machine
    from tasks.engines.machine import on_this_machine

    params = load() if args.params is None else with_profile(load(), args.params)
    estimates = plan(on_this_machine(params), args.parent, Paths())
    sys.stdout.write(plan_text(estimates if args.params is None else replace(estimates, took={}), args.dollars))


def plan_text(plan: "Plan", dollars_per_hour: float | None = None) -> str:
    """Return a line per stage, the total, and which mode of the activation cache fits; at most 100 columns."""
    took = f"{'took':>10}" if plan.took else ""
    lines = [
        f"{plan.parent}: modelled from sizes",
        f"on {plan.machine}",
        f"{'stage':<31} {'time':>13}{took} {'peak memory':>12} {'disk':>15}",
    ]
    lines += [
        f"{stage.stage:<31} {duration_text(stage.seconds):>13}{_took(plan, stage.stage)} "
        f"{_gib(stage.memory_bytes):>12} {_gib(stage.disk_bytes):>15}"
        for stage in plan.stages
    ]
    seconds = sum(stage.seconds for stage in plan.stages)
    disk_bytes = sum(stage.disk_bytes for stage in plan.stages)
    memory = f"{max(stage.memory_bytes for stage in plan.stages) / GIB:.1f} GiB"
    took = f"{duration_text(sum(plan.took.values())):>10}" if plan.took else ""
    lines.append(f"{'all':<31} {duration_text(seconds):>13}{took} {memory:>12} {_gib(disk_bytes):>15}")
    lines.append(
        f"DVC's cache holds every artifact a second time: {_gib(2 * disk_bytes)} in all, unless the file system shares"
    )
    lines.append("  blocks (reflinks: Btrfs, XFS, APFS)")
    if plan.num_benchmarks:
        lines.append(f"not estimated: the {counted(plan.num_benchmarks, 'benchmark')} of measure_accuracy")
    device_hours = sum(stage.seconds * stage.devices for stage in plan.stages) / 3600
    hours = f"{device_hours:.1f} {'hours' if plan.device == 'cpu' else 'GPU hours'}"
    if dollars_per_hour:
        lines.append(f"{hours}, ${device_hours * dollars_per_hour:,.2f} at ${dollars_per_hour:,.2f} an hour")
    elif plan.device != "cpu":
        lines.append(hours)
    read, hashed = (sum(getattr(stage, kind) for stage in plan.stages) for kind in ("read_bytes", "hashed_bytes"))
    lines.append(
        f"of it {duration_text(plan.reading_seconds)} to read {_gib(read)} of weights and states, "
        f"{duration_text(plan.hashing_seconds)} to hash {_gib(hashed)}"
    )
    return "\n".join([*lines, *_cache_lines(plan), *_healing_lines(plan), ""])


def _took(plan: "Plan", stage: str) -> str:
    """Return a column with what the stage took when it last ran; no column where no stage has run."""
    if not plan.took:
        return ""
    return f"{duration_text(plan.took[stage]) if stage in plan.took else '-':>10}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"


def _cache_lines(plan: "Plan") -> list[str]:
    """Return both modes of the activation cache against the free disk, and the mode that params name."""
    materialised, rolling = _fits(plan.materialised_bytes, plan), _fits(plan.rolling_bytes, plan)
    mode, fits, other_mode, other_fits = "materialised", materialised, "rolling", rolling
    if plan.rolling:
        mode, fits, other_mode, other_fits = other_mode, other_fits, mode, fits
    lines = [
        f"activation cache: {_gib(plan.materialised_bytes)} materialised ({_fits_text(materialised)}), "
        f"{_gib(plan.rolling_bytes)} rolling ({_fits_text(rolling)});",
        f"  {plan.free_disk_bytes / GIB:,.0f} GiB are free; params ask for {mode}",
    ]
    if not fits:
        advice = f"cache_activations.mode: {other_mode}" if other_fits else "fewer tokens or a larger disk"
        lines.append(f"  {mode} needs more than there is: set {advice}")
    teacher = "live, and not in the cache" if plan.live_teacher else "read from the cache"
    if plan.teacher_cache_bytes:
        lines.append(f"GKD's teacher: {teacher} (all boundaries of its tokens: {_gib(plan.teacher_cache_bytes)})")
    return lines


def _healing_lines(plan: "Plan") -> list[str]:
    """Say what both ways to heal a child hold in memory; the first is there where the second does not fit."""
    by_block, whole = (
        max(stage.memory_bytes for stage in plan.stages if stage.stage.startswith(f"{name}@"))
        for name in ("refine_child", "distill_child")
    )
    gkd = f"distill_child holds the whole child with its gradients and moments ({_gib(whole)})"
    if plan.rank_bytes:
        gkd = f"each rank of distill_child holds its share of child, gradients, moments ({_gib(plan.rank_bytes)});"
        gkd += f"\n  its machine's memory holds {_gib(plan.rank_host_bytes)} a rank"
    elif not plan.teacher_cache_bytes:
        gkd = "distill_child trains nothing (distill_child.tokens: 0)"
    return [
        f"healing: refine_child holds one block at a time ({_gib(by_block)}), whatever the mode of the cache;",
        f"  {gkd}",
    ]


def _fits(size: float, plan: "Plan") -> bool:
    """Tell whether the disk holds the artifacts twice: DVC's cache has a copy where a file system shares no blocks."""
    return 2 * size < plan.free_disk_bytes


def _fits_text(fits: bool) -> str:
    return "fits" if fits else "does not fit"
