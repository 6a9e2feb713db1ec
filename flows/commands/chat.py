"""Talk with a child in the terminal; `make chat` is the same for the demo's children.

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
from typing import TextIO

from flows.arguments import count, not_negative
from storage.files import InputError
from storage.formats import LLAMACPP_FORMAT
from storage.params import load
from storage.paths import Paths
from tasks.checkpoints.gguf_files import CONTEXT, PARENT, gguf_of, loaded, parent_beside, precision_note
from tasks.engines.llamacpp import AnswerPart, ChatOptions, LlamaCpp

EXAMPLE = "puzzle chat --target like-51b --compare"
_MAX_TOKENS = 512
_UNSHOWN = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control characters, which a model might make, and which would drive the terminal."""


@dataclass
class Speaker:
    """A model and its own conversation: the questions and its own answers, not another model's."""

    name: str
    engine: LlamaCpp
    history: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Screen:
    """The streams for answers and for notes, and whether input is a terminal."""

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


def converse(speakers: list[Speaker], lines: Iterable[str], options: ChatOptions, screen: Screen) -> None:
    """Let every speaker answer every line, until they end or one is /exit.

    Raises:
        InputError: the input is a pipe and a conversation does not fit the context; on a terminal the message is shown
            instead.
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


def _ask(speaker: Speaker, question: str, options: ChatOptions, screen: Screen) -> None:
    """Stream an answer; the question, and as much of the answer as came, join the history."""
    messages = [*speaker.history, {"role": "user", "content": question}]
    parts: list[AnswerPart] = []
    is_stopped = False
    try:
        with contextlib.closing(speaker.engine.chat(messages, options)) as coming:
            for part in coming:
                parts.append(part)
                screen.say(part.text)
    except KeyboardInterrupt:
        is_stopped = True
    except InputError as error:
        if not screen.is_interactive:
            raise
        screen.note(f"{speaker.name}: {error}; /clear forgets it, a larger --context holds more")
        return
    answer = "".join(part.text for part in parts)
    if not answer.endswith("\n"):
        screen.say("\n")
    if answer:
        speaker.history = [*messages, {"role": "assistant", "content": answer}]
    screen.note(_note(speaker.name, parts, is_stopped, options.max_tokens))


def _note(name: str, parts: list[AnswerPart], is_stopped: bool, max_tokens: int) -> str:
    """Return a line on an answer: tokens and tokens/s as llama.cpp measured them, why it ended if not by the model."""
    if not parts:
        return f"{name}: stopped"
    last = parts[-1]
    speed = f", {last.tokens_per_s:.1f} tokens/s" if last.tokens_per_s else ""
    cut = f", cut at {max_tokens} (--max-tokens)" if last.tokens >= max_tokens else ", the context is full (/clear)"
    end = ", stopped" if is_stopped else cut if last.finish == "length" else ""
    return f"{name}: {last.tokens} tokens{speed}{end}"


def _typed() -> Iterator[str]:
    """Yield lines as a person types them, history on the arrow keys; Ctrl-C begins the line anew, Ctrl-D ends."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--target", required=True, help=f"key of the target in params.yaml, or {PARENT}")
    parser.add_argument(
        "--format", default=LLAMACPP_FORMAT, help=f"format of the exported file (default {LLAMACPP_FORMAT})"
    )
    parser.add_argument("--compare", action="store_true", help="the parent answers every question as well")
    parser.add_argument("--threads", type=count, help="threads of llama.cpp (default: measure_costs.threads)")
    parser.add_argument(
        "--context", type=count, help=f"tokens of a conversation (default {CONTEXT}, or what the model was made for)"
    )
    parser.add_argument(
        "--max-tokens", type=count, default=_MAX_TOKENS, help=f"an answer is cut there (default {_MAX_TOKENS})"
    )
    parser.add_argument(
        "--temperature",
        type=not_negative,
        default=0.0,
        help="0 (default) is greedy: a question gets the same answer each time, and two models differ by their weights "
        "alone; small models repeat themselves less at 0.2, which SmolLM2's authors use. Drawn with run.seed",
    )


def run(args: argparse.Namespace) -> None:
    """Load the models, talk until the lines end."""
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
    options = ChatOptions(args.max_tokens, args.temperature, params.run.seed)
    screen = Screen(sys.stdout, sys.stderr, sys.stdin.isatty())
    if screen.is_interactive:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        models = " and ".join(f"{file.name} ({file.format})" for file in files)
        context = min(speaker.engine.context for speaker in speakers)
        screen.note(f"{models}, {context} tokens of context; Ctrl-C stops an answer, /clear forgets, Ctrl-D ends")
    converse(speakers, _typed() if screen.is_interactive else sys.stdin, options, screen)
