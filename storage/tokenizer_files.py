"""The tokenizer files of a checkpoint, checked before anything else reads them. No torch, no transformers.

What is checked: small JSON files are objects, ids of special tokens are numbers, chat templates are texts, no file asks
for code of its own, and the tokenizers library reads tokenizer.json, and jinja2 renders the templates, within seconds
and a gigabyte, tried in a process of its own.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from storage import tokenizer_probe
from storage.files import InputError
from storage.json_files import read_object, read_text
from storage.model_config import special_token_ids
from storage.side_files import GENERATION_FILES, side_files

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
    side_files(folder, GENERATION_FILES)
    templates: list[str] = []
    for name in _OBJECTS:
        file = folder / f"{name}.json"
        values = read_object(file, rebuild) if file.exists() else {}
        if name in ("generation_config", "config"):
            special_token_ids(values, str(file))
        code = values.get("auto_map")
        if (isinstance(code, Mapping) and "AutoTokenizer" in code) or (code and name == "tokenizer_config"):
            raise InputError(
                f"{file} asks for a tokenizer class of its own (auto_map), whose code is never run here; save the "
                "tokenizer as tokenizer.json and take auto_map out"
            )
        templates += _texts(values.get("chat_template"))
    templates += [read_text(file, rebuild, _MAX_TEMPLATE_BYTES) for file in side_files(folder, _TEMPLATES)]
    if templates:
        _probe_templates(tuple(templates), folder)
    path = folder / _TOKENIZER
    if path.is_file():
        status = path.stat()
        _probe(path, status.st_size, status.st_mtime_ns)


def read_settings(folder: Path, rebuild: str) -> dict[str, dict[str, Any]]:
    """Return the files of SETTINGS by name; empty where one is missing."""
    files = {name: folder / f"{name}.json" for name in SETTINGS}
    return {name: read_object(file, rebuild) if file.is_file() else {} for name, file in files.items()}


def _texts(templates: Any) -> Iterator[str]:
    """Yield the texts of one template, or of several by name."""
    if isinstance(templates, str):
        yield templates
    elif isinstance(templates, list | Mapping):
        for template in templates.values() if isinstance(templates, Mapping) else templates:
            yield from _texts(template)


@functools.lru_cache(maxsize=8)
def _probe_templates(templates: tuple[str, ...], folder: Path) -> None:
    """Raise InputError where chat templates are not rendered within the limits."""
    ended = _run_probe(standard_input=json.dumps(templates))
    if ended is None or ended.returncode:
        raise InputError(
            f"{folder}: its chat template takes more than {_limits()} for a short chat; take another template"
        )


@functools.lru_cache(maxsize=8)
def _probe(path: Path, size: int, _changed_ns: int) -> None:
    """Raise InputError where the library does not read a tokenizer.json, or not within its limits."""
    advice = "save it anew with transformers"
    if size > _MAX_BYTES:
        raise InputError(f"{path} is larger than {_MAX_BYTES >> 20} MiB, which no tokenizer is; {advice}")
    ended = _run_probe(str(path))
    if ended is None:
        raise InputError(f"{path} takes the tokenizers library more than {_TIMEOUT_S:.0f} s; {advice}")
    if ended.returncode:
        lines = ended.stderr.splitlines()
        reason = lines[-1].partition(": ")[2][:_MAX_REASON] if ended.returncode == 1 and lines else ""
        raise InputError(f"{path} is not a tokenizer ({reason or f'reading it takes more than {_limits()}'}); {advice}")


def _run_probe(*arguments: str, standard_input: str = "") -> "subprocess.CompletedProcess[str] | None":
    """Return the probe's end; None if it did not end in time."""
    limits = [str(tokenizer_probe.CPU_SECONDS), str(tokenizer_probe.MEMORY_BYTES)]
    command = [sys.executable, "-P", str(Path(tokenizer_probe.__file__)), *limits, *arguments]
    try:
        return subprocess.run(
            command,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"},
            input=standard_input,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None


def _limits() -> str:
    """Return the limits of the probe, for people."""
    return f"{tokenizer_probe.CPU_SECONDS} s or {tokenizer_probe.MEMORY_BYTES / 2**30:g} GiB"
