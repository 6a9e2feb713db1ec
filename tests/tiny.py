"""Tiny real parents: random weights of every supported family, saved by transformers itself; a tiny random corpus."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from storage.checkpoints import Checkpoint, CheckpointWriter
from storage.corpus import (
    SPLITS,
    Manifest,
    Split,
    content_hash,
    domain_split,
    split_path,
    write_manifest,
    write_split,
)
from storage.documents import PackedSequence
from storage.files import read_json, sha256, write_json
from storage.model_config import ModelConfig, expected_shapes
from storage.nemotron_nas import to_nemotron_nas
from storage.variants import Attention, Ffn
from tasks.puzzle.model.child import DeciLMForCausalLM, NemotronNasConfig

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,  # at transformers' 0.02 a block of this size hardly changes the logits
}
FAMILIES = ("llama", "llama3-untied-head_dim-bias", "mistral", "qwen2", "qwen3")


def tiny_model(family: str) -> Any:
    """Make a random parent of a family, float32, the same on every call."""
    torch.manual_seed(0)
    model: Any
    match family:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
        case "llama3-untied-head_dim-bias":
            extra: dict[str, Any] = {
                "head_dim": 20,
                "attention_bias": True,
                "mlp_bias": True,
                "rope_parameters": LLAMA3_ROPE,
            }
            model = LlamaForCausalLM(LlamaConfig(**SIZES, **extra, tie_word_embeddings=False))
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=20, tie_word_embeddings=True))
        case _:
            raise ValueError(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                name.endswith("bias") or "norm" in name
            ):  # transformers starts them at 0 and 1, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train(False)


def save_tiny(family: str, folder: Path, max_shard_size: str = "20KB") -> tuple[Any, ModelConfig]:
    """Save a tiny parent as a sharded checkpoint; return the model, and its geometry as this project reads it."""
    model = tiny_model(family)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model, ModelConfig.from_hf(read_json(folder / "config.json", "the test"), str(folder))


def random_child(config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]], seed: int = 1) -> DeciLMForCausalLM:
    """Make a child with weights large enough that every subblock changes the logits."""
    torch.manual_seed(seed)
    model = DeciLMForCausalLM(NemotronNasConfig(**to_nemotron_nas(config, blocks, {}, "float32")))
    for key, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in key else 0.0, 0.1)
    return model


def save_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer of 260 tokens: bytes, <s>, </s>, <pad> and the only merge, `ab`."""
    special = ["<s>", "</s>", "<pad>"]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special, "ab"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)


def save_child(folder: Path, config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]]) -> DeciLMForCausalLM:
    """Save a random child as a checkpoint of this project, with the tokenizer of save_tokenizer; return the model."""
    model = random_child(config, blocks)
    folder.mkdir(parents=True)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in expected_shapes(config, blocks)}
    writer = CheckpointWriter(folder, 40_000)
    for name, tensor in tensors.items():
        writer.add({name: tensor})
    special = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    write_json(folder / "config.json", to_nemotron_nas(config, blocks, special, "float32"))
    save_tokenizer(folder)
    (folder / "LICENSE").write_text("The tiny licence.\n", encoding="utf-8")
    writer.finish()
    return model


def flip_byte(path: Path, position: int = -1) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def change_weights(folder: Path) -> None:
    """Write a checkpoint anew, whole, with other weights in the first block's FFN."""
    checkpoint = Checkpoint(folder, "the test")
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.checksums}
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1.01
    writer = CheckpointWriter(folder, 1 << 30)
    writer.add(tensors)
    writer.finish()


def tiny_corpus(
    folder: Path,
    vocab_size: int,
    seq_len: int,
    sequences: tuple[int, int, int] = (48, 16, 8),
    domains: tuple[str, ...] = (),
) -> None:
    """Write a corpus of random ids as prepare_corpus would, the same on every call; `sequences` counts them by split.

    A shorter corpus holds the first sequences of a longer one. Each sequence is a document; a domain has as many as
    validation.
    """
    counts: dict[str, int] = dict(zip(SPLITS, sequences, strict=True))
    counts |= {domain_split(name): sequences[2] for name in domains}
    splits = {}
    for number, (name, count) in enumerate(counts.items()):
        ids = np.random.default_rng(number).integers(0, vocab_size, (count, seq_len), np.int32)
        packed = [PackedSequence(tokens, document) for document, tokens in enumerate(ids)]
        _, token_sha256 = write_split(split_path(folder, name), packed, seq_len)
        splits[name] = Split(count, count * seq_len, count, token_sha256, sha256(split_path(folder, name)))
    write_manifest(
        folder,
        Manifest("key", content_hash(splits), seq_len, "<|endoftext|>", 0, None, "no tokenizer", splits, (), 0, ()),
    )
