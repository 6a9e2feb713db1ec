"""Hidden states that llama.cpp computes before the LM head at every token of a text, and the head that a file has.

llama.cpp's server gives probabilities of generated tokens only, so a text is read with it as an embedding model without
pooling, which gives the hidden state behind the final norm at each token.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from storage.files import InputError
from storage.gguf import gguf_errors
from tasks.engines.llamacpp import LlamaCpp

Array = NDArray[np.float32]
_SECONDS = 3600
"""Longest wait for one text; a large model on a small machine is slow."""
_MULTIPLIED_AS = {
    GGMLQuantizationType.F32: GGMLQuantizationType.F32,
    GGMLQuantizationType.F16: GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16: GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q8_0: GGMLQuantizationType.Q8_0,
}
"""Type of a matrix -> the type of what it is multiplied with (ggml's vec_dot types)."""


def hidden_states(path: Path, texts: Sequence[Sequence[int]], threads: int) -> Iterator[Array]:
    """Compute hidden states behind the final norm, [tokens, hidden] for each text of token ids.

    As users run the file: a 16-bit KV cache, flash attention where llama.cpp takes it.

    Raises:
        InputError: xllamacpp is not installed, llama.cpp does not load the file, or computes no finite numbers.
    """
    engine = LlamaCpp(path, threads, 1, max(map(len, texts)), embeddings=True, chats=False)
    url = engine.url.removesuffix("/v1") + "/embedding"
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {engine.key}"}
    for text in texts:
        body = json.dumps({"content": list(text), "embd_normalize": -1}).encode()
        request = urllib.request.Request(url, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                states = np.array(json.load(response)[0]["embedding"], np.float32)
        except urllib.error.HTTPError as error:
            reason = json.load(error)["error"]["message"]
            raise InputError(f"llama.cpp reads no such text with {path}: {reason}") from error
        if not np.isfinite(states).all():  # llama.cpp writes null for them
            raise InputError(
                f"the hidden states of {path} in llama.cpp are not finite: export it as gguf-bf16 or gguf-f32, or "
                "where it is one of these lower distill_child.learning_rate"
            )
        yield states


def head_of(path: Path) -> tuple[Array, GGMLQuantizationType]:
    """Read the LM head of a GGUF file, [vocabulary, hidden], and the type that it is stored in.

    Raises:
        DamagedFileError: it has none that can be read.
    """
    with gguf_errors(path, "the export again"):
        tensors = {tensor.name: tensor for tensor in GGUFReader(str(path)).tensors}
        head = tensors.get("output.weight") or tensors["token_embd.weight"]
        return np.array(dequantize(head.data, head.tensor_type), np.float32), head.tensor_type


def as_multiplied(hidden: Array, kind: GGMLQuantizationType) -> Array:
    """Round hidden states to the type in which llama.cpp multiplies them by such a matrix.

    Raises:
        InputError: the matrix has a type that this project does not write.
    """
    if kind not in _MULTIPLIED_AS:
        types = ", ".join(matrix.name for matrix in _MULTIPLIED_AS)
        raise InputError(f"the LM head is stored as {kind.name}, expected one of {types}; export the child anew")
    rounded = _MULTIPLIED_AS[kind]
    return np.asarray(dequantize(quantize(hidden, rounded), rounded), np.float32)
