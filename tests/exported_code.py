"""An export of random weights with the code that goes into it, loaded as engines load it."""

import contextlib
import copy
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import dynamic_module_utils

from storage.model_config import LM_HEAD
from tasks.puzzle.model.child import DeciLMForCausalLM, NemotronNasConfig

CODE = Path(__file__).parents[1] / "storage/remote_code"
FILES = ("configuration_nemotron_nas.py", "modeling_nemotron_nas.py")
AUTO_MAP = {
    "AutoConfig": "configuration_nemotron_nas.NemotronNasConfig",
    "AutoModel": "modeling_nemotron_nas.DeciLMModel",
    "AutoModelForCausalLM": "modeling_nemotron_nas.DeciLMForCausalLM",
}
SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@contextlib.contextmanager
def code_copied_to(folder: Path) -> Iterator[None]:
    """Have transformers copy a checkpoint's code into this folder meanwhile, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(str(folder))
        _forget_copied_code()
        yield
    _forget_copied_code()


def _forget_copied_code() -> None:
    """Forget the package of all copies, which remembers its folder: the next test module in one process has its own."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def save_child(folder: Path, config: dict[str, Any]) -> DeciLMForCausalLM:
    """Save an export of random weights, as engines find it; return the same model by our class."""
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}), encoding="utf-8")
    for file in FILES:
        shutil.copy(CODE / file, folder)
    torch.manual_seed(1)
    model = DeciLMForCausalLM(NemotronNasConfig(**copy.deepcopy(config)))  # transformers writes into rope_scaling
    for key, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in key else 0.0, 0.15)
    tied = {LM_HEAD} if config["tie_word_embeddings"] else set()
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key not in tied}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model.train(False)
    return model


def class_of(folder: Path, auto_class: str) -> Any:
    """Return what `auto_map` names, from the checkpoint's files, without a network."""
    named = AUTO_MAP[auto_class]
    return dynamic_module_utils.get_class_from_dynamic_module(named, str(folder), local_files_only=True)


def model_of(folder: Path, auto_class: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """Load the checkpoint by its own files: config class, then model class are found, as by engines."""
    config = class_of(folder, "AutoConfig").from_pretrained(folder)
    model = class_of(folder, auto_class).from_pretrained(folder, config=config, dtype="auto", **options)
    return model.train(False)
