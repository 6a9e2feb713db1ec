"""A process of its own that loads a tokenizer.json and encodes a text within limits. Run by storage/tokenizer_files.py.

The library's Rust code may hang, take all memory or abort on a file that others wrote: that ends this process alone.
"""

import contextlib
import resource
import sys

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


def main(path: str, cpu_seconds: int, memory_bytes: int) -> None:
    """Load the tokenizer and encode the sample; an error of the library is the last line of the traceback."""
    for kind, limit in ((resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_AS, memory_bytes)):
        with contextlib.suppress(ValueError, OSError):  # macOS has no such limit on memory
            resource.setrlimit(kind, (limit, limit))
    tokenizer = Tokenizer.from_file(path)
    with contextlib.suppress(Exception):  # it need not know every letter; a panic is no Exception
        tokenizer.encode(_SAMPLE)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
