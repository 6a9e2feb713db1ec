"""KL and perplexity of an exported GGUF are those of what llama.cpp itself answers, and a bad file shows."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from storage.checkpoints import Checkpoint
from storage.evaluation import ExportQuality
from storage.files import InputError
from storage.formats import FileType
from storage.gguf_child import write_gguf
from storage.model_config import ModelConfig
from storage.sections import Run
from storage.variants import Attention, Ffn
from tasks.checkpoints.export_quality import compare_files, export_quality
from tasks.engines.hidden_states import as_multiplied, hidden_states
from tasks.engines.llamacpp import LlamaCpp
from tasks.puzzle.model.child import DeciLMForCausalLM
from tests.tiny import save_child, save_tiny

BLOCKS = [
    (Attention("gqa", 2), Ffn("gated", 96)),
    (Attention("no_op"), Ffn("gated", 64)),
    (Attention("gqa", 1), Ffn("no_op")),
]
VOCABULARY, TOKENS = 288, 20
RUN = Run(seed=0, dtype="float32", device="cpu", threads=1, workers=1)


@pytest.fixture
def child(tmp_path: Path) -> tuple[DeciLMForCausalLM, ModelConfig]:
    """Return a child with hidden size 64, which Q8_0 divides; untied, so that the head is a tensor of its own."""
    _, config = save_tiny("llama", tmp_path / "parent")
    config = replace(config, hidden_size=64, head_dim=16, vocab_size=VOCABULARY, tie_embeddings=False)
    return save_child(tmp_path / "child", config, BLOCKS), config


def answered(path: Path, tokens: list[int]) -> Tensor:
    """Ask llama.cpp for log-probabilities of all tokens, a request for each position; [tokens, vocabulary]."""
    engine = LlamaCpp(path, threads=1, sequences=1, context=2 * TOKENS)
    rows = []
    for end in range(1, len(tokens)):
        answer = engine.complete(tokens[:end], 1, logprobs=VOCABULARY)["choices"][0]["logprobs"]["content"][0]
        row = torch.empty(VOCABULARY)
        for token in answer["top_logprobs"]:
            row[token["id"]] = token["logprob"]
        rows.append(row)
    return torch.stack(rows)


def exported(file: Path, child: Path, tokens: Tensor) -> ExportQuality:
    """Return the quality of one file on one sequence."""
    compared = compare_files({"gguf-f16": file}, Checkpoint(child, "again"), tokens, RUN)
    return export_quality("gguf-f16", [compared], [0])


@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16", "Q8_0"])
def test_it_is_what_llama_cpp_answers(
    file_type: FileType, child: tuple[DeciLMForCausalLM, ModelConfig], tmp_path: Path
) -> None:
    """The head of the file included: Q8_0 rounds the hidden states that it multiplies as well.

    Both sides run the same file; llama.cpp reads the text at once for one and token by token for the other, with keys
    and values in F16 (2^-11 of a log-probability's size each), and KL is quadratic in that.
    """
    model, config = child
    tensors = model.state_dict()
    path = tmp_path / "child.gguf"
    write_gguf(path, config, BLOCKS, lambda name: iter([tensors[name].numpy()]), file_type)
    tokens = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(5))
    quality = exported(path, tmp_path / "child", tokens)
    theirs = answered(path, tokens[0].tolist())
    with torch.inference_mode():
        ours = torch.log_softmax(model(input_ids=tokens).logits[0, :-1].double(), -1)
    kl = (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    picked = theirs.gather(1, tokens[0, 1:, None]).mean().item()
    assert quality.kl == pytest.approx(kl, abs=2e-5, rel=0.05)
    assert math.log(quality.perplexity) == pytest.approx(-picked, abs=2e-3)
    assert quality.top1_agreement == pytest.approx((theirs.argmax(-1) == ours.argmax(-1)).double().mean().item())
    expected = -ours.gather(1, tokens[0, 1:, None]).mean().item()
    assert math.log(quality.torch_perplexity) == pytest.approx(expected, abs=1e-5)
    assert {"F32": 0.0, "F16": 0.0, "BF16": 1e-6, "Q8_0": 1e-6}[file_type] <= quality.kl < 0.01


def test_a_bad_file_shows(child: tuple[DeciLMForCausalLM, ModelConfig], tmp_path: Path) -> None:
    """One matrix of another block: loads, answers, and is far off."""
    model, config = child
    tensors = dict(model.state_dict())
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].flip(0)
    write_gguf(tmp_path / "bad.gguf", config, BLOCKS, lambda name: iter([tensors[name].numpy()]), "Q8_0")
    tokens = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(5))
    assert exported(tmp_path / "bad.gguf", tmp_path / "child", tokens).kl > 0.1


def test_a_head_of_another_type_is_refused() -> None:
    """llama.cpp multiplies Q4_0 by Q8_0, not by itself."""
    with pytest.raises(InputError, match="stored as Q4_0, expected one of F32, F16, BF16, Q8_0"):
        as_multiplied(np.zeros((1, 64), np.float32), GGMLQuantizationType.Q4_0)


def test_what_llama_cpp_cannot_read_or_compute_is_one_error(
    child: tuple[DeciLMForCausalLM, ModelConfig], tmp_path: Path
) -> None:
    """Tokens that the embedding has no row for; and states that overflow, which its server writes as null."""
    model, config = child
    tensors = model.state_dict()
    path = tmp_path / "child.gguf"
    write_gguf(path, config, BLOCKS, lambda name: iter([tensors[name].numpy()]), "F32")
    with pytest.raises(InputError, match=r"reads no such text with .*child\.gguf: Prompt contains invalid tokens$"):
        list(hidden_states(path, [[1, VOCABULARY]], threads=1))
    torch.nn.init.constant_(tensors["model.norm.weight"], 3.4e38)
    write_gguf(path, config, BLOCKS, lambda name: iter([tensors[name].numpy()]), "F32")
    with pytest.raises(InputError, match=r"hidden states of .*child.gguf in llama.cpp are not finite"):
        list(hidden_states(path, [[1, 2, 3]], threads=1))
