"""llama.cpp in this process (extra `llamacpp`: xllamacpp, a wheel with a prebuilt llama.cpp), timed.

In: a GGUF file, threads, sequences at once, their context in tokens. Out: milliseconds of prefill and of a decode step;
answers to conversations, streamed. Its server runs in threads of this process, on a port of 127.0.0.1, and answers
whoever has its key.
"""

import contextlib
import http.client
import importlib
import json
import secrets
import statistics
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from storage.files import InputError
from storage.records import Precision
from tasks.engines.timings import Rounds, Workload

ENGINE = "llama.cpp"
PRECISION: Precision = "float16"
"""Precision of the matrices in the files that are timed, and of llama.cpp's KV cache."""
_HOST = "127.0.0.1"
_STEPS = 32
"""The most decode steps that one timing is the mean of."""
_MARGIN = _STEPS + 2
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
    """Raise InputError where xllamacpp is not installed."""
    _library()


def software() -> str:
    """Return the version of xllamacpp, as tables have it."""
    return f"xllamacpp {metadata.version('xllamacpp')}"


@dataclass(frozen=True)
class ChatOptions:
    """Settings of an answer: its longest length in tokens, the temperature (0 is greedy), and the seed of draws."""

    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class AnswerPart:
    """A part of a streamed answer, and the state of the answer by llama.cpp's own count.

    Attributes:
        text: the text of this part.
        tokens: tokens generated so far.
        tokens_per_s: tokens generated per second so far; 0 for the first token.
        prompt_tokens: tokens before the answer.
        finish: None before the last part, which says: the model ended (stop), or there was no room for more (length).
    """

    text: str
    tokens: int
    tokens_per_s: float
    prompt_tokens: int
    finish: Literal["stop", "length"] | None


class LlamaCpp:
    """A model that llama.cpp has loaded."""

    def __init__(
        self,
        path: Path,
        threads: int,
        sequences: int,
        context: int,
        *,
        exact: bool = False,
        embeddings: bool = False,
        name: str | None = None,
        quiet: bool = False,
        chats: bool = True,
    ) -> None:
        """Load a model.

        Args:
            path: the GGUF file.
            threads: threads that llama.cpp computes with.
            sequences: sequences held at once.
            context: tokens of each sequence; llama.cpp lowers it to what the model was made for.
            exact: a float32 KV cache and no flash attention, to compare numbers; else a 16-bit cache, as users have it.
            embeddings: the server gives the hidden state of each token of a text instead of answers.
            name: the model's name in the HTTP API; None: the file's name.
            quiet: llama.cpp does not write its errors to stderr; requests and exceptions have them.
            chats: conversations come, so llama.cpp has to take the file's chat template.

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
        if embeddings:
            params.embedding, params.embd_normalize = True, -1
            params.pooling_type = library.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
            params.n_batch = params.n_ubatch = context
        if not chats:
            params.chat_template = "chatml"
        params.n_gpu_layers = 0  # rows say that the processor computes
        params.fit_params = params.warmup = False
        params.cache_ram_mib = 0
        params.verbosity = 0 if quiet else 1  # 1: errors
        self.key = secrets.token_hex()
        params.hostnames, params.port, params.api_keys = [_HOST], 0, [self.key]
        params.cors_origins = "localhost"  # its default lets any page in the user's browser read conversations
        if name is not None:
            params.model_alias = {name}
        try:
            self._server = library.Server(params)
        except Exception as error:  # the binding has no types of its own
            template = ", or with another chat template where it has one that raises" if chats else ""
            raise InputError(f"llama.cpp does not load {path} ({error}); write it anew{template}") from error
        self.complete([1], 1)  # a server that is let go of before its first request hangs

    @property
    def url(self) -> str:
        """Return the URL of its OpenAI HTTP API, which wants :attr:`key`."""
        return f"{self._server.listening_address}/v1"

    @property
    def context(self) -> int:
        """Count the tokens that each sequence has room for."""
        with self._request("GET", "/models") as response:
            return int(json.load(response)["data"][0]["meta"]["n_ctx"])

    def chat(self, messages: Sequence[Mapping[str, str]], options: ChatOptions) -> Generator[AnswerPart, None, None]:
        """Answer a conversation in the chat template of the file.

        An iterator that is closed before its end, or left by an exception, stops the answer.

        Args:
            messages: `role` and `content` of each turn.
            options: the answer's longest length, and the choice of its tokens.

        Raises:
            InputError: the conversation does not fit the context, or the template does not take it.
        """
        body = {
            "messages": list(messages),
            "stream": True,
            "timings_per_token": True,
            "reasoning_format": "none",  # reasoning stays in the text
        }
        with self._request("POST", "/chat/completions", {**body, **asdict(options)}) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    yield _answer_part(json.loads(line.removeprefix(b"data: ")))

    @contextlib.contextmanager
    def _request(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        """Return the response to an HTTP request; closing the connection stops an answer at once (callbacks cannot)."""
        connection = http.client.HTTPConnection(self._server.listening_address.removeprefix("http://"))
        try:
            text = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
            connection.request(method, f"/v1{path}", text, headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise InputError(_refusal(json.load(response)["error"]))
            yield response
        finally:
            connection.close()

    def complete(self, prompt: Sequence[int], tokens: int, **options: Any) -> dict[str, Any]:
        """Return the greedy completion of token ids, as the HTTP API answers."""
        body = {"prompt": list(prompt), "max_tokens": tokens, "ignore_eos": True, "samplers": ["top_k"], "top_k": 1}
        answer: dict[str, Any] = self._server.handle_completions({**body, **options})
        if "error" in answer:
            raise InputError(f"llama.cpp answers with an error: {answer['error']}")
        return answer

    def _together(self, prompts: Sequence[Sequence[int]], tokens: int, *, keep: bool) -> list[dict[str, Any]]:
        """Complete all prompts at the same time, each in its own slot; with `keep` a slot continues what it holds."""

        def ask(slot: int) -> dict[str, Any]:
            return self.complete(prompts[slot], tokens, id_slot=slot, cache_prompt=keep)

        with ThreadPoolExecutor(len(prompts)) as users:
            return list(users.map(ask, range(len(prompts))))

    def prefill_ms(self, prompts: Sequence[Sequence[int]]) -> float:
        """Measure the milliseconds until all prompts are read, without a cache."""
        start = time.perf_counter()
        self._together(prompts, 1, keep=False)
        return (time.perf_counter() - start) * 1e3

    def fill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read prompts into the slots, for :meth:`decode_ms` to go on from."""
        self._together(prompts, 1, keep=True)

    def decode_ms(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Measure the milliseconds of one decode step: the median over sequences of each one's mean over `steps`."""
        answers = self._together(prompts, steps + 1, keep=True)  # the first token comes with the prompt's last
        return statistics.median(float(answer["timings"]["predicted_per_token_ms"]) for answer in answers)


def _answer_part(event: dict[str, Any]) -> AnswerPart:
    if "error" in event:
        raise InputError(f"llama.cpp answers with an error: {event['error']}")
    (choice,), timings = event["choices"], event.get("timings", {})
    tokens = timings.get("predicted_n", 0)
    return AnswerPart(
        choice["delta"].get("content") or "",
        tokens,
        timings["predicted_per_second"] if tokens > 1 else 0.0,  # the first comes with the prompt
        timings.get("cache_n", 0) + timings.get("prompt_n", 0),
        choice["finish_reason"],
    )


def _refusal(error: dict[str, Any]) -> str:
    if error.get("type") == "exceed_context_size_error":
        return f"the conversation is {error['n_prompt_tokens']} tokens long, more than the context of {error['n_ctx']}"
    return f"llama.cpp does not take the conversation: {error['message']}"


def _decode_steps(workload: Workload) -> int:
    """Decode steps of one timing, around the mean context: fewer of a large batch, which are long enough."""
    return min(_STEPS, max(4, 128 // workload.batch), workload.context_at_midpoint)


def _needed_context(workload: Workload) -> int:
    """Count the tokens of a sequence that must have room."""
    return max(workload.input_tokens, workload.context_at_midpoint) + _MARGIN


def _prompts(batch: int, tokens: int) -> list[list[int]]:
    """Return token ids that differ between sequences; their values play no part."""
    return [[(1 + sequence + 31 * position) % 97 + 1 for position in range(tokens)] for sequence in range(batch)]


def check_room(workloads: Mapping[str, Workload], context: int) -> None:
    """Raise InputError where a workload, given under the name that people know, is too long for a model's context."""
    for name, workload in workloads.items():
        needed = _needed_context(workload)
        if needed > context:
            raise InputError(
                f"{name}: timing it in llama.cpp needs {needed} tokens of context; the parent has {context}"
            )


def time_files(files: Mapping[str, Path], workload: Workload, repeats: int, threads: int) -> dict[str, Rounds]:
    """Time models in turn, `repeats` rounds after one that does not count.

    Raises:
        InputError: llama.cpp refuses a file, as for :class:`LlamaCpp`.
    """
    context, steps = _needed_context(workload), _decode_steps(workload)
    engines = {name: LlamaCpp(path, threads, workload.batch, context, chats=False) for name, path in files.items()}
    prompts = _prompts(workload.batch, workload.input_tokens)
    contexts = _prompts(workload.batch, max(1, workload.context_at_midpoint - steps // 2))
    rounds: dict[str, Rounds] = {name: {"prefill": [], "decode": []} for name in files}
    for number in range(repeats + 1):
        for name, engine in engines.items():
            prefill = engine.prefill_ms(prompts)
            rounds[name]["prefill"] += [prefill] if number else []
    for engine in engines.values():
        engine.fill(contexts)
    for number in range(repeats + 1):
        for name, engine in engines.items():
            decode = engine.decode_ms(contexts, steps)
            rounds[name]["decode"] += [decode] if number else []
    return rounds
