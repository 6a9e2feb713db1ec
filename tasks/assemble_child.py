"""assemble_child: architecture.json + parent + library -> a checkpoint in nemotron-nas form, written block by block."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor
from tqdm import tqdm

from storage.checkpoints import CHECKSUMS, CheckpointWriter
from storage.files import InputError, digest_of, read_json, write_json
from storage.library import Library, entry_name
from storage.model_config import EMBEDDING, LM_HEAD, NORM, to_nemotron_nas
from storage.params import Params
from storage.parent import TOKENIZER_FILES, Parent
from storage.paths import Paths
from storage.records import Architecture, Attention, Ffn
from tasks.puzzle.assembly import compose
from tasks.puzzle.model_card import model_card
from tasks.puzzle.runtimes import refusals


@task(cache_policy=NO_CACHE)
def assemble(target: str, params: Params, paths: Paths) -> None:
    """Write the child of `target`; an earlier one stays until the new one is whole.

    Raises:
        InputError: the architecture was made for another parent.
    """
    rebuild = f"dvc repro search_architecture@{target}"
    chosen, parent, library = (
        read_json(paths.architecture(target), rebuild),
        Parent(paths.parent),
        Library(paths.library),
    )
    if chosen["parent"]["digest"] != parent.digest:
        raise InputError(
            f"{paths.architecture(target)} was made for parent {chosen['parent']['name']} "
            f"({chosen['parent']['digest'][:12]}…), but {paths.parent} is {parent.info['name']} "
            f"({parent.digest[:12]}…); run `{rebuild}`"
        )
    architecture = Architecture.from_json(chosen["blocks"])
    final = paths.assembled(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".assembled-") as scratch:
        folder = Path(scratch) / "child"
        folder.mkdir()
        _write_weights(folder, architecture, parent, library, params)
        _write_rest(folder, architecture, parent, chosen)
        if final.exists():
            shutil.rmtree(final)
        folder.rename(final)


def _write_weights(folder: Path, architecture: Architecture, parent: Parent, library: Library, params: Params) -> None:
    """Tensors in the order of the blocks and in the parent's dtype; memory holds one shard and one block."""
    embedding = parent.checkpoint.tensor(EMBEDDING)
    dtype, cpu = embedding.dtype, torch.device("cpu")
    writer = CheckpointWriter(folder, int(params.assemble_child.max_shard_gib * 2**30))
    writer.add({EMBEDDING: embedding})
    for index, replacement in enumerate(tqdm(architecture.blocks, desc="assemble", unit="block", disable=None)):

        def trained(variant: Attention | Ffn, first_block: int = replacement.first_block) -> dict[str, Tensor]:
            tensors = library.read(entry_name(first_block, variant))
            return {name: tensor.to(dtype) for name, tensor in tensors.items()}

        block = compose(parent.config, parent.block(replacement.first_block, cpu, dtype), replacement, trained)
        writer.add({f"model.layers.{index}.{name}": tensor for name, tensor in block.items()})
    writer.add({NORM: parent.checkpoint.tensor(NORM)})
    if not parent.config.tie_embeddings:
        writer.add({LM_HEAD: parent.checkpoint.tensor(LM_HEAD)})
    writer.finish()


def _write_rest(folder: Path, architecture: Architecture, parent: Parent, chosen: dict[str, Any]) -> None:
    """Config, tokenizer, licence and model card."""
    dtype = str(parent.checkpoint.tensor(EMBEDDING).dtype).removeprefix("torch.")
    blocks = [(block.attention, block.ffn) for block in architecture.blocks]
    config = to_nemotron_nas(parent.config, blocks, parent.info["special_tokens"], dtype)
    write_json(folder / "config.json", config)
    for pattern in (*TOKENIZER_FILES, *parent.info["licence_files"]):
        for file in parent.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    hashes = {
        "parent": parent.digest,
        "architecture": digest_of(chosen["blocks"]),
        "weights": digest_of(read_json(folder / CHECKSUMS, "dvc repro assemble_child")),
    }
    card = model_card(chosen, architecture, parent.info, hashes, refusals(config))
    (folder / "README.md").write_text(card, encoding="utf-8")
