"""Progress that people see in the UI: done/total and time left, as a progress artifact of the flow run."""

import re
import time
from dataclasses import dataclass, field
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

PIECES = "pieces"
"""Key of the artifact with which a stage's run shows its pieces."""

_SECONDS_BETWEEN = 2.0
_RUNNING = re.compile(r"^Running stage '(.+)':$")
_SKIPPED = re.compile(r"^Stage '(.+)' (?:didn't change, skipping|is cached - skipping run.*)$")


class Shown:
    """One progress artifact of the current flow run, updated every two seconds at most."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._artifact: UUID | None = None
        self._next = 0.0

    def is_due(self) -> bool:
        """Whether it is time to show something again."""
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


@dataclass
class Stages:
    """How far `dvc` is, read from its own output.

    `ahead`: names of the stages that will run, in order. `usual`: seconds that a stage took when it last completed,
    absent where that is not known.
    """

    ahead: list[str]
    usual: dict[str, float]
    done: set[str] = field(default_factory=set)
    current: str | None = None
    since: float = 0.0

    def read(self, line: str, now: float) -> None:
        """Take a line of DVC's output; `now` in seconds of a monotonic clock."""
        if found := _RUNNING.match(line):
            self.finish(now)
            self.current, self.since = found[1], now
            if found[1] not in self.ahead:
                self.ahead.append(found[1])
        elif (found := _SKIPPED.match(line)) and found[1] in self.ahead:
            self.done.add(found[1])
            self.current = None if self.current == found[1] else self.current

    def finish(self, now: float) -> None:
        """The current stage has ended well; the other targets' stage of its kind will take as long."""
        if self.current:
            self.done.add(self.current)
            kind = self.current.partition("@")[0]
            for stage in self.ahead:
                if stage.partition("@")[0] == kind:
                    self.usual.setdefault(stage, now - self.since)
        self.current = None

    def percent(self, of_current: float | None) -> float:
        """Share of stages that are done, 0 to 100; `of_current`: percent of the current stage that is done."""
        part = (of_current or 0.0) / 100 if self.current else 0.0
        return 100 * (len(self.done) + part) / len(self.ahead) if self.ahead else 100.0

    def seconds_left(self, of_current: float | None, now: float) -> tuple[float, bool]:
        """Seconds until the end, and whether every stage that is left counts in them (else they are a lower bound)."""
        left, known = 0.0, True
        for stage in self.ahead:
            if stage in self.done:
                continue
            seconds = self.usual.get(stage)
            if stage == self.current:
                spent = now - self.since
                if of_current:
                    seconds = spent * 100 / of_current
                seconds = None if seconds is None else max(seconds - spent, 0.0)
            known &= seconds is not None
            left += seconds or 0.0
        return left, known

    def text(self, of_current: float | None, pieces: str, now: float) -> str:
        """One line for people: stages, the current one with its pieces, time left."""
        seconds, known = self.seconds_left(of_current, now)
        told = f"about {span(seconds)} left"
        if not known:  # a stage of which this server has not seen the end yet
            told = f"more than {span(seconds)} left" if seconds else "time left not known yet"
        current = [f"{self.current}{f' ({pieces})' if pieces else ''}"] if self.current else []
        return " · ".join([f"{len(self.done)}/{len(self.ahead)} stages", *current, told])


def span(seconds: float) -> str:
    """Seconds as people say them: `40 s`, `12 min`, `3 h 05 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
