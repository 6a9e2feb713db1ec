"""config.json of others: whatever is in it, it is read or refused in one sentence that names the file."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig

from storage.block_configs import to_anymodel
from storage.files import SEAL, InputError, write_sealed
from storage.json_files import read_object
from storage.model_config import ModelConfig, expected_shapes
from storage.nemotron_nas import from_config_json, to_nemotron_nas
from storage.parent_info import INFO, ParentInfo, read_parent_info, write_parent_info
from storage.variants import Attention, Ffn

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 96,
    "vocab_size": 160,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
}
CONFIG = ModelConfig.from_hf(LLAMA, "the test")
BLOCKS = [
    (Attention("gqa", 2), Ffn("gated", 256)),
    (Attention("no_op"), Ffn("gated", 40)),
    (Attention("linear"), Ffn("no_op")),
]
CHILD = to_nemotron_nas(CONFIG, BLOCKS, {"eos_token_id": [1, 2]}, "float32")
ANYMODEL = to_anymodel(CONFIG, BLOCKS[:2], {}, "float32")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": True}, "must have numbers above 0 for hidden_size"),
        ({"hidden_size": "48"}, "must have numbers above 0 for hidden_size"),
        ({"hidden_size": 48.5}, "hidden_size is 48.5, expected a whole number from 1 to 4,194,304"),
        ({"hidden_size": -48}, "must have numbers above 0 for hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size is 1000.*, expected a whole number"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1000000, expected a whole number from 1 to 10,000"),
        ({"vocab_size": 10**8}, "vocab_size is 100000000, expected a whole number from 1 to 8,388,608"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"head_dim": 13}, "the head_dim 13 is odd"),
        ({"head_dim": None, "hidden_size": 50}, "4 attention heads cannot share a hidden size of 50 evenly"),
        ({"rms_norm_eps": math.inf}, "must have numbers above 0 for rms_norm_eps"),
        ({"rms_norm_eps": 1e5}, "rms_norm_eps is 100000.0, expected a number above 0, at most 1"),
        ({"architectures": "LlamaForCausalLM"}, r"architecture \(none named\) is not supported"),
        ({"architectures": [None]}, r"architecture \(none named\) is not supported"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ({"hidden_act": ["silu"]}, "hidden_act is .'silu'., expected a text"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\], expected an object"),
        ({"rope_parameters": False}, "rope_parameters is False, expected an object"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope type .'yarn'. is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "32"}}, "above 0 for beta_fast"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "differ by layer .full_attention. are not"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is set"),
        ({"rope_scaling": {**LLAMA["rope_scaling"], "high_freq_factor": 1.0}}, "must be above low_freq_factor"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings is 1000000000000"),
        ({"is_causal": False}, "is_causal is false: attention sees later tokens too"),
        ({"rope_theta": 1.0}, "must have a rope_theta above 1"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "a factor of at least 1"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=f"my.json: .*{reason}"):
        from_config_json({**LLAMA, **changes}, "my.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},  # rope_scaling counts where both are there
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 77.0}, "rope_scaling": {}},
        {"original_max_position_embeddings": 64},
        {"original_max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 50.0},
    ],
)
def test_ropes_are_those_that_transformers_reads(changes: dict[str, Any]) -> None:
    config = {**LLAMA, **changes}
    theirs = LlamaConfig(**copy.deepcopy(config))
    theirs.standardize_rope_params()  # as its rotary embedding does before it reads them
    ours = ModelConfig.from_hf(config, "the test").rope
    assert ours == {key: value for key, value in dict(theirs.rope_parameters or {}).items() if key != "type"}


@pytest.mark.parametrize("given", [{}, {"sliding_window": None}, {"sliding_window": 100}])
def test_full_attention_is_as_long_as_the_window_of_transformers(given: dict[str, int | None]) -> None:
    """A Mistral whose config.json says nothing of a window has one of 4,096 tokens."""
    config = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", **given}
    config["max_position_embeddings"] = 32_768
    window = MistralConfig(**copy.deepcopy(config)).sliding_window
    assert ModelConfig.from_hf(config, "the test").context == (window or 32_768)


def test_a_million_blocks_are_counted_first() -> None:
    """They took 25 s and 1.8 GiB before anything was checked."""
    with pytest.raises(InputError, match=r"block_configs must be a list of 1 to 10,000 objects"):
        from_config_json({**CHILD, "block_configs": [None] * 1_000_000}, "my.json")


def nested(kind: str) -> str:
    return {"list": "[" * 100_000, "object": '{"a":' * 100_000}[kind]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[1, 2]", "is a list, expected a JSON object"),
        (b"null", "is null, expected a JSON object"),
        (b'{"a": NaN}', r"is not valid JSON \(NaN is no number of JSON\)"),
        (b'{"a": -Infinity}', "Infinity is no number of JSON"),
        (b'{"a": 1e999}', "1e999 is too large a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' stands in an object twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' stands in an object twice"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        ('{"ä": 1}'.encode("latin-1"), "is not UTF-8 .byte 2 is 0xe4"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"", "is not valid JSON"),
        (nested("list").encode(), "lie too deep in each other"),
        (nested("object").encode(), "lie too deep in each other"),
    ],
)
def test_a_file_that_is_no_object_is_one_sentence(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=f"config.json .*{reason}") as error:
        read_object(tmp_path / "config.json", "the download again")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(tmp_path))


def of_gigabytes(path: Path) -> None:
    with path.open("wb") as handle:
        handle.truncate(1 << 33)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (of_gigabytes, "is larger than 16 MiB"),
        (Path.mkdir, "is a folder, expected a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, expected a file"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda _: None, "is missing; run the download again"),
    ],
)
def test_what_is_no_file_is_not_read(make: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    make(tmp_path / "config.json")
    with pytest.raises(InputError, match=f"config.json {reason}"):
        read_object(tmp_path / "config.json", "the download again")


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, 1, 2, 48, 1e-5]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def _changed(value: Any, data: st.DataObject) -> Any:
    """Return a JSON value of which one part, wherever in it, is another or gone."""
    if not isinstance(value, dict | list) or not value or not data.draw(st.integers(0, 4)):
        return data.draw(_VALUES)
    key = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    copy: Any = value.copy()
    if data.draw(st.booleans()):
        copy[key] = _changed(value[key], data)
    else:
        del copy[key]
    return copy


@settings(max_examples=600, deadline=None)
@given(raw=st.sampled_from([LLAMA, CHILD, ANYMODEL]), changes=st.integers(1, 3), data=st.data())
def test_any_change_of_a_config_is_a_model_or_one_sentence(raw: Any, changes: int, data: st.DataObject) -> None:
    for _ in range(changes):
        raw = _changed(raw, data)
    try:
        config, blocks = from_config_json(raw, "my.json")
    except InputError as error:
        assert str(error).startswith("my.json: ") and "\n" not in str(error)
    else:
        assert all(size > 0 for shape in expected_shapes(config, blocks[:3]).values() for size in shape)
        assert math.isfinite(config.rope["rope_theta"])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), is_sealed=st.booleans())
def test_any_change_of_puzzle_parent_json_is_a_parent_or_one_sentence(
    data: st.DataObject, is_sealed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("parent")
    write_parent_info(folder, ParentInfo("tiny", "tests", "mit", (), CONFIG, {"bos_token_id": 1}, "d1"))
    value = _changed(json.loads((folder / INFO).read_text()), data)
    (folder / INFO).write_text(json.dumps(value))
    if is_sealed and isinstance(value, dict):
        write_sealed(folder / INFO, {key: part for key, part in value.items() if key != SEAL})
    try:
        read_parent_info(folder)
    except InputError as error:
        assert "\n" not in str(error)
