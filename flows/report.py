"""Write the report of all targets as one page. Run: `puzzle stage report`."""

from prefect import flow

from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import report as tasks


@flow(name="report", description="One self-contained HTML page of everything that was measured and predicted.")
def report(params: Params, paths: Paths) -> None:
    """Draw what exists, name what does not."""
    tasks.write_report(params, paths)


if __name__ == "__main__":
    main(report)
