"""What became of faults, counted: a table for people, a line of JSON for machines, exit code 1 unless all are right.

right: the command succeeded with the right result, or ended with one message and an exit code, and what the message
says led to the right result. wrong: any other end. traceback: a person saw Python's. hang: it took longer than allowed.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from flows.durations import duration_text
from tests.clone import Ended

Verdict = Literal["right", "wrong", "traceback", "hang"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
_SECONDS_BETWEEN_LINES = 60.0


@dataclass(frozen=True)
class Outcome:
    """One fault: its kind (a row of the table), what became of it, and how to have it again."""

    kind: str
    verdict: Verdict
    story: str = ""


@dataclass(frozen=True)
class Settings:
    """What a campaign is run with; in `scratch` it may leave what the next one takes, `base`.

    A short one does without DVC and the later stages where that saves minutes.
    """

    seed: int
    count: int
    scratch: Path
    is_short: bool

    def chance(self, number: int) -> random.Random:
        """Return the random numbers of one fault."""
        return random.Random(f"{self.seed}/{number}")


def run_campaign(name: str, description: str, count: int, faults: Callable[[Settings], Iterator[Outcome]]) -> None:
    """Run a campaign as its arguments say, print its table, and exit with 1 unless every fault ended right."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.faults.{name}", description=description)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=count, help=f"how many faults (default: {count})")
    parser.add_argument("--short", action="store_true", help="without DVC and the later stages")
    parser.add_argument("--scratch", type=Path, help="a folder whose finished clone is taken, or made and kept")
    parser.add_argument("--verbose", action="store_true", help="a line for every fault, as it ends")
    args = parser.parse_args()
    began, outcomes = time.monotonic(), list[Outcome]()
    line_written_at = began
    with tempfile.TemporaryDirectory(prefix=f"faults-{name}-") as scratch:
        settings = Settings(args.seed, args.count, (args.scratch or Path(scratch)).resolve(), args.short)
        for outcome in faults(settings):
            outcomes.append(outcome)
            if args.verbose or outcome.verdict != "right":
                sys.stdout.write(f"{len(outcomes):>4} {outcome.verdict}: {outcome.kind}: {outcome.story}\n")
                sys.stdout.flush()
            if time.monotonic() - line_written_at > _SECONDS_BETWEEN_LINES:
                line_written_at = time.monotonic()
                sys.stderr.write(_progress(name, outcomes, args.count, line_written_at - began))
    sys.stdout.write(_table(outcomes))
    counts = Counter(outcome.verdict for outcome in outcomes)
    summary: dict[str, int] = {verdict: counts[verdict] for verdict in VERDICTS}
    failures = [asdict(outcome) for outcome in outcomes if outcome.verdict != "right"]
    record: dict[str, object] = {"campaign": name, "seed": args.seed, "count": len(outcomes), **summary}
    sys.stdout.write(json.dumps({**record, "seconds": round(time.monotonic() - began), "failures": failures}) + "\n")
    sys.exit(1 if failures or not outcomes else 0)


def _progress(name: str, outcomes: list[Outcome], count: int, seconds: float) -> str:
    """Write a line that says how far a campaign is; the time left is that of faults like those so far."""
    not_right = sum(outcome.verdict != "right" for outcome in outcomes)
    time_left = duration_text(seconds / len(outcomes) * (count - len(outcomes)))
    return f"{name}: {len(outcomes)} of {count}, {not_right} not right, about {time_left} left\n"


def _table(outcomes: list[Outcome]) -> str:
    """Write a row for each kind of fault, and their sum."""
    kinds = dict.fromkeys(outcome.kind for outcome in outcomes)
    rows = [(kind, [outcome.verdict for outcome in outcomes if outcome.kind == kind]) for kind in kinds]
    rows.append(("all", [outcome.verdict for outcome in outcomes]))
    width = max(len(kind) for kind, _ in rows)
    head = "".join(f"{verdict:>11}" for verdict in VERDICTS)
    lines = [f"{'fault':<{width}}{'count':>8}{head}"]
    for kind, verdicts in rows:
        counts = "".join(f"{verdicts.count(verdict):>11}" for verdict in VERDICTS)
        lines.append(f"{kind:<{width}}{len(verdicts):>8}{counts}")
    return "\n".join(lines) + "\n"


def end_of(ended: Ended | None) -> Verdict | None:
    """Return the verdict where the end itself is wrong: hang, traceback, an error without a message; else None."""
    if ended is None:
        return "hang"
    if "Traceback (most recent call last)" in ended.err + ended.out:
        return "traceback"
    is_clean = ended.code == 0 or "error: " in ended.err.lower()
    return None if is_clean else "wrong"


def last_words(ended: Ended | None) -> str:
    """Return the last lines of stderr, for a story."""
    if ended is None:
        return "it did not end"
    lines = [line for line in ended.err.splitlines() if line.strip()]
    return f"exit {ended.code}: {' | '.join(lines[-3:])[-500:]}"
