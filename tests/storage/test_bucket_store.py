"""Stages whose shards and library are in a bucket of a real S3 server: the same bytes, and nothing lost on the way."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType

import pytest
import torch

from storage import bucket as bucket_module
from storage import file_cache
from storage.activations import BoundaryReader
from storage.bucket import Bucket
from storage.files import DamagedFileError, InputError
from storage.params import Params
from storage.paths import Paths
from storage.sections import Storage
from storage.stores import store_of
from tasks import cache_activations, distill_blocks
from tests.s3_server import FaultyProxy, S3Server, cut, refuse
from tests.stages import assemble, cache, calls_of, checksums, distill, prepare, score
from tests.tiny import flip_byte

VARIANTS = [("kv_1", "ffn_48"), ("no_op", "ffn_24"), ("kv_2", "no_op")]
NUMBERS = itertools.count()
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Run:
    """Artifacts of a run, and its params."""

    params: Params
    paths: Paths


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a whole run on the local disk."""
    params, paths = prepare("llama", tmp_path_factory.mktemp("local"))
    whole(params, paths)
    return Run(params, paths)


def whole(params: Params, paths: Paths) -> None:
    """Run cache, library, scores and assembly."""
    cache(params, paths)
    distill(params, paths)
    score(params, paths)
    assemble(params, paths, VARIANTS)


def stored(local: Run, root: str, folder: Path, cache_gib: float = 1.0) -> Run:
    """Return a run with the same parent and corpus, whose files are kept in a bucket."""
    for name in ("parent", "corpus"):
        shutil.copytree(local.paths.root / name, folder / "artifacts" / name)
    return Run(local.params, Paths(folder / "artifacts", Storage(root=root, cache_gib=cache_gib)))


@pytest.fixture
def run(local: Run, bucket: str, tmp_path: Path) -> Run:
    """Return a run that is still to make, in a folder of the bucket that no other test has."""
    return stored(local, f"{bucket}/run-{next(NUMBERS)}", tmp_path)


@pytest.fixture
def proxy(s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Stand in front of the server; waits are short."""
    monkeypatch.setattr(bucket_module, "_WAITS_S", (0.01,) * 8)
    with FaultyProxy(s3.environment["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def records(folder: Path) -> dict[str, str]:
    """Return the text of all records by the name of their piece."""
    return {path.name: path.read_text() for path in folder.rglob("*.json")}


def colleague(run: Run, folder: Path, cache_gib: float = 1.0) -> Run:
    """Return the run of a colleague who has what DVC has, and nothing of the cache."""
    shutil.copytree(run.paths.root, folder / "artifacts", ignore=lambda *_: ["cached"])
    storage = Storage(root=run.paths.storage.root, cache_gib=cache_gib)
    return Run(run.params, Paths(folder / "artifacts", storage))


def fetched(run: Run) -> set[str]:
    """Return the files of the bucket that a run's cache holds."""
    return {name for name in checksums(run.paths.root / "cached") if not name.startswith(".")}


def same(run: Run, local: Run) -> None:
    """Check that every artifact is as on the local disk, with the records alone in place of activations and library."""
    home, local_home = run.paths.root, local.paths.root
    for name in ("activations", "library"):
        assert records(home / name) == records(local_home / name)
        assert {path.suffix for path in (home / name).rglob("*") if path.is_file()} <= {".json", ".parquet"}
    for name in ("score_pieces", "children"):
        assert checksums(home / name) == checksums(local_home / name)
    for file in ("scores.parquet", "library/index.parquet"):
        assert (home / file).read_bytes() == (local_home / file).read_bytes()


def test_a_run_in_a_bucket_has_the_bytes_of_one_on_the_local_disk(local: Run, run: Run) -> None:
    whole(run.params, run.paths)
    same(run, local)
    assert cache(run.params, run.paths) == distill(run.params, run.paths) == []
    assert (run.paths.root / "activations" / "validation").is_dir(), "a stage depends on splits by themselves"


def test_a_cache_that_holds_little_changes_no_byte(
    local: Run, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every boundary has gone before it is read again; a shard of the cache alone takes 37 KB a boundary."""
    monkeypatch.setattr(file_cache, "_JUST_USED_S", 0.0)
    run = stored(local, f"{bucket}/run-{next(NUMBERS)}", tmp_path, cache_gib=200_000 / GIB)
    whole(run.params, run.paths)
    same(run, local)
    held = sum(path.stat().st_size for path in (run.paths.root / "cached").rglob("*") if path.is_file())
    assert 100_000 < held <= 200_000


def test_a_window_of_boundaries_stays_on_the_local_disk_and_what_is_kept_goes_to_the_bucket(
    local: Run, run: Run
) -> None:
    """Library and scores are those of the materialised cache."""
    cached = run.params.cache_activations.model_copy(update={"mode": "rolling"})
    whole(run.params.model_copy(update={"cache_activations": cached}), run.paths)
    for name in ("library", "score_pieces", "children"):
        kept = records if name == "library" else checksums
        assert kept(run.paths.root / name) == kept(local.paths.root / name)
    assert run.paths.scores.read_bytes() == local.paths.scores.read_bytes()
    assert not run.paths.rolling.exists()
    assert not list((run.paths.root / "activations").rglob("*.arrow"))


def test_a_cache_is_one_clones(run: Run, bucket: str, local: Run, tmp_path: Path) -> None:
    """Another one would delete what was made and not sent. A clone that was copied or moved has its own."""
    cache(run.params, run.paths)
    other = stored(local, run.paths.storage.root or "", tmp_path / "other")
    (other.paths.root / "cached").symlink_to(run.paths.root / "cached")
    with pytest.raises(InputError, match=f"cached is the cache of {run.paths.root} already; give it a folder"):
        cache(other.params, other.paths)
    copied = Paths(tmp_path / "copied", run.paths.storage)
    shutil.copytree(run.paths.root, copied.root)
    cache(run.params, copied)
    moved = run.paths.root.rename(tmp_path / "moved")
    (other.paths.root / "cached").unlink()
    (other.paths.root / "cached").symlink_to(moved / "cached")
    cache(other.params, other.paths)


def test_a_colleague_makes_nothing_and_reads_what_a_changed_target_needs(
    local: Run, run: Run, tmp_path: Path, proxy: FaultyProxy
) -> None:
    whole(run.params, run.paths)
    theirs = colleague(run, tmp_path / "theirs")
    proxy.requests.clear()
    assert cache(theirs.params, theirs.paths) == distill(theirs.params, theirs.paths) == []
    assert not score(theirs.params, theirs.paths)
    assert fetched(theirs) == set()
    assert {request.split()[0] for request in proxy.requests} == {"GET"}, "they need not be able to write"
    assemble(theirs.params, theirs.paths, VARIANTS)
    same(theirs, local)
    assert fetched(theirs) == {
        f"library/block_00{i}/{name}.safetensors" for i, name in ((0, "kv_1"), (0, "ffn_48"), (1, "ffn_24"))
    }


def test_files_that_were_on_the_local_disk_move_into_the_bucket(local: Run, bucket: str, tmp_path: Path) -> None:
    shutil.copytree(local.paths.root, tmp_path / "artifacts")
    run = Run(local.params, Paths(tmp_path / "artifacts", Storage(root=f"{bucket}/run-{next(NUMBERS)}", cache_gib=1.0)))
    assert cache(run.params, run.paths) == distill(run.params, run.paths) == []
    same(run, local)
    theirs = colleague(run, tmp_path / "theirs")
    assert cache(theirs.params, theirs.paths) == distill(theirs.params, theirs.paths) == []


PUBLISHING = """
import sys
from pathlib import Path
from storage.paths import Paths
from storage.sections import Storage
from tests.settings import tiny_params
from tests.stages import cache

cache(tiny_params(prepare_parent={"source": sys.argv[3]}), Paths(Path(sys.argv[1]), Storage(root=sys.argv[2])))
"""


def test_a_run_that_is_killed_while_it_uploads_goes_on_there(
    run: Run, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third upload hangs, then the process is killed: no record, no object of it, and nothing is computed twice."""
    puts, hangs = itertools.count(1), threading.Event()

    def hang(request: BaseHTTPRequestHandler) -> bool:
        if is_late := request.command == "PUT" and next(puts) > 3:
            hangs.set()
            time.sleep(5)
        return is_late

    proxy.before = hang
    assert run.paths.storage.root
    arguments = (str(run.paths.root), run.paths.storage.root, run.params.prepare_parent.source)
    process = subprocess.Popen([sys.executable, "-c", PUBLISHING, *arguments], start_new_session=True)
    assert hangs.wait(600)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    proxy.before = lambda _: False
    assert not records(run.paths.root / "activations")
    calls = calls_of(cache_activations, "write_shard", monkeypatch)
    made = cache(run.params, run.paths)
    assert "train.shard_000" not in made
    assert not [path for path, *_ in calls if path.name == "shard_000.arrow" and "train" in path.parts]
    theirs = colleague(run, run.paths.root.parent / "theirs")
    assert len(BoundaryReader(theirs.paths.activations, "train", 1).read(range(12))) == 12


def test_a_store_that_refuses_in_the_middle_loses_nothing(
    run: Run, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials expire after some uploads: one message; the next run sends on what was computed."""
    puts = itertools.count()
    proxy.before = lambda request: request.command == "PUT" and next(puts) > 6 and refuse(request, 400, "ExpiredToken")
    with pytest.raises(InputError, match="credentials have expired"):
        cache(run.params, run.paths)
    finished = records(run.paths.root / "activations")
    assert set(finished) == {"train.shard_000.json"}
    proxy.before = lambda _: False
    calls = calls_of(cache_activations, "write_shard", monkeypatch)
    assert "train.shard_001" not in cache(run.params, run.paths), "it was computed, and is published now"
    assert len({path for path, *_ in calls}) == len(calls)
    assert finished.items() <= records(run.paths.root / "activations").items()
    distill(run.params, run.paths)


def test_a_server_that_is_killed_in_the_middle_of_a_stage(
    local: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started again a little later; the stage does not notice."""
    (tmp_path / "server").mkdir()
    monkeypatch.setattr(bucket_module, "_WAITS_S", (0.2,) * 200)
    starting: list[threading.Timer] = []

    def kill_at(call: int, module: ModuleType, name: str) -> None:
        function, calls = getattr(module, name), itertools.count()

        def wrapped(*arguments: object) -> object:
            if next(calls) == call:
                server.kill()
                starting.append(threading.Timer(1.0, server.start))
                starting[-1].start()
            return function(*arguments)

        monkeypatch.setattr(module, name, wrapped)

    with S3Server(tmp_path / "server") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        run = stored(local, f"s3://{server.bucket}/run", tmp_path)
        kill_at(9, cache_activations, "write_shard")
        cache(run.params, run.paths)
        shutil.rmtree(run.paths.root / "cached")
        kill_at(1, distill_blocks, "distill_block")
        distill(run.params, run.paths)
        score(run.params, run.paths)
        assemble(run.params, run.paths, VARIANTS)
        assert len(starting) == 2
        same(run, local)


FAULTS: dict[int, Callable[[BaseHTTPRequestHandler], bool]] = {
    3: lambda request: refuse(request, 500, "InternalError"),
    6: cut,
}


def test_a_slow_store_that_fails_every_third_time_changes_no_byte(local: Run, run: Run, proxy: FaultyProxy) -> None:
    requests = itertools.count()

    def faulty(request: BaseHTTPRequestHandler) -> bool:
        time.sleep(0.01)
        fault = FAULTS.get(next(requests) % 9)
        return fault is not None and fault(request)

    proxy.before = faulty
    whole(run.params, run.paths)
    same(run, local)
    theirs = colleague(run, run.paths.root.parent / "theirs")
    hidden = BoundaryReader(theirs.paths.activations, "calibration", 2).read(range(16))
    assert torch.equal(hidden, BoundaryReader(local.paths.activations, "calibration", 2).read(range(16)))


def wait_for(is_so: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 300
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def objects_of(run: Run, kind: str) -> Bucket:
    return Bucket(f"{run.paths.storage.root}/{kind}")


def file_of(run: Run, kind: str, name: str) -> str:
    """Return the sha256 of a file of an artifact, from the records."""
    for text in records(run.paths.root / kind).values():
        files: dict[str, str] = json.loads(text)["files"]
        if name in files:
            return files[name]
    raise AssertionError(name)


SHARD = "train/boundary_001/shard_001.arrow"


def test_a_damaged_object_is_found_deleted_and_made_anew(
    run: Run, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(run.params, run.paths)
    digest, objects = file_of(run, "activations", SHARD), objects_of(run, "activations")
    whole_file = run.paths.root / "cached/activations" / SHARD
    shutil.copyfile(whole_file, tmp_path / "damaged")
    flip_byte(tmp_path / "damaged", 1000)
    s3.client().put_file(str(tmp_path / "damaged"), objects.address(digest))
    theirs = colleague(run, tmp_path / "theirs")
    store_of(theirs.paths.activations).prefetch(["train.shard_001"])
    wait_for(lambda: len(checksums(theirs.paths.activations)) == 3)
    message = (
        rf"{digest} \({SHARD}\) is damaged: .* was deleted from the bucket; run `dvc repro --force --single-item c"
    )
    with pytest.raises(DamagedFileError, match=message):
        BoundaryReader(theirs.paths.activations, "train", 1).read([13])
    assert objects.size(digest) is None
    calls = calls_of(cache_activations, "write_shard", monkeypatch)
    assert cache(theirs.params, theirs.paths) == ["train.shard_001"]
    assert len(calls) == 4
    assert objects.size(digest) == whole_file.stat().st_size
    assert len(BoundaryReader(theirs.paths.activations, "train", 1).read([13])) == 1


def test_a_reader_without_rights_says_what_it_cannot_delete(
    run: Run, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(run.params, run.paths)
    digest, objects = file_of(run, "activations", SHARD), objects_of(run, "activations")
    s3.client().pipe_file(objects.address(digest), b"short")
    theirs = colleague(run, tmp_path / "theirs")
    for name, value in s3.reader.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DamagedFileError, match=r"is damaged: .* cannot be deleted .*may not be written"):
        BoundaryReader(theirs.paths.activations, "train", 1).read([13])


def test_bytes_that_are_damaged_on_their_way_are_read_again(run: Run, tmp_path: Path, proxy: FaultyProxy) -> None:
    cache(run.params, run.paths)
    theirs, spoilt = colleague(run, tmp_path / "theirs"), list[str]()

    def spoil(request: BaseHTTPRequestHandler, body: bytes) -> bytes:
        if "list-type" not in request.path and request.path not in spoilt:
            spoilt.append(request.path)
            return body[:-1] + bytes([body[-1] ^ 1])
        return body

    proxy.body = spoil
    reader = BoundaryReader(theirs.paths.activations, "train", 1)
    assert torch.equal(reader.read(range(48)), BoundaryReader(run.paths.activations, "train", 1).read(range(48)))
    assert len(spoilt) >= 4


def test_an_object_that_is_gone_is_named_and_made_anew(run: Run, tmp_path: Path) -> None:
    cache(run.params, run.paths)
    distill(run.params, run.paths)
    name = "block_001/kv_1.safetensors"
    objects_of(run, "library").remove(file_of(run, "library", name))
    theirs = colleague(run, tmp_path / "theirs")
    with pytest.raises(DamagedFileError, match=r"is missing from the bucket.*--force --single-item distill_blocks`"):
        assemble(theirs.params, theirs.paths, [("kv_1", "ffn_48")] * 3)
    assert distill(theirs.params, theirs.paths) == ["block_001.kv_1"]
    assemble(theirs.params, theirs.paths, [("kv_1", "ffn_48")] * 3)


def test_a_copy_that_rots_in_the_cache_is_fetched_again(run: Run) -> None:
    cache(run.params, run.paths)
    path = run.paths.root / "cached/activations" / SHARD
    before = path.read_bytes()
    path.chmod(0o644)
    flip_byte(path)
    path.chmod(0o444)
    BoundaryReader(run.paths.activations, "train", 1).read([13])
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["reader", "missing"])
def test_a_bucket_that_cannot_be_written_ends_a_stage_before_any_work(
    kind: str, local: Run, s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stored(local, f"{bucket}-missing/run" if kind == "missing" else f"{bucket}/run-{next(NUMBERS)}", tmp_path)
    for name, value in (s3.reader if kind == "reader" else {}).items():
        monkeypatch.setenv(name, value)
    message = "there is no bucket puzzle-missing" if kind == "missing" else "may not be written"
    with pytest.raises(InputError, match=message):
        cache_activations.plan_shards.fn(run.params, run.paths)


def test_what_is_read_next_is_fetched_ahead(run: Run, tmp_path: Path) -> None:
    """The shard's next two boundaries; at the first boundary its next shards, too."""
    cache(run.params, run.paths)
    theirs = colleague(run, tmp_path / "theirs")
    BoundaryReader(theirs.paths.activations, "train", 0).read([0])
    expected = {f"train/boundary_000/shard_00{shard}.arrow" for shard in range(4)}
    expected |= {f"train/boundary_00{boundary}/shard_000.arrow" for boundary in (1, 2)}
    wait_for(lambda: {*checksums(theirs.paths.activations)} == expected)
    BoundaryReader(theirs.paths.activations, "train", 1).read([0])
    expected |= {"train/boundary_003/shard_000.arrow"}
    wait_for(lambda: {*checksums(theirs.paths.activations)} == expected)
