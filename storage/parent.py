"""The parent as an artifact: a Hugging Face checkpoint and `puzzle_parent.json` beside it."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.checkpoints import Checkpoint
from storage.files import read_json
from storage.model_config import EMBEDDING, LM_HEAD, NORM, ModelConfig

INFO = "puzzle_parent.json"
REBUILD = "dvc repro prepare_parent"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
"""Patterns of what travels unchanged from source to parent to child."""


@dataclass(frozen=True)
class Parent:
    """The parent in `folder`, read block by block; every tensor is compared with its checksum as it is read."""

    folder: Path

    @functools.cached_property
    def info(self) -> dict[str, Any]:
        """{name, source, licence, licence_files, config, special_tokens, digest}."""
        info: dict[str, Any] = read_json(self.folder / INFO, REBUILD)
        return info

    @functools.cached_property
    def config(self) -> ModelConfig:
        """Its geometry."""
        return ModelConfig.from_json(self.info["config"])

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """Its tensors."""
        return Checkpoint(self.folder, REBUILD)

    @property
    def digest(self) -> str:
        """Content digest of geometry and all tensors."""
        return str(self.info["digest"])

    def block(self, block_index: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of one block, named as within a Llama layer."""
        return self.checkpoint.block(block_index, device, dtype)

    def outside(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Embedding [vocabulary, hidden], final norm [hidden], LM head [vocabulary, hidden] (the embedding if tied)."""
        embedding = self.checkpoint.tensor(EMBEDDING).to(device, dtype)
        norm = self.checkpoint.tensor(NORM).to(device, dtype)
        head = embedding if self.config.tie_embeddings else self.checkpoint.tensor(LM_HEAD).to(device, dtype)
        return embedding, norm, head
