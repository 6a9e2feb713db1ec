"""A child as users take it: transformers' Llama, its Trainer, its caches and PEFT are what it must agree with.

Both classes are held to the same tests: this project's own, and the one that goes into an export.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, StaticCache, Trainer, TrainingArguments

from storage.model_config import ModelConfig
from storage.nemotron_nas import to_nemotron_nas
from storage.variants import Attention, Ffn
from tasks.puzzle.model.child import DeciLMForCausalLM, DeciLMModel
from tests.exported_code import SPECIAL_TOKENS, code_copied_to, model_of, save_child
from tests.tiny import save_tiny

ERROR = 2e-5
"""Of float32 logits up to 10: the same few hundred products a logit, added up in another order."""
FULL, ONE, LINEAR, NO_ATTENTION = Attention("gqa", 2), Attention("gqa", 1), Attention("linear"), Attention("no_op")
WIDE, NARROW, LINEAR_FFN, NO_FFN = Ffn("gated", 96), Ffn("gated", 40), Ffn("linear"), Ffn("no_op")
CHILDREN = {
    "kv heads and widths": [(FULL, WIDE), (ONE, NARROW), (FULL, NO_FFN)],
    "first without attention": [(NO_ATTENTION, NARROW), (LINEAR, LINEAR_FFN), (ONE, WIDE), (NO_ATTENTION, NO_FFN)],
    "no attention at all": [(NO_ATTENTION, NARROW), (LINEAR, WIDE)],
}


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have transformers copy a checkpoint's code into a folder of this test."""
    with code_copied_to(tmp_path_factory.mktemp("modules")):
        yield


def ids(rows: int = 2, length: int = 12, seed: int = 3) -> Tensor:
    """Draw token ids, none of them special."""
    return torch.randint(3, 160, (rows, length), generator=torch.Generator().manual_seed(seed))


class Kind:
    """One of the two classes: how a folder is loaded with it."""

    def __init__(self, name: str) -> None:
        self.is_ours = name == "our class"

    def load(self, folder: Path, auto_class: str = "AutoModelForCausalLM", **options: Any) -> Any:
        """Load the checkpoint in a folder."""
        if self.is_ours:
            loader: Any = {"AutoModel": AutoModel, "AutoModelForCausalLM": AutoModelForCausalLM}[auto_class]
            return loader.from_pretrained(folder, dtype="auto", **options).train(False)
        return model_of(folder, auto_class, **options)


@pytest.fixture(params=["our class", "the export's class"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Return both classes in turn."""
    return Kind(request.param)


@pytest.fixture(scope="module")
def geometry(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Make a tiny Llama's geometry."""
    return save_tiny("llama", tmp_path_factory.mktemp("parent"))[1]


@pytest.fixture(scope="module")
def plain(geometry: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a child whose blocks are its parent's."""
    folder = tmp_path_factory.mktemp("plain")
    block = (Attention("gqa", geometry.num_kv_heads), Ffn("gated", geometry.intermediate_size))
    save_child(folder, to_nemotron_nas(geometry, [block] * geometry.num_blocks, SPECIAL_TOKENS, "float32"))
    return folder


@pytest.fixture(scope="module")
def mixed(geometry: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a child with every kind of block, the first without attention."""
    folder = tmp_path_factory.mktemp("mixed")
    save_child(folder, to_nemotron_nas(geometry, CHILDREN["first without attention"], SPECIAL_TOKENS, "float32"))
    return folder


def llama_of(model: Any, geometry: ModelConfig, tmp_path: Path) -> Any:
    """Return transformers' Llama with the weights of a plain child."""
    llama, _ = save_tiny("llama", tmp_path / "llama")
    llama.load_state_dict(model.state_dict(), strict=True)
    assert isinstance(llama, LlamaForCausalLM)
    return llama


def same(computed: Any, expected: Any) -> None:
    torch.testing.assert_close(computed, expected, rtol=0, atol=ERROR)


def test_outputs_are_those_of_a_llama(kind: Kind, plain: Path, geometry: ModelConfig, tmp_path: Path) -> None:
    """Loss of labels, hidden states, positions to keep, tuples: what callers of a Llama ask for."""
    model = kind.load(plain)
    llama = llama_of(model, geometry, tmp_path)
    labels = ids()
    labels[0, :5] = -100
    asked_for: dict[str, dict[str, Any]] = {
        "loss": {"labels": labels},
        "loss over a given number of items": {"labels": labels, "num_items_in_batch": torch.tensor(40)},
        "hidden states": {"output_hidden_states": True},
        "last positions": {"logits_to_keep": 3},
        "positions": {"logits_to_keep": torch.tensor([1, 7])},
        "positions of each row": {"logits_to_keep": torch.tensor([[1, 7], [0, 2]])},
        "a mask of positions": {"logits_to_keep": labels > 80},
        "packed sequences": {"position_ids": torch.tensor([[*range(5), *range(7)], [*range(9), *range(3)]])},
        "a mask of four dimensions": {
            "attention_mask": torch.ones(2, 1, 12, 12).tril(-2).bool() | torch.eye(12).bool()
        },
    }
    with torch.inference_mode():
        for name, options in asked_for.items():
            computed, expected = (
                each_model(input_ids=ids(), use_cache=False, **options) for each_model in (model, llama)
            )
            assert list(computed.keys()) == list(expected.keys()), name
            for key, value in expected.items():
                same(computed[key], value)
        as_tuple = model(input_ids=ids(), labels=labels, use_cache=True, return_dict=False)
        model.config.return_dict = False
        assert isinstance(model(input_ids=ids()), tuple)
        model.config.return_dict = True
        expected = llama(input_ids=ids(), labels=labels, use_cache=True, return_dict=False)
        assert [type(part) for part in as_tuple] == [type(part) for part in expected]
        same(as_tuple[:2], expected[:2])


def test_masks_of_four_dimensions(kind: Kind, mixed: Path) -> None:
    """Boolean, as ones and zeros, and as numbers that are added, infinite ones too, do what padding does."""
    model, padding = kind.load(mixed), torch.ones(2, 12, dtype=torch.int64)
    padding[0, 8:] = 0
    allowed = torch.ones(12, 12).tril().bool() & padding[:, None, None, :].bool()
    added = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    with torch.inference_mode():
        expected = model(input_ids=ids(), attention_mask=padding).logits
        assert (model(input_ids=ids()).logits - expected)[0, 9:].abs().max() > 0.1, "the padding changes nothing"
        for mask in (allowed, allowed.long(), added):
            same(model(input_ids=ids(), attention_mask=mask).logits, expected)


def test_what_cannot_be_is_refused(kind: Kind, plain: Path) -> None:
    model = kind.load(plain)
    for inputs in ({}, {"input_ids": ids(), "inputs_embeds": torch.zeros(2, 12, 48)}):
        with pytest.raises(ValueError, match="give one of them"):
            model(**inputs)
    if kind.is_ours:
        with pytest.raises(ValueError, match="load an export of the child"):
            model(input_ids=ids(), output_attentions=True)


def test_the_exports_class_has_attention_weights(plain: Path) -> None:
    model = model_of(plain, attn_implementation="eager")
    with torch.inference_mode():
        weights = model(input_ids=ids(), output_attentions=True).attentions
    assert [tuple(layer.shape) for layer in weights] == [(2, 4, 12, 12)] * 3
    same(weights[1].sum(-1), torch.ones(2, 4, 12))


@pytest.mark.parametrize("name", CHILDREN)
def test_a_static_cache_generates_what_a_dynamic_one_does(
    name: str, kind: Kind, geometry: ModelConfig, tmp_path: Path
) -> None:
    """Alone, left-padded in a batch, and with beams."""
    save_child(tmp_path, to_nemotron_nas(geometry, CHILDREN[name], SPECIAL_TOKENS, "float32"))
    model, mask = kind.load(tmp_path), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for how in ({}, {"attention_mask": mask}, {"num_beams": 2}):
        dynamic, static = (
            model.generate(ids(), **options, **how, cache_implementation=cache) for cache in ("dynamic", "static")
        )
        assert dynamic.tolist() == static.tolist(), how
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.inference_mode():
        first = model(input_ids=ids()[:, :9], past_key_values=cache, use_cache=True).logits
        second = model(input_ids=ids()[:, 9:], past_key_values=cache, use_cache=True).logits
        same(torch.cat((first, second), 1), model(input_ids=ids()).logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_computes_blocks_again_and_gradients_alike(
    use_reentrant: bool, kind: Kind, mixed: Path
) -> None:
    model, calls = kind.load(mixed).train(), []

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids(), labels=ids(), use_cache=True).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    for block in model.model.layers:
        normed = next((module for name, module in block.named_children() if "norm" in name), None)
        if normed is not None:
            normed.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients()
    once = len(calls)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls.clear()
    again = gradients()
    assert len(calls) == 2 * once > 0
    assert again.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(again[name], gradient), name


def test_the_model_without_its_head(kind: Kind, mixed: Path) -> None:
    """AutoModel loads it from the checkpoint of the whole; it gives what the head is given."""
    model, base = kind.load(mixed), kind.load(mixed, "AutoModel")
    with torch.inference_mode():
        whole = model(input_ids=ids(), output_hidden_states=True)
        for inner in (base, model.model, model.base_model):
            output = inner(input_ids=ids(), output_hidden_states=True)
            same(output.last_hidden_state, whole.hidden_states[-1])
            assert len(output.hidden_states) == len(model.model.layers) + 1
        same(model.lm_head(base(ids(), return_dict=False)[0]), whole.logits)
        same(output.hidden_states[0], model.get_input_embeddings()(ids()))
    if kind.is_ours:
        assert type(base) is DeciLMModel and type(model) is DeciLMForCausalLM


def one_step(model: nn.Module, folder: Path) -> None:
    """Take a step of transformers' Trainer, with checkpointing and two accumulated batches."""
    rows = [{"input_ids": row, "labels": row} for row in ids(rows=4)]
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=0.01,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer: Any = Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(folder))


def moved(model: Any, before: dict[str, Tensor]) -> set[str]:
    """Return names of the tensors that a step changed."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_trainer_takes_a_step_and_its_checkpoint_loads(kind: Kind, mixed: Path, tmp_path: Path) -> None:
    model = kind.load(mixed)
    if not kind.is_ours:  # as AutoModelForCausalLM does, so that the code is saved as well
        type(model).register_for_auto_class("AutoModelForCausalLM")
        type(model.config).register_for_auto_class()
    before = copy.deepcopy(model.state_dict())
    one_step(model, tmp_path)
    assert moved(model, before) == before.keys()
    again = kind.load(tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(input_ids=ids()).logits, model.train(False)(input_ids=ids()).logits)


def test_a_lora_takes_a_step_and_loads(kind: Kind, mixed: Path, tmp_path: Path) -> None:
    base = kind.load(mixed)
    before = copy.deepcopy(base.state_dict())
    targets = ["q_proj", "v_proj", "down_proj", "linear_attn", "linear_mlp"]
    settings: Any = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, init_lora_weights=False)
    model: Any = get_peft_model(base, settings)
    trained = copy.deepcopy(model.state_dict())
    one_step(model, tmp_path)
    assert moved(model, trained) == {name for name in trained if "lora_" in name}
    again: Any = PeftModel.from_pretrained(kind.load(mixed), str(tmp_path))
    with torch.inference_mode():
        expected = model.train(False)(input_ids=ids()).logits
        assert torch.equal(again(input_ids=ids()).logits, expected)
        same(again.merge_and_unload()(input_ids=ids()).logits, expected)
        assert not torch.equal(kind.load(mixed)(input_ids=ids()).logits, expected)
    assert before.keys() == kind.load(mixed).state_dict().keys()
