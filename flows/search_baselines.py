"""Search the baselines of a target. Run: `puzzle stage search_baselines --target like-51b`."""

from prefect import flow

from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import search_baselines as tasks


@flow(name="search_baselines", description="What simpler searches choose from the same library under the same limits.")
def search_baselines(params: Params, paths: Paths, target: str) -> None:
    """Choose the baselines and write baselines.json."""
    tasks.search_baselines(target, params, paths)


if __name__ == "__main__":
    main(search_baselines)
