"""When constraints change: what DVC calls stale is rebuilt, on an interval. Deployed by `python -m flows.serve`.

A cause that failed (or whose run somebody cancelled) is not tried again before it changes or `make serve` starts anew.
"""

from pathlib import Path
from typing import Any

import yaml
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows import HOME
from flows.repro import BusyError, only_one, run_dvc, stale, would_run
from storage.files import InputError, digest_of, read_json, sha256, write_json
from storage.params import load

_FAILED = HOME / "failed_causes.json"


@flow(name="rerun-on-change", description="Rebuild what DVC calls stale, and nothing else.")
def rerun_on_change() -> State[Any]:
    """Ask DVC, rebuild, remember what failed."""
    try:
        load()
        with only_one("repro", wait=False):
            return _rebuild()
    except BusyError as error:
        return Completed(name="Busy", message=str(error))
    except InputError as error:
        return Failed(message=str(error))


def forget_failures() -> None:
    """Try everything that is stale again."""
    _FAILED.unlink(missing_ok=True)


def _rebuild() -> State[Any]:
    changed, failed = stale(), _failed()
    causes = {stage: cause_digest(stage, details) for stage, details in changed.items()}
    fresh = [stage for stage, digest in causes.items() if digest not in failed]
    if not fresh:
        waiting = f"; failed before and unchanged since: {', '.join(causes)}" if causes else ""
        return Completed(name="Unchanged", message=f"nothing to rebuild{waiting}")
    told = {stage: cause_text(changed[stage]) for stage in fresh}
    _label(told)
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
    return Completed(message="rebuilt: " + "; ".join(f"{stage} ({cause})" for stage, cause in told.items()))


def cause_text(details: list[Any]) -> str:
    """What `dvc status` says about a stage, in one line: `targets.like-51b modified, artifacts/x deleted`."""
    found = []
    for detail in details:
        groups = detail.values() if isinstance(detail, dict) else [{str(detail): ""}]
        for group in groups:
            for path, what in group.items() if isinstance(group, dict) else [(str(group), "")]:
                inner = what if isinstance(what, dict) else {path: what}
                found += [f"{name} {how}".strip() for name, how in inner.items()]
    return ", ".join(found)


def _label(told: dict[str, str]) -> None:
    """The cause on the run: in its name, its tags and an artifact."""
    first, cause = next(iter(told.items()))
    more = f" and {len(told) - 1} more" if len(told) > 1 else ""
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, name=f"{first}: {cause[:80]}{more}", tags=[*flow_run.tags, *told])
    rows = "\n".join(f"| `{stage}` | {cause} |" for stage, cause in told.items())
    create_markdown_artifact(f"| stage | changed |\n|---|---|\n{rows}\n", key="cause", description="why this run began")


def cause_digest(stage: str, details: list[Any]) -> str:
    """Content key of a cause: what DVC says, and what the changed files and params now hold."""
    contents: dict[str, Any] = {}
    for detail in details:
        for path, what in detail.get("changed deps", {}).items() if isinstance(detail, dict) else ():
            if isinstance(what, dict):
                values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
                contents |= {key: _value(values, key) for key in what}
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


def _failed() -> set[str]:
    return set(read_json(_FAILED, f"rm {_FAILED}")) if _FAILED.is_file() else set()


def _remember(digests: set[str]) -> None:
    write_json(_FAILED, sorted(_failed() | digests))


def _is_being_cancelled() -> bool:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run.id).state
    return state is not None and (state.is_cancelling() or state.is_cancelled())
