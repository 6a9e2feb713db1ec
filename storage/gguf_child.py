"""A model as a GGUF file that llama.cpp computes right, written tensor by tensor (docs/runtimes.md, found by running).

Arch `llama` where all blocks are alike, else `deci`, whose metadata have head counts and widths per layer. llama.cpp
gets some removed subblocks wrong, so the file has stand-ins for them: an FFN of 32 channels with zero weights for every
removed FFN, an attention of one head with zero weights for a removed attention of the first layer. A block that lacks
both halves is left out.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from gguf.constants import GGML_QUANT_SIZES, GGML_QUANT_VERSION
from gguf.quants import quantize
from numpy.typing import NDArray

from storage.files import InputError, write_whole
from storage.model_config import EMBEDDING, LM_HEAD, NORM, ModelConfig, unsaid_by_gguf
from storage.records import Attention, Ffn

FileType = Literal["F32", "F16", "BF16", "Q8_0"]
STAND_IN_FFN = Ffn("gated", 32)
"""Stands for a removed FFN; 32 channels are the least that quantised types take."""
STAND_IN_ATTENTION = Attention("gqa", 1)
"""Stands for a removed attention of the first layer, with one query head."""

Array = NDArray[np.float32]
Tensor = Callable[[str], Iterator[Array]]
"""A tensor of the checkpoint by its name, as float32, some rows at a time."""


@dataclass(frozen=True)
class Layer:
    """A layer of the file: the block that it is of, its query and kv heads (N, 0: linear), its FFN's width.

    `zero_attention`, `zero_ffn`: that half is a stand-in.
    """

    block: int
    attention: Attention
    heads: int
    width: int
    zero_attention: bool
    zero_ffn: bool


def layers(blocks: Sequence[tuple[Attention, Ffn]], num_heads: int) -> tuple[Layer, ...]:
    """The layers that a child's blocks become.

    Raises:
        InputError: there is no attention with kv heads, or an FFN is linear; llama.cpp loads neither.
    """
    kept = [index for index, (attention, ffn) in enumerate(blocks) if (attention.kind, ffn.kind) != ("no_op", "no_op")]
    found = []
    for position, index in enumerate(kept):
        attention, ffn = blocks[index]
        if ffn.kind == "linear":
            raise InputError(f"block {index} has a linear FFN, which llama.cpp does not know")
        zero_attention = attention.kind == "no_op" and position == 0
        heads = 1 if zero_attention else 0 if attention.kind == "no_op" else num_heads
        found.append(
            Layer(
                index,
                STAND_IN_ATTENTION if zero_attention else attention,
                heads,
                STAND_IN_FFN.intermediate_size if ffn.kind == "no_op" else ffn.intermediate_size,
                zero_attention,
                ffn.kind == "no_op",
            )
        )
    if not any(layer.attention.kind == "gqa" for layer in found):
        raise InputError("no block has an attention with kv heads; llama.cpp loads no such model")
    return tuple(found)


def write_gguf(
    path: Path,
    config: ModelConfig,
    blocks: Sequence[tuple[Attention, Ffn]],
    tensor: Tensor | None,
    file_type: FileType,
    *,
    name: str = "",
    tokenizer: Callable[[GGUFWriter], None] | None = None,
) -> None:
    """Write a model, tensor by tensor.

    Args:
        path: the file.
        config: geometry of the parent.
        blocks: of the model.
        tensor: gives the checkpoint's tensors by name, one at a time; None: noise, for a model that is only timed.
        file_type: of matrices; norms and biases are float32, and rows that Q8_0 cannot divide (by 32) are F16.
        name: of the model, for people.
        tokenizer: adds the metadata of the tokenizer; None: tokens have no text, the model takes and makes ids.

    Raises:
        InputError: as :func:`layers`; the rotary positions have settings that llama.cpp does not take; a weight is
            beyond F16.
    """
    found = layers(blocks, config.num_heads)
    with write_whole(path) as temporary:
        writer = GGUFWriter(None, "llama" if _alike(found) else "deci")
        writer.add_name(name)
        writer.add_file_type(_FILE_TYPES[file_type])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        _write_metadata(writer, config, found)
        _write_rope(writer, config)
        (tokenizer or functools.partial(_nameless_tokens, vocab_size=config.vocab_size))(writer)
        tensors = list(_tensors(config, found, tensor or _no_checkpoint))
        for key, shape, _ in tensors:
            kind = _kind(shape, file_type)
            stored = np.dtype(np.float16 if kind != GGMLQuantizationType.F32 else np.float32)  # any: kind decides
            writer.add_tensor_info(key, shape, stored, _bytes(shape, kind), raw_dtype=kind)
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, shape, make in tensors:
            parts = iter([_noise(shape)]) if tensor is None and key != _ROPE_FACTORS else make()
            writer.write_tensor_data(_encoded(parts, shape, _kind(shape, file_type), key))
        writer.close()


_FILE_TYPES: dict[FileType, LlamaFileType] = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_ROPE_FACTORS = "rope_freqs.weight"
_ROW_MULTIPLE = 32
"""Q8_0 has a scale for each 32 values of a row."""


def _kind(shape: tuple[int, ...], file_type: FileType) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType["F16" if file_type == "Q8_0" and shape[-1] % _ROW_MULTIPLE else file_type]


def _bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    values, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // values * size


def _encoded(
    parts: Iterator[Array], shape: tuple[int, ...], kind: GGMLQuantizationType, name: str
) -> NDArray[np.uint8]:
    """Bytes of a tensor as the file has them; memory holds them and some rows in float32."""
    encoded, end = np.empty(_bytes(shape, kind), np.uint8), 0
    for part in parts:
        largest = np.abs(part).max(initial=0)  # nan where there is one
        if not np.isfinite(largest):
            raise InputError(f"{name} has a weight that is not finite; the checkpoint is broken")
        if kind == GGMLQuantizationType.F16 and largest > np.finfo(np.float16).max:
            raise InputError(f"{name} has a weight beyond F16; export it as gguf-bf16 or gguf-f32 instead")
        rows = np.ascontiguousarray(quantize(part, kind)).view(np.uint8).reshape(-1)
        start, end = end, end + len(rows)
        encoded[start:end] = rows
    return encoded


def _write_rope(writer: GGUFWriter, config: ModelConfig) -> None:
    """Metadata of scaled rotary positions; llama3's factors are a tensor.

    Raises:
        InputError: a setting of yarn that llama.cpp does not take as it is meant.
    """
    rope = config.rope
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif rope["rope_type"] == "yarn":
        if beyond := unsaid_by_gguf(rope):
            raise InputError(f"the rotary positions (yarn) set {', '.join(beyond)}, which GGUF does not say")
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope.get("original_max_position_embeddings") or config.context))
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))


def _llama3_factors(config: ModelConfig) -> Array:
    """What llama.cpp divides each pair's frequency by, [head_dim / 2] (Llama 3.1's rope scaling)."""
    rope = config.rope
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    pairs = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    rounds = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** pairs)
    smooth = np.clip((rounds - low) / (high - low), 0.0, 1.0)
    divisors: Array = (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
    return divisors


def _no_checkpoint(name: str) -> Iterator[Array]:
    raise AssertionError(name)


@functools.lru_cache(maxsize=8)
def _noise(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(0).normal(0.0, 0.02, shape).astype(np.float32)


def _alike(found: Sequence[Layer]) -> bool:
    return found[0].attention.kind == "gqa" and len({(of.attention, of.heads, of.width) for of in found}) == 1


def _write_metadata(writer: GGUFWriter, config: ModelConfig, found: Sequence[Layer]) -> None:
    writer.add_block_count(len(found))
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    heads, kv_heads = [of.heads for of in found], [of.attention.num_kv_heads for of in found]
    widths = [of.width for of in found]
    if _alike(found):
        writer.add_head_count(heads[0])
        writer.add_head_count_kv(kv_heads[0])
        writer.add_feed_forward_length(widths[0])
    else:
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_feed_forward_length(widths)


def _nameless_tokens(writer: GGUFWriter, vocab_size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{index}>" for index in range(vocab_size)])
    writer.add_token_merges(["< 0"])  # llama.cpp wants one
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


_Named = tuple[str, tuple[int, ...], Callable[[], Iterator[Array]]]


def _tensors(config: ModelConfig, found: Sequence[Layer], tensor: Tensor) -> Iterator[_Named]:
    """Name, shape and maker of every tensor of the file, in its order."""
    hidden = config.hidden_size
    yield "token_embd.weight", (config.vocab_size, hidden), lambda: tensor(EMBEDDING)
    yield "output_norm.weight", (hidden,), lambda: tensor(NORM)
    if not config.tie_embeddings:
        yield "output.weight", (config.vocab_size, hidden), lambda: tensor(LM_HEAD)
    if config.rope["rope_type"] == "llama3":
        yield _ROPE_FACTORS, (config.head_dim // 2,), lambda: iter([_llama3_factors(config)])
    for index, layer in enumerate(found):
        for name, shape, make in (*_attention(config, layer, tensor), *_ffn(config, layer, tensor)):
            yield f"blk.{index}.{name}", shape, make


def _attention(config: ModelConfig, layer: Layer, tensor: Tensor) -> Iterator[_Named]:
    if layer.attention.kind == "no_op":
        return
    hidden, dim, at = config.hidden_size, config.head_dim, f"model.layers.{layer.block}"
    if layer.attention.kind == "linear":
        yield "attn_norm.weight", (hidden,), lambda: tensor(f"{at}.input_layernorm.weight")
        yield "attn_output.weight", (hidden, hidden), lambda: tensor(f"{at}.self_attn.linear_attn.weight")
        return
    query, key = layer.heads, layer.attention.num_kv_heads
    wanted: list[tuple[str, str, tuple[int, ...], int]] = [
        ("attn_norm.weight", "input_layernorm.weight", (hidden,), 0),
        ("attn_q.weight", "self_attn.q_proj.weight", (query * dim, hidden), query),
        ("attn_k.weight", "self_attn.k_proj.weight", (key * dim, hidden), key),
        ("attn_v.weight", "self_attn.v_proj.weight", (key * dim, hidden), 0),
        ("attn_output.weight", "self_attn.o_proj.weight", (hidden, query * dim), 0),
    ]
    if config.qkv_bias:
        wanted += [
            ("attn_q.bias", "self_attn.q_proj.bias", (query * dim,), query),
            ("attn_k.bias", "self_attn.k_proj.bias", (key * dim,), key),
            ("attn_v.bias", "self_attn.v_proj.bias", (key * dim,), 0),
        ]
    if config.output_bias:
        wanted += [("attn_output.bias", "self_attn.o_proj.bias", (hidden,), 0)]
    for name, source, shape, heads in wanted:
        yield name, shape, _maker(layer.zero_attention, shape, tensor, f"{at}.{source}", heads)


def _ffn(config: ModelConfig, layer: Layer, tensor: Tensor) -> Iterator[_Named]:
    hidden, width, at = config.hidden_size, layer.width, f"model.layers.{layer.block}"
    wanted: list[tuple[str, str, tuple[int, ...]]] = [
        ("ffn_norm.weight", "post_attention_layernorm.weight", (hidden,)),
        ("ffn_gate.weight", "mlp.gate_proj.weight", (width, hidden)),
        ("ffn_up.weight", "mlp.up_proj.weight", (width, hidden)),
        ("ffn_down.weight", "mlp.down_proj.weight", (hidden, width)),
    ]
    if config.mlp_bias:
        wanted += [
            ("ffn_gate.bias", "mlp.gate_proj.bias", (width,)),
            ("ffn_up.bias", "mlp.up_proj.bias", (width,)),
            ("ffn_down.bias", "mlp.down_proj.bias", (hidden,)),
        ]
    for name, source, shape in wanted:
        yield name, shape, _maker(layer.zero_ffn, shape, tensor, f"{at}.{source}", 0)


def _maker(
    is_zero: bool, shape: tuple[int, ...], tensor: Tensor, name: str, heads: int
) -> Callable[[], Iterator[Array]]:
    """Zeros, or the checkpoint's tensor; with `heads` its rows are interleaved as llama.cpp's rotary kernel reads."""
    if is_zero:
        return lambda: iter([np.zeros(shape, np.float32)])
    return lambda: iter([_interleaved(np.concatenate(list(tensor(name))), heads)]) if heads else tensor(name)


def _interleaved(values: Array, heads: int) -> Array:
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
