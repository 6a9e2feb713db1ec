"""Copies within a limit: what goes first, what never goes, and what several processes see of each other."""

import hashlib
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from storage import file_cache as module
from storage.file_cache import FileCache
from storage.files import DiskFullError

SIZE = 1000


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let copies go as soon as they were used."""
    monkeypatch.setattr(module, "_JUST_USED_S", 0.0)


def content(name: str) -> bytes:
    return name.encode().ljust(SIZE, b".")


def fetch(cache: FileCache, name: str, is_needed: bool = True) -> bool:
    """Bring a copy as a store does; tell whether it was written."""
    path, data = cache.folder / name, content(name)
    checksum = hashlib.sha256(data).hexdigest()
    if cache.has(path, checksum):
        return True
    with cache.filling(path) as part:
        if not cache.reserve(part, SIZE, is_needed):
            return False
        part.write(data)
        cache.put_in_place(part, path, checksum, is_needed)
    return True


def names(cache: FileCache) -> set[str]:
    return {path.name for path in cache.folder.rglob("*") if path.is_file()} - {".lock"}


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 3 * SIZE)
    for name in ("a", "b", "c", "a", "d"):
        fetch(cache, name)
    assert names(cache) == {"a", "c", "d"}
    assert (tmp_path / "d").read_bytes() == content("d")


def test_the_use_by_an_earlier_process_counts(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        fetch(FileCache(tmp_path, 3 * SIZE), name)
    fetch(FileCache(tmp_path, 3 * SIZE), "a")
    fetch(FileCache(tmp_path, 3 * SIZE), "d")
    assert names(FileCache(tmp_path, 0)) == {"a", "c", "d"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="leases are Linux's")
def test_what_is_open_or_mapped_stays(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 3 * SIZE)
    for name in ("opened", "mapped", "c"):
        fetch(cache, name)
    with (tmp_path / "opened").open("rb"):
        with (tmp_path / "mapped").open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ)
        for name in ("d", "e"):
            fetch(cache, name)
            assert names(cache) == {"opened", "mapped", name}
        mapped.close()
        fetch(cache, "f")
        assert names(cache) == {"opened", "e", "f"}
    fetch(cache, "g")
    assert names(cache) == {"e", "f", "g"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="leases are Linux's")
def test_where_all_is_in_use_a_needed_copy_exceeds_the_limit_and_one_ahead_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FileCache(tmp_path, SIZE)
    fetch(cache, "a")
    with (tmp_path / "a").open("rb"):
        assert not fetch(cache, "ahead", is_needed=False)
        assert fetch(cache, "b")
        assert fetch(cache, "b")
        assert names(cache) == {"a", "b"}
    assert caplog.text.count("storage.cache_gib") == 1
    cache.shrink()
    assert names(cache) == {"b"}


def test_what_is_not_in_the_bucket_yet_stays(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 2 * SIZE)
    (tmp_path / "written").write_bytes(content("written"))
    fetch(cache, "a")
    fetch(cache, "b")
    assert names(cache) == {"written", "b"}
    cache.add(tmp_path / "written", hashlib.sha256(content("written")).hexdigest())
    fetch(cache, "b")
    fetch(cache, "c")
    assert names(cache) == {"b", "c"}


def test_a_copy_fetched_ahead_makes_room_for_needed_ones_only(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 2 * SIZE)
    fetch(cache, "read")
    assert fetch(cache, "ahead", is_needed=False)
    assert fetch(cache, "further ahead", is_needed=False), "what was read goes"
    assert names(cache) == {"ahead", "further ahead"}
    assert not fetch(cache, "too far ahead", is_needed=False)
    cache.was_read(tmp_path / "ahead")
    assert fetch(cache, "too far ahead", is_needed=False)
    assert names(cache) == {"further ahead", "too far ahead"}


def test_a_copy_that_rotted_is_none(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, SIZE)
    fetch(cache, "a")
    (tmp_path / "a").chmod(0o644)
    (tmp_path / "a").write_bytes(content("b"))
    assert not FileCache(tmp_path, SIZE).has(tmp_path / "a", hashlib.sha256(content("a")).hexdigest())
    fetch(cache, "a")
    assert (tmp_path / "a").read_bytes() == content("a")


def test_a_file_that_cannot_be_filled_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FileCache(tmp_path, SIZE)
    with pytest.raises(DiskFullError, match="the disk is full"), cache.filling(tmp_path / "sub" / "a") as part:
        part.write(b"half")
        raise OSError(28, "No space left on device")
    assert names(cache) == set()


FETCHING = """
import contextlib, fcntl, sys
from pathlib import Path
from storage import file_cache
from storage.file_cache import FileCache
from tests.storage.test_file_cache import content, fetch

file_cache._JUST_USED_S = 0.0
cache = FileCache(Path(sys.argv[1]), 5000)
for step in range(200):
    name = f"file {(step * int(sys.argv[2])) % 23}"
    fetch(cache, name, is_needed=step % 3 > 0)
    with (cache.folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # else one that goes is seen, and the one that comes for it
        sizes = {}
        for path in cache.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                sizes[path.name] = path.stat().st_size
    assert sum(sizes.values()) <= 5000, sizes
"""


def test_two_processes_share_a_folder_and_its_limit(tmp_path: Path) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", FETCHING, str(tmp_path), step], stderr=subprocess.PIPE, text=True)
        for step in ("5", "7")
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for path in tmp_path.glob("file*"):
        assert path.read_bytes() == content(path.name)
    assert not list(tmp_path.glob("*.part"))


FILLING = """
import sys, time
from pathlib import Path
from storage.file_cache import FileCache

cache = FileCache(Path(sys.argv[1]), 5000)
with cache.filling(cache.folder / "a") as part:
    cache.reserve(part, 1000, True)
    part.write(b"half")
    part.flush()
    print("filling", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_filled_is_taken_over_and_what_a_living_one_fills_is_waited_for(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, SIZE)
    with subprocess.Popen([sys.executable, "-c", FILLING, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert names(cache) == {".a.part"}
        assert not fetch(cache, "b", is_needed=False), "what another process fills counts"
        waiting = threading.Thread(target=fetch, args=(cache, "a"))
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        waiting.join(10)
    assert names(cache) == {"a"}
    assert (tmp_path / "a").read_bytes() == content("a")


def test_what_a_killed_process_left_makes_room(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, SIZE)
    (tmp_path / ".gone.part").write_bytes(content("half"))
    assert fetch(cache, "a", is_needed=False)
    assert names(cache) == {"a"}
