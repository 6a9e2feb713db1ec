"""benchmark_throughput: tokens/s of parent and child, measured here beside predicted, and modelled for a GPU.

Out: children/<target>/throughput.parquet (a row per model, phase, scenario, batch and hardware) and the same as text.
Nothing that makes a child reads it: it holds clocks, so its bytes differ from run to run.
"""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from tqdm import tqdm

from storage.checkpoints import Checkpoint
from storage.files import read_json
from storage.params import SPEED_METRICS, Params
from storage.parent import Parent
from storage.paths import Paths
from storage.records import Architecture, Precision, Replacement, ThroughputRow
from storage.tables import read_costs, read_throughput, write_throughput
from tasks.puzzle.costs import ModelSpeed, Setting
from tasks.puzzle.device import Compute, compute
from tasks.puzzle.hardware import device_named
from tasks.puzzle.throughput import best_modelled, predict, throughput_tables
from tasks.puzzle.timing import ENGINE, Workload, machine, software, spread, time_models
from tasks.puzzle.variants import parent_blocks
from tasks.speed import is_timed_machine, parent_and_child

_STEPS = 8
"""Decode steps timed for each prefill: half of what a speed limit is checked with, since every batch is timed here."""


@task(cache_policy=NO_CACHE)
def model_throughput(target: str, params: Params, paths: Paths) -> list[ThroughputRow]:
    """Whole requests on the modelled hardware, parent and child each at its best batch.

    Raises:
        InputError: the hardware has no data sheet, or a model does not fit in its memory.
    """
    settings, config = params.benchmark_throughput, Parent(paths.parent).config
    device = device_named(settings.hardware)
    rows = []
    for scenario, (model, blocks) in itertools.product(settings.modelled_scenarios, _blocks(target, paths).items()):
        speed, how = best_modelled(config, blocks, device, settings.precision, scenario)
        at = asdict(speed.setting)
        rows.append(ThroughputRow(model=model, phase="request", **at, modelled_tokens_per_s=speed.throughput, how=how))
    return rows


def _blocks(target: str, paths: Paths) -> dict[str, tuple[Replacement, ...]]:
    """Blocks of parent and child, as cost tables know them."""
    chosen = read_json(paths.architecture(target), f"dvc repro search_architecture@{target}")
    return {
        "parent": parent_blocks(Parent(paths.parent).config),
        "child": Architecture.from_json(chosen["blocks"]).blocks,
    }


@dataclass(frozen=True)
class _Here:
    """What all measured rows of a run share.

    `predictor` names the hardware whose timings predict, None for none; `is_timed`: they were taken on a machine like
    this one.
    """

    machine: str
    precision: Precision
    threads: int | None
    predictor: str | None
    is_timed: bool

    @property
    def hardware(self) -> str:
        """This machine's name in the cost table; a machine that was not timed is called by its processor."""
        return self.predictor if self.predictor and self.is_timed else self.machine


@task(cache_policy=NO_CACHE)
def measure_throughput(target: str, params: Params, paths: Paths) -> list[ThroughputRow]:
    """Time prefill and decode of parent and child in turn on this machine, at every scenario and batch of params.

    Raises:
        InputError: the child or the cost table is missing or damaged.
    """
    settings, threads = params.benchmark_throughput, params.measure_costs.threads
    device = compute(params.run.device, params.run.dtype, threads)
    here = _here(device, threads, next(_timed_hardware(target, params), None))
    child = Checkpoint(paths.assembled(target), f"dvc repro assemble_child@{target}")
    models = dict(zip(("parent", "child"), parent_and_child(Parent(paths.parent), child, device), strict=True))
    costs, blocks = read_costs(paths.costs), _blocks(target, paths)
    rows: list[ThroughputRow] = []
    points = list(itertools.product(settings.scenarios, settings.batches))
    for scenario, batch in tqdm(points, desc="measure", unit="setting", disable=None):
        timed = time_models(models, Workload.of(scenario, batch), settings.repeats, device, _STEPS)
        setting = Setting(here.predictor or here.machine, ENGINE, here.precision, 1, scenario, batch)
        for model, rounds in timed.items():
            rows += _measured_rows(here, model, setting, rounds, predict(costs, blocks[model], setting))
    return rows


def _here(device: Compute, threads: int, predictor: str | None) -> _Here:
    name = machine(device.device)
    return _Here(
        machine=name,
        precision="bfloat16" if device.dtype == torch.bfloat16 else "float32",
        threads=threads if device.device.type == "cpu" else None,
        predictor=predictor,
        is_timed=predictor is not None and is_timed_machine(predictor, name),
    )


def _timed_hardware(target: str, params: Params) -> Iterator[str]:
    """Hardware that the target's speed limits name, of the engine that is measured here."""
    for limit in params.target(target).constraints.values():
        if limit.metric in SPEED_METRICS and limit.engine == ENGINE:
            assert limit.hardware is not None
            yield limit.hardware


def _measured_rows(
    here: _Here, model: str, setting: Setting, rounds: dict[str, list[float]], predicted: ModelSpeed | None
) -> Iterator[ThroughputRow]:
    """A row for prefill (tokens read) and one for decode (tokens generated)."""
    medians = {phase: statistics.median(values) for phase, values in rounds.items()}
    speed = ModelSpeed(setting, medians["prefill"], medians["decode"])
    for phase in ("prefill", "decode"):
        yield ThroughputRow(
            model=model,
            phase=phase,
            **asdict(replace(setting, hardware=here.hardware)),
            threads=here.threads,
            machine=here.machine,
            versions=software(),
            measured_ms=medians[phase],
            measured_tokens_per_s=_tokens_per_s(speed, phase),
            measured_spread=spread(rounds[phase]),
            predicted_tokens_per_s=_tokens_per_s(predicted, phase) if predicted else None,
            predicted_hardware=here.predictor if predicted else None,
            how=f"{phase}: median of {len(rounds[phase])} rounds, parent and child in turn; {_source(here, predicted)}",
        )


def _tokens_per_s(speed: ModelSpeed, phase: str) -> float:
    return speed.prefill_throughput if phase == "prefill" else speed.decode_throughput


def _source(here: _Here, predicted: ModelSpeed | None) -> str:
    """Where the prediction is from, or why there is none."""
    if here.predictor is None:
        return f"not predicted: the target limits no speed of {ENGINE}"
    timed = f"{here.predictor} ({'a machine like this one' if here.is_timed else 'NOT this machine'})"
    if predicted is None:
        return f"not predicted: costs.parquet has no {here.precision} timings of {timed} at this setting"
    return f"predicted from the timings of {timed}"


@task(cache_policy=NO_CACHE)
def write_rows(target: str, rows: Sequence[ThroughputRow], paths: Paths) -> None:
    """Write throughput.parquet."""
    write_throughput(paths.throughput(target), rows)


def throughput_text(target: str, params: Params, paths: Paths) -> str:
    """throughput.parquet as tables for people."""
    return throughput_tables(params.target(target).label, read_throughput(paths.throughput(target)))
