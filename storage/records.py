"""The frozen records that every layer shares: variants, replacements, architectures, rows of the tables.

Words are METHOD.md's: a *variant* is one alternative for a subblock (attention or FFN); a *replacement* puts one
attention and one FFN variant in place of `span` consecutive parent blocks; an *architecture* covers the parent's
blocks exactly once, in order.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from storage.files import InputError

AttentionKind = Literal["gqa", "linear", "no_op"]
FfnKind = Literal["gated", "linear", "no_op"]
Weights = Literal["initial", "decoupled", "coupled"]
Origin = Literal["measured", "modelled"]
Precision = Literal["float32", "bfloat16", "float16", "fp8", "int4"]
Phase = Literal["prefill", "decode", "request"]
Component = Literal["attention", "ffn", "embedding", "head", "step"]
Metric = Literal[
    "params",
    "block_params",
    "attention_blocks",
    "weight_bytes",
    "kv_bytes",
    "memory_gib",
    "throughput",
    "decode_throughput",
    "latency_ms",
    "time_to_first_token_ms",
    "time_per_token_ms",
]
Runtime = Literal["vllm", "sglang", "tensorrt-llm", "llama.cpp", "mlx-lm"]
ExportFormat = Literal["nemotron-nas", "padded-llama", "plain", "gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0"]

ANY_VARIANT = "parent"
"""`CostRow.variant` of the components that no child changes: embedding, head, step."""


@dataclass(frozen=True, order=True)
class Attention:
    """Attention variant: grouped-query attention with `num_kv_heads`, one linear layer, or nothing."""

    kind: AttentionKind
    num_kv_heads: int = 0

    def __post_init__(self) -> None:
        assert (self.kind == "gqa") == (self.num_kv_heads > 0), self

    @property
    def name(self) -> str:
        """`kv_3`, `linear` or `no_op`."""
        return f"kv_{self.num_kv_heads}" if self.kind == "gqa" else self.kind

    @classmethod
    def parse(cls, name: str) -> Self:
        """The variant that `name` names."""
        if match := re.fullmatch(r"kv_([1-9]\d*)", name):
            return cls("gqa", int(match[1]))
        if name == "linear" or name == "no_op":
            return cls("linear" if name == "linear" else "no_op")
        raise InputError(f"unknown attention variant {name!r}: expected kv_<heads>, linear or no_op")


@dataclass(frozen=True, order=True)
class Ffn:
    """FFN variant: gated FFN with `intermediate_size` channels, one linear layer, or nothing."""

    kind: FfnKind
    intermediate_size: int = 0

    def __post_init__(self) -> None:
        assert (self.kind == "gated") == (self.intermediate_size > 0), self

    @property
    def name(self) -> str:
        """`ffn_1536`, `linear` or `no_op`."""
        return f"ffn_{self.intermediate_size}" if self.kind == "gated" else self.kind

    @classmethod
    def parse(cls, name: str) -> Self:
        """The variant that `name` names."""
        if match := re.fullmatch(r"ffn_([1-9]\d*)", name):
            return cls("gated", int(match[1]))
        if name == "linear" or name == "no_op":
            return cls("linear" if name == "linear" else "no_op")
        raise InputError(f"unknown FFN variant {name!r}: expected ffn_<channels>, linear or no_op")


@dataclass(frozen=True, order=True)
class Replacement:
    """One child block in place of parent blocks `first_block` .. `first_block + span - 1`."""

    first_block: int
    span: int
    attention: Attention
    ffn: Ffn

    @property
    def parent_blocks(self) -> range:
        """The parent blocks that this one stands for."""
        return range(self.first_block, self.first_block + self.span)

    @property
    def name(self) -> str:
        """For messages and progress: `block 7: kv_1 + ffn_768`, `blocks 7-8: ...`."""
        where = f"block {self.first_block}" if self.span == 1 else f"blocks {self.first_block}-{self.parent_blocks[-1]}"
        return f"{where}: {self.attention.name} + {self.ffn.name}"


@dataclass(frozen=True)
class Architecture:
    """A child: replacements in order that cover the parent's blocks exactly once."""

    blocks: tuple[Replacement, ...]

    def __post_init__(self) -> None:
        covered = [index for block in self.blocks for index in block.parent_blocks]
        if covered != list(range(len(covered))) or not covered:
            raise InputError(f"an architecture must cover the parent's blocks once and in order, found {covered}")

    @property
    def num_parent_blocks(self) -> int:
        """Blocks of the parent that the architecture was made for."""
        return self.blocks[-1].parent_blocks[-1] + 1

    def to_json(self) -> list[dict[str, Any]]:
        """The `blocks` list of architecture.json."""
        return [
            {
                "parent_blocks": list(block.parent_blocks),
                "attention": {"kind": block.attention.kind, "num_kv_heads": block.attention.num_kv_heads},
                "ffn": {"kind": block.ffn.kind, "intermediate_size": block.ffn.intermediate_size},
            }
            for block in self.blocks
        ]

    @classmethod
    def from_json(cls, blocks: list[Mapping[str, Any]]) -> Self:
        """Inverse of :meth:`to_json`.

        Raises:
            InputError: a block lacks a field, names an unknown kind, or the cover has gaps.
        """
        try:
            return cls(
                tuple(
                    Replacement(
                        block["parent_blocks"][0],
                        len(block["parent_blocks"]),
                        Attention(block["attention"]["kind"], block["attention"]["num_kv_heads"]),
                        Ffn(block["ffn"]["kind"], block["ffn"]["intermediate_size"]),
                    )
                    for block in blocks
                )
            )
        except (KeyError, IndexError, TypeError, AssertionError) as error:
            raise InputError(f"architecture.json: not a list of blocks in our form ({error!r})") from error


@dataclass(frozen=True)
class ScoreRow:
    """One replacement measured on one shard of sequences: a row of scores.parquet.

    `weights` says how far the replacement was trained and `weights_hash` names the very tensors ("" where it has none
    of its own: no-ops). `around` is "parent" or the hash of the architecture in which the block was replaced.
    `tokens` counts the scored positions; `kl` (parent || child) and `lm_loss` are means over them in nats per token,
    `top1_agreement` is the share of them on which parent and child rank the same token first, `cosine` the mean cosine
    of their last hidden states (before the final norm).
    """

    first_block: int
    span: int
    attention: str
    ffn: str
    weights: Weights
    weights_hash: str
    around: str
    sequence_shard: int
    tokens: int
    kl: float
    lm_loss: float
    top1_agreement: float
    cosine: float

    @property
    def replacement(self) -> Replacement:
        """What was measured."""
        return Replacement(self.first_block, self.span, Attention.parse(self.attention), Ffn.parse(self.ffn))


@dataclass(frozen=True)
class CostRow:
    """What one component takes in one setting: a row of costs.parquet. A model's cost is the sum over its rows.

    `variant` is ANY_VARIANT for embedding, head (final norm included) and step (floors per step and per sequence);
    `first_block` is null where the cost is the same in every block. `prefill_ms`: the whole batch reads
    `scenario`'s input. `decode_ms`: one step of the whole batch at the scenario's mean context, input + output / 2.
    Bytes and params are those of the whole component, summed over the `tensor_parallel` devices; a head that is tied
    to the embedding has none of its own.
    """

    component: Component
    variant: str
    first_block: int | None
    span: int
    hardware: str
    engine: str
    precision: Precision
    tensor_parallel: int
    scenario: str
    batch: int
    prefill_ms: float
    decode_ms: float
    weight_bytes: int
    kv_bytes_per_token: int
    params: int
    origin: Origin
    how: str


@dataclass(frozen=True)
class TimingRow(CostRow):
    """A measured cost with what it was measured on: a row of storage/timings/<hardware>.parquet.

    `machine` names processor and cores, `versions` the software, `dtype` the compute type, `threads` the engine's
    threads; `spread` is the interquartile range of the `repeats` timings as a share of their median (of prefill or
    decode, whichever is larger).
    """

    machine: str
    versions: str
    dtype: str
    threads: int
    repeats: int
    spread: float


@dataclass(frozen=True, kw_only=True)
class ThroughputRow:
    """Speed of the whole parent or child in one setting: a row of throughput.parquet, either measured or modelled.

    Tokens/s are of tokens read (`prefill`), generated while decoding (`decode`) or generated by whole requests
    (`request`). A measured row has the median `measured_ms` of the phase (one step of the whole batch for decode), its
    spread (interquartile range as a share of the median), where it was taken (`machine`, `versions`, `threads`; null
    threads: a GPU), and what the cost table's timings of `predicted_hardware` say for the same setting, null where it
    has none. A modelled row has none of these; its tokens/s are of each of the `tensor_parallel` devices. `hardware` is
    a name of the cost table, or the machine's own text where the machine was not timed.
    """

    model: str
    phase: Phase
    scenario: str
    batch: int
    hardware: str
    engine: str
    precision: Precision
    tensor_parallel: int
    threads: int | None = None
    machine: str | None = None
    versions: str | None = None
    measured_ms: float | None = None
    measured_tokens_per_s: float | None = None
    measured_spread: float | None = None
    predicted_tokens_per_s: float | None = None
    predicted_hardware: str | None = None
    modelled_tokens_per_s: float | None = None
    how: str


@dataclass(frozen=True, kw_only=True)
class ServingLoad:
    """What a server was loaded with.

    `name` is what the user calls the server (parent, child), `model` what the server calls its model, on `devices`
    devices. `input_tokens` and `output_tokens` are what each request had, a share of the scenario's where lengths are
    scaled.
    """

    name: str
    model: str
    url: str
    devices: int
    scenario: str
    input_tokens: int
    output_tokens: int
    concurrency: int

    @property
    def work(self) -> tuple[str, int, int]:
        """What is compared between servers: the scenario, and the lengths that were sent for it."""
        return self.scenario, self.input_tokens, self.output_tokens


@dataclass(frozen=True, kw_only=True)
class ServingRow(ServingLoad):
    """What a server measured at one concurrency: a row of serving.parquet.

    `counted_input_tokens` is the server's own count. Of `requests`, `errors` failed, of the kinds in `error_kinds`.
    Times and rates are of whole requests, null where none was: generated tokens/s of the server, tokens/s of the median
    request after its first token, percentiles of the time to the first token (ttft) and of the times between events
    (itl).
    """

    requests: int
    errors: int
    error_kinds: str
    counted_input_tokens: float | None
    seconds: float
    measured_tokens_per_s: float | None
    measured_user_tokens_per_s: float | None
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p95_ms: float | None
    itl_p99_ms: float | None
