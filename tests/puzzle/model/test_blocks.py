"""Blocks against transformers' own models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from storage.checkpoints import Checkpoint
from storage.files import write_json
from storage.model_config import EMBEDDING, LM_HEAD, NORM
from storage.nemotron_nas import to_nemotron_nas
from storage.variants import Attention, Ffn
from tasks.puzzle.model.boundaries import boundaries
from tasks.puzzle.model.child import DeciLMForCausalLM, NemotronNasConfig
from tasks.puzzle.model.head import Head
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tests.tiny import FAMILIES, save_tiny

CPU = torch.device("cpu")
TOLERANCE = 2e-5  # float32 sums of at most 160 terms of order 1, in another order than transformers'


def child_of(config: dict[str, Any]) -> Any:
    child: Any = DeciLMForCausalLM(NemotronNasConfig(**config))
    return child.train(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_parent_blocks_give_the_parents_logits(family: str, tmp_path: Path) -> None:
    model, config = save_tiny(family, tmp_path)
    checkpoint = Checkpoint(tmp_path, "the test", is_foreign=True)
    tokens = torch.randint(0, config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    parent = parent_attention(config), parent_ffn(config)
    blocks = ((*parent, checkpoint.block(i, CPU, torch.float32)) for i in range(config.num_blocks))
    *_, last = boundaries(config, checkpoint.tensor(EMBEDDING), blocks, tokens, sequences_per_batch=2)
    head = Head(
        checkpoint.tensor(NORM), checkpoint.tensor(EMBEDDING if config.tie_embeddings else LM_HEAD), config.rms_norm_eps
    )
    logits = head.normalise(last) @ head.weight.T
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_all_parent_child_generates_as_the_parent(family: str, tmp_path: Path) -> None:
    model, config = save_tiny(family, tmp_path / "parent")
    child_config = to_nemotron_nas(
        config, [(parent_attention(config), parent_ffn(config))] * config.num_blocks, {"eos_token_id": None}, "float32"
    )
    child = child_of(child_config)
    child.load_state_dict(model.state_dict(), strict=False)
    child.tie_weights()
    prompt = torch.randint(0, config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0  # left padding: the child must mask as the parent does
    options = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    assert torch.equal(child.generate(prompt, **options), model.generate(prompt, **options))


def test_the_kv_cache_of_a_heterogeneous_child_changes_nothing(tmp_path: Path) -> None:
    _, config = save_tiny("llama", tmp_path / "parent")
    blocks = [
        (Attention("no_op"), Ffn("gated", 64)),
        (Attention("gqa", 1), Ffn("no_op")),
        (Attention("linear"), Ffn("linear")),
    ]
    torch.manual_seed(0)
    child = child_of(to_nemotron_nas(config, blocks, {}, "float32"))
    tokens = torch.randint(0, config.vocab_size, (2, 20))
    with torch.no_grad():
        at_once = child(input_ids=tokens).logits
        step = child(input_ids=tokens[:, :13], use_cache=True)
        parts, cache = [step.logits], step.past_key_values
        for index in range(13, 20):
            step = child(input_ids=tokens[:, index : index + 1], past_key_values=cache, use_cache=True)
            parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, 1), at_once, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_child_loads_with_auto_model(tmp_path: Path) -> None:
    _, config = save_tiny("qwen2", tmp_path / "parent")
    blocks = [
        (Attention("gqa", 1), Ffn("gated", 64)),
        (Attention("no_op"), Ffn("gated", 96)),
        (Attention("gqa", 2), Ffn("no_op")),
    ]
    torch.manual_seed(0)
    child = child_of(to_nemotron_nas(config, blocks, {}, "float32"))
    child.save_pretrained(tmp_path / "child")
    write_json(tmp_path / "child" / "config.json", to_nemotron_nas(config, blocks, {}, "float32"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    tokens = torch.randint(0, config.vocab_size, (1, 15))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, child(input_ids=tokens).logits, atol=0, rtol=0)
