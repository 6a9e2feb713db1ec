"""Which layers a child's blocks become in a GGUF, by hand (docs/runtimes.md); tests/engines run them in llama.cpp."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from storage.files import InputError
from storage.formats import FileType
from storage.gguf_child import GgufLayer, gguf_layers, write_gguf
from storage.model_config import expected_shapes
from storage.variants import Attention, Ffn
from tasks.puzzle.runtimes.rules import format_refusals
from tests.tiny import save_tiny

FULL, NO_ATTENTION, LINEAR = Attention("gqa", 2), Attention("no_op"), Attention("linear")
WIDE, NO_FFN = Ffn("gated", 96), Ffn("no_op")


def test_every_removed_subblock_that_llama_cpp_gets_wrong_has_a_stand_in() -> None:
    layers = gguf_layers(
        [(NO_ATTENTION, NO_FFN), (NO_ATTENTION, WIDE), (NO_ATTENTION, WIDE), (LINEAR, NO_FFN), (FULL, NO_FFN)], 4
    )
    assert layers == (
        GgufLayer(1, Attention("gqa", 1), heads=1, width=96, zero_attention=True, zero_ffn=False),
        GgufLayer(2, NO_ATTENTION, heads=0, width=96, zero_attention=False, zero_ffn=False),
        GgufLayer(3, LINEAR, heads=4, width=32, zero_attention=False, zero_ffn=True),
        GgufLayer(4, FULL, heads=4, width=32, zero_attention=False, zero_ffn=True),
    )


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ([(LINEAR, WIDE), (NO_ATTENTION, WIDE)], "no block has an attention with kv heads"),
        ([(NO_ATTENTION, NO_FFN)], "no block has an attention with kv heads"),
        ([(FULL, Ffn("linear"))], "linear FFN"),
    ],
)
def test_what_llama_cpp_does_not_load_is_refused(blocks: list[tuple[Attention, Ffn]], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        gguf_layers(blocks, 4)


VARIANTS = st.tuples(
    st.sampled_from([FULL, Attention("gqa", 1), LINEAR, NO_ATTENTION]),
    st.sampled_from([WIDE, Ffn("gated", 64), NO_FFN]),
)


@given(st.lists(VARIANTS, min_size=1, max_size=6))
def test_nothing_is_lost_and_nothing_is_what_llama_cpp_gets_wrong(blocks: list[tuple[Attention, Ffn]]) -> None:
    try:
        layers = gguf_layers(blocks, 4)
    except InputError:
        assert all(attention.kind != "gqa" for attention, _ in blocks)
        return
    non_empty_blocks = [index for index, block in enumerate(blocks) if block != (NO_ATTENTION, NO_FFN)]
    assert [layer.block for layer in layers] == non_empty_blocks
    assert layers[0].heads > 0
    assert all(layer.width > 0 for layer in layers)
    for layer in layers:
        attention, ffn = blocks[layer.block]
        assert layer.zero_attention or layer.attention == attention
        assert layer.zero_ffn == (ffn == NO_FFN)


def test_the_files_tensors_are_the_checkpoints(tmp_path: Path) -> None:
    model, config = save_tiny("llama", tmp_path / "parent")
    tensors = model.state_dict()
    blocks = [(FULL, WIDE)] * 3
    write_gguf(tmp_path / "child.gguf", config, blocks, lambda name: iter([tensors[name].numpy()]), "F16")
    reader = GGUFReader(tmp_path / "child.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    written = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    down = tensors["model.layers.1.mlp.down_proj.weight"].numpy()
    assert np.array_equal(written["blk.1.ffn_down.weight"], down.astype(np.float16).astype(np.float32))
    query = tensors["model.layers.2.self_attn.q_proj.weight"].numpy().astype(np.float16).astype(np.float32)
    rows = query.reshape(4, 2, 6, 48)  # 4 heads of dimension 12: the two halves go in turn
    assert np.array_equal(written["blk.2.attn_q.weight"].reshape(4, 6, 2, 48)[:, :, 0], rows[:, 0])
    assert np.array_equal(written["blk.2.attn_q.weight"].reshape(4, 6, 2, 48)[:, :, 1], rows[:, 1])
    assert len(written) == 2 + 9 * 3


def test_llama3_rotary_factors_are_those_of_the_reference(tmp_path: Path) -> None:
    """The file's factors divide the unscaled frequencies; transformers' own scaled ones are the reference."""
    _, config = save_tiny("llama3-untied-head_dim-bias", tmp_path / "parent")
    write_gguf(tmp_path / "a.gguf", config, [(FULL, WIDE)] * 3, None, "F32")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    factors = tensors["rope_freqs.weight"]
    plain = 1.0 / config.rope["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    fields: dict[str, Any] = {"head_dim": config.head_dim, "rope_parameters": config.rope}
    fields["max_position_embeddings"] = config.context
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](PreTrainedConfig(**fields))
    assert factors == pytest.approx(plain / scaled.numpy(), rel=1e-6)  # float32
    assert factors.min() == 1.0 < factors.max() == 8.0  # pairs that turn fast, and slow ones


@pytest.mark.parametrize(
    ("file_type", "error"), [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 1 / 254 + 2**-11), ("F32", 0.0)]
)
def test_matrices_are_rounded_as_the_type_says(file_type: FileType, error: float, tmp_path: Path) -> None:
    """Relative to the value (F16 and BF16: half a unit in the last place), or to the largest of 32
    (Q8_0: half a step of 127, and a scale in F16)."""
    _, config = save_tiny("llama", tmp_path / "parent")
    config = replace(config, hidden_size=64)
    draw = np.random.default_rng(0)
    shapes = expected_shapes(config)
    tensors = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def rows(name: str) -> Iterator[NDArray[np.float32]]:
        return (tensors[name][start : start + 7] for start in range(0, len(tensors[name]), 7))

    write_gguf(tmp_path / "a.gguf", config, [(FULL, Ffn("gated", 96))] * 3, rows, file_type)
    write_gguf(tmp_path / "b.gguf", config, [(FULL, Ffn("gated", 96))] * 3, lambda key: iter([tensors[key]]), file_type)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()  # in rows, or whole
    reader = GGUFReader(tmp_path / "a.gguf")
    written = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    weights = tensors["model.layers.1.mlp.up_proj.weight"]
    scale = np.abs(weights)
    if file_type == "Q8_0":
        scale = np.repeat(scale.reshape(96, 2, 32).max(-1), 32).reshape(96, 64)
    assert np.all(np.abs(written["blk.1.ffn_up.weight"] - weights) <= error * scale * 1.001)
    assert np.array_equal(written["output_norm.weight"], tensors["model.norm.weight"])


def test_rows_that_q8_0_cannot_divide_are_f16(tmp_path: Path) -> None:
    _, config = save_tiny("llama", tmp_path / "parent")  # hidden size 48
    write_gguf(tmp_path / "a.gguf", config, [(FULL, WIDE)] * 3, None, "Q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "Q8_0"  # rows of 96
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == "F16"
    assert types["blk.0.ffn_norm.weight"] == "F32"


def test_what_a_file_cannot_say_is_refused_and_leaves_none(tmp_path: Path) -> None:
    model, config = save_tiny("llama", tmp_path / "parent")
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 2.0,
    }
    with pytest.raises(InputError, match=r"\(yarn\) set mscale, which GGUF does not say"):
        write_gguf(tmp_path / "a.gguf", replace(config, rope=yarn), [(FULL, WIDE)] * 3, None, "F32")
    [refusal] = format_refusals("gguf-f32", replace(config, rope=yarn), [(FULL, WIDE)] * 3)
    assert "settings of its rotary positions" in refusal.text and refusal.way_out == "leave the gguf formats out"
    tensors = model.state_dict()
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = 1e7
    with pytest.raises(InputError, match=r"blk.1.ffn_down.weight has a weight beyond Q8_0; export it as gguf-bf16"):
        write_gguf(tmp_path / "a.gguf", config, [(FULL, WIDE)] * 3, lambda key: iter([tensors[key].numpy()]), "Q8_0")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    with pytest.raises(InputError, match=r"blk.1.ffn_up.weight has a weight beyond F16; export it as gguf-bf16"):
        write_gguf(tmp_path / "a.gguf", config, [(FULL, WIDE)] * 3, lambda key: iter([tensors[key].numpy()]), "F16")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    with pytest.raises(InputError, match=r"blk.1.ffn_up.weight has a weight that is not finite"):
        write_gguf(tmp_path / "a.gguf", config, [(FULL, WIDE)] * 3, lambda key: iter([tensors[key].numpy()]), "Q8_0")
    assert not list(tmp_path.glob("a.gguf*"))
