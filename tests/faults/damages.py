"""Damaged files: artifacts and cache objects altered in place, read by a stage, mended by what its message says.

Run: `python -m tests.faults.damages --count 300`. One fault in ten goes through `dvc repro` and `puzzle chat` as a
person runs them; the others through the stages themselves, in forks of one process.
"""

import hashlib
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.clone import Clone, Ended
from tests.faults.built import Built, Stages, built_clone, copy_of, differing, digests
from tests.faults.outcomes import Outcome, Settings, end_of, last_words, run_campaign

_SECONDS = 120
_MOST_COMMANDS = 5
_THROUGH_DVC = 10
"""Of so many faults one goes through DVC."""
_COMMAND = re.compile(r"`((?:dvc|puzzle) [^`]+)`")
_NOBODYS = ("seconds.json", "report/", "frontier/")
_KINDS = {
    "piece record": r"/\.pieces/",
    "table": r"\.parquet$",
    "activations": r"\.arrow$",
    "tensors": r"\.safetensors$",
    "GGUF": r"\.gguf$",
    "tokenizer": r"/(tokenizer.*|chat_template.*|generation_config\.json)$",
    "JSON": r"\.json$",
    "text": r"",
}
"""Kinds of artifacts, by what their paths match first."""
_WEIGHTS = {
    "piece record": 2,
    "table": 4,
    "activations": 2,
    "tensors": 4,
    "GGUF": 2,
    "tokenizer": 2,
    "JSON": 4,
    "text": 1,
}
_HARMS = ("flip", "flip", "flip", "zeros", "noise", "cut", "empty", "longer", "delete")


@dataclass(frozen=True)
class _Damage:
    """A damaged artifact, how, and the stage that reads it next."""

    name: str
    kind: str
    harm: str
    reader: str


def _kind(name: str) -> str:
    return next(kind for kind, pattern in _KINDS.items() if re.search(pattern, f"/{name}"))


def _choose(chance: random.Random, built: Built) -> _Damage:
    """A random artifact of a random kind, a harm, and one of its readers."""
    by_kind: dict[str, list[str]] = {}
    for name in sorted(built.digests):
        if not name.startswith(_NOBODYS):
            by_kind.setdefault(_kind(name), []).append(name)
    kinds = sorted(by_kind)
    kind = chance.choices(kinds, [_WEIGHTS[kind] for kind in kinds])[0]
    name = chance.choice(by_kind[kind])
    stages, is_record = built.readers(name), kind == "piece record"
    reader = chance.choice(stages if stages and not is_record and chance.random() < 0.75 else built.makers(name))
    empty = (built.clone.artifacts / name).stat().st_size == 0
    return _Damage(name, kind, "longer" if empty else chance.choice(_HARMS), reader)


def harm(path: Path, how: str, chance: random.Random, keeps_date: bool) -> None:
    """Damage a file in place: the same inode, and the same date as rot would leave it."""
    before = path.stat()
    if how == "delete":
        path.unlink()
        return
    path.chmod(0o644)
    with path.open("r+b") as handle:
        position = chance.randrange(before.st_size) if before.st_size else 0
        length = min(chance.choice((1, 8, 512, 4096)), before.st_size - position)
        handle.seek(position)
        match how:
            case "flip":
                byte = handle.read(1)[0]
                handle.seek(position)
                handle.write(bytes([byte ^ 1 << chance.randrange(8)]))
            case "zeros":
                handle.write(bytes(length))
            case "noise":
                handle.write(chance.randbytes(length))
            case "cut":
                handle.truncate(position)
            case "empty":
                handle.truncate(0)
            case "longer":
                handle.seek(0, os.SEEK_END)
                handle.write(chance.randbytes(7))
    if keeps_date:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def faults(settings: Settings) -> Iterator[Outcome]:
    """Damage, read, mend and compare."""
    with built_clone(settings) as (built, stages), tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
        copies = [copy_of(built, Path(folder) / name) for name in ("forked", "dvc")]
        for number in range(settings.count):
            chance = settings.chance(number)
            if number % _THROUGH_DVC == _THROUGH_DVC - 1 and not settings.is_short:
                outcome = _through_dvc(copies[1], built, chance)
                _restore_all(built, copies[1])
            else:
                outcome = _in_forks(copies[0], built, stages, chance)
                _restore(built, copies[0])
            yield Outcome(outcome.kind, outcome.verdict, f"fault {number}: {outcome.story}")


def _restore(built: Built, clone: Clone) -> None:
    """Bring the artifacts of a copy back to those of the undisturbed clone."""
    expected, actual = built.digests, digests(clone.artifacts)
    for name in expected.keys() | actual.keys():
        source, copy = built.clone.artifacts / name, clone.artifacts / name
        if name not in expected:
            copy.unlink()
        elif (
            not copy.is_file() or copy.stat().st_mtime_ns != source.stat().st_mtime_ns or expected[name] != actual[name]
        ):
            copy.unlink(missing_ok=True)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)


def _restore_all(built: Built, clone: Clone) -> None:
    """Make a copy anew, DVC's cache and lock file included."""
    shutil.rmtree(clone.folder)
    copy_of(built, clone.folder)


# --- through the stages ----------------------------------------------------------------------------------------------


def _in_forks(clone: Clone, built: Built, stages: Stages, chance: random.Random) -> Outcome:
    damage = _choose(chance, built)
    harm(clone.artifacts / damage.name, damage.harm, chance, keeps_date=chance.random() < 0.5)
    kind, story = f"{damage.kind}, stage", f"{damage.harm} {damage.name}, read by {damage.reader}"
    complained, todo = False, [damage.reader]
    for _ in range(_MOST_COMMANDS):
        ended = stages.run(clone, todo[-1], _SECONDS)
        if verdict := end_of(ended):
            return Outcome(kind, verdict, f"{story} -> {todo[-1]}: {last_words(ended)}")
        if ended and ended.code == 0:
            todo.pop()
            if not todo:
                return _compared(kind, story, clone, built, damage, complained)
            continue
        complained = True
        command = _COMMAND.search(ended.err if ended else "")
        name = command[1].removeprefix("dvc repro").strip() if command else ""
        advised = [stage for stage in built.stages if name in (stage, stage.partition("@")[0])]
        if not advised:
            return Outcome(kind, "wrong", f"{story} -> no stage to run in: {last_words(ended)}")
        todo += advised
    return Outcome(kind, "wrong", f"{story} -> the messages lead in a circle: {last_words(ended)}")


def _compared(kind: str, story: str, clone: Clone, built: Built, damage: _Damage, complained: bool) -> Outcome:
    """Whether a copy holds the right bytes in the end; a file that nobody had to read may still be damaged."""
    wrong = differing(clone.artifacts, built.digests)
    if not wrong:
        return Outcome(kind, "right", f"{story} -> {'mended as the message says' if complained else 'mended'}")
    if not complained and wrong == [damage.name] and damage.reader not in built.makers(damage.name):
        return Outcome(kind, "right", f"{story} -> not read")
    return Outcome(kind, "wrong", f"{story} -> {'after its message' if complained else 'silent'}: {wrong[:4]} differ")


# --- as a person would -----------------------------------------------------------------------------------------------


def _through_dvc(clone: Clone, built: Built, chance: random.Random) -> Outcome:
    """An artifact, or its cache object that DVC then links back, and `dvc repro`; a GGUF is also chatted with."""
    damage = _choose(chance, built)
    story = f"{damage.harm} {damage.name}"
    target = damage.name.split("/")[1]
    is_chat = damage.kind == "GGUF" and damage.name.startswith("children/")
    if not is_chat and chance.random() < 0.4 and (cached := _cache_object(clone, damage.name)):
        harm(cached, "flip" if damage.harm == "delete" else damage.harm, chance, keeps_date=True)
        (clone.artifacts / damage.name).unlink()
        story = f"{story}'s cache object"
    else:
        harm(clone.artifacts / damage.name, damage.harm, chance, keeps_date=True)
    first: tuple[str, ...] = (
        ("flows.cli", "chat", "--target", target, "--format", damage.name.split("/")[3])
        if is_chat
        else (*("dvc", "repro", "--force", "--single-item", damage.reader),)
    )
    kind, story = f"{damage.kind}, {'chat' if is_chat else 'dvc repro'}", f"{story}, then {' '.join(first)}"
    commands, complained = list[tuple[str, ...]]([first]), False
    if not is_chat and not (clone.artifacts / damage.name).exists():
        commands = [("dvc", "repro"), first]
    while commands:
        command = commands.pop(0)
        ended: Ended = clone.run(*command)
        if verdict := end_of(ended):
            return Outcome(kind, verdict, f"{story} -> {last_words(ended)}")
        if ended.code == 0:
            if is_chat and not complained:
                return Outcome(kind, "wrong", f"{story} -> chats on")
            continue
        advice = _COMMAND.search(ended.err)
        if len(commands) > _MOST_COMMANDS or not advice:
            return Outcome(kind, "wrong", f"{story} -> no way out in: {last_words(ended)}")
        complained = True
        commands = [tuple(advice[1].split()), ("dvc", "repro"), *commands[-_MOST_COMMANDS:]]
    return _compared(kind, story, clone, built, damage, complained)


def _cache_object(clone: Clone, name: str) -> Path | None:
    """The cache object with the bytes of an artifact."""
    digest = hashlib.md5((clone.artifacts / name).read_bytes()).hexdigest()
    path = clone.folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    return path if path.is_file() else None


if __name__ == "__main__":
    run_campaign("damages", "Artifacts and cache objects altered in place, read and mended.", 300, faults)
