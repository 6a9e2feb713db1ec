"""Which runtime computes which architecture right in which form, and why not (docs/runtimes.md). No torch.

One table of rules: the search leaves out what a named runtime would get wrong, the export refuses to write it, the
model card and `python -m flows.check_runtimes` say who loads a checkpoint. The rules were read from each runtime's
loader, llama.cpp's found by running it. llama.cpp reads a GGUF, in which removed subblocks have stand-ins; the others
read nemotron-nas, or a Llama.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from storage.model_config import ModelConfig, ffn_mult, unsaid_by_gguf
from storage.records import Attention, ExportFormat, Ffn, Runtime

RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
Blocks = Sequence[tuple[Attention, Ffn]]
_NAS = ("vllm", "sglang", "tensorrt-llm", "mlx-lm")
_PADDED = "export it as padded-llama"


@dataclass(frozen=True)
class Refusal:
    """Why something would be computed wrong or not at all, which blocks it is about ("" for all), and the way out."""

    reason: str
    where: str
    way_out: str

    @property
    def text(self) -> str:
        """The reason and the blocks."""
        return f"{self.reason}, unlike {self.where}" if self.where else self.reason


@dataclass(frozen=True)
class Verdict:
    """What a runtime makes of a checkpoint: the forms that it computes right, and why not nemotron-nas or GGUF."""

    runtime: Runtime
    takes: tuple[str, ...]
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class _Block:
    """A child block, where it stands, and the parent's geometry."""

    config: ModelConfig
    index: int
    attention: Attention
    ffn: Ffn


@dataclass(frozen=True)
class _Rule:
    """What some runtimes get wrong: blocks of this kind, with the reason and the way out.

    `lists_blocks`: which ones it is about is news. `as_llama`: also of a Llama that is computed so.
    """

    runtimes: tuple[str, ...]
    breaks: Callable[[_Block], bool]
    reason: str
    way_out: str
    lists_blocks: bool = True
    as_llama: bool = False


def _lacks_ffn_mult(of: _Block) -> bool:
    return of.ffn.kind == "gated" and ffn_mult(of.ffn.intermediate_size, of.config.hidden_size) is None


def _has_biases(of: _Block) -> bool:
    return of.config.qkv_bias or of.config.output_bias or of.config.mlp_bias


_RULES = (
    _Rule(
        ("sglang", "tensorrt-llm", "mlx-lm"),
        _lacks_ffn_mult,
        "it takes FFN widths in multiples of 256 only",
        f"search with distill_blocks.width_multiple: 256, or {_PADDED}",
    ),
    _Rule(
        ("vllm", "sglang", "mlx-lm"),
        lambda of: of.index == 0 and of.attention.kind == "no_op",
        "it takes no model without attention in block 0",
        f"name the runtime in the target's `runtimes`, or {_PADDED}",
        lists_blocks=False,
    ),
    _Rule(
        ("sglang",),
        lambda of: of.attention.kind == "gqa" and of.attention.num_kv_heads != of.config.num_kv_heads,
        "it takes one number of kv heads in all blocks",
        f"name the runtime in the target's `runtimes`, or {_PADDED}",
    ),
    _Rule(
        ("vllm", "sglang", "mlx-lm"),
        lambda of: of.attention.kind == "linear",
        "it has no linear attention",
        "name the runtime in the target's `runtimes`",
    ),
    _Rule(
        ("vllm", "sglang", "mlx-lm", "llama.cpp"),
        lambda of: of.ffn.kind == "linear",
        "it has no linear FFN",
        "name the runtime in the target's `runtimes`",
    ),
    _Rule(("tensorrt-llm",), _has_biases, "it takes no biases", _PADDED, lists_blocks=False),
    _Rule(
        ("sglang", "mlx-lm"),
        lambda of: of.config.qkv_bias != of.config.output_bias,
        "it takes biases on all of q, k, v and output or on none",
        _PADDED,
        lists_blocks=False,
    ),
    _Rule(
        ("sglang",),
        lambda of: of.config.mlp_bias,
        "it takes no biases in FFNs",
        "use another runtime",
        lists_blocks=False,
        as_llama=True,
    ),
    _Rule(
        ("mlx-lm",),
        lambda of: of.config.num_heads * of.config.head_dim != of.config.hidden_size,
        "it takes heads that share the hidden size evenly",
        _PADDED,
        lists_blocks=False,
    ),
    _Rule(
        ("vllm", "sglang", "tensorrt-llm", "llama.cpp"),
        lambda of: of.config.activation != "silu",
        "it computes SiLU only",
        "use transformers, or mlx-lm",
        lists_blocks=False,
        as_llama=True,
    ),
    _Rule(
        ("llama.cpp",),
        lambda of: bool(unsaid_by_gguf(of.config.rope)),
        "GGUF has no key for some settings of its rotary positions (yarn: attention_factor, mscale, truncate)",
        "leave the gguf formats out",
        lists_blocks=False,
    ),
    _Rule(
        ("mlx-lm",),
        lambda of: of.config.activation == "gelu_pytorch_tanh",
        "it does not know gelu_pytorch_tanh",
        "use transformers",
        lists_blocks=False,
        as_llama=True,
    ),
)
_NO_KV_HEADS = Refusal(
    "it loads no model without kv heads", "", "add a constraint {metric: attention_blocks, at_least: 1} to the target"
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


def refusals(config: ModelConfig, blocks: Blocks) -> dict[Runtime, list[Refusal]]:
    """Runtime -> why it would load a child of these blocks wrong or not at all."""
    most = max((attention.num_kv_heads for attention, _ in blocks), default=0)
    config = replace(config, num_kv_heads=most)  # a child may have fewer than its parent, the same number everywhere
    found = {runtime: _broken(runtime, config, blocks, _RULES) for runtime in RUNTIMES}
    if not has_kv_heads(blocks):
        found["llama.cpp"].append(_NO_KV_HEADS)
    return found


def has_kv_heads(blocks: Blocks) -> bool:
    """Whether the GGUF of these blocks has a layer with kv heads, be it a stand-in for the first one's attention."""
    kept = [attention.kind for attention, ffn in blocks if (attention.kind, ffn.kind) != ("no_op", "no_op")]
    return "gqa" in kept or kept[:1] == ["no_op"]


def _broken(runtime: Runtime, config: ModelConfig, blocks: Blocks, rules: Sequence[_Rule]) -> list[Refusal]:
    found = []
    for rule in rules:
        at = [index for index, (a, f) in enumerate(blocks) if rule.breaks(_Block(config, index, a, f))]
        if at and runtime in rule.runtimes:
            found.append(Refusal(rule.reason, _listed(at, len(blocks)) if rule.lists_blocks else "", rule.way_out))
    return found


def _listed(indices: Sequence[int], count: int) -> str:
    if len(indices) == count:
        return "all blocks"
    shown = ", ".join(map(str, indices[:6])) + (", ..." if len(indices) > 6 else "")
    return f"block{'s' * (len(indices) > 1)} {shown}"


def are_alike(blocks: Blocks) -> bool:
    """Whether the model is a plain Llama: every block has attention with the same kv heads and an FFN of one width."""
    [*kinds] = set(blocks)
    return len(kinds) == 1 and kinds[0][0].kind == "gqa" and kinds[0][1].kind == "gated"


def format_refusals(wanted: ExportFormat, config: ModelConfig, blocks: Blocks) -> list[Refusal]:
    """Why a child of these blocks cannot be had in a form so that what reads it computes it right."""
    if wanted.startswith("gguf-"):
        return refusals(config, blocks)["llama.cpp"]
    if wanted == "plain" and not are_alike(blocks):
        return [Refusal("its blocks differ", "", _PADDED)]
    if wanted == "plain" and config.output_bias and not config.qkv_bias:
        return [Refusal("its output projection alone has a bias, and no family has that", "", _PADDED)]
    linear = [index for index, of in enumerate(blocks) if "linear" in (of[0].kind, of[1].kind)]
    if wanted == "padded-llama" and linear:
        where = _listed(linear, len(blocks))
        return [Refusal("a Llama has no linear layer", where, "export it as nemotron-nas, or forbid linear layers")]
    return []


def verdicts(config: ModelConfig, blocks: Blocks) -> list[Verdict]:
    """What each runtime makes of a model of these blocks, in every form that it may be exported in."""
    against = refusals(config, blocks)
    as_llama = "padded-llama" if format_refusals("plain", config, blocks) else "plain"
    has_llama = not format_refusals("padded-llama", config, blocks)
    found = []
    for runtime in RUNTIMES:
        own = "GGUF" if runtime == "llama.cpp" else "nemotron-nas"
        takes = [] if against[runtime] else [own]
        rules = [rule for rule in _RULES if rule.as_llama]
        if runtime in _NAS and has_llama and not _broken(runtime, config, blocks, rules):
            takes.append(as_llama)
        found.append(Verdict(runtime, tuple(takes), tuple(against[runtime])))
    return found
