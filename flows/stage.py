"""What every stage's main() shares: arguments, params, server, workers, progress, and errors as one line."""

import argparse
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prefect import Flow, Task
from prefect.futures import as_completed
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ThreadPoolTaskRunner
from tqdm import tqdm

from flows.progress import PIECES, Shown, span
from flows.server import ensure
from storage.files import InputError, read_json, write_json
from storage.params import Params, load
from storage.paths import Paths

_BEGAN = time.monotonic()


def main(stage: Flow[..., Any], *, per_target: bool = False) -> None:
    """Run a stage's flow with the params of the working directory.

    A wrong input ends the process with one message and the error's exit code; pieces that were finished stay.
    """
    parser = argparse.ArgumentParser(prog=f"python -m flows.{stage.name}", description=stage.description)
    if per_target:
        parser.add_argument("--target", required=True, help="key of the target in params.yaml, e.g. like-51b")
    arguments = vars(parser.parse_args())
    run_cleanly(lambda: _run(stage, load(), arguments))
    gc.freeze()  # the process ends here: what torch and prefect made need not be looked through once more


def run_cleanly(action: Callable[[], object]) -> None:
    """Run `action`; an InputError becomes one message on stderr and its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        action()
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


def _run(stage: Flow[..., Any], params: Params, arguments: dict[str, Any]) -> None:
    if "target" in arguments:
        params.target(arguments["target"])
    url, _ = ensure()
    with temporary_settings({PREFECT_API_URL: url}):
        stage.with_options(task_runner=workers(params.run.workers))(params=params, paths=Paths(), **arguments)
    name = f"{stage.name}@{arguments['target']}" if "target" in arguments else stage.name
    _record(name, time.monotonic() - _BEGAN, Paths())


def _record(name: str, seconds: float, paths: Paths) -> None:
    """Keep how long a stage took, for flows/plan.py to show beside its estimates."""
    earlier = read_json(paths.seconds, "dvc repro") if paths.seconds.is_file() else {}
    write_json(paths.seconds, {**earlier, name: seconds})


def workers(count: int) -> Any:
    """Where pieces run: threads of this process (torch releases the GIL in every kernel)."""
    return ThreadPoolTaskRunner(max_workers=count)


def run_pieces(
    work: Task[..., Any], pieces: Sequence[Any], *common: Any, unit: str, in_order: bool = False
) -> list[Any]:
    """Run `work(piece, *common)` for every piece on the flow's workers, with done/total and time left.

    A terminal shows them as a bar, the UI as an artifact of the stage's run. `in_order` starts a piece when the one
    before it has ended.

    Returns the results in the order of the pieces.
    The first failure ends the stage; pieces that were finished stay, and the next run takes them.
    """
    futures: list[Any] = []
    began, shown, total = time.monotonic(), Shown(PIECES), len(pieces)

    def ended() -> Iterator[Any]:
        for piece in pieces:
            futures.append(work.submit(piece, *common))
            if in_order:
                yield futures[-1]
        if not in_order:
            yield from as_completed(futures)

    bar = tqdm(ended(), total=total, desc=work.name, unit=unit, disable=None)
    for done, future in enumerate(bar, start=1):
        future.result()
        if shown.is_due() or done == total:
            left = (time.monotonic() - began) * (total - done) / done
            shown.show(100 * done / total, f"{unit} {done}/{total}, about {span(left)} left")
    return [future.result() for future in futures]
