"""Checks that the deployment of a run is still as `make serve` made it.

Its runs are this clone's own flows in any case (flows/ui/serve.py gives them to the runner), but whoever reaches the
server can change what the deployment says, and a run that was asked for under such words is refused.
"""

import os
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from storage.files import InputError


def check_deployment(module: str, function: str) -> None:
    """Compare the deployment of this run with what `make serve` deployed: that function of that module, and no more.

    Raises:
        InputError: somebody has changed it.
    """
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(flow_run.id)
        if run.deployment_id is None:
            return
        deployment = client.read_deployment(run.deployment_id)
    entrypoint = f"{os.path.relpath(Path(__file__).with_name(module))}:{function}"
    expected = {"entrypoint": entrypoint, "path": ".", "enforce_parameter_schema": True}
    nothing = ("pull_steps", "job_variables", "work_pool_name", "storage_document_id", "infrastructure_document_id")
    present = {name: getattr(deployment, name) or None for name in (*expected, *nothing)}
    changed = [f"{name} is {value!r}" for name, value in present.items() if value != expected.get(name)]
    changed += ["the run brings variables of its own"] if run.job_variables else []
    if changed:
        raise InputError(
            f"the deployment {deployment.name} is no longer as `make serve` made it ({'; '.join(changed)}), so that "
            "nothing was run; start `make serve` again, which makes it anew"
        )
