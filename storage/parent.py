"""The parent as an artifact: a Hugging Face checkpoint and `puzzle_parent.json` beside it."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from storage.checkpoints import Checkpoint
from storage.model_config import EMBEDDING, LM_HEAD, NORM, ModelConfig
from storage.parent_info import REBUILD, ParentInfo, read_parent_info


@dataclass(frozen=True)
class Parent:
    """The parent in `folder`, read block by block; every tensor that is read is compared with its checksum."""

    folder: Path

    @functools.cached_property
    def info(self) -> ParentInfo:
        """Return the parent's description, puzzle_parent.json."""
        return read_parent_info(self.folder)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """Return the parent's geometry."""
        return self.info.config

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """Return the parent's tensors, by name."""
        return Checkpoint(self.folder, REBUILD)

    @property
    def digest(self) -> str:
        """Return the content digest of geometry and all tensors."""
        return self.info.digest

    def block(self, block_index: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return tensors of one block, named as within a Llama layer."""
        return self.checkpoint.block(block_index, device, dtype)

    def outside(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return embedding [vocabulary, hidden], final norm [hidden], head [vocabulary, hidden] (embedding if tied)."""
        embedding = self.checkpoint.tensor(EMBEDDING).to(device, dtype)
        norm = self.checkpoint.tensor(NORM).to(device, dtype)
        head = embedding if self.config.tie_embeddings else self.checkpoint.tensor(LM_HEAD).to(device, dtype)
        return embedding, norm, head
