"""Serve a child and its parent behind OpenAI HTTP APIs; `make serve-child` is the same for the demo's children.

llama.cpp computes, behind servers that listen on 127.0.0.1 alone and let no page of the web in; the parent's has the
port after the child's. Their addresses are printed once both answer; Ctrl-C or SIGTERM ends them.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Mapping

from flows.arguments import LAST_PORT, count, port
from flows.gate import listening_on, serve_in_thread
from storage.files import InputError
from storage.formats import LLAMACPP_FORMAT
from storage.params import load
from storage.paths import Paths
from tasks.checkpoints.gguf_files import CONTEXT, PARENT, gguf_of, loaded, parent_beside, precision_note

EXAMPLE = "puzzle serve-child --target like-51b --port 8080"
_PORT = 8080
_PARALLEL = 4


def serving_text(urls: Mapping[str, str], parallel: int, context: int) -> str:
    """Return the models' addresses, and lines to paste: a question to each model, and a load on all of them."""
    width = max(map(len, urls))
    load_line = ["puzzle", "benchmark-server"]
    load_line += [f"{'parent' if name == PARENT else 'child'}={url}" for name, url in urls.items()]
    levels = [str(1 << power) for power in range(parallel.bit_length())]  # more requests at once would only wait
    return "\n".join(
        [
            *(f"{name:<{width}}  {url}" for name, url in urls.items()),
            "",
            *(_question(name, url) for name, url in urls.items()),
            shlex.join([*load_line, "--concurrencies", ",".join(levels)]),
            "",
            "in a browser, each address without /v1 is llama.cpp's own page to chat on",
            f"{parallel} requests of up to {context} tokens each at once; Ctrl-C ends",
            "",
        ]
    )


def _question(name: str, url: str) -> str:
    """Return a curl line that asks a model something, greedily."""
    body = {
        "model": name,
        "messages": [{"role": "user", "content": "What is gravity?"}],
        "max_tokens": 128,
        "temperature": 0,
    }
    question = ["curl", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return shlex.join(question)


def _sockets(first: int, with_parent: bool) -> list[socket.socket]:
    """Return the sockets of child and parent, which listen from now on.

    Args:
        first: the child's port, the parent's is the next one; 0: any for both.
        with_parent: whether the parent has one.

    Raises:
        InputError: one of the ports is taken, or there is none after the child's.
    """
    if with_parent and first == LAST_PORT:
        raise InputError(f"--port {first} leaves none for the parent; choose a lower one, or --no-parent")
    sockets = [listening_on(first, "choose another with --port")]
    if with_parent:
        way_out = "it is the parent's; choose another --port, or --no-parent"
        sockets.append(listening_on(first and first + 1, way_out))
    return sockets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--target", required=True, help=f"key of the target in params.yaml, or {PARENT}")
    parser.add_argument(
        "--format", default=LLAMACPP_FORMAT, help=f"format of the exported file (default {LLAMACPP_FORMAT})"
    )
    parser.add_argument(
        "--port", type=port, default=_PORT, help=f"port on 127.0.0.1; 0: any that is free (default {_PORT})"
    )
    parser.add_argument("--parallel", type=count, default=_PARALLEL, help=f"requests at once (default {_PARALLEL})")
    parser.add_argument(
        "--context", type=count, help=f"tokens of a request (default {CONTEXT}, or what the model was made for)"
    )
    parser.add_argument("--threads", type=count, help="threads of llama.cpp (default: measure_costs.threads)")
    parser.add_argument("--no-parent", action="store_true", help="serve the child alone")


def run(args: argparse.Namespace) -> None:
    """Load the models, serve until a signal comes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the loading without a traceback
    params, paths = load(), Paths()
    if args.target != PARENT:
        params.target(args.target)
    files = [gguf_of(args.target, args.format, paths)]
    if not args.no_parent and args.target != PARENT:
        files.append(parent_beside(files[0], paths))
    sockets = _sockets(args.port, len(files) > 1)
    threads = args.threads or params.measure_costs.threads
    engines = [loaded(file, threads, args.parallel, args.context) for file in files]
    urls = {}
    for file, engine, listening in zip(files, engines, sockets, strict=True):
        serve_in_thread(listening, engine.url.removesuffix("/v1"), engine.key)
        urls[file.name] = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    sys.stderr.write(precision_note(files))
    ended = threading.Event()
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda *_: ended.set())
    context = min(engine.context for engine in engines)
    sys.stdout.write(serving_text(urls, args.parallel, context))
    sys.stdout.flush()
    ended.wait()
    os._exit(0)  # llama.cpp's own end waits for streams that are open, up to half a minute
