"""The flow that the UI's form starts: every stage for the chosen targets. flows/ui/serve.py deploys it.

Without changes this is `dvc repro`. With a profile or constraints typed into the form it is `dvc exp run --temp`: an
experiment of its own, params.yaml and artifacts/ untouched.
"""

import base64
import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import fsspec
from prefect import flow
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.client.schemas import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from flows.closing_table import closing_table
from flows.ui.deployment_check import check_deployment
from flows.ui.overrides import NO_PROFILE, Constraints, as_arguments, changes_of, one_of, profile_names, target_names
from flows.ui.repro import only_one, run_dvc, stale, would_run
from storage.files import InputError
from storage.params import load
from storage.paths import Paths

TargetKey = Annotated[str, Field(json_schema_extra=one_of(target_names))]
Profile = Annotated[str, Field(json_schema_extra=one_of(profile_names))]
NOTHING_TYPED = Constraints.model_validate({})


@flow(name="compress", description="Every stage for the chosen targets; ends with the children beside the parent.")
def compress(
    targets: tuple[TargetKey, ...] = (), profile: Profile = NO_PROFILE, constraints: Constraints = NOTHING_TYPED
) -> State[Any]:
    """Build the children of the targets.

    Args:
        targets: Which children to build. None chosen: all.
        profile: File of overrides in params/, for another parent or budget.
        constraints: Constraints for this run, of one target, in place of params.yaml's.
    """
    try:
        check_deployment("compress.py", "compress")
        params = load()
        chosen = [name for name in params.targets if name in targets or not targets]
        for name in targets:
            params.target(name)
        changes = changes_of(params, list(targets), profile, constraints)
        experiment = f"compress-{str(flow_run.id)[:8]}" if changes else None
        with only_one("repro", wait=True):
            stages = [] if not targets or len(chosen) == len(params.targets) else _stages_of(chosen)
            if experiment:
                _must_track_lock()
                command = ["exp", "run", "--temp", "--name", experiment, *as_arguments(changes), *stages]
                run_dvc(command, would_run(*stages))
            else:
                run_dvc(["repro", *stages], _stale_among(stages))
            with _results(experiment, chosen) as paths:
                _show(paths, chosen, experiment)
    except InputError as error:
        return Failed(message=str(error))
    return Completed(message=f"built {', '.join(chosen)}" + (f" as experiment {experiment}" if experiment else ""))


def _stages_of(targets: list[str]) -> list[str]:
    """Return the stages of these targets alone."""
    return [stage for stage in would_run() if stage.partition("@")[2] in targets]


def _stale_among(stages: list[str]) -> list[str]:
    """Return the stages that `dvc repro <stages>` will run at most: the changed ones and all behind them, in order."""
    changed = stale()
    ahead = would_run("--downstream", *changed) if changed else []
    behind = set(would_run(*stages)) if stages else set(ahead)
    return [stage for stage in ahead if stage in behind]


def _must_track_lock() -> None:
    """Refuse an experiment without dvc.lock: it starts from what git knows and would compute every stage again."""
    listed = subprocess.run(["git", "ls-files", "dvc.lock"], capture_output=True, text=True, check=False)
    if Path("dvc.lock").is_file() and not listed.stdout:
        raise InputError(
            "dvc.lock is not in git, so that an experiment would compute every stage again; run `git add dvc.lock`"
        )


@contextlib.contextmanager
def _results(experiment: str | None, targets: list[str]) -> Iterator[Paths]:
    """Yield paths of the small files of the results: artifacts/, or a temporary copy of an experiment's."""
    paths = Paths()
    if experiment is None:
        yield paths
        return
    store = fsspec.filesystem("dvc", url=".", rev=experiment)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "artifacts"
        for folder in (*(paths.child(target) for target in targets), paths.report):
            for file in store.ls(str(folder)) if store.exists(str(folder)) else []:
                if file["type"] == "file":
                    local = root / Path(file["name"]).relative_to(paths.root)
                    local.parent.mkdir(parents=True, exist_ok=True)
                    store.get_file(file["name"], str(local))
        yield Paths(root)


def _show(paths: Paths, targets: list[str], experiment: str | None) -> None:
    """Show the closing table and the report's pictures as artifacts of the run."""
    table = closing_table(paths, targets).replace(str(paths.root), str(Paths().root))
    text = f"```\n{table}```\n\n"
    if experiment:
        text += f"Experiment {experiment}: `dvc exp apply {experiment}` brings it to artifacts/ and params.yaml."
    create_markdown_artifact(text, key="closing-table", description="children and parent")
    for picture in sorted(paths.report.glob("*.png")):
        data = base64.b64encode(picture.read_bytes()).decode()
        key = "picture-" + "".join(letter if letter.isalnum() else "-" for letter in picture.stem.lower())
        create_image_artifact(f"data:image/png;base64,{data}", key=key, description=picture.name)
