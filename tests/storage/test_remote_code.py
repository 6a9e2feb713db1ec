"""The files that an export copies into a checkpoint, loaded as engines load them, against this project's own class."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import dynamic_module_utils

from storage.files import read_json
from storage.model_config import ModelConfig
from storage.nemotron_nas import to_nemotron_nas
from storage.variants import Attention, Ffn
from tasks.puzzle.model.child import DeciLMForCausalLM
from tests.exported_code import AUTO_MAP, CODE, FILES, SPECIAL_TOKENS, class_of, code_copied_to, model_of, save_child
from tests.tiny import FAMILIES, LLAMA3_ROPE, save_tiny

FULL, ONE, LINEAR, NO_ATTENTION = Attention("gqa", 2), Attention("gqa", 1), Attention("linear"), Attention("no_op")
WIDE, NARROW, LINEAR_FFN, NO_FFN = Ffn("gated", 256), Ffn("gated", 40), Ffn("linear"), Ffn("no_op")
Blocks = Sequence[tuple[Attention, Ffn]]
CHILDREN: dict[str, Blocks] = {
    "kv heads and widths": [(FULL, WIDE), (ONE, NARROW), (FULL, NARROW)],
    "first without attention": [(NO_ATTENTION, NARROW), (FULL, NO_FFN), (NO_ATTENTION, NO_FFN), (ONE, WIDE)],
    "linear": [(LINEAR, NARROW), (FULL, LINEAR_FFN), (LINEAR, LINEAR_FFN), (ONE, NO_FFN)],
    "no attention at all": [(NO_ATTENTION, NARROW), (LINEAR, WIDE)],
}
LOGIT_ERROR = 2e-5
"""Of logits up to 10 in float32: both do the same few hundred sums a logit in another order, each rounded at 6e-8."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's folder, the model that its own files make of it, and ours of the same tensors."""

    folder: Path
    model: Any
    ours: DeciLMForCausalLM


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have transformers copy a checkpoint's code into a folder of this test."""
    with code_copied_to(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module", params=[(family, name) for family in FAMILIES for name in CHILDREN], ids=" of ".join)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Load every child of every family, with random weights."""
    family, name = request.param
    folder = tmp_path_factory.mktemp("child")
    _, geometry = save_tiny(family, tmp_path_factory.mktemp("parent"))
    ours = save_child(folder, to_nemotron_nas(geometry, CHILDREN[name], SPECIAL_TOKENS, "float32"))
    return Loaded(folder, model_of(folder), ours)


def tokens(rows: int, length: int) -> Tensor:
    """Draw random ids, no special one among them."""
    return torch.randint(3, 160, (rows, length), generator=torch.Generator().manual_seed(2))


def test_only_what_every_engine_has_is_imported() -> None:
    for file in FILES:
        allowed = {"copy", "torch", "transformers", "typing"}
        assert set(dynamic_module_utils.get_imports(CODE / file)) <= allowed, file
        assert dynamic_module_utils.get_relative_imports(CODE / file) in ([], ["configuration_nemotron_nas"])


def test_it_computes_what_our_class_computes(loaded: Loaded) -> None:
    ids = tokens(2, 24)
    with torch.inference_mode():
        expected, computed = loaded.ours(input_ids=ids).logits, loaded.model(input_ids=ids).logits
        last = loaded.model(input_ids=ids, logits_to_keep=3).logits
    assert computed.dtype == torch.float32
    assert expected.abs().max() > 1  # else the tolerance says nothing
    torch.testing.assert_close(computed, expected, rtol=0, atol=LOGIT_ERROR)
    torch.testing.assert_close(last, computed[:, -3:], rtol=0, atol=LOGIT_ERROR)


def test_it_computes_the_same_with_eager_attention(loaded: Loaded) -> None:
    ids = tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    eager = model_of(loaded.folder, attn_implementation="eager")
    with torch.inference_mode():
        expected, computed = (model(input_ids=ids, attention_mask=mask).logits for model in (loaded.model, eager))
    torch.testing.assert_close(computed[0, 9:], expected[0, 9:], rtol=0, atol=LOGIT_ERROR)
    torch.testing.assert_close(computed[1], expected[1], rtol=0, atol=LOGIT_ERROR)


def test_its_tensors_are_the_checkpoints(loaded: Loaded) -> None:
    assert {name: tensor.shape for name, tensor in loaded.model.state_dict().items()} == {
        name: tensor.shape for name, tensor in loaded.ours.state_dict().items()
    }
    assert loaded.model.config.tie_word_embeddings == (
        loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    )


def test_greedy_generation(loaded: Loaded) -> None:
    """With a cache and without, alone and left-padded in a batch, and as our class generates."""
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    long, short = tokens(1, 12), tokens(1, 12)[:, :7]
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), short), dim=1)
    mask = torch.cat((torch.ones_like(long), (padded > 0).to(torch.int64)))
    with torch.inference_mode():
        alone = [loaded.model.generate(ids, **options)[0, -8:] for ids in (long, short)]
        without = [loaded.model.generate(ids, use_cache=False, **options)[0, -8:] for ids in (long, short)]
        together = loaded.model.generate(torch.cat((long, padded)), attention_mask=mask, **options)[:, -8:]
        ours: Any = loaded.ours
        expected = [ours.generate(ids, **options)[0, -8:] for ids in (long, short)]
    for row in range(2):
        assert alone[row].tolist() == without[row].tolist() == together[row].tolist() == expected[row].tolist()


def test_only_attention_has_a_place_in_the_cache(loaded: Loaded) -> None:
    with torch.inference_mode():
        cache = loaded.model(input_ids=tokens(1, 5), use_cache=True).past_key_values
    config = read_json(loaded.folder / "config.json", "the test")
    groups = [block["attention"]["n_heads_in_group"] for block in config["block_configs"]]
    kv_heads = [config["num_attention_heads"] // group for group in groups if group]
    assert [layer.keys.shape[1] for layer in cache.layers] == kv_heads


def test_the_config_is_written_as_it_was_read(loaded: Loaded, tmp_path: Path) -> None:
    read = read_json(loaded.folder / "config.json", "the test")
    config = class_of(loaded.folder, "AutoConfig").from_pretrained(loaded.folder)
    config.save_pretrained(tmp_path)
    saved = read_json(tmp_path / "config.json", "the test")
    assert saved.pop("transformers_version")
    assert saved == read
    assert json.loads(config.to_json_string()).items() >= read.items()
    assert {name: config.to_dict()[name] for name in read} == read


def test_blocks_are_read_as_attributes(loaded: Loaded) -> None:
    """As vLLM, SGLang and TensorRT-LLM read them: every field but `ffn_mult: null`, which is no attribute."""
    read = read_json(loaded.folder / "config.json", "the test")
    for block, fields in zip(loaded.model.config.block_configs, read["block_configs"], strict=True):
        for half in ("attention", "ffn"):
            for name, value in fields[half].items():
                if (name, value) == ("ffn_mult", None):
                    assert not hasattr(block.ffn, name)
                else:
                    assert getattr(getattr(block, half), name) == value


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "llama3": LLAMA3_ROPE,
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("name", ROPES)
def test_every_rope_in_both_forms(name: str, tmp_path: Path) -> None:
    """transformers 5 writes rope_parameters, older ones and engines that pin them rope_theta and rope_scaling."""
    _, geometry = save_tiny("llama", tmp_path / "parent")
    config = to_nemotron_nas(ModelConfig(**geometry.to_json() | {"rope": ROPES[name]}), [(FULL, NARROW)], {}, "float32")
    folder = tmp_path / "both"
    folder.mkdir()
    ours = save_child(folder, config)
    ids = tokens(1, 100)
    with torch.inference_mode():
        expected = ours(input_ids=ids).logits
    for dropped in ({"rope_parameters"}, {"rope_theta", "rope_scaling"}):
        kept = {key: value for key, value in config.items() if key not in dropped}
        (folder / "config.json").write_text(json.dumps({**kept, "auto_map": AUTO_MAP}), encoding="utf-8")
        model = model_of(folder)
        with torch.inference_mode():
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=LOGIT_ERROR)
        assert model.config.rope_theta == ROPES[name]["rope_theta"]
        assert model.config.to_dict()["rope_scaling"] == config["rope_scaling"]


def test_a_width_by_the_multiplier(tmp_path: Path) -> None:
    """Configs of others have no exact width: round_up_256(int(2 * 6.0 * 48 / 3)) = 256."""
    _, geometry = save_tiny("llama", tmp_path / "parent")
    config = to_nemotron_nas(geometry, [(FULL, WIDE)], {}, "float32")
    config["block_configs"][0]["ffn"] = {"ffn_mult": 6.0, "no_op": False, "replace_with_linear": False}
    ours = save_child(tmp_path, config)
    assert model_of(tmp_path).state_dict().keys() == ours.state_dict().keys()
