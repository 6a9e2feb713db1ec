"""A model as a GGUF file that llama.cpp computes right, written tensor by tensor (docs/runtimes.md, found by running).

In: the parent's geometry, a child's blocks, the checkpoint's tensors. Out: one file, of arch `llama` where all blocks
are alike, else `deci`, whose metadata have head counts and widths for each layer; with qk-norm of arch `qwen3`, else
`openelm`. llama.cpp gets some removed subblocks wrong, so the file has stand-ins for them: an FFN of 32 channels with
zero weights for every removed FFN, an attention of one head with zero weights for a removed attention of the first
layer, in `openelm` of any layer. A block that lacks both halves is left out.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from gguf.constants import GGML_QUANT_SIZES, GGML_QUANT_VERSION
from gguf.quants import quantize
from numpy.typing import NDArray

from storage.files import InputError, write_whole
from storage.formats import FileType
from storage.model_config import EMBEDDING, LM_HEAD, NORM, ModelConfig, rope_without_gguf_key
from storage.variants import Attention, Ffn

STAND_IN_FFN = Ffn("gated", 32)
"""Stands for a removed FFN; 32 channels are the least that quantised types take."""
STAND_IN_ATTENTION = Attention("gqa", 1)
"""Stands for a removed attention of the first layer, or of any layer of arch `openelm`, with one query head."""

Array = NDArray[np.float32]
ReadTensor = Callable[[str], Iterator[Array]]
"""Reads a tensor of the checkpoint by its name, as float32, some rows at a time."""
_ROPE_FACTORS = "rope_freqs.weight"
_OPENELM = "openelm"
"""The arch whose head is the embedding, and whose q, k and v are one tensor."""
_F16_MAX = float(np.finfo(np.float16).max)
_LARGEST = {GGMLQuantizationType.F16: _F16_MAX, GGMLQuantizationType.Q8_0: 127 * _F16_MAX}
"""The largest weight of a type; a block of Q8_0 has a scale in F16, and integers up to 127."""


@dataclass(frozen=True)
class GgufLayer:
    """A layer of the file.

    Attributes:
        block: index of the child's block that the layer computes.
        attention: its attention variant, or the stand-in.
        heads: number of query heads; 0: no attention.
        width: channels of its FFN.
        zero_attention: whether the attention is a stand-in, with zero weights.
        zero_ffn: whether the FFN is a stand-in, with zero weights.
    """

    block: int
    attention: Attention
    heads: int
    width: int
    zero_attention: bool
    zero_ffn: bool


@dataclass(frozen=True)
class _GgufTensor:
    """A tensor of the file: its name, its shape, and a function that gives its values some rows at a time."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Iterator[Array]]


def gguf_layers(
    blocks: Sequence[tuple[Attention, Ffn]], num_heads: int, *, all_attend: bool = False
) -> tuple[GgufLayer, ...]:
    """Return the layers that a child's blocks become; `all_attend`: every removed attention needs a stand-in.

    Raises:
        InputError: there is no attention with kv heads, or an FFN is linear; llama.cpp loads neither.
    """
    non_empty_blocks = [
        index for index, (attention, ffn) in enumerate(blocks) if (attention.kind, ffn.kind) != ("no_op", "no_op")
    ]
    layers = []
    for position, index in enumerate(non_empty_blocks):
        attention, ffn = blocks[index]
        if ffn.kind == "linear":
            raise InputError(f"block {index} has a linear FFN, which llama.cpp does not know")
        zero_attention = attention.kind == "no_op" and (all_attend or position == 0)
        heads = 1 if zero_attention else 0 if attention.kind == "no_op" else num_heads
        layers.append(
            GgufLayer(
                index,
                STAND_IN_ATTENTION if zero_attention else attention,
                heads,
                STAND_IN_FFN.intermediate_size if ffn.kind == "no_op" else ffn.intermediate_size,
                zero_attention,
                ffn.kind == "no_op",
            )
        )
    if not any(layer.attention.kind == "gqa" for layer in layers):
        raise InputError("no block has an attention with kv heads; llama.cpp loads no such model")
    return tuple(layers)


def write_gguf(
    path: Path,
    config: ModelConfig,
    blocks: Sequence[tuple[Attention, Ffn]],
    read_tensor: ReadTensor | None,
    file_type: FileType,
    *,
    name: str = "",
    tokenizer: Callable[[GGUFWriter], None] | None = None,
) -> None:
    """Write a model, tensor by tensor.

    Args:
        path: the file.
        config: geometry of the parent.
        blocks: blocks of the model.
        read_tensor: gives the checkpoint's tensors by name, one at a time; None: noise, for a model that is only timed.
        file_type: type of the matrices; norms and biases are float32, and rows that a type with blocks of values (Q8_0:
            32) cannot divide are F16.
        name: name of the model, for people.
        tokenizer: adds the metadata of the tokenizer; None: tokens have no text, the model takes and makes ids.

    Raises:
        InputError: a block is refused by :func:`gguf_layers`; the rotary positions have settings that llama.cpp does
            not take; a weight is beyond its type.

    What else its archs with qk-norm do not take, tasks/puzzle/runtimes/rules.py refuses.
    """
    layers = gguf_layers(blocks, config.num_heads, all_attend=config.qk_norm)
    arch = _arch(config, layers)
    add_tokenizer = tokenizer or functools.partial(_add_nameless_tokens, vocab_size=config.vocab_size)
    with write_whole(path) as temporary:
        writer = GGUFWriter(None, arch)
        writer.add_name(name)
        writer.add_file_type(LlamaFileType[f"{'ALL' if file_type == 'F32' else 'MOSTLY'}_{file_type}"])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        _write_metadata(writer, config, layers)
        _write_rope(writer, config)
        add_tokenizer(writer)
        tensors = list(_tensors(config, arch, layers, read_tensor or _no_checkpoint))
        for tensor in tensors:
            stored = _stored_type(tensor.shape, file_type)
            dtype = np.dtype(np.float32 if stored == GGMLQuantizationType.F32 else np.float16)  # raw_dtype decides
            size = _num_bytes(tensor.shape, stored)
            writer.add_tensor_info(tensor.name, tensor.shape, dtype, size, raw_dtype=stored)
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            is_noise = read_tensor is None and tensor.name != _ROPE_FACTORS
            parts = iter([_noise(tensor.shape)]) if is_noise else tensor.read()
            writer.write_tensor_data(_encoded(parts, tensor, _stored_type(tensor.shape, file_type)))
        writer.close()


def _stored_type(shape: tuple[int, ...], file_type: FileType) -> GGMLQuantizationType:
    """Return the type that a tensor is stored in."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    matrix_type = GGMLQuantizationType[file_type]
    values_in_block, _ = GGML_QUANT_SIZES[matrix_type]
    return GGMLQuantizationType.F16 if shape[-1] % values_in_block else matrix_type


def _num_bytes(shape: tuple[int, ...], stored: GGMLQuantizationType) -> int:
    """Return the number of a tensor's bytes in the file."""
    values_in_block, bytes_of_block = GGML_QUANT_SIZES[stored]
    return math.prod(shape) // values_in_block * bytes_of_block


def _encoded(parts: Iterator[Array], tensor: _GgufTensor, stored: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Return bytes of a tensor as the file has them; memory holds them and some rows in float32."""
    encoded, end = np.empty(_num_bytes(tensor.shape, stored), np.uint8), 0
    for part in parts:
        largest = np.abs(part).max(initial=0)  # nan where there is one
        if not np.isfinite(largest):
            raise InputError(f"{tensor.name} has a weight that is not finite; the checkpoint is broken")
        if largest > _LARGEST.get(stored, math.inf):
            beyond = f"{tensor.name} has a weight beyond {stored.name}"
            raise InputError(f"{beyond}; export it as gguf-bf16 or gguf-f32 instead")
        part_bytes = np.ascontiguousarray(quantize(part, stored)).view(np.uint8).reshape(-1)
        start, end = end, end + len(part_bytes)
        encoded[start:end] = part_bytes
    return encoded


def _write_rope(writer: GGUFWriter, config: ModelConfig) -> None:
    """Write metadata of scaled rotary positions; llama3's factors are a tensor.

    Raises:
        InputError: a setting of yarn that llama.cpp does not take as it is meant.
    """
    rope = config.rope
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif rope["rope_type"] == "yarn":
        if settings := rope_without_gguf_key(rope):
            raise InputError(f"the rotary positions (yarn) set {', '.join(settings)}, which GGUF does not say")
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope.get("original_max_position_embeddings") or config.context))
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))


def _llama3_factors(config: ModelConfig) -> Array:
    """Return divisors of the rotary pairs' frequencies in llama.cpp, [head_dim / 2] (Llama 3.1's rope scaling)."""
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


def _arch(config: ModelConfig, layers: Sequence[GgufLayer]) -> str:
    """Return llama.cpp's name of the architecture."""
    if config.qk_norm:
        return "qwen3" if _are_alike(layers) else _OPENELM
    return "llama" if _are_alike(layers) else "deci"


def _are_alike(layers: Sequence[GgufLayer]) -> bool:
    """Tell whether all layers have the same attention and FFN, which archs `llama` and `qwen3` need."""
    kinds = {(layer.attention, layer.heads, layer.width) for layer in layers}
    return layers[0].attention.kind == "gqa" and len(kinds) == 1


def _write_metadata(writer: GGUFWriter, config: ModelConfig, layers: Sequence[GgufLayer]) -> None:
    """Write metadata of the geometry; head counts and widths are lists where layers differ."""
    writer.add_block_count(len(layers))
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    heads = [layer.heads for layer in layers]
    kv_heads = [layer.attention.num_kv_heads for layer in layers]
    widths = [layer.width for layer in layers]
    are_alike = _are_alike(layers)
    writer.add_head_count(heads[0] if are_alike else heads)
    writer.add_head_count_kv(kv_heads[0] if are_alike else kv_heads)
    writer.add_feed_forward_length(widths[0] if are_alike else widths)


def _add_nameless_tokens(writer: GGUFWriter, vocab_size: int) -> None:
    """Add metadata of a tokenizer whose tokens have no text."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{index}>" for index in range(vocab_size)])
    writer.add_token_merges(["< 0"])  # llama.cpp needs at least one
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _tensors(
    config: ModelConfig, arch: str, layers: Sequence[GgufLayer], read_tensor: ReadTensor
) -> Iterator[_GgufTensor]:
    """Yield every tensor of the file, in its order."""
    hidden = config.hidden_size
    yield _GgufTensor("token_embd.weight", (config.vocab_size, hidden), lambda: read_tensor(EMBEDDING))
    yield _GgufTensor("output_norm.weight", (hidden,), lambda: read_tensor(NORM))
    if not config.tie_embeddings and arch != _OPENELM:
        yield _GgufTensor("output.weight", (config.vocab_size, hidden), lambda: read_tensor(LM_HEAD))
    if config.rope["rope_type"] == "llama3":
        yield _GgufTensor(_ROPE_FACTORS, (config.head_dim // 2,), lambda: iter([_llama3_factors(config)]))
    for index, layer in enumerate(layers):
        attention, ffn = _attention_tensors(config, arch, layer), _ffn_tensors(config, layer)
        for tensors, is_zero in ((attention, layer.zero_attention), (ffn, layer.zero_ffn)):
            for tensor in tensors:
                read = tensor.zeros if is_zero else tensor.reader(layer.block, read_tensor)
                yield _GgufTensor(f"blk.{index}.{tensor.name}", tensor.shape, read)


@dataclass(frozen=True)
class _LayerTensor:
    """A tensor of a layer: its name in the file, the tensors of the checkpoint's block whose rows it has, its shape.

    `heads`: its rows are interleaved for rotary positions, in so many heads; 0: they are not.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    heads: int = 0

    def zeros(self) -> Iterator[Array]:
        """Yield the values of a stand-in."""
        yield np.zeros(self.shape, np.float32)

    def reader(self, block_index: int, read_tensor: ReadTensor) -> Callable[[], Iterator[Array]]:
        """Return a function that gives the checkpoint's tensor, its rows in the order of llama.cpp's rotary kernel."""
        sources = [f"model.layers.{block_index}.{source}" for source in self.sources]
        if self.heads:
            return lambda: iter([_interleaved(np.concatenate(list(read_tensor(sources[0]))), self.heads)])
        return lambda: itertools.chain.from_iterable(map(read_tensor, sources))


def _attention_tensors(config: ModelConfig, arch: str, layer: GgufLayer) -> list[_LayerTensor]:
    """Return tensors of a layer's attention, in the file's order; none where it was removed."""
    if layer.attention.kind == "no_op":
        return []
    hidden, dim = config.hidden_size, config.head_dim
    norm = _LayerTensor("attn_norm.weight", ("input_layernorm.weight",), (hidden,))
    if layer.attention.kind == "linear":
        return [norm, _LayerTensor("attn_output.weight", ("self_attn.linear_attn.weight",), (hidden, hidden))]
    output = _LayerTensor("attn_output.weight", ("self_attn.o_proj.weight",), (hidden, layer.heads * dim))
    if config.qk_norm:
        return [norm, *_normalised_qkv(config, arch, layer), output]
    heads, kv_heads = layer.heads, layer.attention.num_kv_heads
    tensors = [
        norm,
        _LayerTensor("attn_q.weight", ("self_attn.q_proj.weight",), (heads * dim, hidden), heads),
        _LayerTensor("attn_k.weight", ("self_attn.k_proj.weight",), (kv_heads * dim, hidden), kv_heads),
        _LayerTensor("attn_v.weight", ("self_attn.v_proj.weight",), (kv_heads * dim, hidden)),
        output,
    ]
    if config.qkv_bias:
        tensors += [
            _LayerTensor("attn_q.bias", ("self_attn.q_proj.bias",), (heads * dim,), heads),
            _LayerTensor("attn_k.bias", ("self_attn.k_proj.bias",), (kv_heads * dim,), kv_heads),
            _LayerTensor("attn_v.bias", ("self_attn.v_proj.bias",), (kv_heads * dim,)),
        ]
    if config.output_bias:
        tensors.append(_LayerTensor("attn_output.bias", ("self_attn.o_proj.bias",), (hidden,)))
    return tensors


def _normalised_qkv(config: ModelConfig, arch: str, layer: GgufLayer) -> list[_LayerTensor]:
    """Return q, k and v with the norms of queries and keys; the rotary kernel of these archs takes rows as they are."""
    hidden, dim = config.hidden_size, config.head_dim
    sources = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    heads = [layer.heads, layer.attention.num_kv_heads, layer.attention.num_kv_heads]
    if arch == _OPENELM:
        qkv = [_LayerTensor("attn_qkv.weight", tuple(sources), (sum(heads) * dim, hidden))]
    else:
        qkv = [
            _LayerTensor(f"attn_{name}.weight", (source,), (count * dim, hidden))
            for name, source, count in zip("qkv", sources, heads, strict=True)
        ]
    norms = [_LayerTensor(f"attn_{name}_norm.weight", (f"self_attn.{name}_norm.weight",), (dim,)) for name in "qk"]
    return [*qkv, *norms]


def _ffn_tensors(config: ModelConfig, layer: GgufLayer) -> list[_LayerTensor]:
    """Return tensors of a layer's FFN, in the file's order."""
    hidden, width = config.hidden_size, layer.width
    tensors = [
        _LayerTensor("ffn_norm.weight", ("post_attention_layernorm.weight",), (hidden,)),
        _LayerTensor("ffn_gate.weight", ("mlp.gate_proj.weight",), (width, hidden)),
        _LayerTensor("ffn_up.weight", ("mlp.up_proj.weight",), (width, hidden)),
        _LayerTensor("ffn_down.weight", ("mlp.down_proj.weight",), (hidden, width)),
    ]
    if config.mlp_bias:
        tensors += [
            _LayerTensor("ffn_gate.bias", ("mlp.gate_proj.bias",), (width,)),
            _LayerTensor("ffn_up.bias", ("mlp.up_proj.bias",), (width,)),
            _LayerTensor("ffn_down.bias", ("mlp.down_proj.bias",), (hidden,)),
        ]
    return tensors


def _interleaved(values: Array, heads: int) -> Array:
    """Return rows of q or k in the order of llama.cpp's rotary kernel: the two halves of a head in turn."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
