"""`make serve`: the Prefect UI with two deployments, until Ctrl-C. Run: `python -m flows.serve [--interval SECONDS]`.

`compress` is started from its form; `rerun-on-change` looks every INTERVAL seconds whether DVC calls something stale.
"""

import argparse
import os
import sys

from prefect import serve
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.compress import compress
from flows.repro import only_one
from flows.reruns import forget_failures, rerun_on_change
from flows.server import ensure, stop
from flows.stage import run_cleanly
from storage.params import load

_QUERY_SECONDS = 2  # between Submit and the start of a run; Prefect's own default is 10


def serve_deployments(interval: int) -> None:
    """Start the server unless it runs, serve both deployments, stop what was started."""
    load()
    with only_one("serve", wait=False):
        url, started = ensure()
        os.environ["PREFECT_API_URL"] = url
        try:
            with temporary_settings({PREFECT_API_URL: url}):
                forget_failures()
                sys.stdout.write(f"Prefect UI: {url.removesuffix('/api')}/deployments (Ctrl-C ends it)\n")
                sys.stdout.flush()
                one_at_a_time = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
                serve(
                    RunnerDeployment.from_flow(compress, "compress", paused=False),
                    RunnerDeployment.from_flow(
                        rerun_on_change,
                        "rerun-on-change",
                        interval=interval,
                        paused=False,
                        concurrency_limit=one_at_a_time,
                    ),
                    print_starting_message=False,
                    query_seconds=_QUERY_SECONDS,
                )
        finally:
            if started:
                stop()


def main() -> None:
    """Read the interval and serve."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description=__doc__)
    parser.add_argument("--interval", type=int, default=60, metavar="SECONDS", help="between two looks (default: 60)")
    arguments = parser.parse_args()
    if arguments.interval < 1:
        parser.error("--interval must be at least 1 second")
    run_cleanly(lambda: serve_deployments(arguments.interval))


if __name__ == "__main__":
    main()
