"""Kills: stages with pieces under way, DVC and the Prefect server are killed; `dvc repro` must end in the same bytes.

Run: `python -m tests.faults.kills --count 30`. Each fault takes a finished clone without one stage's artifacts and
without DVC's memory of earlier runs, starts `dvc repro`, waits until the stage's flow runs and a random number of its
files are written (where there is only one: for a share of the flow's time), kills, and runs `dvc repro` again. A stage
that ended before counts as not killed: it runs again, to be killed earlier.
"""

import contextlib
import functools
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.clone import Clone, Ended
from tests.faults.built import Built, built_clone, copy_of, differing
from tests.faults.outcomes import Outcome, Settings, end_of, last_words, run_campaign

_SECONDS = 600
_STEP_SECONDS = 0.005
_FIRST_GUESS = 2.0
"""Seconds that a flow without pieces is taken to run, until one was seen to end."""
_EARLIER = 0.7
"""The share of the moment at which a stage is killed that had ended before it."""
_MOST_TRIES = 30
_VICTIMS = ("all", "stage", "dvc", "server", "all")
"""Who is killed: the whole process group, the stage alone, DVC alone (the stage runs on), the Prefect server."""


@dataclass(frozen=True)
class _Fault:
    """A kill of `victim` while `stage` runs in a copy of the clone, without DVC in a short campaign."""

    built: Built
    clone: Clone
    stage: str
    victim: str
    is_short: bool

    @property
    def arguments(self) -> list[str]:
        """Return the stage's command line, as dvc.yaml has it, without Python."""
        name, _, target = self.stage.partition("@")
        return ["-m", f"flows.{name}", *(["--target", target] if target else [])]

    @functools.cached_property
    def outs(self) -> list[str]:
        """Return the artifacts that the stage makes."""
        return [name for name in self.built.digests if self.stage in self.built.makers(name)]

    @functools.cached_property
    def others(self) -> set[str]:
        """Return all other artifacts."""
        return {*self.built.digests} - {*self.outs}

    def command(self, target: str = "") -> list[str]:
        """Return what runs the stage, or everything for a person who runs DVC."""
        return self.arguments[1:] if self.is_short else list(filter(None, ["dvc", "repro", target]))

    def prepare(self) -> None:
        """Take away what the stage made, and DVC's memory of it, from which DVC would put it back without a run."""
        for name in self.outs:
            (self.clone.artifacts / name).unlink(missing_ok=True)
        shutil.rmtree(self.clone.folder / ".dvc/cache/runs", ignore_errors=True)
        lock = self.clone.folder / "dvc.lock"
        if lock.exists():
            entries = yaml.safe_load(lock.read_text(encoding="utf-8"))
            entries["stages"].pop(self.stage, None)
            lock.write_text(yaml.safe_dump(entries), encoding="utf-8")
        if self.victim == "server":
            self.clone.must("flows.server", "start")

    def kill(self, process: "subprocess.Popen[str]", moment: float, seconds: float) -> tuple[str, float]:
        """Wait for the moment and kill.

        Returns when that was, in words, empty if the stage ended before, and how many seconds the flow ran.
        """
        flow = self.clone.folder / ".prefect/running"
        self._wait(process, lambda: any(flow.glob("*.lock")))
        began, pids = time.monotonic(), self._running(process)
        num_files = len([name for name in self.outs if name not in self._whole_outs()])
        count = 1 + int(moment * (num_files - 1))
        if num_files:
            self._wait(process, lambda: len(self._written()) >= count)
            when = f"file {count} of {num_files}"
        else:
            self._wait(process, lambda: time.monotonic() > began + moment * seconds)
            when = f"{moment * seconds:.2f} s"
        ran = time.monotonic() - began
        if process.poll() is not None or not pids or not _lives(pids[-1]):
            return "", ran
        victims = {"all": (os.killpg, process.pid), "dvc": (os.kill, process.pid), "stage": (os.kill, pids[-1])}
        end_it, number = victims.get(self.victim) or (os.killpg, self._server())
        end_it(number, signal.SIGKILL)
        if self.victim == "dvc":
            process.wait()  # else it is a process still, and holds what it locked
        return when, ran

    def _whole_outs(self) -> set[str]:
        """Return outs that are a file each: one moment they are not there, the next they are whole."""
        return {name for name in self.outs if f"artifacts/{name}" in self.built.outs(self.stage)}

    def _written(self) -> set[str]:
        """Return files under artifacts/, also unfinished, that the finished clone without this stage does not have."""
        root = self.clone.artifacts  # walked, since a folder may go meanwhile
        paths = (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
        return {str(path.relative_to(root)) for path in paths} - self.others

    def _server(self) -> int:
        """Return the process of the clone's own Prefect server."""
        return int(self.clone.json("../.prefect/server.json")["pid"])

    def _running(self, process: "subprocess.Popen[str]") -> list[int]:
        """Return the processes of the stage."""
        listed = subprocess.run(["ps", "-eo", "pid=,pgid=,args="], capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in listed.splitlines()]
        is_ours = [row for row in rows if row[1] == str(process.pid) and row[3:] == self.arguments]
        return [int(row[0]) for row in is_ours]

    def _wait(self, process: "subprocess.Popen[str]", is_time: Callable[[], bool]) -> None:
        """Wait for something while a command runs."""
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end and process.poll() is None and not is_time():
            time.sleep(_STEP_SECONDS)

    def outcome(self, moment: float) -> Outcome:
        """Kill, and see what the next runs make of it; a stage that ended before runs again, to be killed earlier."""
        when, seconds, tries = "", _FIRST_GUESS, 0
        while not when:
            tries += 1
            assert tries <= _MOST_TRIES, f"{self.stage} ended {tries} times before it could be killed"
            self.prepare()
            process = self.clone.start(*self.command(self.stage))
            when, ran = self.kill(process, moment, seconds)
            if not when:
                process.communicate()
                moment, seconds = moment * _EARLIER, min(ran, seconds)
        kind, story = f"{self.victim} killed", f"{self.stage} at {when}, {self.victim} killed"
        if self.victim == "dvc":  # a person runs DVC again at once, while the stage still runs on
            outcome = self._rerun(kind, story)
            _end_group(process)
            return outcome
        try:
            out, err = process.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            _end_group(process)
            return Outcome(kind, "hang", f"{story} -> it did not end in {_SECONDS} s")
        first = Ended(process.returncode, out, err)
        if self.victim == "server" and (verdict := end_of(first)):
            return Outcome(kind, verdict, f"{story} -> {last_words(first)}")
        return self._rerun(kind, story)

    def _rerun(self, kind: str, story: str) -> Outcome:
        """Run to the end, then once more, which must find nothing to do."""
        ended = self.clone.run(*self.command())
        if ended.code == 0:
            ended = self.clone.run(*self.command())
        if ended.code != 0:
            return Outcome(kind, end_of(ended) or "wrong", f"{story} -> the rerun: {last_words(ended)}")
        if ended.ran():
            return Outcome(kind, "wrong", f"{story} -> a third run runs {ended.ran()}")
        wrong = differing(self.clone.artifacts, self.built.digests)
        if wrong:
            return Outcome(kind, "wrong", f"{story} -> {wrong[:4]} differ")
        return Outcome(kind, "right", f"{story} -> the same bytes")


def _lives(pid: int) -> bool:
    """Tell whether a process has not ended, nor waits for its parent to notice."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return False


def _end_group(process: "subprocess.Popen[str]") -> None:
    """End what a command started and its pipes still hold."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def faults(settings: Settings) -> Iterator[Outcome]:
    """Kill and rerun: every stage in turn, from a random first one."""
    with built_clone(settings) as (built, _), tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
        stages = list(built.stages)
        random.Random(settings.seed).shuffle(stages)
        for number in range(settings.count):
            victim = "all" if settings.is_short else _VICTIMS[number % len(_VICTIMS)]
            clone = copy_of(built, Path(folder) / str(number))
            if victim == "server":
                clone = Clone(clone.folder)  # with a server of its own
            fault = _Fault(built, clone, stages[number % len(stages)], victim, settings.is_short)
            try:
                outcome = fault.outcome(settings.chance(number).random())
            finally:
                if victim == "server":
                    clone.run("flows.server", "stop")
            shutil.rmtree(clone.folder)
            yield Outcome(outcome.kind, outcome.verdict, f"fault {number}: {outcome.story}")


if __name__ == "__main__":
    run_campaign("kills", "Stages, DVC and the server killed, and run again.", 30, faults)
