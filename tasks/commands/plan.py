"""The demand of each stage on this machine, before any run, from the parent's config.json and a minute of timing.

In: params, a config.json (no weights), this machine. Out: estimates, all modelled (tasks/estimates/stage_estimates.py);
beside them what the stages of this clone took, where they ran. Run: `puzzle plan`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from storage.params import Params
from storage.paths import Paths
from storage.pipeline import read_pipeline, read_seconds
from tasks.commands.machine_rates import rates_of_machine
from tasks.estimates.parent_geometry import parent_geometry
from tasks.estimates.rank_memory import cpu_bytes, rank_bytes
from tasks.estimates.stage_case import StageCase
from tasks.estimates.stage_estimates import StageEstimate, estimate_stages, kept_share


@dataclass(frozen=True)
class Plan:
    """Estimates of all stages; bytes of the activation cache in both modes, and whether params name rolling mode.

    `live_teacher` says whether the parent itself runs in GKD, whose tokens would take `teacher_cache_bytes` of cache.

    `reading_seconds` and `hashing_seconds` are parts of the estimates: what stages read while they compute, and what
    they compare with its checksums. `took` has the seconds that stages of this clone took when they last ran. Of
    measure_accuracy the estimate has the start alone, not its `num_benchmarks`. `rank_bytes` is what each of
    GKD's ranks holds for the largest child on its device, `rank_host_bytes` in its machine's memory; 0 without ranks.
    """

    parent: str
    machine: str
    device: str
    stages: tuple[StageEstimate, ...]
    took: dict[str, float]
    reading_seconds: float
    hashing_seconds: float
    materialised_bytes: float
    rolling_bytes: float
    rolling: bool
    live_teacher: bool
    teacher_cache_bytes: float
    free_disk_bytes: float
    num_benchmarks: int
    rank_bytes: float = 0.0
    rank_host_bytes: float = 0.0


def plan(params: Params, config_json: Path | None, paths: Paths) -> Plan:
    """Time this machine and estimate every stage of dvc.yaml.

    Args:
        params: the project's params, with `auto` resolved for this machine.
        config_json: the parent's config.json; None: the file of prepare_parent.source.
        paths: the future paths of artifacts; their disk is timed.

    Raises:
        InputError: there is no config.json without fetching the parent, or its architecture is not supported.
    """
    pipeline = read_pipeline()
    name, config = parent_geometry(params.prepare_parent.source, config_json)
    case = StageCase(config, params)
    largest = StageCase(config, params, max(map(kept_share, params.targets.values())))
    paths.root.mkdir(parents=True, exist_ok=True)
    rates, machine = rates_of_machine(config, params, paths.root)
    status = os.statvfs(paths.root)
    stages = estimate_stages(pipeline, config, params, rates)
    return Plan(
        parent=name,
        machine=machine,
        device=params.run.device,
        stages=stages,
        reading_seconds=sum(stage.read_bytes for stage in stages) / rates.read_bytes_per_s,
        hashing_seconds=sum(stage.hashed_bytes for stage in stages) / rates.hash_bytes_per_s,
        took=read_seconds(paths.seconds),
        materialised_bytes=case.materialised_bytes,
        rolling_bytes=case.rolling_bytes,
        rolling=case.is_rolling,
        live_teacher=case.has_live_teacher,
        teacher_cache_bytes=case.teacher_cache_bytes,
        free_disk_bytes=float(status.f_bavail * status.f_frsize),
        num_benchmarks=case.num_benchmarks,
        rank_bytes=rank_bytes(largest),
        rank_host_bytes=cpu_bytes(largest) if rank_bytes(largest) else 0.0,
    )
