"""The models that benchmarks ask: the parent and the children of a target, and what they answered before.

In: artifacts. Out: models of transformers with their tokenizers, as users load them; and answers that are kept under a
key of all that they depend on, so that a rerun asks a model nothing twice, and two targets ask their parent once.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from storage.checkpoints import Checkpoint
from storage.files import InputError, digest_of, sha256
from storage.parent_info import REBUILD
from storage.paths import Paths
from storage.pieces import Pieces
from storage.tokenizer import chat_template, load_tokenizer, tokenizer_digest
from tasks.puzzle.model.child import DeciLMForCausalLM
from tasks.puzzle.model.device import Compute
from tasks.puzzle.quality.accuracy import PARENT, Answers, Benchmark

Loaded: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Keep: TypeAlias = Callable[[Mapping[str, Any], Callable[[], Mapping[str, Any]]], dict[str, Any]]
"""Keeps a part of a model's answers under a key of its own, so that it is not made again if a later part fails."""


@dataclass(frozen=True)
class AskedModel:
    """The parent or a child, by its `name` in tables."""

    name: str
    checkpoint: Checkpoint

    @functools.cached_property
    def digest(self) -> str:
        """Return the digest of weights, config.json, generation_config.json and tokenizer."""
        generation = self.checkpoint.folder / "generation_config.json"
        files = {
            "config": self.checkpoint.config_json(),
            "tokenizer": tokenizer_digest(self.checkpoint.folder),
            "generation": sha256(generation) if generation.is_file() else None,
        }
        return digest_of({"tensors": self.checkpoint.checksums, **files})

    def tokenizer(self, *, chat: bool) -> PreTrainedTokenizerBase:
        """Load the tokenizer alone.

        Raises:
            InputError: `chat` is set, and the tokenizer has no chat template.
        """
        tokenizer = load_tokenizer(self.checkpoint.folder, self.checkpoint.rebuild)
        if chat:
            problem = f"the tokenizer in {self.checkpoint.folder} has no chat template that can be read"
            way_out = "take benchmarks with `chat` and mt_bench out of measure_accuracy, or take a parent that chats"
            tokenizer.chat_template = chat_template(tokenizer, problem, way_out)
        return tokenizer

    def load(self, compute: Compute, *, chat: bool) -> Loaded:
        """Compare every tensor with its checksum, and load model and tokenizer.

        Raises:
            DamagedFileError: a file is not as it was written.
            InputError: as of :meth:`tokenizer`; and later, from the model itself, where its logits are not finite.
        """
        for tensor in self.checkpoint.files:
            self.checkpoint.tensor(tensor)
        disable_progress_bar()
        loader: Any = AutoModelForCausalLM if self.name == PARENT else DeciLMForCausalLM
        loaded = loader.from_pretrained(self.checkpoint.folder, dtype=compute.dtype, trust_remote_code=False)
        model: PreTrainedModel = loaded.to(compute.device)
        refuse_overflow(model)
        return model, self.tokenizer(chat=chat)


def refuse_overflow(model: PreTrainedModel) -> None:
    """Have a model raise InputError over logits that are NaN or infinite, which would count as answers."""

    def check(_module: nn.Module, _hidden: tuple[Tensor, ...], logits: Tensor) -> None:
        if not all(extreme.isfinite() for extreme in torch.aminmax(logits)):
            raise InputError(
                f"logits of {model.name_or_path} are not finite: its weights overflow in {logits.dtype}; set run.dtype "
                "to float32, or take another revision of the parent"
            )

    model.get_output_embeddings().register_forward_hook(check)


def parent_model(paths: Paths) -> AskedModel:
    """Return the parent."""
    return AskedModel(PARENT, Checkpoint(paths.parent, REBUILD))


def asked_models(target: str, paths: Paths) -> list[AskedModel]:
    """List the parent, then the children of a target that exist, in the order of their making."""
    made = {
        "assembled": (paths.assembled(target), "assemble_child"),
        "refined": (paths.refined(target), "refine_child"),
        "distilled": (paths.distilled(target), "distill_child"),
    }
    children = [
        AskedModel(state, Checkpoint(folder, f"dvc repro {stage}@{target}"))
        for state, (folder, stage) in made.items()
        if folder.is_dir()
    ]
    return [parent_model(paths), *children]


@dataclass(frozen=True)
class PlannedBenchmark:
    """A benchmark that was checked and can be asked.

    Attributes:
        benchmark: what tables say of it.
        key: all that answers depend on, beside the model and how it computes.
        ask: asks a model all questions; it may keep parts of the work.
        chat: whether it needs a chat template.
    """

    benchmark: Benchmark
    key: Mapping[str, Any]
    ask: Callable[[PreTrainedModel, PreTrainedTokenizerBase, Keep], Answers]
    chat: bool = False


def remembered(paths: Paths, key: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON values that `make` gave under this key, here or in an earlier run."""
    digest = digest_of(key)
    pieces = Pieces(paths.answers, "dvc repro --force measure_accuracy")
    if not pieces.done(digest, digest):
        pieces.finish(digest, digest, [], make())
    facts: dict[str, Any] = pieces.get(digest)["facts"]
    return facts
