"""Talk with a child in the terminal: `python -m flows.chat --target like-51b`, behind `make chat TARGET=like-51b`.

Ctrl-C stops an answer, /clear forgets the conversation, /exit or Ctrl-D ends it. The lines of a pipe are questions as
well: then stdout holds the answers alone (with --compare the model's name above each), and stderr their speeds.
"""

import argparse
import contextlib
import importlib
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from flows.stage import run_cleanly
from storage.files import InputError
from storage.params import load
from storage.paths import Paths
from tasks.engines.llamacpp import LlamaCpp, Piece
from tasks.gguf_files import CONTEXT, FORMAT, PARENT, gguf_of, loaded, parent_beside, precision_note

_MAX_TOKENS = 512
_UNSHOWN = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control characters, which a model might make, and which would drive the terminal."""


@dataclass
class Speaker:
    """A model, and the conversation as it knows it: its own answers, not another's."""

    name: str
    engine: LlamaCpp
    history: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Screen:
    """Where answers go, where notes go, and whether a person sits there."""

    out: TextIO
    notes: TextIO
    is_interactive: bool

    def say(self, text: str) -> None:
        """Show text of a model at once."""
        self.out.write(text.translate(_UNSHOWN))
        self.out.flush()

    def note(self, text: str) -> None:
        """Show a line about an answer, dim on a terminal."""
        self.notes.write(f"\x1b[2m{text}\x1b[0m\n" if self.notes.isatty() else f"{text}\n")
        self.notes.flush()


def converse(speakers: list[Speaker], lines: Iterable[str], options: dict[str, Any], screen: Screen) -> None:
    """Let every speaker answer every line, until they end or one is /exit.

    Raises:
        InputError: nobody sits there, and a conversation does not fit the context; a person is told, and goes on.
    """
    for line in lines:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/clear":
                for speaker in speakers:
                    speaker.history.clear()
            case question:
                for speaker in speakers:
                    if len(speakers) > 1:
                        screen.say(f"{speaker.name}:\n")
                    _ask(speaker, question, options, screen)


def _ask(speaker: Speaker, question: str, options: dict[str, Any], screen: Screen) -> None:
    """Stream an answer; the question and what came of the answer join the history."""
    asked = [*speaker.history, {"role": "user", "content": question}]
    pieces: list[Piece] = []
    is_stopped = False
    try:
        with contextlib.closing(speaker.engine.chat(asked, **options)) as coming:
            for piece in coming:
                pieces.append(piece)
                screen.say(piece.text)
    except KeyboardInterrupt:
        is_stopped = True
    except InputError as error:
        if not screen.is_interactive:
            raise
        screen.note(f"{speaker.name}: {error}; /clear forgets it, a larger --context holds more")
        return
    answer = "".join(piece.text for piece in pieces)
    if not answer.endswith("\n"):
        screen.say("\n")
    if answer:
        speaker.history = [*asked, {"role": "assistant", "content": answer}]
    screen.note(_note(speaker.name, pieces, is_stopped, options["max_tokens"]))


def _note(name: str, pieces: list[Piece], is_stopped: bool, max_tokens: int) -> str:
    """One line on an answer: tokens and tokens/s as llama.cpp measured them, and why it ended if the model did not."""
    if not pieces:
        return f"{name}: stopped"
    last = pieces[-1]
    speed = f", {last.tokens_per_s:.1f} tokens/s" if last.tokens_per_s else ""
    cut = f", cut at {max_tokens} (--max-tokens)" if last.tokens >= max_tokens else ", the context is full (/clear)"
    end = ", stopped" if is_stopped else cut if last.finish == "length" else ""
    return f"{name}: {last.tokens} tokens{speed}{end}"


def _typed() -> Iterator[str]:
    """Lines as a person types them, with a history on the arrow keys; Ctrl-C begins the line anew, Ctrl-D ends."""
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("readline")  # input() uses it once it is there
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except EOFError:
            sys.stdout.write("\n")
            return


def _count(value: str) -> int:
    if not value.isdecimal() or not int(value):
        raise argparse.ArgumentTypeError(f"{value!r}: expected a number of at least 1")
    return int(value)


def _temperature(value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"{value!r}: expected a number from 0")
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m flows.chat", description=__doc__)
    parser.add_argument("--target", required=True, help=f"key of the target in params.yaml, or {PARENT}")
    parser.add_argument("--format", default=FORMAT, help=f"of the exported file (default {FORMAT})")
    parser.add_argument("--compare", action="store_true", help="the parent answers every question as well")
    parser.add_argument("--threads", type=_count, help="of llama.cpp (default: measure_costs.threads)")
    parser.add_argument(
        "--context", type=_count, help=f"tokens of a conversation (default {CONTEXT}, or what the model was made for)"
    )
    parser.add_argument(
        "--max-tokens", type=_count, default=_MAX_TOKENS, help=f"an answer is cut there (default {_MAX_TOKENS})"
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        help="0 (default) is greedy: a question gets the same answer each time, and two models differ by their weights "
        "alone; small models repeat themselves less at 0.2, which SmolLM2's authors use. Drawn with run.seed",
    )
    return parser.parse_args()


def main() -> None:
    """Read the arguments, load, talk."""
    args = _parse()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the loading, and a pipe's conversation, without a traceback
    params, paths = load(), Paths()
    if args.compare and args.target == PARENT:
        raise InputError("--compare sets a child beside the parent; name a target of params.yaml, or leave it out")
    if args.target != PARENT:
        params.target(args.target)
    files = [gguf_of(args.target, args.format, paths)]
    if args.compare:
        files.append(parent_beside(files[0], paths))
    threads = args.threads or params.measure_costs.threads
    speakers = [Speaker(file.name, loaded(file, threads, 1, args.context)) for file in files]
    sys.stderr.write(precision_note(files))
    options = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": params.run.seed}
    screen = Screen(sys.stdout, sys.stderr, sys.stdin.isatty())
    if screen.is_interactive:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        models = " and ".join(f"{file.name} ({file.format})" for file in files)
        context = min(speaker.engine.context for speaker in speakers)
        screen.note(f"{models}, {context} tokens of context; Ctrl-C stops an answer, /clear forgets, Ctrl-D ends")
    converse(speakers, _typed() if screen.is_interactive else sys.stdin, options, screen)


if __name__ == "__main__":
    run_cleanly(main)
