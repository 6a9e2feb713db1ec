"""The live view of a distillation: one bar and one table, whose rows are the measurements so far."""

import json
from typing import Any
from uuid import uuid4

import pytest

from flows import distill_child, progress
from tasks.distill_child import Measurement


def test_a_measurement_becomes_a_row_of_the_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    bar, table = uuid4(), uuid4()
    shown: list[tuple[float, str]] = []
    tables: list[list[dict[str, Any]]] = []

    class Client:
        """Prefect's client as far as the table uses it."""

        def __enter__(self) -> "Client":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update_artifact(self, artifact: object, update: Any) -> None:
            assert artifact == table
            tables.append(json.loads(update.data))

    def create_table(rows: list[dict[str, Any]], key: str, description: str) -> object:
        assert key == "held-out-kl-small" and description
        tables.append(list(rows))
        return table

    def update(artifact: object, percent: float, description: str) -> None:
        assert artifact == bar
        shown.append((percent, description))

    def create(percent: float, key: str, description: str) -> object:
        assert key == "distillation-small"
        shown.append((percent, description))
        return bar

    monkeypatch.setattr(progress, "create_progress_artifact", create)
    monkeypatch.setattr(progress, "update_progress_artifact", update)
    monkeypatch.setattr(distill_child, "create_table_artifact", create_table)
    monkeypatch.setattr(distill_child, "get_client", lambda **_: Client())
    live = distill_child._LiveTable("small")
    for step, kl in ((4, 0.8), (8, 0.7), (12, 0.65)):
        live.show(Measurement(step, 16, kl, loss=1.0, gradient_norm=2.5, tokens_per_s=100.0, seconds_left=60.0 - step))
    assert [percent for percent, _ in shown] == [25, 50, 75]
    for words in ("step 12/16", "KL 0.65", "loss 1.0", "gradient norm 2.5", "100 tokens/s", "48 s left"):
        assert words in shown[-1][1]
    assert [[row["step"] for row in rows] for rows in tables] == [[4], [4, 8], [4, 8, 12]]
    assert [row["held-out KL, nats/token"] for row in tables[-1]] == [0.8, 0.7, 0.65]
