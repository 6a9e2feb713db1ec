"""Load any server of the OpenAI HTTP API at several concurrencies -> serving.parquet and a figure beside it.

Run: `puzzle benchmark-server NAME=URL ...`. tasks/engines/client.py sends the requests.
"""

import asyncio
import itertools
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from storage.files import DamagedFileError, InputError, write_whole
from storage.paths import Paths
from storage.records import ServingLoad, ServingRow
from storage.scenario import Scenario
from storage.tables import read_serving, write_serving
from tasks.drawing.serving_text import comparison_table, load_table
from tasks.drawing.throughput_text import SCENARIO_NAMES
from tasks.engines.client import Answer, Endpoint, environment_proxy, load, models
from tasks.engines.load import summary

PUBLISHED_SCENARIOS = tuple(SCENARIO_NAMES)
"""The published table's scenarios."""
API_KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the servers' key."""


@dataclass(frozen=True)
class Server:
    """The user's name of a server, its URL (the API's base, with /v1), and its model (None: its only one)."""

    name: str
    url: str
    model: str | None


@dataclass(frozen=True)
class LoadSweep:
    """The requests that every server gets.

    Attributes:
        scenarios: input/output tokens, before they are scaled.
        length_scale: factor of both lengths.
        concurrencies: requests at once, a level each.
        rounds: requests of a level are this many times its concurrency, after one round that does not count.
        devices: GPUs behind each server.
        stall_s: seconds without an event after which a request has failed.
        vocabulary: token ids are drawn below it.
        is_plain: prompts are text, and requests ask for nothing that only some servers take.
        uses_proxy: requests go through the proxy that the environment names.
    """

    scenarios: tuple[str, ...]
    length_scale: float
    concurrencies: tuple[int, ...]
    rounds: int
    devices: int
    stall_s: float
    vocabulary: int
    is_plain: bool = False
    uses_proxy: bool = False


@dataclass(frozen=True)
class _Prompts:
    """Draws a prompt of a number of tokens, and counts the tokens of a text; `count` None: the server counts alone."""

    draw: Callable[[int], Sequence[int] | str]
    count: Callable[[str], int] | None = None


def benchmark_servers(servers: Sequence[Server], sweep: LoadSweep, path: Path) -> list[ServingRow]:
    """Load each server in turn and keep the rows in `path`, in place of older rows of the same name and lengths.

    Returns:
        All rows of the file, those of other names and lengths included.

    Raises:
        InputError: a server does not answer, or has several models and the user names none; the environment names no
            proxy that can be asked; plain requests find no tokenizer; the table has another model under its name; no
            request came back whole. The table then stays as it was.
    """
    prompts = _prompts(sweep)
    earlier_rows = _earlier_rows(path)
    endpoints = {server.name: _endpoint(server, sweep) for server in servers}  # all of them, before any long work
    for row in earlier_rows:
        if row.name in endpoints and (row.model, row.devices) != (endpoints[row.name].model, sweep.devices):
            raise InputError(
                f"{path} has {row.name} as {row.model} on {row.devices} devices, this one is "
                f"{endpoints[row.name].model} on {sweep.devices}; give it another NAME, or another --out"
            )
    measured_rows: list[ServingRow] = []
    for name, scenario in itertools.product(endpoints, sweep.scenarios):
        measured_rows += asyncio.run(_levels(name, endpoints[name], scenario, sweep, prompts))
        if any(row.measured_tokens_per_s is not None for row in measured_rows):
            keys = set(map(_key, measured_rows))
            write_serving(path, [*(row for row in earlier_rows if _key(row) not in keys), *measured_rows])
    if all(row.measured_tokens_per_s is None for row in measured_rows):
        refusable = "token ids, ignore_eos, min_tokens or stream_options"
        raise InputError(
            f"no request came back whole ({measured_rows[0].name}: {measured_rows[0].error_kinds}); try one with "
            "`curl`, and see what the server logs"
            + ("" if sweep.is_plain else f"; where it refuses {refusable}, measure it with --plain")
        )
    all_rows = list(read_serving(path))
    for suffix, content in _figure(all_rows).items():
        with write_whole(path.with_suffix(suffix)) as temporary:
            temporary.write_bytes(content)
    return all_rows


def serving_text(rows: Sequence[ServingRow], names: Sequence[str]) -> str:
    """Format tables of the servers with these names, then a comparison of all rows."""
    loads: dict[tuple[object, ...], list[ServingRow]] = {}
    for row in rows:
        if row.name in names:
            loads.setdefault((row.name, row.comparison_key), []).append(row)
    return "\n".join([*map(load_table, loads.values()), comparison_table(rows)])


def _earlier_rows(path: Path) -> list[ServingRow]:
    try:
        return list(read_serving(path)) if path.is_file() else []
    except DamagedFileError:
        raise
    except InputError as error:  # such as a table of an earlier version, with fewer columns
        raise InputError(f"{error}; give another --out, or move this table away") from error


def _key(row: ServingRow) -> tuple[object, ...]:
    return row.name, row.comparison_key, row.concurrency


def _figure(rows: Sequence[ServingRow]) -> dict[str, bytes]:
    from tasks.drawing.serving import draw_serving  # matplotlib takes a second, which --help need not wait for

    drawing = draw_serving(rows, dpi=144)
    return {".svg": drawing.svg.encode(), ".png": drawing.png}


def _endpoint(server: Server, sweep: LoadSweep) -> Endpoint:
    """Return where a server's requests go: to the model that the user names, or the only one it has."""
    key, proxy = os.environ.get(API_KEY_VARIABLE), _proxy(server) if sweep.uses_proxy else None
    names = asyncio.run(models(server.url, key, sweep.stall_s, proxy))
    if server.model in names or (server.model is None and len(names) == 1):
        return Endpoint(server.url, server.model or names[0], key, proxy)
    served = f"no model {server.model!r}" if server.model else f"{len(names)} models"
    raise InputError(
        f"{server.name}: {server.url} has {served}, name one of them as {server.name}={server.url}#MODEL "
        f"({', '.join(names) or 'it has none'})"
    )


def _proxy(server: Server) -> str:
    """Return the proxy that the environment names for a server."""
    proxy = environment_proxy(server.url)
    if proxy is None:
        raise InputError(
            f"--proxy: the environment names no proxy for {server.url}; set http_proxy, https_proxy or all_proxy, take "
            "the host out of no_proxy, or leave --proxy out"
        )
    if not proxy.startswith(("http://", "https://")):  # SOCKS; what follows the scheme may hold a password
        raise InputError(
            f"--proxy: the environment's proxy for {server.url} is {proxy.partition('://')[0]}://..., expected "
            "http://HOST:PORT; correct its variable"
        )
    return proxy


async def _levels(
    name: str, endpoint: Endpoint, scenario: str, sweep: LoadSweep, prompts: _Prompts
) -> list[ServingRow]:
    """Measure a row for each concurrency of one scenario."""
    lengths = Scenario.parse(scenario).scaled(sweep.length_scale)
    rows = []
    for concurrency in sweep.concurrencies:
        count = concurrency * sweep.rounds
        drawn = [prompts.draw(lengths.input_tokens) for _ in range(concurrency + count)]
        label = f"{name} {scenario}, {concurrency} at once"
        with tqdm(total=len(drawn), desc=label, unit="request", disable=None) as bar:
            for part, counts in ((drawn[:concurrency], False), (drawn[concurrency:], True)):
                answers = await load(endpoint, part, lengths.output_tokens, concurrency, sweep.stall_s, bar.update)
                if counts:
                    level = ServingLoad(
                        name=name,
                        model=endpoint.model,
                        url=endpoint.url,
                        devices=sweep.devices,
                        scenario=scenario,
                        input_tokens=lengths.input_tokens,
                        output_tokens=lengths.output_tokens,
                        concurrency=concurrency,
                        prompt_kind="text" if sweep.is_plain else "token ids",
                        route="proxy" if endpoint.proxy else "direct",
                    )
                    rows.append(summary(level, [_counted(answer, prompts.count) for answer in answers]))
    return rows


def _prompts(sweep: LoadSweep) -> _Prompts:
    """Return prompts of random token ids, without the lowest, which are often special; or of random words."""
    random_source = random.Random()  # no seed: a server may have cached the prompts of an earlier scenario or run
    if sweep.is_plain:
        # transformers takes seconds, which --help need not wait for
        from tasks.engines.text_prompts import text_prompts

        texts = text_prompts(Paths().parent, sweep.vocabulary)
        return _Prompts(lambda tokens: texts.draw(random_source, tokens), texts.count)
    ids = range(min(1_000, sweep.vocabulary // 2), sweep.vocabulary)
    return _Prompts(lambda tokens: random_source.choices(ids, k=tokens))


def _counted(answer: Answer, count: Callable[[str], int] | None) -> Answer:
    """Return an answer whose tokens our tokenizer counts, where the server does not and there is one."""
    if count is None or answer.counted_by == "usage":
        return answer
    return replace(answer, output_tokens=count(answer.text), counted_by="our tokenizer")
