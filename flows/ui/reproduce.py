"""`dvc repro` as a flow, which a worker of a Prefect work pool runs in the clone; prefect.yaml deploys it."""

from typing import Any

from prefect import flow
from prefect.client.schemas import State
from prefect.states import Completed, Failed

from flows.ui.repro import only_one, run_dvc, would_run
from storage.files import InputError, did_you_mean
from storage.params import load


@flow(name="reproduce", description="Makes what is stale: all stages, or some and what they need.")
def reproduce(stages: tuple[str, ...] = ()) -> State[Any]:
    """Run `dvc repro`.

    Args:
        stages: Names as dvc.yaml has them, like score_blocks or distill_child@like-51b. None: all.
    """
    try:
        load()
        with only_one("repro", wait=True):  # DVC answers nobody else while it works
            stages_of_dvc = would_run()
            for stage in stages:  # an option of DVC's is none
                if stage not in stages_of_dvc:
                    listed = ", ".join(stages_of_dvc)
                    raise InputError(f"unknown stage {stage!r}{did_you_mean(stage, stages_of_dvc)}; known: {listed}")
            run_dvc(["repro", *stages], would_run(*stages))
    except InputError as error:
        return Failed(message=str(error))
    return Completed(message=f"made {', '.join(stages) or 'all stages'}")
