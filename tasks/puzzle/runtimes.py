"""Which runtime computes which architecture right, and why not (RUNTIMES.md). No torch.

One table of rules: the search leaves out what a named runtime would get wrong, and what writes a checkpoint says who
loads it. llama.cpp reads a GGUF, in which removed subblocks have stand-ins; the others read nemotron-nas.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from storage.model_config import ModelConfig, ffn_mult
from storage.records import Attention, Ffn, Runtime

RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)


@dataclass(frozen=True)
class _Block:
    """A child block, where it stands, and the parent's geometry."""

    config: ModelConfig
    index: int
    attention: Attention
    ffn: Ffn


@dataclass(frozen=True)
class _Rule:
    """What some runtimes get wrong: blocks of this kind, with the reason and the way out."""

    runtimes: tuple[Runtime, ...]
    breaks: Callable[[_Block], bool]
    reason: str


def _has_biases(block: _Block) -> bool:
    return block.config.qkv_bias or block.config.output_bias or block.config.mlp_bias


_RULES = (
    _Rule(
        ("sglang", "tensorrt-llm", "mlx-lm"),
        lambda of: of.ffn.kind == "gated" and ffn_mult(of.ffn.intermediate_size, of.config.hidden_size) is None,
        "its FFN widths are multiples of 256 (set distill_blocks.width_multiple to 256)",
    ),
    _Rule(
        ("vllm", "sglang", "tensorrt-llm", "mlx-lm"),
        lambda of: of.index == 0 and of.attention.kind == "no_op",
        "block 0 must have its attention",
    ),
    _Rule(("vllm", "sglang", "mlx-lm"), lambda of: of.attention.kind == "linear", "it has no linear attention"),
    _Rule(("vllm", "sglang", "mlx-lm", "llama.cpp"), lambda of: of.ffn.kind == "linear", "it has no linear FFN"),
    _Rule(("tensorrt-llm",), _has_biases, "it takes no biases"),
    _Rule(("llama.cpp",), lambda of: of.config.activation != "silu", "it computes SiLU only"),
)


def reasons_against(
    runtime: Runtime, config: ModelConfig, index: int, attention: Attention, ffn: Ffn
) -> tuple[str, ...]:
    """Why a runtime would load a child with this block wrong or not at all; none where it computes it right.

    Args:
        runtime: which one.
        config: geometry of the parent.
        index: where the block stands in the child.
        attention: the block's.
        ffn: the block's.
    """
    block = _Block(config, index, attention, ffn)
    return tuple(rule.reason for rule in _RULES if runtime in rule.runtimes and rule.breaks(block))


def refusals(config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]]) -> dict[str, list[str]]:
    """Runtime -> reasons why it would load a child of these blocks wrong or not at all, each with the blocks."""
    found: dict[str, list[str]] = {}
    for runtime in RUNTIMES:
        where: dict[str, list[int]] = {}
        for index, (attention, ffn) in enumerate(blocks):
            for reason in reasons_against(runtime, config, index, attention, ffn):
                where.setdefault(reason, []).append(index)
        found[runtime] = [f"{reason}: {_listed(at, len(blocks))}" for reason, at in where.items()]
    return found


def _listed(indices: Sequence[int], count: int) -> str:
    if len(indices) == count:
        return "all blocks"
    shown = ", ".join(map(str, indices[:6])) + (", ..." if len(indices) > 6 else "")
    return f"block{'s' * (len(indices) > 1)} {shown}"
