"""Damaged files: artifacts and DVC's cache altered in place, read by a stage, mended by what its message says.

Run: `python -m tests.faults.damages --count 300`. Each fault goes through `dvc repro` (a GGUF through `puzzle chat`
as well), in forks of one process: rot that keeps a file's date, read by a stage that has to run; a change with a new
date, which DVC sees; an object in DVC's cache, of a file or of a folder's list, checked out and then read.
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

import yaml

from tests.clone import Clone, Ended
from tests.faults.built import Built, Forks, built_clone, copy_of, differing
from tests.faults.outcomes import Outcome, Settings, end_of, last_words, run_campaign

_SECONDS = 120
_MOST_COMMANDS = 8
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


_PLACES = {"rot": 9, "new date": 5, "cache": 6}
"""Where the harm is done, and how often."""
_CACHE = Path(".dvc/cache/files/md5")
_SHARE_OF_LISTS = 0.25
"""Of the faults in the cache of a folder, the list of its files."""


@dataclass(frozen=True)
class _Damage:
    """A damaged artifact, how, where, and the stage that reads it next."""

    name: str
    kind: str
    harm: str
    place: str
    reader: str

    @property
    def is_chat(self) -> bool:
        """Tell whether it is a file that people chat with."""
        return self.kind == "GGUF" and self.name.startswith("children/") and self.place == "rot"


def _kind(name: str) -> str:
    return next(kind for kind, pattern in _KINDS.items() if re.search(pattern, f"/{name}"))


def _choose(chance: random.Random, built: Built) -> _Damage:
    """Choose a random artifact of a random kind, a harm, and one of its readers."""
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
    how = "longer" if empty else chance.choice(_HARMS)
    place = chance.choices(list(_PLACES), list(_PLACES.values()))[0]
    return _Damage(name, kind, how, place, reader)


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
    path.chmod(before.st_mode)
    if keeps_date:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def faults(settings: Settings) -> Iterator[Outcome]:
    """Damage, read, mend and compare."""
    with built_clone(settings) as (built, forks), tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
        for number in range(settings.count):
            clone = copy_of(built, Path(folder) / "copy")
            outcome = _read(clone, built, forks, settings.chance(number))
            shutil.rmtree(clone.folder)
            yield Outcome(outcome.kind, outcome.verdict, f"fault {number}: {outcome.story}")


def _read(clone: Clone, built: Built, forks: Forks, chance: random.Random) -> Outcome:
    """Harm a file and run what reads it, then whatever the messages say, until it ends well."""
    damage = _choose(chance, built)
    todo = [_first_command(damage)]
    if damage.place == "cache":
        suspect, out = _harm_cache(clone, damage, built.makers(damage.name)[0], chance)
        todo.append(("dvc", "checkout", out))
    else:
        suspect = clone.artifacts / damage.name
        harm(suspect, damage.harm, chance, keeps_date=damage.place == "rot")
    kind = f"{damage.kind}, {damage.place}"
    story = f"{damage.harm} {suspect.relative_to(clone.folder)} ({damage.name}), then {' '.join(todo[0])}"
    complained, advised = False, set[tuple[str, ...]]()
    for _ in range(_MOST_COMMANDS):
        ended = forks.run(clone, *todo[-1], seconds=_SECONDS)
        if verdict := end_of(ended):
            return Outcome(kind, verdict, f"{story} -> {' '.join(todo[-1])}: {last_words(ended)}")
        if ended and ended.code == 0:
            todo.pop()
            if not todo:
                return _compared(kind, story, clone, built, damage, complained)
            continue
        complained = True
        command = _advice(ended, built.makers(damage.name)[0])
        if not command:
            return Outcome(kind, "wrong", f"{story} -> no way out in: {last_words(ended)}")
        if command in advised:
            _forget_index(clone, forks)
        advised.add(command)
        todo.append(command)
    return Outcome(kind, "wrong", f"{story} -> the messages lead in a circle: {last_words(ended)}")


def _first_command(damage: _Damage) -> tuple[str, ...]:
    """Say what reads the file: a stage that has to run, since DVC does not see rot; whatever DVC runs; a chat."""
    if damage.is_chat:
        _, target, _, form, _ = damage.name.split("/")
        return ("flows.cli", "chat", "--target", target, "--format", form)
    forced = ("--force", "--single-item") if damage.place != "new date" else ()
    return ("dvc", "repro", *forced, damage.reader)


def _advice(ended: Ended | None, maker: str) -> tuple[str, ...]:
    """Return the command that a message tells people to run: ours where there is one, else DVC's.

    Where DVC itself says that its cache misses files, docs/architecture.md names the stage that makes them.
    """
    lines = ended.err.splitlines() if ended else []
    if any("missing-files" in line for line in lines):
        return ("dvc", "repro", maker)
    commands = [
        match[1]
        for line in sorted(lines, key=lambda line: not line.startswith("error: "))
        if (match := _COMMAND.search(line))
    ]
    return tuple(commands[0].replace("puzzle ", "flows.cli ").split()) if commands else ()


def _forget_index(clone: Clone, forks: Forks) -> None:
    """Delete DVC's index, which remembers what a rotten list of a folder said, as docs/architecture.md tells people."""
    ended = forks.run(clone, "dvc", "doctor", seconds=_SECONDS)
    folder = re.search(r"^Repo.site_cache_dir: (.+)$", ended.out if ended else "", re.MULTILINE)
    assert folder, ended
    shutil.rmtree(folder[1])


def _compared(kind: str, story: str, clone: Clone, built: Built, damage: _Damage, complained: bool) -> Outcome:
    """Tell whether a copy holds the right bytes in the end, and DVC's cache; what nobody had to read may be damaged."""
    wrong = differing(clone.artifacts, built.digests)
    rotten = _rotten(clone) if complained else []
    if not wrong and not rotten:
        return Outcome(kind, "right", f"{story} -> {'mended as the message says' if complained else 'mended'}")
    is_unread = not complained and not damage.is_chat and damage.reader not in built.makers(damage.name)
    if is_unread and wrong == [damage.name]:
        return Outcome(kind, "right", f"{story} -> not read")
    return Outcome(
        kind, "wrong", f"{story} -> {'after its message' if complained else 'silent'}: {wrong[:4]} differ, {rotten}"
    )


# --- DVC's cache -----------------------------------------------------------------------------------------------------


def _harm_cache(clone: Clone, damage: _Damage, maker: str, chance: random.Random) -> tuple[Path, str]:
    """Damage the object of an artifact, or the list of its folder, and take away what was checked out.

    Returns the object, and the out of dvc.yaml that it belongs to.
    """
    locked = yaml.safe_load((clone.folder / "dvc.lock").read_text(encoding="utf-8"))["stages"][maker]["outs"]
    out = next(row for row in locked if f"artifacts/{damage.name}/".startswith(f"{row['path']}/"))
    artifact = clone.artifacts / damage.name
    digest = hashlib.md5(artifact.read_bytes()).hexdigest()
    if out["md5"].endswith(".dir") and chance.random() < _SHARE_OF_LISTS:
        digest = out["md5"]
    cached = clone.folder / _CACHE / digest[:2] / digest[2:]
    harm(cached, damage.harm, chance, keeps_date=True)
    artifact.unlink()
    return cached, out["path"]


def _rotten(clone: Clone) -> list[str]:
    """Return objects of DVC's cache that are not as their names say."""
    objects = sorted((clone.folder / _CACHE).glob("??/*"))
    return [
        str(path.relative_to(clone.folder))
        for path in objects
        if hashlib.md5(path.read_bytes()).hexdigest() != f"{path.parent.name}{path.name}".removesuffix(".dir")
    ]


if __name__ == "__main__":
    run_campaign("damages", "Artifacts and DVC's cache altered in place, read and mended.", 300, faults)
