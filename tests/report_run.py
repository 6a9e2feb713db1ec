"""Artifacts of a finished run for the report: tables and measurements made up by a formula, children really searched.

Nothing is trained: a parent's geometry is enough. Same config and targets, same files.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.files import read_json, write_json
from storage.model_config import ModelConfig
from storage.params import Params, parse
from storage.paths import Paths
from storage.records import Architecture, CostRow, Phase, ScoreRow, ThroughputRow
from storage.tables import write_costs, write_scores, write_throughput
from tasks.measured import Counted, speed_ratios
from tasks.puzzle.cost_model import modelled_rows
from tasks.puzzle.costs import ModelSizes
from tasks.puzzle.hardware import device_named
from tasks.puzzle.variants import attention_variants, ffn_variants, parent_attention, parent_ffn
from tasks.search_architecture import search
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
    activation="silu",
)
PHASES: dict[Phase, float] = {"prefill": 8.0, "decode": 1.0}
BASELINES = ("uniform", "greedy", *(f"random_{number}" for number in range(5)), "untrained", "depth")
_AT = {"hardware": HARDWARE, "engine": "torch", "precision": "float32", "scenario": SCENARIO, "batch": BATCH}
TARGETS: dict[str, Any] = {
    "large": {
        "label": "Large <child>",
        "constraints": {
            "size": {"metric": "block_params", "at_most_ratio": 0.73},
            "speed": {"metric": "decode_throughput", "at_least_ratio": 1.1, **_AT},
        },
    },
    "small": {
        "label": "Small",
        "constraints": {
            "size": {"metric": "block_params", "at_most_ratio": 0.57},
            "speed": {"metric": "decode_throughput", "at_least_ratio": 1.2, **_AT},
        },
    },
}


def write_run(paths: Paths, config: ModelConfig = CONFIG, **overrides: dict[str, Any]) -> Params:
    """Everything that the report reads, for TARGETS; the params of that run."""
    params = parse({**tiny_values(**overrides), "targets": TARGETS}, "tests/report_run.py")
    write_json(paths.parent / "puzzle_parent.json", {"name": "Tiny", "digest": "0" * 64, "config": config.to_json()})
    write_costs(paths.costs, _costs(config, params))
    write_scores(paths.scores, _scores(config, params))
    paths.library.mkdir()
    pq.write_table(pa.Table.from_pylist(list(_losses(config, params))), paths.library / "index.parquet")
    for number, target in enumerate(params.targets):
        search.fn(target, params, paths)
        _measure(target, number, paths)
    return params


def _variants(config: ModelConfig, params: Params) -> list[tuple[str, str]]:
    """(subblock, variant), the parent's own left out."""
    ffns = ffn_variants(config, params.distill_blocks.ffn_ratios, params.distill_blocks.width_multiple, linear=False)
    return [("attention", one.name) for one in attention_variants(config, linear=False)[1:]] + [
        ("ffn", f.name) for f in ffns[1:]
    ]


def _costs(config: ModelConfig, params: Params) -> Iterator[CostRow]:
    """A modelled GPU, and the same ten thousand times slower as if it had been timed."""
    ffns = ffn_variants(config, params.distill_blocks.ffn_ratios, params.distill_blocks.width_multiple, linear=False)
    device = device_named("h100-sxm")
    for row in modelled_rows(
        config, attention_variants(config, linear=False), ffns, device, "float32", SCENARIO, BATCH
    ):
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
            64,
            kl,
            3 + kl,
            0.9,
            0.9,
        )


def _harm(config: ModelConfig, block_index: int, variant: str) -> float:
    """First and last block matter most, and so does what is taken away."""
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
    """evaluation.json, baselines.json, gkd.json, throughput.parquet of a child."""
    chosen = read_json(paths.architecture(target), "the test")
    score = chosen["predicted"]["score"]
    parent = chosen["predicted"]["speed"]["parent"]
    speed = {
        "machine": "a made-up processor, 1 core",
        "is_timed_machine": True,
        "origin": "measured",
        **_AT,
        **{name: {"decode_throughput": rate} for name, rate in (("parent", parent), ("assembled", parent * 1.23))},
    }
    rows = list(_throughput(parent))
    evaluation = {
        "target": target,
        "label": chosen["label"],
        "tokens": 8192,
        "sequences": 32,
        "parent": _quality(0.0),
        "assembled": _quality(score * 1.2),
        "distilled": _quality(score * 0.8),
        "baselines": {
            name: {**_quality(score * (1.3 + 0.4 * rank)), "sequences": 16} for rank, name in enumerate(BASELINES)
        },
        "paired": {
            name: {"kl_difference": 0.1 * rank - 0.1, "stderr": 0.01}
            for rank, name in enumerate(("distilled", *BASELINES))
        },
        "predicted": {"score": score, "score_stderr": 0.01},
        "constraints": [{**one, "measured": one["predicted"] * 1.01} for one in chosen["constraints"]],
        "speed": speed,
        "speeds": list(speed_ratios(rows, {"parent": _counted(1.0), "assembled": _counted(0.8)})),
        "exports": {"tokens": 512, "formats": {"gguf-q8_0": {**_quality(score * 0.001), "torch_perplexity": 8.9}}},
    }
    write_json(paths.evaluation(target), evaluation)
    write_json(paths.baselines(target), {"target": target, "baselines": _baselines(chosen)})
    write_json(paths.gkd(target), _gkd(target, score, number))
    write_throughput(paths.throughput(target), rows)


def _counted(share: float) -> Counted:
    return Counted(ModelSizes(10_000, 9_000, round(40_000 * share), 0), 5, 0)


def _quality(kl: float) -> dict[str, float]:
    return {"kl": kl, "kl_stderr": kl / 20, "perplexity": 8.8 * math.exp(kl), "top1_agreement": math.exp(-kl / 2)}


def _baselines(chosen: dict[str, Any]) -> dict[str, Any]:
    predicted = chosen["predicted"]
    return {
        name: {
            "blocks": Architecture.from_json(chosen["blocks"]).to_json(),
            "weights": "initial" if name == "untrained" else "decoupled",
            "predicted": {
                "score": predicted["score"] * (1.2 + 0.3 * rank),
                "block_params_ratio": predicted["block_params_ratio"],
                "kv_ratio": predicted["kv_ratio"],
                "throughput_ratio": predicted["throughput_ratio"] + 0.02 * (rank % 3),
            },
        }
        for rank, name in enumerate(BASELINES)
    }


def _gkd(target: str, score: float, number: int) -> dict[str, Any]:
    def at(step: int) -> float:
        return score * (0.8 + 0.4 * math.exp(-step / 20))

    steps = [
        {
            "step": step,
            "tokens": step * 512,
            "loss": at(step) + 0.1,
            "kl": at(step) * (1 + 0.1 * math.sin(step + number)),
            "cosine": 0.1 * math.exp(-step / 50),
            "learning_rate": 1e-4,
        }
        for step in range(1, 61)
    ]
    held_out = [{"step": step, "tokens": step * 512, "kl": at(step)} for step in range(0, 61, 10)]
    return {"target": target, "steps": steps, "held_out": held_out, "best_step": 50}


def _throughput(parent: float) -> Iterator[ThroughputRow]:
    """In two engines; on the modelled GPU parent and child are best on different numbers of devices."""
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
            measured_ms=1e3 / rate,
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
