"""The tokenizer files of a checkpoint, checked before anything else reads them. No torch, no transformers.

What is checked: small JSON files are objects, chat templates are texts, no file asks for code of its own, and the
tokenizers library reads tokenizer.json within seconds and a gigabyte, tried in a process of its own.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage import tokenizer_probe
from storage.files import InputError
from storage.json_files import read_object, read_text
from storage.side_files import TOKENIZER_FILES, side_files

SETTINGS = ("tokenizer_config", "special_tokens_map", "generation_config", "config")
"""Names of the small files beside tokenizer.json."""
_OBJECTS = (*SETTINGS, "added_tokens", "chat_template")
_TOKENIZER = "tokenizer.json"
_TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
_MAX_BYTES = 40 << 20
"""The largest published tokenizer.json has 33 MiB."""
_MAX_TEMPLATE_BYTES = 1 << 20
_TIMEOUT_S = 60.0
_MAX_REASON = 300


def check_tokenizer(folder: Path, rebuild: str) -> None:
    """Check the tokenizer files of a checkpoint, those that it has.

    Raises:
        InputError: one of them cannot be used, asks for code of its own, or takes the library too long.
        DamagedFileError: one of them is not the JSON or the text that it must be.
    """
    side_files(folder, TOKENIZER_FILES)
    for name in _OBJECTS:
        file = folder / f"{name}.json"
        values = read_object(file, rebuild) if file.exists() else {}
        code = values.get("auto_map")
        if (isinstance(code, Mapping) and "AutoTokenizer" in code) or (code and name == "tokenizer_config"):
            raise InputError(
                f"{file} asks for a tokenizer class of its own (auto_map), whose code is never run here; save the "
                "tokenizer as tokenizer.json and take auto_map out"
            )
    for template in side_files(folder, _TEMPLATES):
        read_text(template, rebuild, _MAX_TEMPLATE_BYTES)
    path = folder / _TOKENIZER
    if path.is_file():
        status = path.stat()
        _probe(path, status.st_size, status.st_mtime_ns)


def read_settings(folder: Path, rebuild: str) -> dict[str, dict[str, Any]]:
    """The files of SETTINGS by name; empty where one is missing."""
    files = {name: folder / f"{name}.json" for name in SETTINGS}
    return {name: read_object(file, rebuild) if file.is_file() else {} for name, file in files.items()}


@functools.lru_cache(maxsize=8)
def _probe(path: Path, size: int, _changed_ns: int) -> None:
    """Raise InputError where the library does not read a tokenizer.json, or not within its limits."""
    advice = "save it anew with transformers"
    if size > _MAX_BYTES:
        raise InputError(f"{path} is larger than {_MAX_BYTES >> 20} MiB, which no tokenizer is; {advice}")
    seconds, memory = tokenizer_probe.CPU_SECONDS, tokenizer_probe.MEMORY_BYTES
    command = [sys.executable, "-P", str(Path(tokenizer_probe.__file__)), str(path), str(seconds), str(memory)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    try:
        ended = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"{path} takes the tokenizers library more than {_TIMEOUT_S:.0f} s; {advice}") from None
    if ended.returncode:
        limits = f"{seconds} s or {memory / 2**30:g} GiB"
        lines = ended.stderr.decode(errors="replace").splitlines()
        reason = lines[-1].partition(": ")[2][:_MAX_REASON] if ended.returncode == 1 and lines else ""
        raise InputError(f"{path} is not a tokenizer ({reason or f'reading it takes more than {limits}'}); {advice}")
