"""The reference for scores: blocks replaced in transformers' own model, run from the start with full logits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tasks.puzzle.model.head import TokenLosses
from tests.tiny import tiny_model


class _LinearAttention(nn.Module):
    """One linear layer where transformers calls attention."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return self.linear_attn(hidden_states), None


def replace_block(model: Any, block_index: int, tensors: Mapping[str, Tensor]) -> None:
    """Make block `block_index` of transformers' own model compute what a variant with `tensors` computes.

    Full-model replacement without our blocks: what a variant lacks is zero in the parent's shape (no-ops, dropped
    channels), and a shared kv head is repeated for each of the parent's that it stands for. Linear layers are put in.
    """
    layer, hidden_size = model.model.layers[block_index], model.config.hidden_size
    if "self_attn.linear_attn.weight" in tensors:
        layer.self_attn = _LinearAttention(hidden_size)
    if "mlp.linear_mlp.weight" in tensors:
        layer.mlp = nn.Sequential()
        layer.mlp.add_module("linear_mlp", nn.Linear(hidden_size, hidden_size, bias=False))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            kept = tensors.get(name, torch.zeros(0))
            if "k_proj" in name or "v_proj" in name:
                heads = kept.reshape(-1, layer.self_attn.head_dim, *kept.shape[1:])
                repeats = parameter.shape[0] // kept.shape[0] if len(kept) else 1
                kept = heads.repeat_interleave(repeats, 0).reshape(-1, *kept.shape[1:])
            parameter.zero_()
            if len(kept):
                parameter[tuple(slice(size) for size in kept.shape)] = kept


def full_replacement(family: str, tokens: Tensor, changes: Mapping[int, Mapping[str, Tensor]]) -> TokenLosses:
    """Compute losses from the full logits of transformers' own model, run from the start, in float64."""
    child = tiny_model(family)
    for index, tensors in changes.items():
        replace_block(child, index, tensors)
    with torch.no_grad():
        both = [model(tokens, output_hidden_states=True) for model in (tiny_model(family), child)]
        parent_logits, child_logits = (output.logits[:, :-1].double() for output in both)
        # transformers gives the last hidden states behind the final norm; but for its weight that scales each of them
        last = [(output.hidden_states[-1] / child.model.norm.weight)[:, :-1] for output in both]
    parent_log, child_log = parent_logits.log_softmax(-1), child_logits.log_softmax(-1)
    return TokenLosses(
        kl=functional.kl_div(child_log, parent_log, reduction="none", log_target=True).sum(-1).float(),
        lm_loss=functional.cross_entropy(child_logits.mT, tokens[:, 1:], reduction="none").float(),
        top1=(parent_logits.argmax(-1) == child_logits.argmax(-1)).float(),
        cosine=functional.cosine_similarity(last[0], last[1], dim=-1),
    )
