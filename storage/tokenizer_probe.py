"""A process of its own that tries a tokenizer.json, or chat templates, within limits.

Run by storage/tokenizer_files.py. The library's Rust code, or a template's loops, may hang, take all memory or abort on
what others wrote: that ends this process alone.
"""

import contextlib
import json
import resource
import sys
from collections.abc import Sequence
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

CPU_SECONDS = 8
MEMORY_BYTES = 1 << 30
_RUN = 64
_SAMPLE = (
    "The quick brown fox, isn't it? It's 3.14159 or 1,234,567!\n\n\tdef f(x): return x**2  # αβγ абв 日本語 🙂\r\n"
    + " ".join(letter * _RUN for letter in "a1 -é日_/\n")
    + "ab" * _RUN
)
"""Words as people write them, and runs on which the regular expressions that backtrack take forever."""
_CHAT = [{"role": role, "content": f"Words of the {role}."} for role in ("system", "user", "assistant", "user")]
_CHATS = (_CHAT[1:2], _CHAT[:2], _CHAT[1:3], _CHAT)
_MAX_RENDERED = 1 << 20
_MARKS = {name: f"<{name}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
_TAGS = {"generation"}


class _Generation(Extension):
    """The tag of transformers around what a model writes: what stands in it."""

    tags: set[str] = _TAGS

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Read up to the tag's end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    for kind, limit in ((resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_AS, memory_bytes)):
        with contextlib.suppress(ValueError, OSError):  # macOS has no such limit on memory
            resource.setrlimit(kind, (limit, limit))


def try_tokenizer(path: str) -> None:
    """Load the tokenizer and encode the sample; an error of the library is the last line of the traceback."""
    tokenizer = Tokenizer.from_file(path)
    with contextlib.suppress(Exception):  # it need not know every letter; a panic is no Exception
        tokenizer.encode(_SAMPLE)


def try_templates(templates: Sequence[str]) -> None:
    """Render short chats as transformers does; what a template raises does not matter here."""
    extensions = [_Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    functions: dict[str, Any] = {"raise_exception": _refuse, "strftime_now": str}
    for template in templates:
        for chat in _CHATS:
            try:
                compiled = environment.from_string(template)
                text = compiled.render(messages=chat, tools=None, add_generation_prompt=True, **functions, **_MARKS)
                if len(text) > _MAX_RENDERED:
                    raise MemoryError
            except Exception as error:  # a template may raise anything
                if isinstance(error, MemoryError):
                    raise


def _refuse(message: str) -> None:
    raise ValueError(message)


if __name__ == "__main__":
    _limit(int(sys.argv[1]), int(sys.argv[2]))
    if sys.argv[3:]:
        try_tokenizer(sys.argv[3])
    else:
        try_templates(json.load(sys.stdin))
