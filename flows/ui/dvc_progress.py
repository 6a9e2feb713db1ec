"""The progress of DVC: its own output lines in, done/total and time left out."""

import re
from dataclasses import dataclass, field

from flows.durations import duration_text

_RUNNING = re.compile(r"^Running stage '(.+)':$")
_SKIPPED = re.compile(r"^Stage '(.+)' (?:didn't change, skipping|is cached - skipping run.*)$")


@dataclass
class DvcProgress:
    """The progress of a `dvc` process, read from its own output."""

    ahead: list[str]
    """Names of the stages that will run, in order."""
    usual_seconds: dict[str, float]
    """Seconds that a stage took when it last completed; a stage that never completed is absent."""
    done: set[str] = field(default_factory=set)
    current: str | None = None
    since: float = 0.0
    """When the current stage began, in seconds of a monotonic clock."""

    def read(self, line: str, now: float) -> None:
        """Take a line of DVC's output; `now` in seconds of a monotonic clock."""
        if match := _RUNNING.match(line):
            self.finish(now)
            self.current, self.since = match[1], now
            if match[1] not in self.ahead:
                self.ahead.append(match[1])
        elif (match := _SKIPPED.match(line)) and match[1] in self.ahead:
            self.done.add(match[1])
            self.current = None if self.current == match[1] else self.current

    def finish(self, now: float) -> None:
        """Count the current stage as done; the same stage of another target is expected to take as long."""
        if self.current:
            self.done.add(self.current)
            kind = self.current.partition("@")[0]
            for stage in self.ahead:
                if stage.partition("@")[0] == kind:
                    self.usual_seconds.setdefault(stage, now - self.since)
        self.current = None

    def percent(self, current_percent: float | None) -> float:
        """Return the share of stages that are done, 0 to 100; `current_percent` of the current stage counts as well."""
        part = (current_percent or 0.0) / 100 if self.current else 0.0
        return 100 * (len(self.done) + part) / len(self.ahead) if self.ahead else 100.0

    def seconds_left(self, current_percent: float | None, now: float) -> tuple[float, bool]:
        """Return the seconds left, and whether every stage ahead counts in them (else they are a lower bound)."""
        left, is_complete = 0.0, True
        for stage in self.ahead:
            if stage in self.done:
                continue
            seconds = self.usual_seconds.get(stage)
            if stage == self.current:
                spent = now - self.since
                if current_percent:
                    seconds = spent * 100 / current_percent
                seconds = None if seconds is None else max(seconds - spent, 0.0)
            is_complete &= seconds is not None
            left += seconds or 0.0
        return left, is_complete

    def text(self, current_percent: float | None, pieces: str, now: float) -> str:
        """Return one line for people: stages, the current one with its pieces, time left."""
        parts = [f"{len(self.done)}/{len(self.ahead)} stages"]
        if self.current:
            parts.append(f"{self.current} ({pieces})" if pieces else self.current)
        seconds, is_complete = self.seconds_left(current_percent, now)
        if is_complete:
            parts.append(f"about {duration_text(seconds)} left")
        elif seconds:  # a stage is left that this server has not seen complete
            parts.append(f"more than {duration_text(seconds)} left")
        else:
            parts.append("time left not known yet")
        return " · ".join(parts)
