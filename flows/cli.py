"""The console command `puzzle`: the name of a command and its arguments in, an exit code out (flows/errors.py).

Only the module of the chosen command is imported, so that `--help` and what needs no torch start quickly.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from flows.errors import run_cleanly
from storage.files import did_you_mean

COMMANDS = {
    "plan": "what every stage will take on this machine: time, memory, disk",
    "stage": "run a stage of the pipeline, as DVC does",
    "explain": "why a block of a child is what it is",
    "frontier": "quality against a metric of a target, many children",
    "search": "search a child from tables or a block library of your own",
    "estimate": "modelled tokens/s of any checkpoint on a GPU",
    "time-machine": "time this machine, for limits on measured speed",
    "chat": "talk with a child in the terminal",
    "serve-child": "a child and its parent behind OpenAI HTTP APIs",
    "benchmark-server": "speed of running servers under load",
    "check-runtimes": "which runtime computes a checkpoint right",
    "export": "a checkpoint in the forms that stock runtimes load",
}
"""Command -> what it does. The module is flows/commands/<command>.py, with _ for -."""


class Command(Protocol):
    """The names that a module of flows/commands holds."""

    __doc__: str | None
    EXAMPLE: str
    """A command line that works with the demo's artifacts, or with placeholders in capitals."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def run(self, args: argparse.Namespace) -> None:
        """Do the work.

        Raises:
            InputError: it cannot be done; the message says why.
        """


def load_command(name: str) -> Command:
    """Import the module of a command."""
    return cast(Command, importlib.import_module(f"flows.commands.{name.replace('-', '_')}"))


def parser_of(name: str) -> argparse.ArgumentParser:
    """Return the argument parser of a command, with its example below its arguments."""
    command = load_command(name)
    parser = argparse.ArgumentParser(
        prog=f"puzzle {name}",
        description=command.__doc__,
        epilog=f"example:\n  {command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    return parser


def overview() -> str:
    """Return every command with a phrase."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {phrase}" for name, phrase in COMMANDS.items()]
    ending = "`puzzle COMMAND --help` says what it takes and shows an example"
    return "\n".join(["usage: puzzle COMMAND [ARGUMENTS]", "", *lines, "", ending, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; `arguments` are those of the process unless given."""
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if name in ("-h", "--help"):
        sys.stdout.write(overview())
        return
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        sys.stderr.write(f"error: puzzle has no command {name!r}{hint} (has: {', '.join(COMMANDS)})\n")
        sys.exit(2)
    args = parser_of(name).parse_args(rest)
    run_cleanly(lambda: load_command(name).run(args))


if __name__ == "__main__":
    main()
