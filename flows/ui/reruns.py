"""The flow that rebuilds on an interval what DVC calls stale, such as after a change of constraints.

flows/ui/serve.py deploys it.

A cause that failed (or whose run somebody cancelled) is not tried again before it changes or `make serve` starts anew.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows import HOME
from flows.ui.deployment_check import check_deployment
from flows.ui.repro import BusyError, only_one, run_dvc, stale, would_run
from storage.files import InputError, digest_of, sha256, write_sealed
from storage.json_records import read_record
from storage.params import load
from storage.yaml_files import read_yaml

_FAILED = HOME / "failed_causes.json"


@flow(name="rerun-on-change", description="Rebuild what DVC calls stale, and nothing else.")
def rerun_on_change() -> State[Any]:
    """Ask DVC, rebuild, remember what failed."""
    try:
        check_deployment("reruns.py", "rerun_on_change")
        load()
        with only_one("repro", wait=False):
            return _rebuild()
    except BusyError as error:
        return Completed(name="Busy", message=str(error))
    except InputError as error:
        return Failed(message=str(error))


def forget_failures() -> None:
    """Forget every cause that failed, so that all that is stale is tried again."""
    _FAILED.unlink(missing_ok=True)


def _rebuild() -> State[Any]:
    changed, failed = stale(), _failed()
    causes = {stage: cause_digest(stage, details) for stage, details in changed.items()}
    fresh = [stage for stage, digest in causes.items() if digest not in failed]
    if not fresh:
        waiting = f"; failed before and unchanged since: {', '.join(causes)}" if causes else ""
        return Completed(name="Unchanged", message=f"nothing to rebuild{waiting}")
    fresh_causes = {stage: cause_text(changed[stage]) for stage in fresh}
    _label(fresh_causes)
    try:
        run_dvc(["repro", "--keep-going", "--downstream", *fresh], would_run("--downstream", *fresh))
    except BusyError:
        raise
    except InputError:
        still = stale()
        _remember({causes[stage] for stage in fresh if still.get(stage) == changed[stage]})
        raise
    except BaseException:  # cancelled by hand: leave it be; interrupted with `make serve`: try again then
        if _is_being_cancelled():
            _remember({causes[stage] for stage in fresh})
        raise
    return Completed(message="rebuilt: " + "; ".join(f"{stage} ({cause})" for stage, cause in fresh_causes.items()))


def cause_text(details: list[Any]) -> str:
    """Put the answer of `dvc status` about a stage in one line: `targets.like-51b modified, artifacts/x deleted`."""
    phrases = []
    for detail in details:
        groups = detail.values() if isinstance(detail, dict) else [{str(detail): ""}]
        for group in groups:
            for path, change in group.items() if isinstance(group, dict) else [(str(group), "")]:
                changes = change if isinstance(change, dict) else {path: change}
                phrases += [f"{name} {how}".strip() for name, how in changes.items()]
    return ", ".join(phrases)


def _label(causes: dict[str, str]) -> None:
    """Put the causes on the run: in its name, its tags and an artifact."""
    first, cause = next(iter(causes.items()))
    more = f" and {len(causes) - 1} more" if len(causes) > 1 else ""
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, name=f"{first}: {cause[:80]}{more}", tags=[*flow_run.tags, *causes])
    rows = "\n".join("| `{}` | {} |".format(stage, cause.replace("|", r"\|")) for stage, cause in causes.items())
    create_markdown_artifact(f"| stage | changed |\n|---|---|\n{rows}\n", key="cause", description="why this run began")


def cause_digest(stage: str, details: list[Any]) -> str:
    """Return the content key of a cause: what DVC says, and what the changed files and params hold now."""
    contents: dict[str, Any] = {}
    for detail in details:
        for path, change in detail.get("changed deps", {}).items() if isinstance(detail, dict) else ():
            if isinstance(change, dict):
                values = read_yaml(Path(path))
                contents |= {key: _value(values, key) for key in change}
            elif Path(path).is_file():
                contents[path] = sha256(Path(path))
            elif Path(path).is_dir():
                files = sorted(file for file in Path(path).rglob("*") if file.is_file())
                contents[path] = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return digest_of([stage, details, contents])


def _value(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


@dataclass(frozen=True)
class _Causes:
    """The content of failed_causes.json: digests."""

    causes: set[str]


def _failed() -> set[str]:
    return read_record(_FAILED, _Causes, f"rm {_FAILED}").causes if _FAILED.is_file() else set()


def _remember(digests: set[str]) -> None:
    write_sealed(_FAILED, {"causes": sorted(_failed() | digests)})


def _is_being_cancelled() -> bool:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run.id).state
    return state is not None and (state.is_cancelling() or state.is_cancelled())
