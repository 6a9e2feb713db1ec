"""Serve the Prefect UI with two deployments until Ctrl-C: `make serve`, `make serve INTERVAL=300`.

`compress` is started from its form; `rerun-on-change` looks every INTERVAL seconds whether DVC calls something stale.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, StateType
from prefect.runner import Runner
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed

from flows.arguments import count
from flows.errors import run_cleanly
from flows.orphans import close_orphans
from flows.server import ensure, stop
from flows.ui.compress import compress
from flows.ui.repro import in_state, of_flows, only_one
from flows.ui.reruns import forget_failures, rerun_on_change
from storage.params import load

_QUERY_SECONDS = 2  # between Submit and the start of a run; Prefect's own default is 10


class _Runner(Runner):
    """Prefect's runner, for which SIGTERM is Ctrl-C: its own way out leaves the deployments active."""

    def handle_sigterm(self, *_: Any, **__: Any) -> None:
        """Pause the deployments and leave; DVC ends with its run (flows/ui/guard.py)."""
        signal.raise_signal(signal.SIGINT)


def serve_deployments(interval: int) -> None:
    """Start the server unless it runs, serve both deployments, stop what was started."""
    load()
    with only_one("serve", wait=False):
        url, started = ensure()
        os.environ["PREFECT_API_URL"] = url
        try:
            with temporary_settings({PREFECT_API_URL: url}):
                forget_failures()
                _crash_abandoned_runs()
                close_orphans()
                sys.stdout.write(f"Prefect UI: {url.removesuffix('/api')}/deployments (Ctrl-C ends it)\n")
                sys.stdout.flush()
                one_at_a_time = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
                runner = _Runner(query_seconds=_QUERY_SECONDS)
                # The runner gets the flows themselves: what a deployment says of code to fetch and run counts nothing.
                runner.add_flow(compress, "compress", paused=False)
                runner.add_flow(
                    rerun_on_change, "rerun-on-change", interval=interval, paused=False, concurrency_limit=one_at_a_time
                )
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
                with contextlib.suppress(KeyboardInterrupt):
                    asyncio.run(runner.start())
        finally:
            if started:
                stop()


def _crash_abandoned_runs() -> None:
    """Mark as crashed the runs whose `make serve` has ended."""
    ended: State[Any] = Crashed(message="`make serve` ended before the run did; finished pieces stay")
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(
            flow_filter=of_flows(compress.name, rerun_on_change.name), flow_run_filter=in_state(StateType.RUNNING)
        ):
            client.set_flow_run_state(run.id, ended, force=True)


def main() -> None:
    """Read the interval and serve."""
    parser = argparse.ArgumentParser(prog="python -m flows.ui.serve", description=__doc__)
    parser.add_argument(
        "--interval", type=count, default=60, metavar="SECONDS", help="seconds between two looks (default: 60)"
    )
    interval = parser.parse_args().interval
    run_cleanly(lambda: serve_deployments(interval))


if __name__ == "__main__":
    main()
