"""Made-up tables of a tiny parent for the search: scores, modelled costs, and every child that they allow."""

import functools
import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

from storage.model_config import ModelConfig
from storage.params import Params, parse
from storage.parent_info import write_parent_info
from storage.paths import Paths
from storage.records import CostRow, ScoreRow
from storage.scenario import Setting
from storage.tables import write_costs, write_scores
from storage.variants import Replacement
from tasks.puzzle.costs.cost_model import ENGINE, modelled_rows
from tasks.puzzle.costs.hardware import device_named
from tasks.puzzle.search.score_rule import Scores
from tasks.puzzle.search_space import attention_variants, ffn_variants, parent_blocks
from tasks.search_architecture import SearchSummary, search
from tests.records import parent_info

TARGET = "like-51b"
MARGIN = 0.05
CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "tiny",
)
ATTENTIONS = attention_variants(CONFIG, linear=False)
FFNS = ffn_variants(CONFIG, (0.5, 0.25), 64, linear=False)
SPEED = {"hardware": "h100-sxm", "engine": ENGINE, "scenario": "128/128", "batch": 8}


def tiny_search_params(
    constraints: dict[str, Any], more: dict[str, Any] | None = None, **search_section: Any
) -> Params:
    """Return Params with one target: its constraints, and `more` of it (pins, allowed, runtimes).

    Its child is not exported for llama.cpp, unless a limit holds there: any child may be the best.
    """
    raw: dict[str, Any] = {section: {} for section in Params.model_fields}
    if all(constraint.get("engine") != "llama.cpp" for constraint in constraints.values()):
        raw["export_child"] = {"formats": ["nemotron-nas"]}
    raw["search_architecture"] = {"speed_margin": MARGIN, **search_section}
    raw["targets"] = {"like-51b": {"label": "51B-like", "constraints": constraints, **(more or {})}}
    return parse(raw, "test")


def scores(rng: random.Random) -> list[ScoreRow]:
    """Return two shards of every half, some pairs measured jointly, and a span of blocks 1-2."""
    parent_attention, parent_ffn = ATTENTIONS[0], FFNS[0]
    halves = [(attention, parent_ffn) for attention in ATTENTIONS[1:]] + [(parent_attention, ffn) for ffn in FFNS[1:]]
    replaced = [Replacement(block, 1, *half) for block in range(3) for half in halves]
    replaced += [Replacement(0, 1, ATTENTIONS[1], FFNS[1]), Replacement(1, 2, parent_attention, parent_ffn)]
    return [
        ScoreRow(
            first_block=replacement.first_block,
            span=replacement.span,
            attention=replacement.attention.name,
            ffn=replacement.ffn.name,
            weights="decoupled",
            weights_hash="w",
            around="parent",
            sequence_shard=shard,
            document=shard,
            tokens=512,
            kl=kl * rng.uniform(0.9, 1.1),
            lm_loss=3.0,
            top1_agreement=0.9,
            cosine=0.9,
        )
        for replacement in replaced
        for kl in [rng.uniform(0.01, 0.5)]
        for shard in (0, 1)
    ]


def costs(scenario: str = "128/128", batch: int = 8) -> tuple[CostRow, ...]:
    """Return modelled milliseconds and sizes of every variant."""
    setting = Setting("h100-sxm", ENGINE, "bfloat16", 1, scenario, batch)
    return modelled_rows(CONFIG, ATTENTIONS, FFNS, device_named("h100-sxm"), setting)


def write_tables(paths: Paths) -> None:
    """Write the artifacts that the search reads."""
    write_parent_info(paths.parent, parent_info(CONFIG))
    write_scores(paths.scores, scores(random.Random(0)))
    write_costs(paths.costs, costs())


def run_search(
    constraints: dict[str, Any], paths: Paths, more: dict[str, Any] | None = None, **section: Any
) -> tuple[SearchSummary, dict[str, Any], dict[str, Any]]:
    """Search; return the summary, architecture.json, search.json."""
    summary = search.fn("like-51b", tiny_search_params(constraints, more, **section), paths)
    architecture = json.loads(paths.architecture("like-51b").read_text())
    return summary, architecture, json.loads(paths.search("like-51b").read_text())


def children(table: Scores) -> Iterator[tuple[Replacement, ...]]:
    """Yield every child that the tables allow."""
    scored = [*parent_blocks(CONFIG), *table.replacements("decoupled")]
    single = [
        [candidate for candidate in scored if candidate.first_block == block and candidate.span == 1]
        for block in range(3)
    ]
    yield from itertools.product(*single)
    yield from itertools.product(single[0], [candidate for candidate in scored if candidate.span == 2])


@functools.cache
def all_children() -> tuple[tuple[tuple[Replacement, ...], float], ...]:
    """Return every child with its sum of scores."""
    table = Scores.from_rows(scores(random.Random(0)), CONFIG)
    return tuple((child, table.total(child, "decoupled").mean) for child in children(table))
