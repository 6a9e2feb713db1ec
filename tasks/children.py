"""A child's checkpoint folder: weights, config, tokenizer, licence and model card, whole or absent."""

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from storage.checkpoints import CHECKSUMS, CheckpointWriter
from storage.files import InputError, digest_of, read_json, write_json
from storage.model_config import EMBEDDING, LM_HEAD, NORM, to_nemotron_nas
from storage.parent import TOKENIZER_FILES, Parent
from storage.records import Architecture
from tasks.puzzle.model_card import model_card
from tasks.puzzle.runtimes import refusals


def read_architecture(path: Path, parent: Parent, rebuild: str) -> tuple[dict[str, Any], Architecture]:
    """architecture.json and its blocks.

    Raises:
        InputError: it was made for another parent.
    """
    chosen = read_json(path, rebuild)
    if chosen["parent"]["digest"] != parent.digest:
        raise InputError(
            f"{path} was made for parent {chosen['parent']['name']} ({chosen['parent']['digest'][:12]}…), but "
            f"{parent.folder} is {parent.info['name']} ({parent.digest[:12]}…); run `{rebuild}`"
        )
    return chosen, Architecture.from_json(chosen["blocks"])


def publish(
    final: Path,
    chosen: Mapping[str, Any],
    architecture: Architecture,
    parent: Parent,
    blocks: Iterable[Mapping[str, Tensor]],
    training: str,
    max_shard_gib: float,
) -> None:
    """Write a child to `final` in the parent's dtype; an earlier one stays until the new one is whole.

    Args:
        final: the folder.
        chosen: architecture.json.
        architecture: its blocks.
        parent: gives all that is not in blocks.
        blocks: tensors of each block in order, named as within a Llama layer, read lazily: memory holds one shard.
        training: how the weights came about, a sentence for the model card.
        max_shard_gib: largest safetensors file.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-") as scratch:
        folder = Path(scratch) / "child"
        folder.mkdir()
        embedding = parent.checkpoint.tensor(EMBEDDING)
        writer = CheckpointWriter(folder, int(max_shard_gib * 2**30))
        writer.add({EMBEDDING: embedding})
        for index, block in enumerate(blocks):
            writer.add({f"model.layers.{index}.{name}": tensor.to(embedding.dtype) for name, tensor in block.items()})
        writer.add({NORM: parent.checkpoint.tensor(NORM)})
        if not parent.config.tie_embeddings:
            writer.add({LM_HEAD: parent.checkpoint.tensor(LM_HEAD)})
        writer.finish()
        dtype = str(embedding.dtype).removeprefix("torch.")
        _write_rest(folder, chosen, architecture, parent, training, dtype)
        if final.exists():
            shutil.rmtree(final)
        folder.rename(final)


def _write_rest(
    folder: Path, chosen: Mapping[str, Any], architecture: Architecture, parent: Parent, training: str, dtype: str
) -> None:
    """Config, tokenizer, licence and model card."""
    variants = [(block.attention, block.ffn) for block in architecture.blocks]
    config = to_nemotron_nas(parent.config, variants, parent.info["special_tokens"], dtype)
    write_json(folder / "config.json", config)
    for pattern in (*TOKENIZER_FILES, *parent.info["licence_files"]):
        for file in parent.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    hashes = {
        "parent": parent.digest,
        "architecture": digest_of(chosen["blocks"]),
        "weights": digest_of(read_json(folder / CHECKSUMS, "dvc repro")),
    }
    card = model_card(
        chosen,
        architecture,
        parent.info,
        hashes,
        {name: [one.text for one in found] for name, found in refusals(parent.config, variants).items()},
        training,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
