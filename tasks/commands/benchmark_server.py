"""Load any server of the OpenAI HTTP API at several concurrencies -> serving.parquet and a figure beside it.

Run: `puzzle benchmark-server NAME=URL ...`. tasks/engines/client.py sends the requests.
"""

import asyncio
import itertools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from storage.files import InputError, write_whole
from storage.records import ServingLoad, ServingRow
from storage.scenario import Scenario
from storage.tables import read_serving, write_serving
from tasks.drawing.serving_text import comparison_table, load_table
from tasks.drawing.throughput_text import SCENARIO_NAMES
from tasks.engines.client import Endpoint, load, models
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
    """

    scenarios: tuple[str, ...]
    length_scale: float
    concurrencies: tuple[int, ...]
    rounds: int
    devices: int
    stall_s: float
    vocabulary: int


def benchmark_servers(servers: Sequence[Server], sweep: LoadSweep, path: Path) -> list[ServingRow]:
    """Load each server in turn and keep the rows in `path`, in place of older rows of the same name and lengths.

    Returns:
        All rows of the file, those of other names and lengths included.

    Raises:
        InputError: a server does not answer, or has several models and the user names none; the table has another
            model under its name; no request came back whole. The table then stays as it was.
    """
    earlier_rows = list(read_serving(path)) if path.is_file() else []
    served = {server.name: _model(server, sweep.stall_s) for server in servers}  # all of them, before any long work
    for row in earlier_rows:
        if row.name in served and (row.model, row.devices) != (served[row.name], sweep.devices):
            raise InputError(
                f"{path} has {row.name} as {row.model} on {row.devices} devices, this one is {served[row.name]} on "
                f"{sweep.devices}; give it another NAME, or another --out"
            )
    measured_rows: list[ServingRow] = []
    for server, scenario in itertools.product(servers, sweep.scenarios):
        measured_rows += asyncio.run(_levels(server, served[server.name], scenario, sweep))
        if any(row.measured_tokens_per_s is not None for row in measured_rows):
            keys = set(map(_key, measured_rows))
            write_serving(path, [*(row for row in earlier_rows if _key(row) not in keys), *measured_rows])
    if all(row.measured_tokens_per_s is None for row in measured_rows):
        raise InputError(
            f"no request came back whole ({measured_rows[0].name}: {measured_rows[0].error_kinds}); try one with "
            "`curl`, and see what the server logs"
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


def _key(row: ServingRow) -> tuple[object, ...]:
    return row.name, row.comparison_key, row.concurrency


def _figure(rows: Sequence[ServingRow]) -> dict[str, bytes]:
    from tasks.drawing.serving import draw_serving  # matplotlib takes a second, which --help need not wait for

    drawing = draw_serving(rows, dpi=144)
    return {".svg": drawing.svg.encode(), ".png": drawing.png}


def _model(server: Server, seconds: float) -> str:
    """Return the name of a server's model: the one that the user names, or the only one it has."""
    names = asyncio.run(models(server.url, os.environ.get(API_KEY_VARIABLE), seconds))
    if server.model is None and len(names) == 1:
        return names[0]
    if server.model in names:
        return server.model
    served = f"no model {server.model!r}" if server.model else f"{len(names)} models"
    raise InputError(
        f"{server.name}: {server.url} has {served}, name one of them as {server.name}={server.url}#MODEL "
        f"({', '.join(names) or 'it has none'})"
    )


async def _levels(server: Server, model: str, scenario: str, sweep: LoadSweep) -> list[ServingRow]:
    """Measure a row for each concurrency of one scenario."""
    lengths = Scenario.parse(scenario).scaled(sweep.length_scale)
    endpoint = Endpoint(server.url, model, os.environ.get(API_KEY_VARIABLE))
    draw = random.Random()  # no seed: a server may have cached the prompts of an earlier scenario or run
    rows = []
    for concurrency in sweep.concurrencies:
        count = concurrency * sweep.rounds
        prompts = [_prompt(draw, lengths.input_tokens, sweep.vocabulary) for _ in range(concurrency + count)]
        label = f"{server.name} {scenario}, {concurrency} at once"
        with tqdm(total=len(prompts), desc=label, unit="request", disable=None) as bar:
            for part, counts in ((prompts[:concurrency], False), (prompts[concurrency:], True)):
                answers = await load(endpoint, part, lengths.output_tokens, concurrency, sweep.stall_s, bar.update)
                if counts:
                    level = ServingLoad(
                        name=server.name,
                        model=model,
                        url=server.url,
                        devices=sweep.devices,
                        scenario=scenario,
                        input_tokens=lengths.input_tokens,
                        output_tokens=lengths.output_tokens,
                        concurrency=concurrency,
                    )
                    rows.append(summary(level, answers))
    return rows


def _prompt(draw: random.Random, tokens: int, vocabulary: int) -> list[int]:
    """Draw random token ids; the lowest, which are often special, are left out."""
    return [draw.randrange(min(1_000, vocabulary // 2), vocabulary) for _ in range(tokens)]
