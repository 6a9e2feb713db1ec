"""What the Prefect UI shows of a stage's tasks."""

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
from prefect.settings import PREFECT_API_URL, temporary_settings


def ended_tasks(url: str, stage: str) -> set[str]:
    """Return the tasks of a stage's only run that the UI shows as completed and with a line of their log.

    All its tasks are completed, and its progress is at the end.
    """
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        (run,) = [run for run in client.read_flow_runs() if client.read_flow(run.flow_id).name == stage]
        of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        tasks, artifacts = client.read_task_runs(flow_run_filter=of_run), client.read_artifacts(flow_run_filter=of_run)
        assert {task.state.type.name for task in tasks if task.state} == {"COMPLETED"}
        assert {artifact.data for artifact in artifacts if artifact.key == "pieces"} == {100}
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])))
        logged = {log.task_run_id for log in logs}
        return {task.name.rpartition("-")[0] for task in tasks if task.id in logged}
