"""Conversations with tiny models in the real llama.cpp: what it streams is what it completes, token for token."""

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType

from flows import cli
from flows.commands.chat import Screen, Speaker, converse
from storage.files import sha256, write_sealed
from storage.gguf_child import Array, write_gguf
from storage.model_config import EMBEDDING, ModelConfig
from storage.paths import EXPORTS_OVERVIEW, Paths
from storage.variants import Attention, Ffn
from tasks.engines.llamacpp import ChatOptions, LlamaCpp
from tests.settings import tiny_values

ROOT = Path(__file__).parents[3]
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 32_768
CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "vocab_size": 256 + len(CONTROLS),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
    },
    "the test",
)
PARENT_BLOCKS = [(Attention("gqa", 1), Ffn("gated", 32))] * 2
CHILD_BLOCKS = [(Attention("gqa", 1), Ffn("gated", 32)), (Attention("no_op"), Ffn("gated", 16))]
TOKENS = 24
OPTIONS = ChatOptions(TOKENS)
Messages = Sequence[tuple[str, str]]


def add_byte_tokenizer(writer: GGUFWriter) -> None:
    """Add a token for each byte, as GPT-2 spells them, then the control tokens."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    spelt = {byte: chr(byte) for byte in plain} | {byte: chr(256 + number) for number, byte in enumerate(others)}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*(spelt[byte] for byte in range(256)), *CONTROLS])
    writer.add_token_types([TokenType.NORMAL] * 256 + [TokenType.CONTROL] * len(CONTROLS))
    writer.add_token_merges([f"{spelt[0]} {spelt[1]}"])  # llama.cpp wants one
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256 + CONTROLS.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _write(path: Path, blocks: Sequence[tuple[Attention, Ffn]], seed: int) -> None:
    """Write random weights. Only printable ASCII has an embedding, so nothing else is ever the likeliest."""
    rng = np.random.default_rng(seed)
    shapes = {
        "q_proj": (32, 32),
        "k_proj": (16, 32),
        "v_proj": (16, 32),
        "o_proj": (32, 32),
        "gate_proj": (0, 32),
        "up_proj": (0, 32),
        "down_proj": (32, 0),
    }

    def tensor(name: str) -> Iterator[Array]:
        values: Array
        if name == EMBEDDING:
            values = np.zeros((CONFIG.vocab_size, 32), np.float32)
            values[ord(" ") : ord("~") + 1] = rng.normal(0.0, 1.0, (95, 32))
        elif "norm" in name:
            values = np.ones(32, np.float32)
        else:
            width = blocks[int(name.split(".")[2])][1].intermediate_size
            rows, columns = (size or width for size in shapes[name.split(".")[-2]])
            values = rng.normal(0.0, 0.3, (rows, columns)).astype(np.float32)
        yield values

    write_gguf(path, CONFIG, blocks, tensor, "F32", tokenizer=add_byte_tokenizer)
    files = {f"{path.parent.name}/{path.name}": {"bytes": path.stat().st_size, "sha256": sha256(path)}}
    write_sealed(path.parents[1] / EXPORTS_OVERVIEW, {"formats": {path.parent.name: {"files": files}}})


def write_run(folder: Path) -> None:
    """Write a folder as a run leaves it: params.yaml, and the exports of the parent and of the target `small`."""
    paths = Paths(folder / "artifacts")
    _write(paths.exports("small") / "gguf-f32/small-F32.gguf", CHILD_BLOCKS, 0)
    _write(paths.parent_exports / "gguf-f16/parent-F16.gguf", PARENT_BLOCKS, 1)
    (folder / "params.yaml").write_text(json.dumps(tiny_values(measure_costs={"threads": 1})))  # JSON is YAML


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def engines(run: Path) -> dict[str, LlamaCpp]:
    """Return child and parent, loaded."""
    files = {
        "small": "children/small/exports/gguf-f32/small-F32.gguf",
        "parent": "parent_exports/gguf-f16/parent-F16.gguf",
    }
    return {name: LlamaCpp(run / "artifacts" / file, 1, 1, 1024) for name, file in files.items()}


def prompt_of(messages: Messages) -> list[int]:
    """Return token ids of a conversation up to where an answer begins."""
    start, end = (256 + CONTROLS.index(name) for name in ("<|im_start|>", "<|im_end|>"))
    tokens: list[int] = []
    for role, content in messages:
        tokens += [start, *f"{role}\n{content}".encode(), end, *b"\n"]
    return [*tokens, start, *b"assistant\n"]


def completed(engine: LlamaCpp, messages: Messages, tokens: int = TOKENS) -> str:
    """Return the greedy answer, without the chat endpoint: from token ids, in one piece."""
    return str(engine.complete(prompt_of(messages), tokens)["choices"][0]["text"])


def talk(engines: dict[str, LlamaCpp], *lines: str) -> tuple[str, str]:
    """Return answers and notes of a conversation."""
    out, notes = io.StringIO(), io.StringIO()
    screen = Screen(out, notes, is_interactive=False)
    converse([Speaker(name, engine) for name, engine in engines.items()], lines, OPTIONS, screen)
    return out.getvalue(), notes.getvalue()


def test_an_answer_streams_and_is_the_greedy_one(engines: dict[str, LlamaCpp]) -> None:
    """In the template of the file, whose tokens are counted."""
    question = [("user", "What is gravity?")]
    for engine in engines.values():
        pieces = list(engine.chat([{"role": "user", "content": "What is gravity?"}], OPTIONS))
        assert sum(bool(piece.text) for piece in pieces) == TOKENS
        assert "".join(piece.text for piece in pieces) == completed(engine, question)
        last = pieces[-1]
        assert (last.tokens, last.prompt_tokens, last.finish) == (TOKENS, len(prompt_of(question)), "length")
        assert last.tokens_per_s > 0


def test_history_is_kept_until_it_is_cleared(engines: dict[str, LlamaCpp]) -> None:
    engine = engines["small"]
    first = completed(engine, [("user", "one")])
    second = completed(engine, [("user", "one"), ("assistant", first), ("user", "two")])
    alone = completed(engine, [("user", "two")])
    assert second != alone
    out, notes = talk({"small": engine}, "one\n", "\n", "two\n", "/clear\n", "two\n", "/exit\n", "three\n")
    assert out == f"{first}\n{second}\n{alone}\n"
    assert notes.count(f"small: {TOKENS} tokens, ") == notes.count(f"tokens/s, cut at {TOKENS} (--max-tokens)\n") == 3


def test_each_of_two_answers_from_its_own_history(engines: dict[str, LlamaCpp]) -> None:
    out, notes = talk(engines, "one", "two")
    expected = ""
    histories: dict[str, list[tuple[str, str]]] = {name: [] for name in engines}
    for question in ("one", "two"):
        for name, engine in engines.items():
            messages = [*histories[name], ("user", question)]
            answer = completed(engine, messages)
            histories[name] = [*messages, ("assistant", answer)]
            expected += f"{name}:\n{answer}\n"
    assert out == expected
    assert histories["small"] != histories["parent"]
    assert [line.split(":")[0] for line in notes.splitlines()] == ["small", "parent"] * 2


class _Interrupted(io.StringIO):
    """A screen at which Ctrl-C is pressed once, with a few characters on it."""

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.tell() == 5:
            signal.raise_signal(signal.SIGINT)
        return written


@pytest.mark.usefixtures("in_run")
def test_ctrl_c_stops_an_answer_and_what_came_of_it_is_history(engines: dict[str, LlamaCpp]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = engines["small"]
    part = completed(engine, [("user", "one")])[:5]
    second = completed(engine, [("user", "one"), ("assistant", part), ("user", "two")])
    out, notes = _Interrupted(), io.StringIO()
    converse([Speaker("small", engine)], ["one", "two"], OPTIONS, Screen(out, notes, is_interactive=True))
    assert out.getvalue() == f"{part}\n{second}\n"
    assert "stopped" in notes.getvalue().splitlines()[0]


def test_a_conversation_beyond_the_context_is_told_and_not_kept(engines: dict[str, LlamaCpp]) -> None:
    speaker = Speaker("small", engines["small"])
    notes = io.StringIO()
    screen = Screen(io.StringIO(), notes, is_interactive=True)
    converse([speaker], ["one", "x" * 2000], OPTIONS, screen)
    note = notes.getvalue().splitlines()[1]
    tokens = len(prompt_of([("user", "one"), ("assistant", "a" * TOKENS), ("user", "x" * 2000)]))
    assert note.startswith(f"small: the conversation is {tokens} tokens long, more than the context of 1024; /clear")
    assert [message["role"] for message in speaker.history] == ["user", "assistant"]
    speaker.history.clear()
    converse([speaker], ["x" * 980], ChatOptions(max_tokens=100), screen)
    assert notes.getvalue().endswith("the context is full (/clear)\n")


def test_what_would_drive_the_terminal_is_not_shown() -> None:
    out = io.StringIO()
    Screen(out, io.StringIO(), is_interactive=True).say("a\x1b[2Jb\tc\nd\x07\x9b")
    assert out.getvalue() == "a[2Jb\tc\nd"


# --- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    """Return the command line."""
    return [sys.executable, "-m", "flows.cli", "chat", *arguments]


def test_a_pipe_gets_answers_alone(run: Path, engines: dict[str, LlamaCpp]) -> None:
    ended = subprocess.run(
        command("--target", "small", "--format", "gguf-f32", "--compare", "--max-tokens", str(TOKENS)),
        input="one\n/clear\ntwo",
        cwd=run,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    answers = ""
    for question in ("one", "two"):
        for name, engine in engines.items():
            answers += f"{name}:\n{completed(engine, [('user', question)])}\n"
    assert ended.stdout == answers
    note, *speeds = ended.stderr.splitlines()
    assert note == "small as gguf-f32 beside parent as gguf-f16: not the same precision" and len(speeds) == 4
    assert "\x1b" not in ended.stderr


# The terminal that Ctrl-C comes from: what goes into the pipe is typed, what comes out of it was shown.
ON_A_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


class _Terminal:
    """The command as a person sees it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._unread = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, *command(*arguments)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def type(self, keys: bytes) -> None:
        """Press keys."""
        assert self.process.stdin is not None
        self.process.stdin.write(keys)

    def until(self, text: bytes) -> bytes:
        """Return what is shown up to a text, from where the last call ended."""
        assert self.process.stdout is not None
        end = time.monotonic() + 60
        while text not in self._unread and time.monotonic() < end:
            if select.select([self.process.stdout], [], [], 0.1)[0]:
                self._unread += os.read(self.process.stdout.fileno(), 4096)
        assert text in self._unread, self._unread
        shown, _, self._unread = self._unread.partition(text)
        return shown


def test_a_person_at_a_terminal(run: Path) -> None:
    """Ctrl-C stops a long answer and begins a line anew; Ctrl-D ends, with 0."""
    long = ("--context", str(CONTEXT), "--max-tokens", str(CONTEXT))
    terminal = _Terminal(run, "--target", "small", "--format", "gguf-f32", *long)
    with contextlib.closing(terminal.process.stdout or io.BytesIO()):
        try:
            assert f"small (gguf-f32), {CONTEXT} tokens of context".encode() in terminal.until(b"\r\n> ")
            terminal.type(b"one\n")
            assert terminal.until(b"\n") == b"one\r"  # the terminal's echo
            time.sleep(0.2)  # some of the answer
            terminal.type(b"\x03")
            *_, note = terminal.until(b"stopped\x1b[0m\r\n> ").splitlines()
            assert note.startswith(b"\x1b[2msmall: ")
            terminal.type(b"half a quest")
            terminal.until(b"quest")
            time.sleep(0.2)  # readline forgets a signal between its echo and its waiting until the next key
            terminal.type(b"\x03")
            terminal.until(b"\r\n> ")
            terminal.type(b"\x04")
            assert terminal.process.wait(30) == 0
        finally:
            terminal.process.kill()
            terminal.process.wait()


@pytest.fixture
def in_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a command run in this process, in the folder of a run, with Ctrl-C as it was afterwards."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 300))
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_run")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--target smal", "unknown target 'smal', did you mean small?; known: small"),
        (
            "--target small",
            "small has no 'gguf-f16' in artifacts/children/small/exports (has: gguf-f32); take one of these, or add it "
            "to export_child.formats in params.yaml and run `dvc repro export_child@small`",
        ),
        ("--target parent --format gguf-q8_0", "run `dvc repro export_parent`"),
        ("--target parent --compare", "--compare sets a child beside the parent"),
        (f"--target parent --context {2 * CONTEXT}", f"parent was made for {CONTEXT} tokens of context"),
        ("--target parent --context 256", "the conversation is 319 tokens long, more than the context of 256"),
    ],
)
def test_an_error_is_one_line(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["chat", *arguments.split()])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err


@pytest.mark.usefixtures("in_run")
def test_an_error_of_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(SystemExit):
        cli.main(["chat", "--target", "parent"])
    assert capsys.readouterr().err.startswith("error: llama.cpp is not installed; run `")
    (tmp_path / "params.yaml").write_text(Path("params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    for target, stage in {"small": "export_child@small", "parent": "export_parent"}.items():
        with pytest.raises(SystemExit):
            cli.main(["chat", "--target", target])
        assert capsys.readouterr().err.endswith(f"run `dvc repro {stage}`\n")
