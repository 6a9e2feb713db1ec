"""What every stage will take, before any run: `python -m flows.plan [--params FILE] [--parent CONFIG_JSON]`."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from flows.overrides import with_profile
from flows.progress import span
from flows.stage import run_cleanly
from storage.params import load
from storage.paths import Paths
from tasks.machine import on_this_machine
from tasks.plan import Plan, plan

_GIB = 2**30


def plan_text(found: Plan) -> str:
    """A line per stage, the total, and which mode of the activation cache fits; at most 100 columns."""
    took = f"{'took':>10}" if found.took else ""
    lines = [
        f"{found.parent}: modelled from sizes",
        f"on {found.machine}",
        f"{'stage':<31} {'time':>13}{took} {'peak memory':>12} {'disk':>15}",
    ]
    for one in found.stages:
        earlier = f"{span(found.took[one.stage]) if one.stage in found.took else '-':>10}" if found.took else ""
        memory, disk = (f"{value / _GIB:,.1f} GiB" for value in (one.memory_bytes, one.disk_bytes))
        lines.append(f"{one.stage:<31} {span(one.seconds):>13}{earlier} {memory:>12} {disk:>15}")
    seconds, disk_bytes = (sum(getattr(one, name) for one in found.stages) for name in ("seconds", "disk_bytes"))
    earlier = f"{span(sum(found.took.values())):>10}" if found.took else ""
    memory = f"{max(one.memory_bytes for one in found.stages) / _GIB:.1f} GiB"
    lines.append(f"{'all':<31} {span(seconds):>13}{earlier} {memory:>12} {f'{disk_bytes / _GIB:,.1f} GiB':>15}")
    if found.device != "cpu":
        lines.append(f"{seconds / 3600:.1f} GPU hours")
    return "\n".join([*lines, *_cache(found), ""])


def _cache(found: Plan) -> list[str]:
    """Both modes against the free disk, and what params ask for."""
    # twice: DVC's cache holds a copy where the file system cannot share blocks
    fits = {
        mode: "fits" if 2 * size < found.free_disk_bytes else "does not fit"
        for mode, size in (("materialised", found.materialised_bytes), ("rolling", found.rolling_bytes))
    }
    asked = "rolling" if found.rolling else "materialised"
    lines = [
        f"activation cache: {found.materialised_bytes / _GIB:,.1f} GiB materialised ({fits['materialised']}), "
        f"{found.rolling_bytes / _GIB:,.1f} GiB rolling ({fits['rolling']});",
        f"  {found.free_disk_bytes / _GIB:,.0f} GiB are free; params ask for {asked}",
    ]
    if fits[asked] != "fits":
        other = "materialised" if found.rolling else "rolling"
        advice = f"cache_activations.mode: {other}" if fits[other] == "fits" else "fewer tokens or a larger disk"
        lines.append(f"  {asked} needs more than there is: set {advice}")
    return lines


def main() -> None:
    """Read the arguments, time, print."""
    parser = argparse.ArgumentParser(prog="python -m flows.plan", description=__doc__)
    parser.add_argument("--params", type=Path, help="a profile (params/NAME.yaml) on top of params.yaml")
    parser.add_argument("--parent", type=Path, metavar="CONFIG_JSON", help="the parent's config.json, no weights")
    args = parser.parse_args()
    params = load() if args.params is None else with_profile(load(), args.params)
    found = plan(on_this_machine(params), args.parent, Paths())
    sys.stdout.write(plan_text(found if args.params is None else replace(found, took={})))


if __name__ == "__main__":
    run_cleanly(main)
