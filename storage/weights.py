"""The one check of a checkpoint before it is copied or exported: every tensor is used, and is a weight of this model.

Names, types and shapes come from the headers of all files, before any tensor is read; that values are finite is seen as
tensors are read (storage/checkpoints.py).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from storage.checkpoints import Checkpoint
from storage.files import InputError, to_run
from storage.model_config import EMBEDDING, LM_HEAD, ModelConfig, expected_shapes
from storage.variants import Attention, Ffn

_WEIGHT_TYPES = ("BF16", "F16", "F32")
_TYPES = "float16, bfloat16 or float32"
_WAYS_OUT = (
    (r"lora_|adapter", "merge the adapter into the weights first (merge_and_unload of peft)"),
    (r"scale|zero|qweight|g_idx|absmax|quant", f"it is part of quantised weights: take those in {_TYPES}"),
    (r"[qk]_norm", "it normalises queries and keys (qk-norm), of which config.json says nothing: is it of a Qwen3?"),
    (
        r"\.bias$",
        "the bias would be left out: config.json of a Llama says attention_bias (q, k, v and o) or mlp_bias, a Qwen2 "
        "has biases of q, k and v alone; correct config.json, or remove the tensor if nothing adds it",
    ),
)
"""What to do about a tensor that config.json does not ask for, by what its name matches."""
_ANY_WAY_OUT = "take a config.json that describes all tensors, or remove the tensor if nothing computes with it"
_ROWS = 4096


def check_weights(
    checkpoint: Checkpoint,
    raw: Mapping[str, Any],
    config: ModelConfig,
    blocks: Sequence[tuple[Attention, Ffn]] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Check a checkpoint against its config.json.

    Args:
        checkpoint: the files.
        raw: config.json.
        config: its geometry.
        blocks: its blocks; None: those of a parent.

    Returns:
        Names and shapes of the tensors that the model has, in its order.

    Raises:
        InputError: quantised weights, an adapter, a tensor that is missing, left over, of another type or shape, or a
            head that is not the embedding although config.json ties them; it names tensor, file and way out.
    """
    _check_form(checkpoint, raw)
    expected, headers = expected_shapes(config, blocks), checkpoint.headers
    for name, header in headers.items():
        if header.dtype not in _WEIGHT_TYPES:
            raise InputError(
                f"{header.file}: tensor {name} is of type {header.dtype}, expected {_TYPES}; take the checkpoint "
                "before it was quantised, or convert it"
            )
    if missing := [name for name in expected if name not in headers]:
        raise InputError(
            f"{checkpoint.folder}: the checkpoint lacks tensor {missing[0]}{_others(missing)}, which config.json asks "
            f"for; {to_run(checkpoint.rebuild)}, or correct config.json"
        )
    copies = {LM_HEAD} if config.tie_embeddings else set()
    if extra := [name for name in headers if name not in expected and name not in copies]:
        way_out = next((words for pattern, words in _WAYS_OUT if re.search(pattern, extra[0])), _ANY_WAY_OUT)
        raise InputError(
            f"{headers[extra[0]].file}: config.json does not ask for tensor {extra[0]}{_others(extra)}; {way_out}"
        )
    for name, shape in expected.items():
        if headers[name].shape != shape:
            raise InputError(
                f"{headers[name].file}: tensor {name} has shape {headers[name].shape}, config.json asks for {shape}; "
                f"{to_run(checkpoint.rebuild)}, or correct config.json"
            )
    if config.tie_embeddings and LM_HEAD in headers:
        _check_tied(checkpoint)
    return expected


def _others(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _check_form(checkpoint: Checkpoint, raw: Mapping[str, Any]) -> None:
    """Raise InputError where transformers would take other weights than the files', or more than them."""
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            raise InputError(
                f"{checkpoint.folder}: the checkpoint is quantised ({key} in config.json); expected weights in "
                f"{_TYPES}: take the checkpoint before it was quantised"
            )
    if raw.get("transformers_weights"):
        raise InputError(
            f"{checkpoint.folder}: config.json names the file of its weights (transformers_weights), expected "
            "model.safetensors or its index; save it with save_pretrained"
        )
    adapter = checkpoint.folder / "adapter_config.json"
    if adapter.exists():
        raise InputError(
            f"{adapter}: transformers would add this adapter to the weights; merge it (merge_and_unload of peft) or "
            "move it away"
        )


def _check_tied(checkpoint: Checkpoint) -> None:
    """Raise InputError where the copy of the embedding that serves as the head is another tensor."""
    heads, embeddings = checkpoint.headers[LM_HEAD], checkpoint.headers[EMBEDDING]
    if heads.shape != embeddings.shape or not all(
        torch.equal(head.float(), embedding.float())
        for head, embedding in zip(_parts(checkpoint, LM_HEAD), _parts(checkpoint, EMBEDDING), strict=True)
    ):
        raise InputError(
            f"{heads.file}: config.json says that the embeddings are tied, and {LM_HEAD} is another tensor than "
            f"{EMBEDDING}; say tie_word_embeddings: false, or remove {LM_HEAD}"
        )


def _parts(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """Yield rows of a matrix, some thousands at once."""
    rows = checkpoint.headers[name].shape[0]
    return (checkpoint.rows(name, slice(start, start + _ROWS)) for start in range(0, rows, _ROWS))
