"""llama.cpp in this process (extra `llamacpp`: xllamacpp, a wheel with a prebuilt llama.cpp), timed.

In: a GGUF file, threads, sequences at once, their context in tokens. Out: milliseconds of prefill and of a decode step.
Its server runs in threads of this process, on a port of 127.0.0.1 that any client may use as well.
"""

import importlib
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from storage.files import InputError
from storage.records import Precision

ENGINE = "llama.cpp"
PRECISION: Precision = "float16"
"""Of the matrices in the files that are timed, and of llama.cpp's KV cache."""
_STEPS = 32
"""Decode steps that one timing is the mean of, at most."""
MARGIN = _STEPS + 2
"""Tokens of context that timing takes beside the input, or the mean context."""


def _library() -> Any:
    try:
        return importlib.import_module("xllamacpp")
    except ModuleNotFoundError as error:
        raise InputError(
            "llama.cpp is not installed; run `.venv/bin/python -m pip install --constraint constraints.txt "
            "--editable '.[llamacpp]'`"
        ) from error


def check_installed() -> None:
    """Raise InputError where xllamacpp is not."""
    _library()


def software() -> str:
    """Version of what computes."""
    return f"xllamacpp {metadata.version('xllamacpp')}"


class LlamaCpp:
    """A model that llama.cpp has loaded."""

    def __init__(self, path: Path, threads: int, sequences: int, context: int, *, exact: bool = False) -> None:
        """Load a model.

        Args:
            path: the GGUF file.
            threads: of llama.cpp.
            sequences: to be held at once.
            context: tokens of each.
            exact: a float32 KV cache and no flash attention, to compare numbers; else a 16-bit one, as users have it.

        Raises:
            InputError: xllamacpp is not installed, or llama.cpp does not load the file.
        """
        library = _library()
        params = library.CommonParams()
        params.model.path = str(path)
        params.n_parallel = sequences
        params.n_ctx = sequences * context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if exact:
            params.cache_type_k = params.cache_type_v = library.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_gpu_layers = 0  # rows say that the processor computes
        params.fit_params = params.warmup = False
        params.cache_ram_mib = 0
        params.verbosity = 1  # errors
        try:
            self._server = library.Server(params)
        except Exception as error:  # the binding has no types of its own
            raise InputError(f"llama.cpp does not load {path} ({error}); write it anew") from error
        self.complete([1], 1)  # a server that is let go of before its first request hangs

    @property
    def url(self) -> str:
        """Of its OpenAI HTTP API."""
        return f"{self._server.listening_address}/v1"

    def complete(self, prompt: Sequence[int], tokens: int, **options: Any) -> dict[str, Any]:
        """Greedy completion of token ids, as the HTTP API answers."""
        asked = {"prompt": list(prompt), "max_tokens": tokens, "ignore_eos": True, "samplers": ["top_k"], "top_k": 1}
        found: dict[str, Any] = self._server.handle_completions({**asked, **options})
        if "error" in found:
            raise RuntimeError(f"llama.cpp: {found['error']}")
        return found

    def _together(self, prompts: Sequence[Sequence[int]], tokens: int, *, keep: bool) -> list[dict[str, Any]]:
        """Complete all prompts at the same time, each in a slot of its own; `keep`: go on from what the slot holds."""

        def ask(slot: int) -> dict[str, Any]:
            return self.complete(prompts[slot], tokens, id_slot=slot, cache_prompt=keep)

        with ThreadPoolExecutor(len(prompts)) as users:
            return list(users.map(ask, range(len(prompts))))

    def prefill_ms(self, prompts: Sequence[Sequence[int]]) -> float:
        """Milliseconds until all prompts are read, nothing of them cached."""
        start = time.perf_counter()
        self._together(prompts, 1, keep=False)
        return (time.perf_counter() - start) * 1e3

    def fill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read prompts into the slots, for :meth:`decode_ms` to go on from."""
        self._together(prompts, 1, keep=True)

    def decode_ms(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Milliseconds of one step of the whole batch, the mean of `steps` behind the prompts that were filled in."""
        answers = self._together(prompts, steps + 1, keep=True)  # the first token comes with the prompt's last
        return statistics.median(float(answer["timings"]["predicted_per_token_ms"]) for answer in answers)


@dataclass(frozen=True)
class Work:
    """Sequences at once, tokens that each reads, tokens in its cache halfway through decoding."""

    batch: int
    input_tokens: int
    mean_context: int

    @property
    def steps(self) -> int:
        """Decode steps of one timing, around the mean context."""
        return min(_STEPS, self.mean_context)

    @property
    def context(self) -> int:
        """Tokens of a sequence that must have room."""
        return max(self.input_tokens, self.mean_context) + MARGIN

    def prompts(self, tokens: int) -> list[list[int]]:
        """Token ids that differ between sequences; what they are plays no part."""
        return [[(1 + sequence + 31 * at) % 97 + 1 for at in range(tokens)] for sequence in range(self.batch)]


def time_files(files: Mapping[str, Path], work: Work, repeats: int, threads: int) -> dict[str, dict[str, list[float]]]:
    """Time models in turn: name -> `prefill`, `decode` -> milliseconds of each of `repeats` rounds, after one more.

    Raises:
        InputError: as :class:`LlamaCpp`.
    """
    engines = {name: LlamaCpp(path, threads, work.batch, work.context) for name, path in files.items()}
    read, filled = work.prompts(work.input_tokens), work.prompts(max(1, work.mean_context - work.steps // 2))
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in files}
    for number in range(repeats + 1):
        for name, engine in engines.items():
            prefill = engine.prefill_ms(read)
            found[name]["prefill"] += [prefill] if number else []
    for engine in engines.values():
        engine.fill(filled)
    for number in range(repeats + 1):
        for name, engine in engines.items():
            decode = engine.decode_ms(filled, work.steps)
            found[name]["decode"] += [decode] if number else []
    return found
