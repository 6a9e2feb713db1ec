"""The table of export formats: every row can be written and refused, its size is the true one, its name is found."""

import itertools
from dataclasses import replace
from typing import get_args

import pytest
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES

from storage.formats import FORMATS, LLAMACPP_FORMAT, FileType, FormatKind
from storage.model_config import ModelConfig, to_hf
from tasks.checkpoints.exports import WRITERS
from tasks.puzzle.model.padding import padded_config
from tasks.puzzle.runtimes.rules import RUNTIMES, format_refusals
from tests.engines.test_loaders import KV, PLAIN, WIDE
from tests.settings import tiny_params, tiny_values
from tests.storage.test_params import problems


def test_every_kind_has_a_row_a_writer_and_refusals() -> None:
    assert {row.kind for row in FORMATS.values()} == set(get_args(FormatKind)) == set(WRITERS)
    for qk_norm, other in ((False, "padded-qwen3"), (True, "padded-llama")):
        config = replace(PLAIN, qk_norm=qk_norm)
        refused = [name for name in FORMATS if format_refusals(name, config, [(KV, WIDE)] * 2)]
        assert refused == [other], "two blocks alike have every format but the other family's"


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)))
def test_a_config_of_a_family_says_every_flag_or_is_refused(flags: tuple[bool, bool, bool, bool]) -> None:
    """A Qwen2 with biases in its FFNs would be loaded without them, and nothing said."""
    qkv, output, mlp, qk_norm = flags
    config, blocks = replace(PLAIN, qkv_bias=qkv, output_bias=output, mlp_bias=mlp, qk_norm=qk_norm), [(KV, WIDE)] * 2
    as_padded, padded = padded_config(config), "padded-qwen3" if qk_norm else "padded-llama"
    assert as_padded.qkv_bias == as_padded.output_bias == (qkv or output)
    assert bool(format_refusals(padded, config, blocks)) == (qk_norm and mlp)
    for form, written in ((padded, as_padded), ("plain", config)):
        if not format_refusals(form, config, blocks):
            read = ModelConfig.from_hf(to_hf(written, 2, (KV, WIDE), {}, "float32"), "written")
            found = (read.qkv_bias, read.output_bias, read.mlp_bias, read.qk_norm)
            assert found == (written.qkv_bias, written.output_bias, mlp, qk_norm)


def test_the_rows_of_gguf_are_the_types_of_its_matrices() -> None:
    rows = [row for row in FORMATS.values() if row.kind == "gguf"]
    assert [row.file_type for row in rows] == list(get_args(FileType))
    for row in rows:
        assert row.is_gguf and row.runtime == "llama.cpp"
        assert row.file_type is not None
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[row.file_type]]
        assert row.size_ratio == size / values / 2  # 16 bit: two bytes a value
        assert any(kind.name in (f"ALL_{row.file_type}", f"MOSTLY_{row.file_type}") for kind in LlamaFileType)
        assert row.gguf_name("like-51b") == f"like-51b-{row.file_type}.gguf"
    assert not any(row.is_gguf for row in FORMATS.values() if row.kind != "gguf")
    assert FORMATS[LLAMACPP_FORMAT].runtime == "llama.cpp"


def test_runtimes_of_the_rows_exist() -> None:
    assert {row.runtime for row in FORMATS.values()} <= {None, *RUNTIMES}


@pytest.mark.parametrize("section", ["export_child", "export_parent"])
def test_every_format_is_accepted_and_another_one_named_with_the_nearest(section: str) -> None:
    tiny_params(**{section: {"formats": list(FORMATS)}})
    line, *_ = problems(tiny_values(**{section: {"formats": ["gguf-f61"]}}))
    assert line.startswith(f"{section}.formats.0: unknown format, did you mean gguf-f16? (formats: nemotron-nas, ")
    assert line.endswith("(found 'gguf-f61')")
