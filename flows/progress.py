"""Progress that people see in the Prefect UI: done/total and time left, as a progress artifact of the flow run."""

import time
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

PIECES = "pieces"
"""Key of the artifact with which a stage's run shows its pieces."""

_SECONDS_BETWEEN = 2.0


class ProgressArtifact:
    """One progress artifact of the current flow run, updated every two seconds at most."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._artifact: UUID | None = None
        self._next = 0.0

    def is_due(self) -> bool:
        """Tell whether the last update is two seconds old."""
        return time.monotonic() >= self._next

    def show(self, percent: float, text: str) -> None:
        """Show `percent` (0 to 100) and the sentence beside it."""
        if self._artifact is None:
            created = create_progress_artifact(percent, key=self._key, description=text)
            assert isinstance(created, UUID)  # not a coroutine: flows here are synchronous
            self._artifact = created
        else:
            update_progress_artifact(self._artifact, percent, description=text)
        self._next = time.monotonic() + _SECONDS_BETWEEN
