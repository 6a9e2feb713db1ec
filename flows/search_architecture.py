"""Search the child of one target. Run: `python -m flows.search_architecture --target like-51b`.

From files alone (flows/own_tables.py): `--scores S.parquet --costs C.parquet --target TARGET.yaml --out DIR`, or
`--block-library LIB.json --limit runtime_ms=N --metric kl_div [--alternatives K --min-distance 0.2] [--json]`.
"""

import sys

from prefect import flow

from flows.own_tables import search_block_library, search_own_tables
from flows.stage import main, run_cleanly
from storage.params import Params
from storage.paths import Paths
from tasks import search_architecture as tasks


@flow(
    name="search_architecture", description="Choose a variant for every block: least score within the target's limits."
)
def search_architecture(params: Params, paths: Paths, target: str) -> None:
    """Solve, re-check, write architecture.json and search.json."""
    tasks.search(target, params, paths)


if __name__ == "__main__":
    if "--block-library" in sys.argv:
        run_cleanly(search_block_library)
    elif "--scores" in sys.argv or "--costs" in sys.argv:
        run_cleanly(search_own_tables)
    else:
        main(search_architecture, per_target=True)
