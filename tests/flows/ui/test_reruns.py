"""The cause of a rerun, in words and as a digest; whole runs are in test_serve."""

from pathlib import Path
from typing import Any

import pytest

from flows.ui.reruns import cause_digest, cause_text


def test_a_cause_says_what_changed() -> None:
    """The form of `dvc status --json`."""
    changed = [
        {"changed deps": {"params.yaml": {"targets.small": "modified"}, "tasks/puzzle/search/mip.py": "modified"}},
        {"changed outs": {"artifacts/scores.parquet": "deleted"}},
        "changed command",
    ]
    assert cause_text(changed) == (
        "targets.small modified, tasks/puzzle/search/mip.py modified, artifacts/scores.parquet deleted, changed command"
    )


def test_a_cause_is_another_when_what_changed_changes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC says the same each time; what failed is tried again after its own params or files changed, no others."""
    monkeypatch.chdir(tmp_path)
    deps = {"params.yaml": {"targets.small": "modified"}, "code.py": "modified", "data": "modified", "gone": "deleted"}
    details: list[Any] = [{"changed deps": deps}]

    def digest_with(small: int = 1, other: int = 1, code: str = "a", data: str = "a") -> str:
        Path("params.yaml").write_text(f"targets: {{small: {{limit: {small}}}, other: {other}}}", encoding="utf-8")
        Path("code.py").write_text(code, encoding="utf-8")
        Path("data").mkdir(exist_ok=True)
        for name in data:
            if not Path("data", name).exists():
                Path("data", name).touch()
        return cause_digest("search@small", details)

    first = digest_with()
    assert digest_with(other=2) == first
    assert len({first, digest_with(small=2), digest_with(code="b"), digest_with(data="ab")}) == 4
