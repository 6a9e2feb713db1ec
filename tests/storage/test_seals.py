"""Every table and every JSON record that stages write: damage is found and named, never read as other values."""

import json
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dvc.exceptions import CheckoutError
from dvc.repo import Repo
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.prefect_app import ServerState
from storage.accuracy import read_accuracy
from storage.activations import BoundaryReader, shard_name, shard_path, write_shard
from storage.architecture import read_architecture, read_baselines
from storage.checkpoints import CHECKSUMS, Checkpoint, CheckpointWriter
from storage.corpus import read_manifest, read_sequences, split_path
from storage.evaluation import read_evaluation
from storage.files import SEAL, DamagedFileError, InputError, digest_of, read_sealed, sha256, write_json, write_sealed
from storage.formats import FORMATS
from storage.gguf import GgufModel
from storage.gguf_child import write_gguf
from storage.gkd import read_gkd
from storage.json_records import read_record
from storage.parent_info import INFO, read_parent_info
from storage.parquet_files import read_table, write_table
from storage.paths import EXPORTS_OVERVIEW, Paths
from storage.pieces import Pieces
from storage.records import ServingRow, TimingRow
from storage.tables import (
    read_costs,
    read_scores,
    read_serving,
    read_throughput,
    read_timings_or_costs,
    write_serving,
    write_timings,
)
from storage.variants import Attention, Ffn
from tasks.checkpoints.gguf_files import exported_ggufs
from tasks.engines.hidden_states import head_of
from tests.report_run import write_run
from tests.settings import SEQ_LEN
from tests.tiny import save_tiny, tiny_corpus

REBUILD = "dvc repro it"
FLIPS = 200


@dataclass(frozen=True)
class Sealed:
    """A file with a seal, or whose checksum is in a file with one, and how stages read it."""

    path: Callable[[Paths], Path]
    read: Callable[[Paths], Any]


def _record(path: Callable[[Paths], Path]) -> Sealed:
    return Sealed(path, lambda paths: read_sealed(path(paths), REBUILD))


def _table(path: Callable[[Paths], Path]) -> Sealed:
    return Sealed(path, lambda paths: read_table(path(paths), REBUILD).to_pylist())


CHILD = "small"
_SERVED = ServingRow(
    name="child",
    model="m",
    url="http://127.0.0.1:1",
    devices=1,
    scenario="8/8",
    input_tokens=8,
    output_tokens=8,
    concurrency=1,
    prompt_kind="token ids",
    route="direct",
    requests=9,
    errors=0,
    error_kinds="",
    buffered=0,
    counted_input_tokens=8.0,
    counted_output_tokens=8.0,
    counted_by="usage",
    seconds=1.5,
    measured_tokens_per_s=48.0,
    measured_user_tokens_per_s=50.0,
    ttft_p50_ms=1.0,
    ttft_p95_ms=2.0,
    ttft_p99_ms=3.0,
    itl_p50_ms=1.0,
    itl_p95_ms=2.0,
    itl_p99_ms=None,
)
SEALED = {
    "puzzle_parent.json": Sealed(lambda paths: paths.parent / INFO, lambda paths: read_parent_info(paths.parent)),
    "architecture.json": Sealed(lambda paths: paths.architecture(CHILD), lambda paths: read_architecture(CHILD, paths)),
    "baselines.json": Sealed(lambda paths: paths.baselines(CHILD), lambda paths: read_baselines(CHILD, paths)),
    "evaluation.json": Sealed(lambda paths: paths.evaluation(CHILD), lambda paths: read_evaluation(CHILD, paths)),
    "gkd.json": Sealed(lambda paths: paths.gkd(CHILD), lambda paths: read_gkd(CHILD, paths)),
    "search.json": _record(lambda paths: paths.search(CHILD)),
    "accuracy.json": Sealed(lambda paths: paths.accuracy(CHILD), lambda paths: read_accuracy(CHILD, paths)),
    "exports.json": Sealed(
        lambda paths: paths.exports(CHILD) / EXPORTS_OVERVIEW,
        lambda paths: exported_ggufs(CHILD, paths.exports(CHILD)),
    ),
    "server.json": Sealed(
        lambda paths: paths.root / "server.json",
        lambda paths: read_record(paths.root / "server.json", ServerState, REBUILD),
    ),
    "record of a piece": Sealed(
        lambda paths: paths.library / ".pieces/block_000.kv_1.json",
        lambda paths: Pieces(paths.library, REBUILD).get("block_000.kv_1"),
    ),
    "manifest.json": Sealed(lambda paths: paths.corpus / "manifest.json", lambda paths: read_manifest(paths.corpus)),
    "checksums.json": Sealed(
        lambda paths: paths.assembled(CHILD) / CHECKSUMS,
        lambda paths: Checkpoint(paths.assembled(CHILD), REBUILD).checksums,
    ),
    "config.json": Sealed(
        lambda paths: paths.assembled(CHILD) / "config.json",
        lambda paths: Checkpoint(paths.assembled(CHILD), REBUILD).config_json(),
    ),
    "scores.parquet": Sealed(lambda paths: paths.scores, lambda paths: read_scores(paths.scores)),
    "costs.parquet": Sealed(lambda paths: paths.costs, lambda paths: read_costs(paths.costs)),
    "costs of a search": Sealed(lambda paths: paths.costs, lambda paths: read_costs(paths.costs, takes_foreign=True)),
    "timings": Sealed(
        lambda paths: paths.root / "timings.parquet",
        lambda paths: read_timings_or_costs(paths.root / "timings.parquet"),
    ),
    "throughput.parquet": Sealed(
        lambda paths: paths.throughput(CHILD), lambda paths: read_throughput(paths.throughput(CHILD))
    ),
    "serving.parquet": Sealed(lambda paths: paths.serving, lambda paths: read_serving(paths.serving)),
    "index.parquet": _table(lambda paths: paths.library / "index.parquet"),
    "evaluation.parquet": _table(lambda paths: paths.evaluation(CHILD).with_suffix(".parquet")),
    "train.parquet": Sealed(
        lambda paths: split_path(paths.corpus, "train"), lambda paths: read_sequences(paths.corpus, "train").tolist()
    ),
}


def _gguf(paths: Paths) -> Path:
    return paths.exports(CHILD) / "gguf-f16" / FORMATS["gguf-f16"].gguf_name(CHILD)


def _add_ids(writer: GGUFWriter) -> None:
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)


def _shard(paths: Paths) -> Path:
    return shard_path(paths.activations, "train", 0, 0)


def _read_recorded_shard(paths: Paths) -> Any:
    """Read a shard that is recorded as it is, damaged or not."""
    pieces = Pieces(paths.activations, REBUILD)
    pieces.finish(shard_name("train", 0), "key", [_shard(paths)], {"sequences_per_shard": 2})
    return BoundaryReader(paths.activations, "train", 0).read([0, 1])


UNSEALED = {
    "shard.arrow": Sealed(_shard, _read_recorded_shard),
    "LM head of a GGUF": Sealed(_gguf, lambda paths: head_of(_gguf(paths))),
    "model in GGUF": Sealed(
        _gguf, lambda paths: (GgufModel(_gguf(paths)).config(), list(GgufModel(_gguf(paths)).tensors()))
    ),
}
"""Files that their readers take as they are: what is damaged is another value, or an error."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """Return a run with every table and record; tests put back what they change."""
    paths = Paths(tmp_path_factory.mktemp("run") / "artifacts")
    write_run(paths)
    write_sealed(paths.root / "server.json", {"pid": 4321, "port": 4200})
    _, config = save_tiny("llama", paths.root / "tiny")
    write_gguf(_gguf(paths), config, [(Attention("gqa", 2), Ffn("gated", 96))], None, "F16", tokenizer=_add_ids)
    listed = {"gguf-f16": {"files": {f"gguf-f16/{_gguf(paths).name}": {"sha256": sha256(_gguf(paths))}}}}
    write_sealed(paths.exports(CHILD) / EXPORTS_OVERVIEW, {"formats": listed})
    write_shard(_shard(paths), torch.arange(24.0).view(2, 3, 4), {})
    weights = paths.library / "block_000/kv_1.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    Pieces(paths.library, REBUILD).finish("block_000.kv_1", "key", [weights], {"variant": "kv_1", "loss_after": 0.125})
    tiny_corpus(paths.corpus, 160, SEQ_LEN)
    writer = CheckpointWriter(paths.assembled(CHILD), 1 << 20)
    writer.add({"model.norm.weight": torch.arange(8.0), "model.embed_tokens.weight": torch.ones(4, 8)})
    write_json(paths.assembled(CHILD) / "config.json", {"model_type": "llama", "eos_token_id": [257, 258], "eps": 1e-5})
    writer.finish()
    costs = read_costs(paths.costs)[:9]
    timed: dict[str, Any] = {
        "machine": "2 cores",
        "versions": "torch 2",
        "dtype": "float32",
        "threads": 2,
        "repeats": 9,
    }
    write_timings(paths.root / "timings.parquet", [TimingRow(**vars(row), **timed, spread=0.03) for row in costs])
    write_serving(paths.serving, [replace(_SERVED, concurrency=2**power) for power in range(6)])
    rows = [{"model": "parent", "sequence": index, "kl": index / 7} for index in range(12)]
    write_table(paths.evaluation(CHILD).with_suffix(".parquet"), pa.Table.from_pylist(rows))
    return paths


@pytest.mark.parametrize("name", SEALED)
def test_a_flipped_bit_is_found_or_changes_no_value(name: str, finished: Paths) -> None:
    sealed = SEALED[name]
    path, chance = sealed.path(finished), random.Random(0)
    whole, expected = path.read_bytes(), sealed.read(finished)
    num_found = 0
    try:
        for bit in chance.sample(range(8 * len(whole)), FLIPS):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            try:
                assert sealed.read(finished) == expected, (bit // 8, bit % 8)
            except DamagedFileError as error:
                _check_message(error, path)
                num_found += 1
    finally:
        path.write_bytes(whole)
    assert num_found > FLIPS / 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def _flipped(whole: bytes, bits: list[int]) -> bytes:
    data = bytearray(whole)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def _damages(whole: bytes) -> st.SearchStrategy[bytes]:
    """Return what may stand in a file's place: any bytes, a part of it, some bits flipped, JSON of any shape."""
    bits = st.integers(0, 8 * len(whole) - 1) | st.integers(0, 8 * min(len(whole), 400) - 1)
    return st.one_of(
        st.binary(max_size=300),
        st.integers(0, len(whole)).map(lambda size: whole[:size]),
        st.lists(bits, min_size=1, max_size=3).map(lambda flips: _flipped(whole, flips)),
        JSON.map(lambda value: json.dumps(value).encode()),
    )


def _sealed_otherwise(whole: bytes) -> st.SearchStrategy[bytes]:
    """Return records in the shape of other versions: a field is another value, or gone, and the seal is theirs."""
    record = {name: value for name, value in json.loads(whole).items() if name != SEAL}

    def sealed(name: str, value: Any) -> bytes:
        other = {key: record[key] for key in record if key != name} | ({} if value is None else {name: value})
        return json.dumps({**other, SEAL: digest_of(other)}).encode()

    return st.builds(sealed, st.sampled_from(sorted(record)), JSON)


@pytest.mark.parametrize("name", [*SEALED, *UNSEALED])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_whatever_a_file_holds_is_its_value_or_one_sentence(name: str, data: st.DataObject, finished: Paths) -> None:
    sealed = {**SEALED, **UNSEALED}[name]
    path = sealed.path(finished)
    whole, expected = path.read_bytes(), sealed.read(finished)
    has_seal = path.suffix == ".json" and SEAL in json.loads(whole)
    is_other_version = has_seal and data.draw(st.booleans())
    path.write_bytes(data.draw(_sealed_otherwise(whole) if is_other_version else _damages(whole)))
    try:
        value = sealed.read(finished)
        assert name in UNSEALED or is_other_version or value == expected
    except InputError as error:
        assert "\n" not in str(error) and path.name in str(error)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", SEALED)
def test_a_file_that_is_cut_emptied_or_gone_is_named_with_its_remedy(name: str, finished: Paths) -> None:
    sealed = SEALED[name]
    path = sealed.path(finished)
    whole = path.read_bytes()
    try:
        for size in (0, 1, len(whole) // 2, len(whole) - 3):
            path.write_bytes(whole[:size])
            with pytest.raises(DamagedFileError) as damaged:
                sealed.read(finished)
            _check_message(damaged.value, path)
        path.unlink()
        with pytest.raises(InputError) as missing:
            sealed.read(finished)
        assert "run `" in str(missing.value)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["architecture.json", "checksums.json", "record of a piece", "scores.parquet"])
def test_a_seal_that_was_taken_out_is_an_error_and_no_switch(name: str, finished: Paths) -> None:
    sealed = SEALED[name]
    path = sealed.path(finished)
    whole = path.read_bytes()
    try:
        if path.suffix == ".json":
            write_json(path, read_sealed(path, REBUILD))
        else:
            pq.write_table(read_table(path, REBUILD).replace_schema_metadata(None), path)
        with pytest.raises(DamagedFileError) as damaged:
            sealed.read(finished)
        _check_message(damaged.value, path)
    finally:
        path.write_bytes(whole)


def test_a_table_of_others_is_read_where_users_bring_their_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, table = tmp_path / "theirs.parquet", pa.table({"a": [1, 2], "when": pa.array([1, 2], pa.timestamp("ms"))})
    pq.write_table(table, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_table(path, REBUILD, takes_foreign=True).equals(table)
    assert not caplog.records
    with pytest.raises(DamagedFileError):
        read_table(path, REBUILD)


def test_a_damaged_file_gets_a_new_date_so_that_dvc_looks_at_it(tmp_path: Path) -> None:
    """Bytes rot without one, and DVC would call the stage up to date that its reader's message names."""
    path = tmp_path / "record.json"
    write_sealed(path, {"a": 1})
    path.write_text(path.read_text().replace("1,", "2,"))
    os.utime(path, (1e9, 1e9))
    with pytest.raises(DamagedFileError):
        read_sealed(path, REBUILD)
    assert path.stat().st_mtime > 1e9


_RECORD = Path("record.json")
_CACHE = Path(".dvc/cache/files/md5")


def _made(out: str, copy: str) -> Repo:
    """Return a stage `it` of DVC that made `out` by a shell command and, as ours do, has DVC check its copy."""
    write_sealed(Path("original.json"), {"a": 1})
    repo = Repo.init(no_scm=True)
    check = f"from pathlib import Path; import storage.files; storage.files.have_cached_copy_checked(Path('{out}'))"
    repo.run(name="it", cmd=f'{copy} && {sys.executable} -c "{check}"', deps=["original.json"], outs=[out])
    return repo


def _rot(cached: Path, rotten: str) -> None:
    """Alter an object of the cache in place; it is read-only and dated as before."""
    written = cached.stat()
    cached.chmod(0o644)
    cached.write_text(rotten)
    cached.chmod(written.st_mode)
    os.utime(cached, ns=(written.st_atime_ns, written.st_mtime_ns))


@pytest.fixture
def rotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repo:
    """Return a stage that made record.json, of which the cached copy rotted and was checked out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    _made(str(_RECORD), f"cp original.json {_RECORD}")
    cached = next(_CACHE.glob("??/*"))
    _rot(cached, cached.read_text().replace("1,", "2,"))
    _RECORD.unlink()
    Repo().checkout()
    return Repo()  # as another process opens it


def test_the_command_of_a_message_rebuilds_what_rotted_in_dvcs_cache(rotten: Repo) -> None:
    """DVC checks nothing that is read-only in its cache, and put the rotten object back for the stage's run."""
    with pytest.raises(DamagedFileError, match=REBUILD):
        read_sealed(_RECORD, REBUILD)
    rotten.reproduce("it")
    assert read_sealed(_RECORD, REBUILD) == {"a": 1}
    _RECORD.unlink()
    rotten.checkout()
    assert read_sealed(_RECORD, REBUILD) == {"a": 1}


def test_what_rotted_in_dvcs_cache_never_takes_the_place_of_what_a_stage_wrote(rotten: Repo) -> None:
    """DVC copied the rotten object over the file that the stage had just made, and said nothing."""
    rotten.reproduce("it", force=True)
    assert read_sealed(_RECORD, REBUILD) == {"a": 1}


def test_the_list_of_a_folder_that_rotted_in_dvcs_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC kept the rotten list behind the stage's run, and every checkout missed its files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    _made("made", "mkdir -p made && cp original.json made/record.json")
    _rot(next(_CACHE.glob("??/*.dir")), "")
    shutil.rmtree("made")
    with pytest.raises(CheckoutError):
        Repo().checkout()
    Repo().reproduce("it")
    shutil.rmtree("made")
    Repo().checkout()
    assert read_sealed(Path("made/record.json"), REBUILD) == {"a": 1}


def _check_message(error: DamagedFileError, path: Path) -> None:
    """Check that it is one sentence that names the file and the command."""
    message = str(error)
    assert str(path) in message or path.name in message, message
    assert "run `" in message and "\n" not in message, message
    assert error.exit_code == 4
