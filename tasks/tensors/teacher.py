"""Where GKD takes the parent's hidden states from, and the train tokens that the activation cache holds. No torch.

The cache costs 2 x hidden x (blocks + 1) bytes a token and is computed once for all targets; a live teacher computes
them again for each target, in about a quarter of the time of the child's own steps (docs/distillation.md), without
disk. The choice follows from params and the parent's geometry alone, so that all machines make the same.
"""

from storage.model_config import ModelConfig
from storage.params import Params
from storage.records import ELEMENT_BYTES

MOST_CACHED_BYTES = 4 * 2**30
"""Where GKD's tokens would take more in the cache, `distill_child.teacher: auto` computes them instead."""


def teacher_is_live(params: Params, config: ModelConfig) -> bool:
    """Tell whether the parent itself runs in GKD, so that its train tokens are not in the activation cache."""
    gkd, cache = params.distill_child, params.cache_activations
    if gkd.teacher != "auto":
        return gkd.teacher != "cache"
    lacks_boundaries = cache.rolling and gkd.cosine_weight > 0 and not cache.keep
    return lacks_boundaries or teacher_cache_bytes(params, config) > MOST_CACHED_BYTES


def teacher_cache_bytes(params: Params, config: ModelConfig) -> int:
    """Count the bytes of all boundaries of GKD's train tokens."""
    token_bytes = (config.num_blocks + 1) * config.hidden_size * ELEMENT_BYTES[params.cache_activations.dtype]
    return params.distill_child.tokens * token_bytes


def tokens_before_gkd(params: Params) -> int:
    """Train tokens that BLD or the correction has seen: the split's first ones."""
    return max(params.distill_blocks.used_tokens, params.refine_child.tokens)


def cached_train_tokens(params: Params, config: ModelConfig, train_tokens: int) -> int:
    """Count the tokens of a train split that the cache holds: all, or those before GKD's where its teacher is live."""
    return min(train_tokens, tokens_before_gkd(params)) if teacher_is_live(params, config) else train_tokens
