"""benchmark_throughput: tokens/s of parent and child, measured here beside predicted, and modelled for a GPU.

Out: children/<target>/throughput.parquet (a row per model, phase, scenario, batch and hardware) and the same as text.
It is the only stage with a clock: the bytes of its table differ from run to run. Nothing that makes a child reads it.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from tqdm import tqdm

from storage.checkpoints import Checkpoint, read_blocks
from storage.files import read_json
from storage.model_config import ModelConfig
from storage.params import Params
from storage.parent import Parent
from storage.paths import TIMINGS, Paths
from storage.records import Architecture, Attention, Ffn, Precision, Replacement, ThroughputRow
from storage.tables import read_costs, read_throughput, read_timings_or_costs, write_throughput
from storage.targets import SPEED_METRICS
from tasks.engines import llamacpp
from tasks.gguf_files import FORMAT, PARENT, gguf_of, whole
from tasks.puzzle.child import DeciLMForCausalLM, build
from tasks.puzzle.costs import ModelSpeed, Setting
from tasks.puzzle.device import Compute, compute
from tasks.puzzle.engine_model import TENSORRT_LLM
from tasks.puzzle.hardware import check_precision, device_named
from tasks.puzzle.throughput import best_modelled, predict, throughput_tables
from tasks.puzzle.timing import ENGINE, Workload, machine, software, spread, time_models
from tasks.puzzle.variants import parent_attention, parent_blocks, parent_ffn


@task(cache_policy=NO_CACHE)
def model_throughput(target: str, params: Params, paths: Paths) -> list[ThroughputRow]:
    """Whole requests on the modelled hardware, parent and child each at its best batch and number of devices.

    Raises:
        InputError: the hardware has no data sheet, or a model does not fit in its memory.
    """
    settings, config = params.benchmark_throughput, Parent(paths.parent).config
    device = device_named(settings.hardware)
    check_precision(device, settings.precision)
    rows = []
    for scenario, (model, blocks) in itertools.product(settings.modelled_scenarios, _blocks(target, paths).items()):
        best, how = best_modelled(config, blocks, device, settings.precision, scenario)
        at = Setting(device.name, TENSORRT_LLM.name, settings.precision, best.tensor_parallel, scenario, best.batch)
        speed = best.tokens_per_s_per_gpu
        rows.append(ThroughputRow(model=model, phase="request", **asdict(at), modelled_tokens_per_s=speed, how=how))
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
    """What all measured rows of an engine share.

    `predictor` names the hardware whose timings predict, None for none; `is_timed`: they were taken on a machine like
    this one.
    """

    engine: str
    machine: str
    versions: str
    precision: Precision
    threads: int | None
    predictor: str | None
    is_timed: bool

    @property
    def hardware(self) -> str:
        """This machine's name in the cost table; a machine that was not timed is called by its processor."""
        return self.predictor if self.predictor and self.is_timed else self.machine


_Rounds = dict[str, dict[str, list[float]]]
"""Model -> phase -> milliseconds of each round."""


@task(cache_policy=NO_CACHE)
def measure_throughput(target: str, params: Params, paths: Paths) -> list[ThroughputRow]:
    """Time prefill and decode of parent and child in turn on this machine, in every engine of params.

    At every scenario and batch of params, and in the engine, at the scenario and batch of the target's speed limits.

    Raises:
        InputError: the child or the cost table is missing or damaged, or llama.cpp is asked for and is not installed or
            does not load the child.
    """
    settings, threads = params.benchmark_throughput, params.measure_costs.threads
    device = compute(params.run.device, params.run.dtype, threads)
    costs, blocks = read_costs(paths.costs), _blocks(target, paths)
    limits = _speed_limits(target, paths)
    engines = dict.fromkeys([*settings.engines, *limits])
    if llamacpp.ENGINE in engines:
        llamacpp.check_installed()
        asked = {f"benchmark_throughput.scenarios, {scenario}": scenario for scenario in settings.measured_scenarios}
        asked |= {f"targets.{target}.constraints.{one['name']}": one["scenario"] for one in limits.get("llama.cpp", [])}
        works = {name: _in_llamacpp(Workload.of(scenario, 1)) for name, scenario in asked.items()}
        llamacpp.check_room(works, Parent(paths.parent).config.context)
        _exported(target, paths)
    rows: list[ThroughputRow] = []
    for engine in engines:
        held = limits.get(engine, [])
        here = _here(engine, device, threads, [one["hardware"] for one in held], params.measure_costs.timings)
        timed = _timer(engine, target, params, paths, device)
        points = dict.fromkeys(itertools.product(settings.measured_scenarios, settings.batches))
        points |= dict.fromkeys((one["scenario"], one["batch"]) for one in held)
        for scenario, batch in tqdm(points, desc=f"measure in {engine}", unit="setting", disable=None):
            setting = Setting(here.predictor or here.machine, engine, here.precision, 1, scenario, batch)
            for model, rounds in _paired(timed(Workload.of(scenario, batch))).items():
                rows += _measured_rows(here, model, setting, rounds, predict(costs, blocks[model], setting))
    return rows


def _paired(rounds: _Rounds) -> _Rounds:
    """The child's rounds at the speed that the parent's median has: what wanders from round to round cancels."""
    parent = {phase: (times, statistics.median(times)) for phase, times in rounds["parent"].items()}
    child = {
        phase: [parent[phase][1] * time / beside for time, beside in zip(times, parent[phase][0], strict=True)]
        for phase, times in rounds["child"].items()
    }
    return {"parent": rounds["parent"], "child": child}


def _timer(engine: str, target: str, params: Params, paths: Paths, device: Compute) -> Callable[[Workload], _Rounds]:
    """What times parent and child in an engine: torch as checkpoints, llama.cpp as they were exported."""
    parent, repeats = Parent(paths.parent), params.benchmark_throughput.repeats
    if engine == ENGINE:
        child = Checkpoint(paths.assembled(target), f"dvc repro assemble_child@{target}")
        models = parent_and_child(parent, child, device)
        return lambda work: time_models(parent.config, models, work, repeats, device)
    files, threads = _exported(target, paths), params.measure_costs.threads
    return lambda work: llamacpp.time_files(files, _in_llamacpp(work), repeats, threads)


def _in_llamacpp(work: Workload) -> llamacpp.Work:
    return llamacpp.Work(work.batch, work.input_tokens, work.mean_context)


def _exported(target: str, paths: Paths) -> dict[str, Path]:
    """GGUF files of parent and child, of the same precision.

    Raises:
        InputError: one of them is not there, or damaged.
    """
    return {"parent": whole(gguf_of(PARENT, FORMAT, paths)), "child": whole(gguf_of(target, FORMAT, paths))}


def _speed_limits(target: str, paths: Paths) -> dict[str, list[dict[str, Any]]]:
    """The limits of the child that can be measured here, by engine, with the batch that the search chose."""
    found = read_json(paths.architecture(target), f"dvc repro search_architecture@{target}")["constraints"]
    of_speed = [one for one in found if one["metric"] in SPEED_METRICS]
    by_engine = {name: [one for one in of_speed if one["engine"] == name] for name in (ENGINE, llamacpp.ENGINE)}
    return {name: limits for name, limits in by_engine.items() if limits}


def _here(engine: str, device: Compute, threads: int, limited: Sequence[str], timed: Sequence[str]) -> _Here:
    """Predictions come from the hardware of the speed limits, or else from timings that were taken on this machine."""
    where = device.device if engine == ENGINE else torch.device("cpu")
    name = machine(where)
    predictor = next((one for one in (*limited, *(of for of in timed if is_timed_machine(of, engine, name)))), None)
    narrow: Precision = "bfloat16" if device.dtype == torch.bfloat16 else "float32"
    return _Here(
        engine=engine,
        machine=name,
        versions=software() if engine == ENGINE else llamacpp.software(),
        precision=narrow if engine == ENGINE else llamacpp.PRECISION,
        threads=threads if where.type == "cpu" else None,
        predictor=predictor,
        is_timed=predictor is not None and is_timed_machine(predictor, engine, name),
    )


def is_timed_machine(hardware: str, engine: str, here: str) -> bool:
    """Whether the timings of that name and engine were taken on a machine like this one."""
    path = TIMINGS / f"{hardware}.parquet"  # a table that a user brings names no machine
    if not path.is_file():
        return False
    return {getattr(row, "machine", None) for row in read_timings_or_costs(path) if row.engine == engine} == {here}


def parent_and_child(parent: Parent, child: Checkpoint, device: Compute) -> dict[str, DeciLMForCausalLM]:
    """Parent and child whole in memory, as the same class, so that they differ in their blocks alone."""
    own = [(parent_attention(parent.config), parent_ffn(parent.config))] * parent.config.num_blocks
    return {
        "parent": _whole(parent.checkpoint, parent.config, own, device),
        "child": _whole(child, *read_blocks(child), device),
    }


def _whole(
    checkpoint: Checkpoint, config: ModelConfig, blocks: list[tuple[Attention, Ffn]], device: Compute
) -> DeciLMForCausalLM:
    return build(config, blocks, {name: checkpoint.tensor(name) for name in checkpoint.files}, device)


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
            versions=here.versions,
            measured_ms=medians[phase],
            measured_tokens_per_s=_tokens_per_s(speed, phase),
            measured_spread=spread(rounds[phase]),
            predicted_tokens_per_s=_tokens_per_s(predicted, phase) if predicted else None,
            predicted_hardware=here.predictor if predicted else None,
            how=f"{phase}: median of {len(rounds[phase])} rounds in turn, the child's as multiples of the parent's "
            f"beside them; {_source(here, predicted)}",
        )


def _tokens_per_s(speed: ModelSpeed, phase: str) -> float:
    return speed.prefill_throughput if phase == "prefill" else speed.decode_throughput


def _source(here: _Here, predicted: ModelSpeed | None) -> str:
    """Where the prediction is from, or why there is none."""
    if here.predictor is None:
        return f"not predicted: the target limits no speed of {here.engine}, and no timings are of this machine"
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
    names = params.benchmark_throughput.measured_scenarios
    return throughput_tables(params.target(target).label, read_throughput(paths.throughput(target)), names)
