"""The common part of all stages' flows: arguments, params, server, workers, progress, and errors as one message."""

import argparse
import contextlib
import gc
import inspect
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

from httpx import TransportError
from prefect import Flow, Task
from prefect.futures import PrefectFuture, as_completed
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ThreadPoolTaskRunner
from tqdm import tqdm

from flows.durations import duration_text
from flows.errors import run_cleanly
from flows.orphans import close_orphans, hold, release
from flows.progress import PIECES, ProgressArtifact
from flows.server import ensure
from storage.files import InputError, write_sealed
from storage.params import Params, load
from storage.paths import Paths
from storage.pipeline import read_seconds

_BEGAN = time.monotonic()


def main(stage: Flow[..., Any]) -> None:
    """Run a stage as dvc.yaml does: `python -m flows.<stage> [--target TARGET]`."""
    parser = argparse.ArgumentParser(prog=f"python -m flows.{stage.name}", description=stage.description)
    parser.add_argument("--target", help="key of the target in params.yaml; of stages that run per target alone")
    target = parser.parse_args().target
    run_cleanly(lambda: run_stage(stage, target))
    gc.freeze()  # the process ends here: what torch and prefect made need not be looked through once more


def run_stage(stage: Flow[..., Any], target: str | None) -> None:
    """Run a stage's flow with the params of the working directory; pieces that were finished before stay.

    Args:
        stage: flow of params and paths, and of a target where the stage runs per target.
        target: key of the target, None for a stage that all targets share.

    Raises:
        InputError: a wrong input, also a target that is missing, unknown, or not the stage's business; or the server
            was stopped meanwhile.
    """
    params = load()
    _check_target(stage, target, params)
    arguments = {} if target is None else {"target": target}
    url, _ = ensure()
    with temporary_settings({PREFECT_API_URL: url}):
        try:
            close_orphans()
            tracked_stage = stage.with_options(task_runner=workers(params.run.workers), on_running=[hold])
            tracked_stage(params=params, paths=Paths(), **arguments)
        except TransportError as error:
            logging.raiseExceptions = False  # Prefect would write once more that its log reaches nobody
            raise InputError(
                f"the Prefect server at {url} no longer answers ({error}); run the same command again: finished pieces "
                "stay"
            ) from error
        finally:
            release()
    _record(stage.name if target is None else f"{stage.name}@{target}", time.monotonic() - _BEGAN, Paths())


def _check_target(stage: Flow[..., Any], target: str | None, params: Params) -> None:
    is_per_target = "target" in inspect.signature(stage.fn).parameters
    if target is None and is_per_target:
        raise InputError(f"{stage.name} runs per target; add --target with one of {', '.join(params.targets)}")
    if target is not None and not is_per_target:
        raise InputError(f"{stage.name} is the same for all targets; leave --target out")
    if target is not None:
        params.target(target)


def _record(name: str, seconds: float, paths: Paths) -> None:
    """Keep how long a stage took, which `puzzle plan` shows beside its estimates."""
    with contextlib.suppress(InputError, OSError):  # the stage has done its work, and nothing needs the record
        write_sealed(paths.seconds, {**read_seconds(paths.seconds), name: seconds})


def workers(count: int) -> Any:
    """The runner of pieces: threads of this process (torch releases the GIL in every kernel)."""
    return ThreadPoolTaskRunner(max_workers=count)


def run_pieces(
    work: Task[..., Any], pieces: Sequence[Any], *common: Any, unit: str, in_order: bool = False
) -> list[Any]:
    """Run `work(piece, *common)` for every piece on the flow's workers, with done/total and time left.

    A terminal shows them as a bar, the UI as an artifact of the stage's run. The first failure ends the stage; pieces
    that were finished stay, and the next run takes them.

    Args:
        work: task of a piece and of what all pieces share.
        pieces: first argument of `work`, each.
        common: further arguments of `work`.
        unit: word for a piece, for the bar.
        in_order: start a piece when the one before it has ended.

    Returns the results in the order of the pieces.
    """
    futures: list[PrefectFuture[Any]] = []
    began, artifact, total = time.monotonic(), ProgressArtifact(PIECES), len(pieces)

    def ended() -> Iterator[PrefectFuture[Any]]:
        for piece in pieces:
            futures.append(work.submit(piece, *common))
            if in_order:
                yield futures[-1]
        if not in_order:
            yield from as_completed(futures)

    bar = tqdm(ended(), total=total, desc=work.name, unit=unit, disable=None)
    for done, future in enumerate(bar, start=1):
        future.result()
        if artifact.is_due() or done == total:
            left = (time.monotonic() - began) * (total - done) / done
            artifact.show(100 * done / total, f"{unit} {done}/{total}, about {duration_text(left)} left")
    return [future.result() for future in futures]
