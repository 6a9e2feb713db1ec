"""benchmark_throughput: tokens/s of parent and child, measured here beside predicted, and modelled for a GPU.

Out: children/<target>/throughput.parquet (a row per model, phase, scenario, batch and hardware) and the same as text.
It is the only stage with a clock: the bytes of its table differ from run to run. No stage that makes a child reads it.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from tqdm import tqdm

from storage.architecture import ReachedLimit, read_architecture
from storage.checkpoints import Checkpoint, read_blocks
from storage.formats import LLAMACPP_FORMAT
from storage.params import Params
from storage.parent import Parent
from storage.paths import TIMINGS, Paths
from storage.records import Precision, ThroughputRow
from storage.scenario import Scenario, Setting
from storage.tables import read_costs, read_throughput, read_timings_or_costs, write_throughput
from storage.variants import Replacement
from tasks.checkpoints.gguf_files import PARENT, gguf_of, whole
from tasks.drawing.throughput_text import throughput_tables
from tasks.engines import llamacpp
from tasks.engines.in_torch import ENGINE, load_model, time_models
from tasks.engines.machine import machine, software
from tasks.engines.timings import Rounds, Workload, spread
from tasks.puzzle.costs.cost_table import ModelSpeed
from tasks.puzzle.costs.engine_model import ENGINES
from tasks.puzzle.costs.hardware import check_precision, device_named
from tasks.puzzle.costs.throughput import best_modelled, predict
from tasks.puzzle.model.child import DeciLMForCausalLM
from tasks.puzzle.model.device import Compute, prepare_compute
from tasks.puzzle.search_space import parent_attention, parent_blocks, parent_ffn


@task(cache_policy=NO_CACHE)
def model_throughput(target: str, params: Params, paths: Paths) -> list[ThroughputRow]:
    """Model whole requests on hardware, for parent and child each at its best batch and number of devices.

    Raises:
        InputError: the hardware has no data sheet, or a model does not fit in its memory.
    """
    settings, config = params.benchmark_throughput, Parent(paths.parent).config
    device, engine = device_named(settings.hardware), ENGINES[settings.modelled_engine]
    check_precision(device, settings.precision)
    rows = []
    for scenario, (model, blocks) in itertools.product(settings.modelled_scenarios, _blocks(target, paths).items()):
        best, how = best_modelled(config, blocks, device, settings.precision, scenario, engine)
        setting = Setting(device.name, engine.name, settings.precision, best.tensor_parallel, scenario, best.batch)
        speed = best.tokens_per_s_per_gpu
        rows.append(
            ThroughputRow(model=model, phase="request", **asdict(setting), modelled_tokens_per_s=speed, how=how)
        )
    return rows


def _blocks(target: str, paths: Paths) -> dict[str, tuple[Replacement, ...]]:
    """Return the blocks of parent and child, as cost tables know them."""
    parent = parent_blocks(Parent(paths.parent).config)
    return {"parent": parent, "child": read_architecture(target, paths).blocks}


@dataclass(frozen=True)
class _EngineSetup:
    """Facts that all measured rows of an engine share.

    Attributes:
        engine: the engine's name in cost tables.
        machine: the processor or GPU that computes.
        versions: the versions of the software that computes.
        precision: the precision of weights.
        threads: the processor's threads; None on a GPU.
        predictor: the hardware whose timings predict; None: there are no predictions.
        is_timed: whether those timings were taken on a machine like this one.
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
        """Return this machine's name in the cost table; a machine that was not timed is called by its processor."""
        return self.predictor if self.predictor and self.is_timed else self.machine

    def setting(self, scenario: str, batch: int) -> Setting:
        """Return the setting of the cost table that predicts a measurement."""
        return Setting(self.predictor or self.machine, self.engine, self.precision, 1, scenario, batch)


@task(cache_policy=NO_CACHE)
def measure_throughput(target: str, params: Params, paths: Paths) -> list[ThroughputRow]:
    """Time prefill and decode of parent and child in turn on this machine, in every engine of params.

    They are timed at every scenario and batch of params, and where the target limits a speed in the engine, at the
    scenario and batch of that limit.

    Raises:
        InputError: the child or the cost table is missing or damaged, or llama.cpp is needed and is not installed or
            does not load the child.
    """
    settings, threads = params.benchmark_throughput, params.measure_costs.threads
    compute = prepare_compute(params.run.device, params.run.dtype, threads)
    costs, blocks = read_costs(paths.costs), _blocks(target, paths)
    limits = _speed_limits(target, paths)
    engines = dict.fromkeys([*settings.engines, *limits])
    if llamacpp.ENGINE in engines:
        _check_llamacpp(target, params, limits.get(llamacpp.ENGINE, []), paths)
    rows: list[ThroughputRow] = []
    for engine in engines:
        engine_limits = limits.get(engine, [])
        hardware = [limit.setting.hardware for limit in engine_limits]
        setup = _engine_setup(engine, compute, threads, hardware, params.measure_costs.timings)
        time_pair = _timer(engine, target, params, paths, compute)
        points = dict.fromkeys(itertools.product(settings.measured_scenarios, settings.batches))
        points |= dict.fromkeys((limit.setting.scenario, limit.setting.batch) for limit in engine_limits)
        for scenario, batch in tqdm(points, desc=f"measure in {engine}", unit="setting", disable=None):
            setting = setup.setting(scenario, batch)
            for model, rounds in _paired(time_pair(Workload(Scenario.parse(scenario), batch))).items():
                rows += _measured_rows(setup, model, setting, rounds, predict(costs, blocks[model], setting))
    return rows


def _check_llamacpp(target: str, params: Params, limits: Sequence[ReachedLimit], paths: Paths) -> None:
    """Raise InputError, before anything is timed, where llama.cpp, context or an exported file is missing."""
    llamacpp.check_installed()
    scenarios = {
        f"benchmark_throughput.scenarios, {text}": text for text in params.benchmark_throughput.measured_scenarios
    }
    for limit in limits:
        scenarios[f"targets.{target}.constraints.{limit.name}"] = limit.setting.scenario
    workloads = {name: Workload(Scenario.parse(scenario), 1) for name, scenario in scenarios.items()}
    llamacpp.check_room(workloads, Parent(paths.parent).config.context)
    _exported(target, paths)


def _paired(rounds: dict[str, Rounds]) -> dict[str, Rounds]:
    """Scale the child's rounds to the parent's median speed: a speed that wanders from round to round cancels."""
    scaled: Rounds = {}
    for phase, parent in rounds["parent"].items():
        median = statistics.median(parent)
        pairs = zip(rounds["child"][phase], parent, strict=True)
        scaled[phase] = [median * child_ms / parent_ms for child_ms, parent_ms in pairs]
    return {"parent": rounds["parent"], "child": scaled}


def _timer(
    engine: str, target: str, params: Params, paths: Paths, compute: Compute
) -> Callable[[Workload], dict[str, Rounds]]:
    """Return what times parent and child in an engine: checkpoints in torch, exported files in llama.cpp."""
    parent, repeats = Parent(paths.parent), params.benchmark_throughput.repeats
    if engine == ENGINE:
        child = Checkpoint(paths.assembled(target), f"dvc repro assemble_child@{target}")
        models = parent_and_child(parent, child, compute)
        return lambda workload: time_models(parent.config, models, workload, repeats, compute)
    files, threads = _exported(target, paths), params.measure_costs.threads
    return lambda workload: llamacpp.time_files(files, workload, repeats, threads)


def _exported(target: str, paths: Paths) -> dict[str, Path]:
    """Return the GGUF files of parent and child, of the same precision.

    Raises:
        InputError: one of them is missing or damaged.
    """
    return {
        "parent": whole(gguf_of(PARENT, LLAMACPP_FORMAT, paths)),
        "child": whole(gguf_of(target, LLAMACPP_FORMAT, paths)),
    }


def _speed_limits(target: str, paths: Paths) -> dict[str, list[ReachedLimit]]:
    """Return the limits of the child that can be measured here, by engine, with the batch that the search chose."""
    speeds = [limit for limit in read_architecture(target, paths).constraints if limit.is_speed]
    by_engine: dict[str, list[ReachedLimit]] = {}
    for engine in (ENGINE, llamacpp.ENGINE):
        if limits := [limit for limit in speeds if limit.engine == engine]:
            by_engine[engine] = limits
    return by_engine


def _engine_setup(
    engine: str, compute: Compute, threads: int, limited: Sequence[str], timed: Sequence[str]
) -> _EngineSetup:
    """Collect the facts that all measured rows of an engine share.

    Args:
        engine: torch or llama.cpp.
        compute: torch's device and precision.
        threads: the processor's threads.
        limited: hardware of the target's speed limits; the first of them predicts.
        timed: names of timings; without a limit, timings that were taken on this machine predict.
    """
    device = compute.device if engine == ENGINE else torch.device("cpu")
    name = machine(device)
    timed_on_machine = [hardware for hardware in timed if _was_timed_on(name, hardware, engine)]
    predictor = next(iter([*limited, *timed_on_machine]), None)
    torch_precision: Precision = "bfloat16" if compute.dtype == torch.bfloat16 else "float32"
    return _EngineSetup(
        engine=engine,
        machine=name,
        versions=software() if engine == ENGINE else llamacpp.software(),
        precision=torch_precision if engine == ENGINE else llamacpp.PRECISION,
        threads=threads if device.type == "cpu" else None,
        predictor=predictor,
        is_timed=predictor is not None and _was_timed_on(name, predictor, engine),
    )


def _was_timed_on(machine_name: str, hardware: str, engine: str) -> bool:
    """Tell whether the timings of a hardware name and engine were taken on a machine of this kind."""
    path = TIMINGS / f"{hardware}.parquet"  # a table that a user brings names no machine
    if not path.is_file():
        return False
    rows = [row for row in read_timings_or_costs(path) if row.engine == engine]
    return {getattr(row, "machine", None) for row in rows} == {machine_name}


def parent_and_child(parent: Parent, child: Checkpoint, compute: Compute) -> dict[str, DeciLMForCausalLM]:
    """Load parent and child whole into memory, as the same class, so that they differ in their blocks alone."""
    blocks = [(parent_attention(parent.config), parent_ffn(parent.config))] * parent.config.num_blocks
    return {
        "parent": load_model(parent.checkpoint, parent.config, blocks, compute),
        "child": load_model(child, *read_blocks(child), compute),
    }


def _measured_rows(
    setup: _EngineSetup, model: str, setting: Setting, rounds: Rounds, predicted: ModelSpeed | None
) -> Iterator[ThroughputRow]:
    """Yield a row for prefill (tokens read) and one for decode (tokens generated)."""
    medians = {phase: statistics.median(values) for phase, values in rounds.items()}
    speed = ModelSpeed(setting, medians["prefill"], medians["decode"])
    for phase in ("prefill", "decode"):
        yield ThroughputRow(
            model=model,
            phase=phase,
            **asdict(replace(setting, hardware=setup.hardware)),
            threads=setup.threads,
            machine=setup.machine,
            versions=setup.versions,
            measured_ms=medians[phase],
            measured_tokens_per_s=_tokens_per_s(speed, phase),
            measured_spread=spread(rounds[phase]),
            predicted_tokens_per_s=_tokens_per_s(predicted, phase) if predicted else None,
            predicted_hardware=setup.predictor if predicted else None,
            how=f"{phase}: median of {len(rounds[phase])} rounds in turn, the child's as multiples of the parent's "
            f"beside them; {_source(setup, predicted)}",
        )


def _tokens_per_s(speed: ModelSpeed, phase: str) -> float:
    return speed.prefill_throughput if phase == "prefill" else speed.decode_throughput


def _source(setup: _EngineSetup, predicted: ModelSpeed | None) -> str:
    """Say where the prediction comes from, or why there is none."""
    if setup.predictor is None:
        return f"not predicted: the target limits no speed of {setup.engine}, and no timings are of this machine"
    timed = f"{setup.predictor} ({'a machine like this one' if setup.is_timed else 'NOT this machine'})"
    if predicted is None:
        return f"not predicted: costs.parquet has no {setup.precision} timings of {timed} at this setting"
    return f"predicted from the timings of {timed}"


@task(cache_policy=NO_CACHE)
def write_rows(target: str, rows: Sequence[ThroughputRow], paths: Paths) -> None:
    """Write throughput.parquet."""
    write_throughput(paths.throughput(target), rows)


def throughput_text(target: str, params: Params, paths: Paths) -> str:
    """Format throughput.parquet as tables for people."""
    names = params.benchmark_throughput.measured_scenarios
    return throughput_tables(params.target(target).label, read_throughput(paths.throughput(target)), names)
