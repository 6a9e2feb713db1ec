"""Artifacts of a finished run for the report: tables and measurements made up by a formula, children really searched.

Nothing is trained: a parent's geometry is enough. Same config and targets, same files.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from storage.accuracy import (
    Accuracy,
    BenchmarkAccuracy,
    ChildAccuracy,
    ChildLoss,
    Estimate,
    PositionBucket,
    write_accuracy,
)
from storage.architecture import (
    Baseline,
    Baselines,
    ChosenArchitecture,
    ReachedLimit,
    read_architecture,
    write_baselines,
)
from storage.documents import TRAINING_MIX
from storage.evaluation import (
    BaselineQuality,
    DomainQuality,
    Evaluation,
    ExportQuality,
    Exports,
    MeasuredLimit,
    MeasuredSpeed,
    PairedDifference,
    PredictedScore,
    Quality,
    write_evaluation,
)
from storage.gkd import GkdCurve, GkdStep, HeldOutKl, write_gkd
from storage.metrics import METRICS
from storage.model_config import ModelConfig
from storage.params import Params, parse
from storage.parent_info import write_parent_info
from storage.parquet_files import write_table
from storage.paths import Paths
from storage.records import CostRow, Phase, ScoreRow, ThroughputRow, Weights
from storage.refinement import BlockRefinement, Refinement, SubblockRefinement, write_refinement
from storage.scenario import Setting
from storage.tables import write_costs, write_scores, write_throughput
from storage.variants import Attention
from tasks.puzzle.costs.cost_model import ENGINE, modelled_rows
from tasks.puzzle.costs.cost_table import ModelSizes
from tasks.puzzle.costs.hardware import device_named
from tasks.puzzle.search_space import attention_variants, ffn_variants, parent_attention, parent_ffn
from tasks.search_architecture import search
from tasks.targets.measured import Counted, measured_speed, speed_ratios
from tests.records import parent_info
from tests.settings import tiny_values

HARDWARE, SCENARIO, BATCH = "tiny-cpu", "8/8", 2
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=48,
    num_blocks=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    intermediate_size=96,
    vocab_size=160,
    rms_norm_eps=1e-5,
    rope={"rope_type": "default", "rope_theta": 1e4},
    context=128,
    tie_embeddings=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    activation="silu",
)
RATE = 250.0
"""The parent's decode tokens/s at BATCH in torch."""
PHASES: dict[Phase, float] = {"prefill": 8.0, "decode": 1.0}
BASELINES = ("uniform", "greedy", *(f"random_{number}" for number in range(5)), "untrained", "depth")
_SETTING = {"hardware": HARDWARE, "engine": "torch", "precision": "float32", "scenario": SCENARIO, "batch": BATCH}
TARGETS: dict[str, Any] = {
    "large": {
        "label": "Large <child>",
        "constraints": {
            "size": {"metric": "block_params", "at_most_ratio": 0.73},
            "speed": {"metric": "decode_throughput", "at_least_ratio": 1.1, **_SETTING},
        },
    },
    "small": {
        "label": "Small",
        "constraints": {
            "size": {"metric": "block_params", "at_most_ratio": 0.57},
            "speed": {"metric": "decode_throughput", "at_least_ratio": 1.2, **_SETTING},
        },
    },
}


def speed_constraints(metric: str) -> dict[str, Any]:
    """Return constraints of a target whose speed limit is on this metric; the best child keeps them."""
    bound = {"at_least_ratio": 1.1} if METRICS[metric].more_is_better else {"at_most_ratio": 0.9}
    size = {"metric": "block_params", "at_most_ratio": 0.57}
    return {"size": size, "speed": {"metric": metric, **bound, **_SETTING}}


def write_run(
    paths: Paths, config: ModelConfig = CONFIG, targets: dict[str, Any] = TARGETS, **overrides: dict[str, Any]
) -> Params:
    """Write everything that the report reads, for these targets; returns the params of that run."""
    params = parse({**tiny_values(**overrides), "targets": targets}, "tests/report_run.py")
    write_parent_info(paths.parent, parent_info(config, "Tiny", "0" * 64))
    write_costs(paths.costs, _costs(config, params))
    write_scores(paths.scores, _scores(config, params))
    paths.library.mkdir()
    write_table(paths.library / "index.parquet", pa.Table.from_pylist(list(_losses(config, params))))
    for number, target in enumerate(params.targets):
        search.fn(target, params, paths)
        _measure(target, number, paths)
    return params


def _variants(config: ModelConfig, params: Params) -> list[tuple[str, str]]:
    """Return the subblock and variant of all but the parent's own."""
    ffns = ffn_variants(config, params.distill_blocks.ffn_ratios, params.distill_blocks.width_multiple, linear=False)
    attentions = attention_variants(config, linear=False)
    return [("attention", variant.name) for variant in attentions[1:]] + [("ffn", variant.name) for variant in ffns[1:]]


def _costs(config: ModelConfig, params: Params) -> Iterator[CostRow]:
    """Yield rows of a modelled GPU, and the same ten thousand times slower as if they had been timed."""
    ffns = ffn_variants(config, params.distill_blocks.ffn_ratios, params.distill_blocks.width_multiple, linear=False)
    device = device_named("h100-sxm")
    setting = Setting(device.name, ENGINE, "float32", 1, SCENARIO, BATCH)
    for row in modelled_rows(config, attention_variants(config, linear=False), ffns, device, setting):
        yield row
        timed = replace(row, hardware=HARDWARE, engine="torch", origin="measured", how="made up")
        yield replace(timed, prefill_ms=row.prefill_ms * 1e4, decode_ms=row.decode_ms * 1e4)


def _scores(config: ModelConfig, params: Params) -> Iterator[ScoreRow]:
    attention, ffn = parent_attention(config).name, parent_ffn(config).name
    for index, (subblock, variant), shard in itertools.product(
        range(config.num_blocks), _variants(config, params), range(4)
    ):
        names = {"attention": attention, "ffn": ffn, subblock: variant}
        kl = _harm(config, index, variant) * (1 + 0.1 * shard)
        weights_hash = "" if variant == "no_op" else "hash"
        yield ScoreRow(
            index,
            1,
            names["attention"],
            names["ffn"],
            "decoupled",
            weights_hash,
            "parent",
            shard,
            shard,
            64,
            kl,
            3 + kl,
            0.9,
            0.9,
        )


def _harm(config: ModelConfig, block_index: int, variant: str) -> float:
    """Return a variant's score: the first and last block matter most, and it is higher the more is taken away."""
    kept = int(variant.rpartition("_")[2]) if variant[-1].isdigit() else 0
    whole = config.num_kv_heads if variant.startswith("kv") else config.intermediate_size
    edge: float = 1 + 6 * (block_index in (0, config.num_blocks - 1)) + math.sin(block_index) ** 2
    return 0.05 * edge * math.sqrt(1 - kept / whole) * (1 - kept / whole)


def _losses(config: ModelConfig, params: Params) -> Iterator[dict[str, Any]]:
    for index, (subblock, variant) in itertools.product(range(config.num_blocks), _variants(config, params)):
        if variant != "no_op":
            loss = 4 * _harm(config, index, variant)
            yield {
                "first_block": index,
                "span": 1,
                "subblock": subblock,
                "variant": variant,
                "weights": "decoupled",
                "loss": "normalised_mse",
                "loss_before": loss,
                "loss_fitted": loss * 0.6,
                "loss_after": loss * 0.35,
            }


def _measure(target: str, number: int, paths: Paths) -> None:
    """Write evaluation.json, baselines.json, gkd.json, accuracy.json and throughput.parquet of a child."""
    chosen, rows = read_architecture(target, paths), list(throughput_rows(RATE))
    score = chosen.predicted.score
    evaluation = Evaluation(
        target=target,
        label=chosen.label,
        domains={TRAINING_MIX: _domain(score, 8.8), "prose": _domain(score * 1.7, 19.2)},
        exports=Exports(512, 2, {"gguf-q8_0": ExportQuality(**asdict(_quality(score * 0.001)), torch_perplexity=8.9)}),
        predicted=PredictedScore(score, 0.01),
        constraints=tuple(MeasuredLimit.from_limit(limit, limit.predicted * 1.01) for limit in chosen.constraints),
        speed=_speed(rows, chosen.constraints),
        speeds=tuple(speed_ratios(rows, {"parent": _counted(1.0), "assembled": _counted(0.8)})),
    )
    write_evaluation(paths.evaluation(target), evaluation)
    write_baselines(paths.baselines(target), Baselines(target, _baselines(chosen)))
    write_gkd(paths.gkd(target), _gkd(target, score, number))
    write_refinement(paths.refinement(target), _refinement(chosen, score))
    write_throughput(paths.throughput(target), rows)
    write_accuracy(paths.accuracy(target), _accuracy(target))


def _accuracy(target: str) -> Accuracy:
    """Return the accuracies at a benchmark that the parent knows, and at one at which it guesses."""
    known, guessed = Estimate(0.5, 0.02), Estimate(0.25, 0.02)
    known_child = ChildAccuracy(Estimate(0.45, 0.02), Estimate(-0.05, 0.01), Estimate(0.9, 0.02), Estimate(0.8, 0.04))
    guessed_child = ChildAccuracy(guessed, Estimate(0.0, 0.01), None, None)
    benchmarks = (
        BenchmarkAccuracy("hellaswag", "acc_norm", "1", None, 400, "a", 0.25, False, known, {"refined": known_child}),
        BenchmarkAccuracy("mmlu", "acc", "1", None, 400, "b", 0.25, True, guessed, {"refined": guessed_child}),
    )
    position = PositionBucket(1, 64, 630, 10, 3.0, {"refined": ChildLoss(3.25, 0.25, 0.05)})
    return Accuracy(target, "float32", benchmarks, None, (position,))


def _speed(rows: list[ThroughputRow], limits: tuple[ReachedLimit, ...]) -> MeasuredSpeed | None:
    speeds = [measured_speed(limit, rows) for limit in limits if limit.is_speed]
    return speeds[0] if speeds else None


def _counted(share: float) -> Counted:
    return Counted(ModelSizes(10_000, 9_000, round(40_000 * share), 0), (Attention("gqa", 2),) * 5, 0)


def _domain(score: float, perplexity: float) -> DomainQuality:
    """Return qualities of a child whose scores predict this KL, on text that the parent has this perplexity on."""
    names = ("refined", "distilled", *BASELINES)
    return DomainQuality(
        tokens=8192,
        sequences=32,
        documents=29,
        parent=_quality(0.0, perplexity),
        assembled=_quality(score * 1.2, perplexity),
        refined=_quality(score * 0.9, perplexity),
        distilled=_quality(score * 0.8, perplexity),
        baselines={
            name: BaselineQuality(
                **asdict(_quality(score * (1.3 + 0.4 * rank), perplexity)), sequences=16, documents=15
            )
            for rank, name in enumerate(BASELINES)
        },
        paired={name: PairedDifference(0.1 * rank - 0.2, 0.01 * score) for rank, name in enumerate(names)},
    )


def _quality(kl: float, perplexity: float = 8.8) -> Quality:
    return Quality(kl=kl, kl_stderr=kl / 20, perplexity=perplexity * math.exp(kl), top1_agreement=math.exp(-kl / 2))


def _baselines(chosen: ChosenArchitecture) -> dict[str, Baseline]:
    baselines = {}
    for rank, name in enumerate(BASELINES):
        ratio = chosen.predicted.throughput_ratio
        predicted = replace(
            chosen.predicted,
            score=chosen.predicted.score * (1.2 + 0.3 * rank),
            throughput_ratio=None if ratio is None else ratio + 0.02 * (rank % 3),
        )
        weights: Weights = "initial" if name == "untrained" else "decoupled"
        baselines[name] = Baseline(weights, blocks=chosen.blocks, predicted=predicted)
    return baselines


def _refinement(chosen: ChosenArchitecture, score: float) -> Refinement:
    """Return a correction of all blocks but the first, which is the parent's."""
    blocks = [BlockRefinement(0, 1, (), 0.0, 0.0)]
    for depth, block in enumerate(chosen.blocks[1:], 1):
        error = score * depth / 100
        corrections = (SubblockRefinement("ffn", 0.3, error, 0.9 * error),)
        blocks.append(BlockRefinement(block.first_block, block.span, corrections, error, 0.7 * error))
    return Refinement(chosen.target, 12_288, 1_024, tuple(blocks))


def _gkd(target: str, score: float, number: int) -> GkdCurve:
    def kl(step: int) -> float:
        return score * (0.8 + 0.4 * math.exp(-step / 20))

    steps = [
        GkdStep(
            step=step,
            tokens=step * 512,
            loss=kl(step) + 0.1,
            kl=kl(step) * (1 + 0.1 * math.sin(step + number)),
            cosine=0.1 * math.exp(-step / 50),
            learning_rate=1e-4,
            gradient_norm=1 + math.exp(-step / 10),
        )
        for step in range(1, 61)
    ]
    held_out = [HeldOutKl(step, step * 512, kl(step)) for step in range(0, 61, 10)]
    return GkdCurve(target, tuple(steps), tuple(held_out), 50)


def throughput_rows(parent: float) -> Iterator[ThroughputRow]:
    """Yield rows of two engines, and of a modelled GPU where parent and child are best on different device counts."""
    for (engine, pace), (model, faster), (phase, share), batch in itertools.product(
        (("torch", 1.0), ("llama.cpp", 0.37)), (("parent", 1.0), ("child", 1.23)), PHASES.items(), (1, BATCH)
    ):
        rate = parent * pace * faster * share * batch / BATCH
        yield ThroughputRow(
            model=model,
            phase=phase,
            scenario=SCENARIO,
            batch=batch,
            hardware=HARDWARE,
            engine=engine,
            precision="float32",
            tensor_parallel=1,
            threads=1,
            machine="a made-up processor, 1 core",
            versions="torch 0",
            measured_ms=1e3 * batch * (1.0 if phase == "decode" else 8.0) / rate,
            measured_tokens_per_s=rate,
            measured_spread=0.02,
            predicted_tokens_per_s=rate * 1.05 if batch == BATCH else None,
            predicted_hardware=HARDWARE,
            how="made up",
        )
    for model, batch, devices in (("parent", 256, 2), ("child", 512, 1)):
        yield ThroughputRow(
            model=model,
            phase="request",
            scenario="128/128",
            batch=batch,
            hardware="h100-sxm",
            engine="tensorrt-llm",
            precision="float32",
            tensor_parallel=devices,
            modelled_tokens_per_s=1000.0 * batch,
            how="made up",
        )
