"""A child's checkpoint folder: weights, config, tokenizer, licence and model card, whole or absent."""

import glob
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from storage.architecture import ChosenArchitecture, read_architecture
from storage.checkpoints import CheckpointWriter
from storage.files import InputError, digest_of, replace_folder, unfinished_folder, write_json
from storage.model_config import EMBEDDING, LM_HEAD, NORM
from storage.nemotron_nas import to_nemotron_nas
from storage.parent import Parent
from storage.paths import Paths
from storage.side_files import GENERATION_FILES, copy_side_files, side_files
from tasks.puzzle.runtimes.model_card import model_card
from tasks.puzzle.runtimes.rules import is_empty, refusals


def architecture_for(parent: Parent, target: str, paths: Paths) -> ChosenArchitecture:
    """Read the architecture.json of a target, which must be for this parent.

    Raises:
        InputError: it is missing, it was made for another parent, or nothing is left in its blocks.
        DamagedFileError: it is not JSON, or a field is missing or has the wrong type.
    """
    chosen = read_architecture(target, paths)
    if chosen.parent.digest != parent.digest:
        raise InputError(
            f"{paths.architecture(target)} was made for parent {chosen.parent.name} ({chosen.parent.digest[:12]}…), "
            f"but {parent.folder} is {parent.info.name} ({parent.digest[:12]}…); "
            f"run `dvc repro search_architecture@{target}`"
        )
    if is_empty([(block.attention, block.ffn) for block in chosen.blocks]):
        raise InputError(
            f"{paths.architecture(target)}: no block has an attention or an FFN, so there is nothing to train; loosen "
            f"targets.{target}.constraints and run `dvc repro search_architecture@{target}`"
        )
    return chosen


def publish(
    final: Path,
    chosen: ChosenArchitecture,
    parent: Parent,
    blocks: Iterable[Mapping[str, Tensor]],
    training: str,
    max_shard_gib: float,
) -> None:
    """Write a child's checkpoint in the parent's dtype; an earlier one stays until the new one is whole.

    Args:
        final: the folder that it becomes.
        chosen: the child's architecture.
        parent: gives the tensors outside of blocks, the tokenizer and the licence files.
        blocks: tensors of each block in order, named as within a Llama layer, read lazily: memory holds one shard.
        training: a sentence for the model card on the making of the weights.
        max_shard_gib: largest safetensors file.
    """
    with unfinished_folder(final) as scratch:
        folder = scratch / "child"
        folder.mkdir()
        dtype = parent.checkpoint.dtype
        writer = CheckpointWriter(folder, int(max_shard_gib * 2**30))
        writer.add({EMBEDDING: parent.checkpoint.tensor(EMBEDDING)})
        for index, block in enumerate(blocks):
            writer.add({f"model.layers.{index}.{name}": tensor.to(dtype) for name, tensor in block.items()})
        writer.add({NORM: parent.checkpoint.tensor(NORM)})
        if not parent.config.tie_embeddings:
            writer.add({LM_HEAD: parent.checkpoint.tensor(LM_HEAD)})
        name = str(dtype).removeprefix("torch.")
        _write_rest(folder, chosen, parent, training, name, digest_of(writer.checksums))
        writer.finish()
        replace_folder(folder, final)


def _write_rest(
    folder: Path, chosen: ChosenArchitecture, parent: Parent, training: str, dtype: str, weights_digest: str
) -> None:
    """Write config, tokenizer, licence files and model card."""
    variants = [(block.attention, block.ffn) for block in chosen.blocks]
    config = to_nemotron_nas(parent.config, variants, parent.info.special_tokens, dtype)
    write_json(folder / "config.json", config)
    licences = (glob.escape(name) for name in parent.info.licence_files)
    copy_side_files(side_files(parent.folder, (*GENERATION_FILES, *licences)), parent.folder, folder)
    hashes = {
        "parent": parent.digest,
        "architecture": digest_of(chosen.architecture.to_json()),
        "weights": weights_digest,
    }
    reasons = {}
    for runtime, against in refusals(parent.config, variants).items():
        reasons[runtime] = [refusal.text for refusal in against]
    card = model_card(chosen, parent.info, hashes, reasons, training)
    (folder / "README.md").write_text(card, encoding="utf-8")
