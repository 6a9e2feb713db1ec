"""Distil the corrected child of a target (GKD). Run: `puzzle stage distill_child --target like-51b`."""

import json
from uuid import UUID

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from flows.durations import duration_text
from flows.progress import ProgressArtifact
from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import distill_child as tasks
from tasks.engines.machine import on_this_machine


class _LiveTable:
    """The training as the UI shows it while it runs: a bar with the time left, and a row for each measurement."""

    def __init__(self, target: str) -> None:
        self._bar, self._key = ProgressArtifact(f"distillation-{target}"), f"held-out-kl-{target}"
        self._rows: list[dict[str, int | float]] = []
        self._artifact: UUID | None = None

    def show(self, measured: tasks.Measurement) -> None:
        """Add a measurement."""
        time_left = f"about {duration_text(measured.seconds_left)} left"
        self._bar.show(
            100 * measured.step / measured.num_steps,
            f"step {measured.step}/{measured.num_steps}, held-out KL {measured.kl:.4f}, loss {measured.loss:.4f}, "
            f"gradient norm {measured.gradient_norm:.3f}, {measured.tokens_per_s:,.0f} tokens/s, {time_left}",
        )
        self._rows.append(
            {
                "step": measured.step,
                "held-out KL, nats/token": round(measured.kl, 4),
                "loss": round(measured.loss, 4),
                "gradient norm": round(measured.gradient_norm, 3),
                "tokens/s": round(measured.tokens_per_s),
                "seconds left": round(measured.seconds_left),
            }
        )
        if self._artifact is None:
            created = create_table_artifact(self._rows, key=self._key, description="GKD, measured as it runs")
            assert isinstance(created, UUID)  # not a coroutine: flows here are synchronous
            self._artifact = created
        else:
            with get_client(sync_client=True) as client:
                client.update_artifact(self._artifact, ArtifactUpdate(data=json.dumps(self._rows)))


@flow(name="distill_child", description="Train the whole child on the parent's hidden states and logits (GKD).")
def distill_child(params: Params, paths: Paths, target: str) -> None:
    """Train on from the last checkpoint, then write the best weights."""
    tasks.distill(target, on_this_machine(params), paths, _LiveTable(target).show)


if __name__ == "__main__":
    main(distill_child)
