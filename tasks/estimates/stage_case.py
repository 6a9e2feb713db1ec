"""Sizes and operations that the estimates of stages are made of, from a parent's geometry and params."""

import math
from dataclasses import dataclass
from typing import get_args

from storage.library import name_of
from storage.metrics import METRICS
from storage.model_config import ModelConfig
from storage.params import Params
from storage.records import ELEMENT_BYTES
from storage.sections import MeasuredEngine
from storage.variants import Attention, Ffn
from tasks.puzzle.costs.sizes import attention_elements, ffn_elements
from tasks.puzzle.search_space import block_variants, parent_attention, parent_ffn
from tasks.tensors.teacher import cached_train_tokens, teacher_cache_bytes, teacher_is_live

_GPU_STATES = 20e9
"""Bytes of hidden states that go through a block together on a GPU of 80 GB: a quarter of it."""


@dataclass(frozen=True)
class StageCase:
    """The input of an estimate: a parent's geometry, params, and the share of block parameters that a child keeps.

    Operations are those of one token, forward; checkpoints are in 16 bit.
    """

    config: ModelConfig
    params: Params
    kept_share: float = 1.0

    def attention_flops(self, attention: Attention) -> float:
        """Count operations of an attention: matrices, then q k^T and the weighted sum of v over half the sequence."""
        elements = attention_elements(self.config, attention)
        attended = 2.0 * self.params.prepare_corpus.seq_len * self.config.num_heads * self.config.head_dim
        return 2.0 * elements.matrix + (attended if elements.kv_per_token else 0.0)

    def ffn_flops(self, ffn: Ffn) -> float:
        """Count the operations of an FFN."""
        return 2.0 * ffn_elements(self.config, ffn).matrix

    @property
    def parent_attention_flops(self) -> float:
        """Count the operations of the attention in a block of the parent."""
        return self.attention_flops(parent_attention(self.config))

    @property
    def parent_ffn_flops(self) -> float:
        """Count the operations of the FFN in a block of the parent."""
        return self.ffn_flops(parent_ffn(self.config))

    @property
    def block_flops(self) -> float:
        """Count the operations of a block of the parent."""
        return self.parent_attention_flops + self.parent_ffn_flops

    @property
    def child_flops(self) -> float:
        """Count the operations of all blocks of the child."""
        return self.kept_share * self.config.num_blocks * self.block_flops

    @property
    def head_flops(self) -> float:
        """Count the operations of the LM head."""
        return 2.0 * self.config.hidden_size * self.config.vocab_size

    @property
    def block_params(self) -> int:
        """Count the parameters of a block of the parent."""
        attention = attention_elements(self.config, parent_attention(self.config))
        ffn = ffn_elements(self.config, parent_ffn(self.config))
        return attention.matrix + attention.sensitive + ffn.matrix + ffn.sensitive

    @property
    def outside_params(self) -> int:
        """Count the parameters of embedding and LM head."""
        return self.config.vocab_size * self.config.hidden_size * (1 if self.config.tie_embeddings else 2)

    @property
    def parent_bytes(self) -> float:
        """Count the bytes of the parent's checkpoint."""
        return 2.0 * (self.config.num_blocks * self.block_params + self.outside_params)

    @property
    def parent_in_compute(self) -> float:
        """Count the bytes of the parent in the dtype of compute."""
        return self.compute_bytes / 2 * self.parent_bytes

    @property
    def cache_passes(self) -> int:
        """Count how often the parent is read to cache activations: a shard each time, on a GPU what it holds."""
        shard = self.params.cache_activations.sequences_per_shard * self.params.prepare_corpus.seq_len
        held = _GPU_STATES / (self.config.hidden_size * self.compute_bytes)
        return math.ceil(self.cached_tokens / (shard if self.params.run.device == "cpu" else max(shard, held)))

    @property
    def child_bytes(self) -> float:
        """Count the bytes of the child's checkpoint."""
        return 2.0 * (self.kept_share * self.config.num_blocks * self.block_params + self.outside_params)

    @property
    def corpus_tokens(self) -> int:
        """Count the tokens of all splits."""
        corpus = self.params.prepare_corpus
        return corpus.train_tokens + corpus.calibration_tokens + corpus.validation_tokens

    @property
    def has_live_teacher(self) -> bool:
        """Tell whether the parent itself runs in GKD."""
        return teacher_is_live(self.params, self.config)

    @property
    def teacher_cache_bytes(self) -> int:
        """Count the bytes that all boundaries of GKD's tokens take in the activation cache."""
        return teacher_cache_bytes(self.params, self.config)

    @property
    def cached_tokens(self) -> int:
        """Count the tokens of all splits that are in the activation cache."""
        train_tokens = self.params.prepare_corpus.train_tokens
        return self.corpus_tokens - train_tokens + cached_train_tokens(self.params, self.config, train_tokens)

    @property
    def compute_bytes(self) -> int:
        """Return the bytes of an element in the dtype of compute."""
        return ELEMENT_BYTES[self.params.run.dtype]

    @property
    def num_benchmarks(self) -> int:
        """Count the benchmarks that measure_accuracy asks."""
        accuracy = self.params.measure_accuracy
        return len(accuracy.tasks) + bool(accuracy.human_eval) + bool(accuracy.mt_bench)

    @property
    def has_speed_limit(self) -> bool:
        """Tell whether a target limits a speed that benchmark_throughput measures."""
        limits = [limit for target in self.params.targets.values() for limit in target.constraints.values()]
        return any(METRICS[limit.metric].speed and limit.engine in get_args(MeasuredEngine) for limit in limits)

    @property
    def workers(self) -> int:
        """Return how many pieces of a stage are computed at the same time."""
        return self.params.run.workers

    @property
    def is_rolling(self) -> bool:
        """Tell whether stages walk through the parent with a window of boundaries."""
        return self.params.cache_activations.rolling

    @property
    def trained_attentions(self) -> list[Attention]:
        """Return the attention variants that BLD trains."""
        attentions, _ = block_variants(self.config, self.params.distill_blocks)
        return [variant for variant in attentions[1:] if variant.kind != "no_op"]  # the parent's own is the first

    @property
    def trained_ffns(self) -> list[Ffn]:
        """Return the FFN variants that BLD trains."""
        _, ffns = block_variants(self.config, self.params.distill_blocks)
        return [variant for variant in ffns[1:] if variant.kind != "no_op"]

    @property
    def variant_tokens(self) -> float:
        """Count the tokens that a variant's steps train on, on average."""
        variants: list[Attention | Ffn] = [*self.trained_attentions, *self.trained_ffns]
        tokens = [self.params.distill_blocks.tokens_of(name_of(variant)) for variant in variants]
        return sum(tokens) / len(tokens) if tokens else 0.0

    @property
    def bld_read_tokens(self) -> int:
        """Count the tokens of a boundary that BLD reads."""
        return self.params.distill_blocks.used_tokens + self.params.prepare_corpus.calibration_tokens

    @property
    def token_bytes(self) -> int:
        """Count the bytes of a token at all boundaries in the activation cache."""
        return (self.config.num_blocks + 1) * self._state_bytes

    @property
    def _state_bytes(self) -> int:
        return self.config.hidden_size * ELEMENT_BYTES[self.params.cache_activations.dtype]

    @property
    def bld_boundary_bytes(self) -> float:
        """Count the bytes of a boundary that BLD reads."""
        return float(self.bld_read_tokens * self._state_bytes)

    @property
    def boundary_bytes(self) -> float:
        """Count the bytes of a boundary in the activation cache."""
        return float(self.cached_tokens * self._state_bytes)

    @property
    def materialised_bytes(self) -> float:
        """Count the bytes of the activation cache with all boundaries."""
        return (self.config.num_blocks + 1) * self.boundary_bytes

    @property
    def rolling_bytes(self) -> float:
        """Count the bytes of the activation cache in rolling mode, with the window that BLD holds."""
        longest = max((1, *self.params.distill_blocks.spans))
        window = (longest + 1) * self.bld_read_tokens * self.config.hidden_size * self.compute_bytes
        kept_boundaries = len({0, self.config.num_blocks, *self.params.cache_activations.keep})
        return kept_boundaries * self.boundary_bytes + window

    @property
    def slowdown(self) -> int:
        """Return the factor by which work takes longer in rolling mode, where one worker does all of it."""
        return self.workers if self.is_rolling else 1

    def in_order(self, flops: float, tokens: float) -> float:
        """Count operations in blocks; in rolling mode the one worker takes the tokens through the parent as well."""
        walk = tokens * self.config.num_blocks * self.block_flops if self.is_rolling else 0.0
        return self.slowdown * (flops + walk)
