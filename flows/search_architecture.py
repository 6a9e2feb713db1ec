"""Search the child of a target. Run: `puzzle stage search_architecture --target like-51b`.

`puzzle search` does the same from a user's files alone.
"""

from prefect import flow

from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import search_architecture as tasks


@flow(
    name="search_architecture", description="Choose a variant for every block: least score within the target's limits."
)
def search_architecture(params: Params, paths: Paths, target: str) -> None:
    """Solve, check the solution against every limit, write architecture.json and search.json."""
    tasks.search(target, params, paths)


if __name__ == "__main__":
    main(search_architecture)
