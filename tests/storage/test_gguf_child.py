"""Which layers a child's blocks become in a GGUF, by hand (RUNTIMES.md); tests/engines run them in llama.cpp."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from storage.files import InputError
from storage.gguf_child import Layer, layers, write_gguf
from storage.records import Attention, Ffn
from tests.tiny import save_tiny

FULL, NO_ATTENTION, LINEAR = Attention("gqa", 2), Attention("no_op"), Attention("linear")
WIDE, NO_FFN = Ffn("gated", 96), Ffn("no_op")


def test_every_removed_subblock_that_llama_cpp_gets_wrong_has_a_stand_in() -> None:
    found = layers(
        [(NO_ATTENTION, NO_FFN), (NO_ATTENTION, WIDE), (NO_ATTENTION, WIDE), (LINEAR, NO_FFN), (FULL, NO_FFN)], 4
    )
    assert found == (
        Layer(1, Attention("gqa", 1), heads=1, width=96, zero_attention=True, zero_ffn=False),
        Layer(2, NO_ATTENTION, heads=0, width=96, zero_attention=False, zero_ffn=False),
        Layer(3, LINEAR, heads=4, width=32, zero_attention=False, zero_ffn=True),
        Layer(4, FULL, heads=4, width=32, zero_attention=False, zero_ffn=True),
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
        layers(blocks, 4)


VARIANTS = st.tuples(
    st.sampled_from([FULL, Attention("gqa", 1), LINEAR, NO_ATTENTION]),
    st.sampled_from([WIDE, Ffn("gated", 64), NO_FFN]),
)


@given(st.lists(VARIANTS, min_size=1, max_size=6))
def test_nothing_is_lost_and_nothing_is_what_llama_cpp_gets_wrong(blocks: list[tuple[Attention, Ffn]]) -> None:
    try:
        found = layers(blocks, 4)
    except InputError:
        assert all(attention.kind != "gqa" for attention, _ in blocks)
        return
    assert [of.block for of in found] == [at for at, block in enumerate(blocks) if block != (NO_ATTENTION, NO_FFN)]
    assert found[0].heads > 0
    assert all(of.width > 0 for of in found)
    for of in found:
        attention, ffn = blocks[of.block]
        assert of.zero_attention or of.attention == attention
        assert of.zero_ffn == (ffn == NO_FFN)


def test_the_files_tensors_are_the_checkpoints(tmp_path: Path) -> None:
    model, config = save_tiny("llama", tmp_path / "parent")
    tensors = model.state_dict()
    blocks = [(FULL, WIDE)] * 3
    write_gguf(tmp_path / "child.gguf", config, blocks, lambda name: tensors[name].numpy(), "F16")
    reader = GGUFReader(tmp_path / "child.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    found = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    down = tensors["model.layers.1.mlp.down_proj.weight"].numpy()
    assert np.array_equal(found["blk.1.ffn_down.weight"], down.astype(np.float16).astype(np.float32))
    query = tensors["model.layers.2.self_attn.q_proj.weight"].numpy().astype(np.float16).astype(np.float32)
    rows = query.reshape(4, 2, 6, 48)  # 4 heads of dimension 12: the two halves go in turn
    assert np.array_equal(found["blk.2.attn_q.weight"].reshape(4, 6, 2, 48)[:, :, 0], rows[:, 0])
    assert np.array_equal(found["blk.2.attn_q.weight"].reshape(4, 6, 2, 48)[:, :, 1], rows[:, 1])
    assert len(found) == 2 + 9 * 3


def test_scaled_rotary_positions_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    model, config = save_tiny("llama3-untied-head_dim-bias", tmp_path / "parent")
    with pytest.raises(InputError, match=r"rotary positions are scaled \(llama3\), which is not written to GGUF yet"):
        write_gguf(
            tmp_path / "a.gguf", config, [(FULL, WIDE)] * 3, lambda name: model.state_dict()[name].numpy(), "F32"
        )
    assert not (tmp_path / "a.gguf").exists()
