"""What a worker process of Ray does on its node before its first piece: it goes to the clone's folder, or says why not.

Nodes share the clone by storage that all of them mount at the same path (NFS, say); nothing is uploaded.
"""

import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from flows import LOCAL_NAMES
from storage.files import InputError, digest_of, sha256
from storage.sources import PACKAGES

_ENTERED = "PUZZLE_ENTERED"
_REACH_SECONDS = 20.0
_LIBRARIES = ("torch", "transformers", "safetensors", "prefect")
"""Libraries whose versions go into results, or into what is sent."""


@dataclass(frozen=True)
class Home:
    """The state of the stage's machine, which every worker has to find on its node, too.

    Attributes:
        folder: the clone's folder, absolute.
        mark: a file in it that this run of the stage has just made, so that no other folder passes for it.
        code: what computes: :func:`code_here`.
        api: address of the Prefect server, to which workers tell the course of their tasks.
        host: name of the stage's machine.
    """

    folder: Path
    mark: str
    code: dict[str, str]
    api: str
    host: str


def code_here() -> dict[str, str]:
    """Return what computes in this process: a digest of the project's sources, versions of Python and libraries."""
    root = Path(__file__).parents[1]
    sources = [
        (path.relative_to(root).as_posix(), sha256(path))
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    ]
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    return {"the code": digest_of(sources)[:12], "Python": sys.version.split()[0], **versions}


def enter(home: Home) -> None:
    """Make this process a worker of the clone; at once where it is one already.

    Raises:
        InputError: this node does not see the clone, computes with other code, or does not reach the Prefect server.
    """
    entered = f"{home.folder}/{home.mark}"
    if os.environ.get(_ENTERED) == entered:
        return
    node = socket.gethostname()
    if problem := next(problems(home, node, code_here()), None):
        raise InputError(f"the Ray node {node} {problem}")
    os.chdir(home.folder)
    os.environ[_ENTERED] = entered


def problems(home: Home, node: str, code: dict[str, str]) -> Iterator[str]:
    """Yield what keeps the node of this name and code from computing pieces: what it lacks, and the way out."""
    if not (home.folder / home.mark).is_file():
        yield f"does not see {home.folder} as {home.host} does; put the clone on storage that all nodes mount there"
    if differing := [name for name, value in home.code.items() if code.get(name) != value]:
        versions = ", ".join(f"{name} {code.get(name, 'none')} for {home.code[name]}" for name in differing)
        yield f"computes with other code than {home.host}: {versions}; start Ray there from this clone and environment"
    if not _reaches(home, node):
        yield (
            f"does not reach the Prefect server at {home.api}; start one that all nodes reach (`prefect server start "
            "--host ADDRESS`), and give its address in PREFECT_API_URL"
        )


def _reaches(home: Home, node: str) -> bool:
    """Tell whether the Prefect server answers this process, in whatever way."""
    local = urllib.request.Request(home.api).host.partition(":")[0] in LOCAL_NAMES
    if local and node != home.host:  # something else may listen there
        return False
    try:
        urllib.request.urlopen(f"{home.api}/health", timeout=_REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
