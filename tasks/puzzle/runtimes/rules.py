"""Which runtime computes which architecture right in which format, and why not (docs/runtimes.md). No torch.

In: the parent's geometry and a child's blocks. Out: refusals, each with the reason, the blocks it is about and the way
out. One table of rules is behind the search, which leaves out what a named runtime would get wrong, the export, which
refuses to write it, and the model card and `puzzle check-runtimes`, which say who loads a checkpoint. The rules of
llama.cpp and mlx-lm come from running them, those of the others from reading each runtime's loader; vLLM was run, too.
llama.cpp reads a GGUF, in which removed subblocks have stand-ins; the others read nemotron-nas, or a Llama.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from storage.block_configs import ffn_mult
from storage.formats import FORMATS, FormatKind, FormatName
from storage.model_config import ModelConfig, rope_without_gguf_key
from storage.nemotron_nas import NEMOTRON_NAS
from storage.records import Runtime
from storage.variants import Attention, Ffn

RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
Blocks = Sequence[tuple[Attention, Ffn]]
_READS_GGUF: Runtime = "llama.cpp"
FIRST_FORMAT: Mapping[Runtime, str] = {
    runtime: "GGUF" if any(row.is_gguf and row.runtime == runtime for row in FORMATS.values()) else NEMOTRON_NAS
    for runtime in RUNTIMES
}
"""The format that each runtime reads a child in; where it computes that one wrong, a Llama may remain."""
_UNIFORM_FORMATS: tuple[FormatName, ...] = ("plain", "padded-llama", "padded-qwen3")
"""Formats of equal blocks, which every tool loads that knows the family; the smaller one first."""
_NEEDS_ATTENTION: tuple[Runtime, ...] = ("vllm", "sglang", "mlx-lm")
_NEEDS_ATTENTION_FIRST: tuple[Runtime, ...] = ("vllm", "sglang")
_PADDED = "export it as {padded}"
"""A way out; `padded` is the format of the two that can express the model."""


@dataclass(frozen=True)
class Refusal:
    """Why a model would be computed wrong or not at all, which blocks it is about ("" for all), and the way out."""

    reason: str
    where: str
    way_out: str

    @property
    def text(self) -> str:
        """Return the reason and the blocks."""
        return f"{self.reason}, unlike {self.where}" if self.where else self.reason


@dataclass(frozen=True)
class Verdict:
    """The formats of a model that a runtime computes right, and why it does not take nemotron-nas or GGUF."""

    runtime: Runtime
    takes: tuple[str, ...]
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class _Block:
    """A child's block, whether an earlier one has attention, and the parent's geometry."""

    config: ModelConfig
    follows_attention: bool
    attention: Attention
    ffn: Ffn


@dataclass(frozen=True)
class _Rule:
    """Something that runtimes get wrong.

    Attributes:
        runtimes: the runtimes that do.
        breaks: whether a block is of the kind that they get wrong.
        reason: the reason, in words that follow the runtime's name.
        way_out: the advice of the message.
        lists_blocks: whether the message says which blocks it is about; otherwise the whole model has this kind.
        breaks_uniform: whether it also holds where the model is exported with equal blocks, as a Llama or a Qwen3.
        breaks_child: whether it holds for nemotron-nas and GGUF.
    """

    runtimes: tuple[Runtime, ...]
    breaks: Callable[[_Block], bool]
    reason: str
    way_out: str
    lists_blocks: bool = True
    breaks_uniform: bool = False
    breaks_child: bool = True


def _lacks_ffn_mult(block: _Block) -> bool:
    return block.ffn.kind == "gated" and ffn_mult(block.ffn.intermediate_size, block.config.hidden_size) is None


def _has_biases(block: _Block) -> bool:
    return block.config.qkv_bias or block.config.output_bias or block.config.mlp_bias


def _has_fewer_kv_heads(block: _Block) -> bool:
    return block.attention.kind == "gqa" and block.attention.num_kv_heads != block.config.num_kv_heads


def _has_ffn_before_attention(block: _Block) -> bool:
    return not block.follows_attention and block.attention.kind == "no_op" and block.ffn.kind != "no_op"


def _has_uneven_heads(block: _Block) -> bool:
    return block.config.num_heads * block.config.head_dim != block.config.hidden_size


def _has_unread_yarn(block: _Block) -> bool:
    rope = block.config.rope
    if rope["rope_type"] != "yarn":
        return False
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    is_scaled_otherwise = not (mscale and all_dim) and (mscale not in (None, 1) or all_dim not in (None, 0))
    return is_scaled_otherwise or rope.get("attention_factor") is not None or rope.get("truncate") is False


def _has_other_rotary_than_qwen3(rope: Mapping[str, Any]) -> bool:
    betas = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    return rope["rope_type"] == "llama3" or (rope["rope_type"] == "yarn" and betas != (32, 1))


_TIED_HEAD = _Rule(
    ("llama.cpp",),
    lambda block: block.config.qk_norm and not block.config.tie_embeddings,
    "its one arch for blocks that differ and normalise queries and keys (openelm) has the embedding as its head",
    f"leave the gguf formats out and run it with transformers, or {_PADDED}",
    lists_blocks=False,
)
"""Where blocks are alike, the GGUF is a Qwen3, which has a head of its own."""
_RULES = (
    _Rule(
        ("sglang", "tensorrt-llm", "mlx-lm"),
        _lacks_ffn_mult,
        "it takes FFN widths in multiples of 256 only",
        f"search with distill_blocks.width_multiple: 256, or {_PADDED}",
    ),
    _Rule(
        _NEEDS_ATTENTION_FIRST,
        _has_ffn_before_attention,
        "it takes no FFN before the first attention",
        f"name the runtime in the target's `runtimes`, or {_PADDED}",
    ),
    _Rule(
        ("sglang",),
        _has_fewer_kv_heads,
        "it takes one number of kv heads in all blocks",
        f"name the runtime in the target's `runtimes`, or {_PADDED}",
    ),
    _Rule(
        ("vllm", "sglang", "mlx-lm"),
        lambda block: block.attention.kind == "linear",
        "it has no linear attention",
        "name the runtime in the target's `runtimes`",
    ),
    _Rule(
        ("vllm", "sglang", "mlx-lm", "llama.cpp"),
        lambda block: block.ffn.kind == "linear",
        "it has no linear FFN",
        "name the runtime in the target's `runtimes`",
    ),
    _Rule(
        ("vllm", "sglang", "tensorrt-llm", "mlx-lm"),
        lambda block: block.config.qk_norm,
        "its nemotron-nas does not normalise queries and keys (qk-norm)",
        _PADDED,
        lists_blocks=False,
    ),
    _Rule(
        ("llama.cpp",),
        lambda block: block.config.qk_norm and block.attention.kind == "linear",
        "it has no linear attention beside one that normalises queries and keys (qk-norm)",
        "name the runtime in the target's `runtimes`",
    ),
    _Rule(
        ("llama.cpp",),
        lambda block: block.config.qk_norm and _has_biases(block),
        "it takes no biases beside qk-norm",
        "leave the gguf formats out",
        lists_blocks=False,
    ),
    _Rule(
        ("llama.cpp",),
        lambda block: block.config.qk_norm and _has_other_rotary_than_qwen3(block.config.rope),
        "beside qk-norm it takes no llama3 rotary positions, nor beta_fast and beta_slow of yarn",
        "leave the gguf formats out",
        lists_blocks=False,
    ),
    _TIED_HEAD,
    _Rule(
        ("mlx-lm",),
        lambda block: block.config.qk_norm and _has_biases(block),
        "its Qwen3 has no biases",
        "use transformers",
        lists_blocks=False,
        breaks_uniform=True,
        breaks_child=False,
    ),
    _Rule(("tensorrt-llm",), _has_biases, "it takes no biases", _PADDED, lists_blocks=False),
    _Rule(
        ("sglang", "mlx-lm"),
        lambda block: block.config.qkv_bias != block.config.output_bias,
        "it takes biases on all of q, k, v and output or on none",
        _PADDED,
        lists_blocks=False,
    ),
    _Rule(
        ("sglang",),
        lambda block: block.config.mlp_bias,
        "it takes no biases in FFNs",
        "use another runtime",
        lists_blocks=False,
        breaks_uniform=True,
    ),
    _Rule(
        ("mlx-lm",),
        _has_uneven_heads,
        "it takes heads that share the hidden size evenly",
        _PADDED,
        lists_blocks=False,
    ),
    _Rule(
        ("vllm", "sglang", "tensorrt-llm", "llama.cpp"),
        lambda block: block.config.activation != "silu",
        "it computes SiLU only",
        "use transformers, or nemotron-nas in mlx-lm",
        lists_blocks=False,
        breaks_uniform=True,
    ),
    _Rule(
        ("llama.cpp",),
        lambda block: bool(rope_without_gguf_key(block.config.rope)),
        "GGUF has no key for some settings of its rotary positions (yarn: attention_factor, mscale, truncate)",
        "leave the gguf formats out",
        lists_blocks=False,
    ),
    _Rule(
        ("mlx-lm",),
        lambda block: block.config.activation == "gelu_pytorch_tanh",
        "it does not know gelu_pytorch_tanh",
        "use transformers",
        lists_blocks=False,
    ),
    _Rule(
        ("mlx-lm",),
        lambda block: block.config.activation != "silu",
        "it computes SiLU in every Llama",
        "use transformers, or nemotron-nas in mlx-lm",
        lists_blocks=False,
        breaks_uniform=True,
        breaks_child=False,
    ),
    _Rule(
        ("mlx-lm",),
        _has_unread_yarn,
        "it does not read attention_factor, truncate, nor one of mscale and mscale_all_dim alone, of yarn",
        "use transformers, or vllm",
        lists_blocks=False,
        breaks_uniform=True,
    ),
)
_CHILD_RULES = tuple(rule for rule in _RULES if rule.breaks_child)
_UNIFORM_RULES = tuple(rule for rule in _RULES if rule.breaks_uniform)
_KEEP_ONE = "add a constraint {metric: attention_blocks, at_least: 1} to the target"
_NO_KV_HEADS = Refusal("it loads no model without kv heads", "", _KEEP_ONE)
_NO_ATTENTION = Refusal("it loads no model without attention", "", _KEEP_ONE)


def reasons_against(
    runtime: Runtime, config: ModelConfig, index: int, attention: Attention, ffn: Ffn
) -> tuple[str, ...]:
    """Say why a runtime would compute every child with this block wrong or not at all.

    What depends on other blocks as well, :func:`refusals` says.

    Args:
        runtime: the runtime.
        config: geometry of the parent.
        index: index of the block in the child.
        attention: the block's attention.
        ffn: the block's FFN.
    """
    block = _Block(config, index > 0, attention, ffn)
    return tuple(rule.reason for rule in _CHILD_RULES if runtime in rule.runtimes and rule.breaks(block))


def variants_refused(
    runtime: Runtime, config: ModelConfig, attentions: Sequence[Attention], ffns: Sequence[Ffn]
) -> set[tuple[str, str]]:
    """Return the variants that a runtime computes in no block, as a cost table has them: ("attention" or "ffn", name).

    What it refuses of the whole model is not among the reasons.
    """
    parent_attention, parent_ffn = Attention("gqa", config.num_kv_heads), Ffn("gated", config.intermediate_size)
    described = [("attention", attention.name, _Block(config, True, attention, parent_ffn)) for attention in attentions]
    described += [("ffn", ffn.name, _Block(config, True, parent_attention, ffn)) for ffn in ffns]
    rules = [rule for rule in _CHILD_RULES if runtime in rule.runtimes and rule.lists_blocks]
    return {(component, name) for component, name, block in described if any(rule.breaks(block) for rule in rules)}


def refusals(config: ModelConfig, blocks: Blocks) -> dict[Runtime, list[Refusal]]:
    """Map each runtime to why it would compute a child of these blocks wrong or not at all."""
    most = max((attention.num_kv_heads for attention, _ in blocks), default=0)
    config = replace(config, num_kv_heads=most)  # a child may have fewer than its parent, the same number everywhere
    non_empty = [block for block in blocks if not is_empty([block])]
    rules = [rule for rule in _CHILD_RULES if rule is not _TIED_HEAD or not are_alike(non_empty)]
    against = {runtime: _broken_rules(runtime, config, blocks, rules) for runtime in RUNTIMES}
    if not has_kv_heads(blocks):
        against[_READS_GGUF].append(_NO_KV_HEADS)
    if all(attention.kind == "no_op" for attention, _ in blocks):
        for runtime in _NEEDS_ATTENTION:
            against[runtime].append(_NO_ATTENTION)
    return against


@dataclass(frozen=True)
class ChildRule:
    """A rule on whole children: the weights of the blocks that a child takes add up to `at_least`.

    Attributes:
        text: the rule in words.
        weights: a weight for every block that a child may take.
        at_least: the least sum.
    """

    text: str
    weights: tuple[int, ...]
    at_least: int


def child_rules(runtimes: Sequence[Runtime], choices: Sequence[tuple[int, Attention, Ffn]]) -> Iterator[ChildRule]:
    """Yield what no single block shows: a child that keeps these rules is not empty, and no runtime refuses it whole.

    Args:
        runtimes: the runtimes that the child must run in.
        choices: the blocks that a child may take: the parent block where each begins, which gives their order;
            attention; FFN. A child takes at most one that begins at a place.
    """
    non_empty = [int((attention.kind, ffn.kind) != ("no_op", "no_op")) for _, attention, ffn in choices]
    yield ChildRule("a child has an attention or an FFN in some block", tuple(non_empty), 1)
    attended = [int(attention.kind != "no_op") for _, attention, _ in choices]
    without = [keeps - has for keeps, has in zip(non_empty, attended, strict=True)]  # 1: an FFN, and no attention
    for runtime in runtimes:
        if runtime in _NEEDS_ATTENTION:
            yield ChildRule(f"{runtime} needs attention in some block", tuple(attended), 1)
        if runtime in _NEEDS_ATTENTION_FIRST:
            text = f"{runtime} takes no FFN before the first attention"
            yield from _preceded(text, choices, without, attended, [0] * len(choices))
        if runtime == _READS_GGUF:
            linear = [int(attention.kind == "linear") for _, attention, _ in choices]
            with_heads = [int(attention.kind == "gqa") for _, attention, _ in choices]
            text = f"{runtime} needs kv heads in some block, unless the first that is kept has an FFN alone"
            yield from _preceded(text, choices, linear, without, with_heads)


def _preceded(
    text: str,
    choices: Sequence[tuple[int, Attention, Ffn]],
    needs: Sequence[int],
    before: Sequence[int],
    anywhere: Sequence[int],
) -> Iterator[ChildRule]:
    """Yield rules that a block with a 1 in `needs` has one of `before` before it, or the child one of `anywhere`."""
    places = [place for place, _, _ in choices]
    for needy_place in sorted({place for place, is_needy in zip(places, needs, strict=True) if is_needy}):
        weights = [
            at_large + earlier * (place < needy_place) - needy * (place == needy_place)
            for place, needy, earlier, at_large in zip(places, needs, before, anywhere, strict=True)
        ]
        yield ChildRule(text, tuple(weights), 0)


def is_empty(blocks: Blocks) -> bool:
    """Tell whether no block has an attention or an FFN, so that there is nothing to train or to run."""
    return all((attention.kind, ffn.kind) == ("no_op", "no_op") for attention, ffn in blocks)


def has_kv_heads(blocks: Blocks) -> bool:
    """Tell whether the GGUF of these blocks has a layer with kv heads; a stand-in for the first attention counts."""
    kinds = [attention.kind for attention, ffn in blocks if (attention.kind, ffn.kind) != ("no_op", "no_op")]
    return "gqa" in kinds or kinds[:1] == ["no_op"]


def _broken_rules(runtime: Runtime, config: ModelConfig, blocks: Blocks, rules: Sequence[_Rule]) -> list[Refusal]:
    """Return a refusal for each rule of a runtime that a block breaks."""
    has_attention = [attention.kind != "no_op" for attention, _ in blocks]
    described = [_Block(config, any(has_attention[:index]), *block) for index, block in enumerate(blocks)]
    against = []
    for rule in rules:
        if runtime not in rule.runtimes:
            continue
        broken = [index for index, block in enumerate(described) if rule.breaks(block)]
        if broken:
            where = _listed(broken, len(blocks)) if rule.lists_blocks else ""
            against.append(Refusal(rule.reason, where, rule.way_out.format(padded=_padded_format(config))))
    return against


def _listed(indices: Sequence[int], count: int) -> str:
    """List the indices of blocks in words, the first six of them, or say that they are all `count` blocks."""
    if len(indices) == count:
        return "all blocks"
    shown = ", ".join(map(str, indices[:6])) + (", ..." if len(indices) > 6 else "")
    return f"block{'s' * (len(indices) > 1)} {shown}"


def are_alike(blocks: Blocks) -> bool:
    """Tell whether the model is a plain Llama: every block has attention with the same kv heads, FFNs of one width."""
    kinds = list(set(blocks))
    return len(kinds) == 1 and kinds[0][0].kind == "gqa" and kinds[0][1].kind == "gated"


def format_refusals(name: FormatName, config: ModelConfig, blocks: Blocks) -> list[Refusal]:
    """Say why a child of these blocks cannot be exported in a format so that what reads it computes it right."""
    return _FORMAT_REFUSALS[FORMATS[name].kind](config, blocks)


def _nemotron_nas_refusals(_config: ModelConfig, _blocks: Blocks) -> list[Refusal]:
    return []


def _padded_format(config: ModelConfig) -> FormatName:
    """Return the format of equal blocks, padded with zeros, that can express a model."""
    return "padded-qwen3" if config.qk_norm else "padded-llama"


def _padded_llama_refusals(config: ModelConfig, blocks: Blocks) -> list[Refusal]:
    if config.qk_norm:
        return [Refusal("a Llama does not normalise queries and keys (qk-norm)", "", "export it as padded-qwen3")]
    return _linear_refusals("a Llama", blocks)


def _padded_qwen3_refusals(config: ModelConfig, blocks: Blocks) -> list[Refusal]:
    if not config.qk_norm:
        return [Refusal("a Qwen3 normalises queries and keys (qk-norm)", "", "export it as padded-llama")]
    if config.mlp_bias:
        return [Refusal("a Qwen3 has no biases in FFNs", "", "export it as nemotron-nas")]
    return _linear_refusals("a Qwen3", blocks)


def _linear_refusals(family: str, blocks: Blocks) -> list[Refusal]:
    linear = [index for index, (attention, ffn) in enumerate(blocks) if "linear" in (attention.kind, ffn.kind)]
    if not linear:
        return []
    where = _listed(linear, len(blocks))
    return [Refusal(f"{family} has no linear layer", where, "export it as nemotron-nas, or forbid linear layers")]


def _anymodel_refusals(config: ModelConfig, blocks: Blocks) -> list[Refusal]:
    return [*_linear_refusals("what reads an anymodel", blocks), *_family_refusals(config)]


def _plain_refusals(config: ModelConfig, blocks: Blocks) -> list[Refusal]:
    if are_alike(blocks):
        return _family_refusals(config)
    return [Refusal("its blocks differ", "", _PADDED.format(padded=_padded_format(config)))]


def _family_refusals(config: ModelConfig) -> list[Refusal]:
    reason = None
    if config.output_bias and not config.qkv_bias:
        reason = "its output projection alone has a bias, and no family has that"
    elif config.qkv_bias and not config.output_bias and (config.mlp_bias or config.qk_norm):
        reason = "it has biases, but none on its output projection, and no family has that"
    elif config.qk_norm and config.mlp_bias:
        reason = "it normalises queries and keys and has biases in FFNs, and no family has both"
    return [Refusal(reason, "", _PADDED.format(padded=_padded_format(config)))] if reason else []


def _gguf_refusals(config: ModelConfig, blocks: Blocks) -> list[Refusal]:
    return refusals(config, blocks)[_READS_GGUF]


_FORMAT_REFUSALS: Mapping[FormatKind, Callable[[ModelConfig, Blocks], list[Refusal]]] = {
    "nemotron-nas": _nemotron_nas_refusals,
    "padded-llama": _padded_llama_refusals,
    "padded-qwen3": _padded_qwen3_refusals,
    "plain": _plain_refusals,
    "anymodel": _anymodel_refusals,
    "gguf": _gguf_refusals,
}
"""What a kind of format (storage/formats.py) cannot express."""


def verdicts(config: ModelConfig, blocks: Blocks) -> list[Verdict]:
    """Return the verdict of each runtime on a model of these blocks, over every format that it may be exported in."""
    against = refusals(config, blocks)
    uniform = next((name for name in _UNIFORM_FORMATS if not format_refusals(name, config, blocks)), None)
    judged = []
    for runtime in RUNTIMES:
        takes = [] if against[runtime] else [FIRST_FORMAT[runtime]]
        reads_uniform = runtime != _READS_GGUF and not _broken_rules(runtime, config, blocks, _UNIFORM_RULES)
        if uniform and reads_uniform:
            takes.append(uniform)
        judged.append(Verdict(runtime, tuple(takes), tuple(against[runtime])))
    return judged
