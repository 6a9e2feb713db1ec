"""Load any server of the OpenAI HTTP API at several concurrencies -> serving.parquet and a figure beside it."""

import asyncio
import itertools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from storage.fields import scaled
from storage.files import InputError, write_whole
from storage.records import ServingLoad, ServingRow
from storage.tables import read_serving, write_serving
from tasks.drawing.serving import draw_serving
from tasks.engines.client import Endpoint, load, models
from tasks.engines.load import comparison_table, load_table, summary
from tasks.puzzle.throughput import SCENARIO_NAMES

SIX = tuple(SCENARIO_NAMES)
"""The published table's scenarios."""
KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Server:
    """What a user calls a server, its URL (the API's base, with /v1), and its model (None: the only one it has)."""

    name: str
    url: str
    model: str | None


@dataclass(frozen=True)
class Load:
    """What every server gets.

    scenarios: input/output tokens, times `length_scale`. concurrencies: requests at once, each level with `rounds`
    times as many requests after one round that does not count. devices: behind each server. stall_s: seconds without
    an event after which a request has failed. vocabulary: token ids are drawn below it.
    """

    scenarios: tuple[str, ...]
    length_scale: float
    concurrencies: tuple[int, ...]
    rounds: int
    devices: int
    stall_s: float
    vocabulary: int


def benchmark_servers(servers: Sequence[Server], wanted: Load, path: Path) -> list[ServingRow]:
    """Load each server in turn and keep the rows in `path`, in place of older ones of the same name and work.

    Returns:
        All rows of the file, those of other names and works included.

    Raises:
        InputError: a server does not answer or has several models and none is named, the table has another model under
            its name, or no request came back whole: then the table is as it was.
    """
    kept = list(read_serving(path)) if path.is_file() else []
    found = {server.name: _model(server, wanted.stall_s) for server in servers}  # all, before any long work
    for row in kept:
        if row.name in found and (row.model, row.devices) != (found[row.name], wanted.devices):
            raise InputError(
                f"{path} has {row.name} as {row.model} on {row.devices} devices, this one is {found[row.name]} on "
                f"{wanted.devices}; give it another NAME, or another --out"
            )
    new: list[ServingRow] = []
    for server, scenario in itertools.product(servers, wanted.scenarios):
        new += asyncio.run(_sweep(server, found[server.name], scenario, wanted))
        if any(row.measured_tokens_per_s is not None for row in new):
            keys = set(map(_key, new))
            write_serving(path, [*(row for row in kept if _key(row) not in keys), *new])
    if all(row.measured_tokens_per_s is None for row in new):
        raise InputError(
            f"no request came back whole ({new[0].name}: {new[0].error_kinds}); try one with `curl`, and see what the "
            "server logs"
        )
    kept = list(read_serving(path))
    for suffix, content in _figure(kept).items():
        with write_whole(path.with_suffix(suffix)) as temporary:
            temporary.write_bytes(content)
    return kept


def serving_text(rows: Sequence[ServingRow], names: Sequence[str]) -> str:
    """The loads of the servers with these names, then all of the table compared."""
    loads = [
        load_table([row for row in rows if (row.name, row.work) == key])
        for key in dict.fromkeys((row.name, row.work) for row in rows)
        if key[0] in names
    ]
    return "\n".join([*loads, comparison_table(rows)])


def _key(row: ServingRow) -> tuple[object, ...]:
    return row.name, row.work, row.concurrency


def _figure(rows: Sequence[ServingRow]) -> dict[str, bytes]:
    drawing = draw_serving(rows, dpi=144)
    return {".svg": drawing.svg.encode(), ".png": drawing.png}


def _model(server: Server, seconds: float) -> str:
    known = asyncio.run(models(server.url, os.environ.get(KEY), seconds))
    if server.model is None and len(known) == 1:
        return known[0]
    if server.model in known:
        return server.model
    wanted = f"no model {server.model!r}" if server.model else f"{len(known)} models"
    raise InputError(
        f"{server.name}: {server.url} has {wanted}, name one of them as {server.name}={server.url}#MODEL "
        f"({', '.join(known) or 'it has none'})"
    )


async def _sweep(server: Server, model: str, scenario: str, wanted: Load) -> list[ServingRow]:
    """Rows of one scenario, a concurrency each."""
    inputs, outputs = map(int, scaled(scenario, wanted.length_scale).split("/"))
    endpoint = Endpoint(server.url, model, os.environ.get(KEY))
    draw = random.Random()  # no seed: a server would have cached the prompts of the scenario, or the run, before
    rows = []
    for concurrency in wanted.concurrencies:
        count = concurrency * wanted.rounds
        prompts = [_prompt(draw, inputs, wanted.vocabulary) for _ in range(concurrency + count)]
        label = f"{server.name} {scenario}, {concurrency} at once"
        with tqdm(total=len(prompts), desc=label, unit="request", disable=None) as bar:
            for part, counts in ((prompts[:concurrency], False), (prompts[concurrency:], True)):
                answers = await load(endpoint, part, outputs, concurrency, wanted.stall_s, bar.update)
                if counts:
                    asked = ServingLoad(
                        name=server.name,
                        model=model,
                        url=server.url,
                        devices=wanted.devices,
                        scenario=scenario,
                        input_tokens=inputs,
                        output_tokens=outputs,
                        concurrency=concurrency,
                    )
                    rows.append(summary(asked, answers))
    return rows


def _prompt(draw: random.Random, tokens: int, vocabulary: int) -> list[int]:
    """Token ids at random; the lowest, which are often special, are left out."""
    return [draw.randrange(min(1_000, vocabulary // 2), vocabulary) for _ in range(tokens)]
