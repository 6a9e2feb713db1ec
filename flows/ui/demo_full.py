"""Every stage with the profile params/full.yaml, then the closing table: `make demo-full`.

It is `dvc exp run` in this working directory: finished pieces stay when it is interrupted, and the same command goes
on. params.yaml holds the profile's values from then on.
"""

import sys

from flows.demo import demo
from flows.errors import run_cleanly
from flows.ui.overrides import Constraints, as_arguments, changes_of
from storage.params import load


def demo_full() -> None:
    """Write the profile's values to params.yaml and make what they make stale."""
    changes = changes_of(load(), [], "full", Constraints.model_validate({}))
    demo(["exp", "run", *as_arguments(changes)])
    sys.stdout.write("params.yaml holds the profile's values; `git checkout params.yaml` takes them back\n")


if __name__ == "__main__":
    run_cleanly(demo_full)
