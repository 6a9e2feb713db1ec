"""score_blocks: the table equals full-model replacement; more tokens and variants append."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from storage.corpus import (
    read_documents,
    read_manifest,
    read_sequences,
    split_path,
    write_manifest,
    write_split,
)
from storage.documents import PackedSequence
from storage.files import DamagedFileError, InputError, sha256
from storage.library import Library, channel_order_name, entry_name
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.records import ScoreRow
from storage.tables import read_scores
from storage.variants import Ffn
from tasks.puzzle.model.assembly import compose, initial_weights
from tasks.puzzle.model.initialise import Tensors
from tasks.puzzle.removals import removal, removal_order, without
from tasks.puzzle.search.score_rule import Scores
from tasks.puzzle.search_space import parent_blocks
from tasks.score_blocks import plan_groups, plan_removals, score_jobs, scores_of_removals
from tasks.tensors.replacements import ReplacementWeights
from tests.reference import full_replacement
from tests.settings import SEQ_LEN, tiny_params
from tests.stages import cache, checksums, distill, prepare, score
from tests.tiny import FAMILIES, flip_byte

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # nats; float32 logits of order 1, summed in another order than transformers'


def tensors_of(row: ScoreRow, paths: Paths) -> Tensors:
    """Compose the block that a row is about."""
    parent, library, index = Parent(paths.parent), Library(paths.library), row.first_block
    block = parent.block(index, CPU, torch.float32)
    if row.weights == "decoupled":
        return compose(parent.config, block, row.replacement, lambda variant: library.read(entry_name(index, variant)))
    order = library.read(channel_order_name(index))["order"]
    return compose(parent.config, block, row.replacement, initial_weights(parent.config, block, order))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_equals_full_model_replacement(family: str, tmp_path: Path) -> None:
    params, paths = prepare(family, tmp_path)
    cache(params, paths)
    distill(params, paths)
    score(params, paths)
    rows = read_scores(paths.scores)
    # 3 blocks x (3 trained on 4 sequences + the same 3 initial on 2 + 2 no-ops on 4)
    assert len(rows) == 3 * (3 * 4 + 3 * 2 + 2 * 4)
    tokens = torch.from_numpy(read_sequences(paths.corpus, "calibration", 0, 4)).long()
    expected = {}
    for row in rows:
        name = (row.replacement, row.weights)
        if name not in expected:
            expected[name] = full_replacement(family, tokens, {row.first_block: tensors_of(row, paths)})
        losses, sequence = expected[name], row.sequence_shard
        assert row.tokens == SEQ_LEN - 1
        assert row.kl == pytest.approx(float(losses.kl[sequence].mean()), abs=TOLERANCE)
        assert row.lm_loss == pytest.approx(float(losses.lm_loss[sequence].mean()), abs=TOLERANCE)
        assert row.top1_agreement == pytest.approx(float(losses.top1[sequence].mean()))
        assert row.cosine == pytest.approx(float(losses.cosine[sequence].mean()), abs=TOLERANCE)


def test_a_span_is_scored_as_the_full_model_without_its_blocks(tmp_path: Path) -> None:
    params, paths = prepare("llama", tmp_path, distill_blocks={"spans": [2], "linear": True})
    cache(params, paths)
    distill(params, paths)
    score(params, paths)
    rows = [row for row in read_scores(paths.scores) if row.span == 2]
    # 2 spans x (whole, kv_1, 2 widths, 2 linear, 2 no-ops) on 4 sequences
    assert len(rows) == 2 * 8 * 4
    assert {row.weights for row in rows} == {"decoupled"}
    tokens = torch.from_numpy(read_sequences(paths.corpus, "calibration", 0, 4)).long()
    weights = ReplacementWeights(Parent(paths.parent), Library(paths.library), CPU, torch.float32)
    expected = {}
    for row in rows:
        if row.replacement not in expected:
            tensors = weights.tensors(row.replacement, "decoupled")
            changes = {row.first_block: tensors, row.first_block + 1: {}}
            expected[row.replacement] = full_replacement("llama", tokens, changes)
        assert row.kl == pytest.approx(float(expected[row.replacement].kl[row.sequence_shard].mean()), abs=TOLERANCE)
    scores = Scores.from_rows(read_scores(paths.scores), Parent(paths.parent).config)
    spans = [replacement for replacement in scores.replacements("decoupled") if replacement.span == 2]
    assert len(spans) == 2 * 4 * 5  # every attention with every FFN
    hashes = {(row.first_block, row.weights_hash) for row in rows}
    assert len(hashes) == 2 * 6  # each trained variant's own; the whole block's alone where nothing else is trained


def test_only_the_first_tokens_of_each_sequence_are_scored(tmp_path: Path) -> None:
    """More documents for the same price; the rows say which document each is of."""
    params, paths = prepare("llama", tmp_path, score_blocks={"sequence_tokens": 8, "initial_tokens": 0})
    cache(params, paths)
    distill(params, paths)
    score(params, paths)
    rows = read_scores(paths.scores)
    num_sequences = 4 * SEQ_LEN // 8
    assert len(rows) == 3 * 5 * num_sequences
    documents = read_documents(paths.corpus, "calibration", 0, num_sequences)
    assert {(row.sequence_shard, row.document) for row in rows} == set(enumerate(documents.tolist()))
    tokens = torch.from_numpy(read_sequences(paths.corpus, "calibration", 0, num_sequences)[:, :8]).long()
    first = [row for row in rows if row.replacement == rows[0].replacement]
    expected = full_replacement("llama", tokens, {0: tensors_of(rows[0], paths)})
    assert [row.tokens for row in first] == [7] * num_sequences
    assert [row.kl for row in first] == pytest.approx(expected.kl.mean(1).tolist(), abs=TOLERANCE)


DEPTH = {"depth_tokens": 2 * SEQ_LEN}


def test_blocks_are_removed_one_after_the_other_by_joint_kl(
    finished: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the full model without those blocks; scores of single blocks stay what they are."""
    monkeypatch.setattr("tasks.score_blocks.MOST_REMOVED", 1.0)
    _, paths = finished
    before = read_scores(paths.scores)
    assert score(tiny_params(score_blocks=DEPTH), paths) == []
    rows = read_scores(paths.scores)
    assert [row for row in rows if row.around == "parent"] == list(before)
    tokens = torch.from_numpy(read_sequences(paths.corpus, "calibration", 0, 2)).long()
    parent = parent_blocks(Parent(paths.parent).config)
    order: list[int] = []
    for _ in range(3):
        step = [row for row in rows if row.around == without(parent, order).digest]
        kls = {}
        for block in sorted({0, 1, 2} - {*order}):
            expected = full_replacement("llama", tokens, {index: {} for index in (*order, block)})
            measured = [row.kl for row in step if row.replacement == removal(block)]
            assert measured == pytest.approx(expected.kl.mean(1).tolist(), abs=TOLERANCE)
            kls[block] = float(expected.kl.mean())
        assert len(step) == 2 * len(kls)
        order.append(min(kls, key=kls.__getitem__))
    assert removal_order(rows, parent) == tuple(order)
    scores = Scores.from_rows(rows, Parent(paths.parent).config)
    assert scores.replacements("decoupled") == Scores.from_rows(before, Parent(paths.parent).config).replacements(
        "decoupled"
    )


def test_a_killed_removal_goes_on_and_altered_records_are_made_anew(
    finished: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.score_blocks.MOST_REMOVED", 1.0)
    _, paths = finished
    params = tiny_params(score_blocks=DEPTH)
    score(params, paths)
    table = paths.scores.read_bytes()
    records = paths.score_pieces / ".pieces"
    damaged = records / "removal_001.batch_0000.json"
    damaged.write_text(damaged.read_text().replace('"kl": ', '"kl": 1', 1))
    (records / "removal_002.batch_0000.json").unlink()
    kept = (records / "removal_000.batch_0000.json").stat().st_mtime_ns
    removals = scores_of_removals.fn(params, paths)
    plan_groups.fn(params, paths)
    assert [batch.step for batch in plan_removals.fn(removals, params, paths)] == [1]
    score(params, paths)
    assert paths.scores.read_bytes() == table
    assert (records / "removal_000.batch_0000.json").stat().st_mtime_ns == kept
    score(tiny_params(), paths)
    assert not list(records.glob("removal_*"))


def test_no_ops_are_scored_once_and_have_no_weights(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    for row in read_scores(paths.scores):
        no_op = "no_op" in (row.attention, row.ffn)
        assert (row.weights_hash == "") == no_op
        assert row.weights == "initial" or not no_op
        assert row.around == "parent"


def test_trained_weights_score_better_than_initial_ones(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    kl = {(row.replacement, row.weights, row.sequence_shard): row.kl for row in read_scores(paths.scores)}
    gains = [
        kl[replacement, "initial", shard] - kl[replacement, "decoupled", shard]
        for replacement, weights, shard in kl
        if weights == "decoupled" and (replacement, "initial", shard) in kl
    ]
    assert len(gains) == 3 * 3 * 2
    assert sum(gains) > 0


def test_two_runs_give_the_same_bytes_whatever_the_group(finished: tuple[Params, Paths], tmp_path: Path) -> None:
    _, paths = finished
    _, others = prepare("llama", tmp_path / "again")
    params = tiny_params(score_blocks={"blocks_per_group": 3})
    cache(params, others)
    distill(params, others)
    for group in reversed(plan_groups.fn(params, others)):
        for job in group.jobs:
            score_jobs.fn(replace(group, jobs=(job,)), params, others)
    assert score(params, others) == []
    assert others.scores.read_bytes() == paths.scores.read_bytes()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_two_groups_write_to_the_same_record(size: int, finished: tuple[Params, Paths]) -> None:
    """They are workers' of several processes, and rows are added to a record by reading and writing it."""
    _, paths = finished
    shutil.rmtree(paths.score_pieces)
    groups = plan_groups.fn(tiny_params(score_blocks={"blocks_per_group": size}), paths)
    records = [record for group in groups for record in {job.record for job in group.jobs}]
    assert len(records) == len(set(records)) >= len(groups) > 1


def test_only_what_a_killed_run_left_undone_is_scored(finished: tuple[Params, Paths]) -> None:
    params, paths = finished
    table = paths.scores.read_bytes()
    records = sorted((paths.score_pieces / ".pieces").iterdir())
    records[1].unlink()
    (paths.score_pieces / ".pieces" / "stranger.json").write_text("{}")
    jobs = score(params, paths)
    assert {job.record for job in jobs} == {records[1].stem}
    assert len(jobs) == 5  # block 0, batch 1: three trained variants and two no-ops
    assert paths.scores.read_bytes() == table
    assert not (paths.score_pieces / ".pieces" / "stranger.json").exists()


def test_nothing_is_scored_twice(finished: tuple[Params, Paths]) -> None:
    params, paths = finished
    table = paths.scores.read_bytes()
    assert score(params, paths) == []
    assert paths.scores.read_bytes() == table


def test_more_tokens_append_and_leave_the_old_rows_as_they_are(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    old = read_scores(paths.scores)
    params = tiny_params(score_blocks={"tokens": 8 * SEQ_LEN, "initial_tokens": 4 * SEQ_LEN})
    jobs = score(params, paths)
    assert {job.batch for job in jobs if job.weights == "decoupled"} == {2, 3}
    assert {job.batch for job in jobs if job.weights_hash and job.weights == "initial"} == {1}
    new = read_scores(paths.scores)
    assert [row for row in new if row in set(old)] == list(old)
    assert len(new) == 3 * (3 * 8 + 3 * 4 + 2 * 8)


def test_a_kl_that_is_not_finite_is_one_error(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    library, spoilt = Library(paths.library), entry_name(1, Ffn("gated", 48))
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in library.read(spoilt).items()}
    library.pieces.finish(spoilt, "", [library.write(spoilt, tensors)], library.pieces.get(spoilt)["facts"])
    with pytest.raises(InputError, match=r"ffn_48.*KL of nan on calibration sequence 0.*learning_rate"):
        score(tiny_params(), paths)


def test_fewer_tokens_are_a_part_of_the_table(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    old = read_scores(paths.scores)
    assert score(tiny_params(score_blocks={"tokens": 2 * SEQ_LEN, "initial_tokens": 0}), paths) == []
    kept = [row for row in old if row.sequence_shard < 2 and (row.weights == "decoupled" or not row.weights_hash)]
    assert list(read_scores(paths.scores)) == kept


def test_one_more_width_scores_only_that(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    params = tiny_params(distill_blocks={"ffn_ratios": [0.5, 0.25, 0.75]})
    distill(params, paths)
    jobs = score(params, paths)
    assert {job.replacement.ffn.name for job in jobs} == {"ffn_72"}
    assert len(jobs) == 3 * (2 + 1)  # blocks x (batches of trained + of initial weights)


def test_retrained_weights_are_scored_anew_but_not_the_initial_ones(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    params = tiny_params(distill_blocks={"learning_rate": 3e-3})
    distill(params, paths)
    assert {job.weights for job in score(params, paths)} == {"decoupled"}


def test_sequences_at_once_are_part_of_what_was_measured(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    before = read_scores(paths.scores)
    assert score(tiny_params(score_blocks={"sequences_per_batch": 1}), paths) != []
    after = read_scores(paths.scores)
    assert [row.sequence_shard for row in after] == [row.sequence_shard for row in before]
    for old, new in zip(before, after, strict=True):
        assert new.kl == pytest.approx(old.kl, abs=TOLERANCE)


def test_boundaries_of_another_precision_are_scored_anew(finished: tuple[Params, Paths]) -> None:
    """Rows are made anew even where library entries have the same bytes; those of initial weights once stayed."""
    _, paths = finished
    old, params = read_scores(paths.scores), tiny_params(cache_activations={"dtype": "bfloat16"})
    cache(params, paths)
    distill(params, paths)
    assert len(score(params, paths)) == len(old) // 2  # two rows a job
    assert not {row.kl for row in read_scores(paths.scores)} & {row.kl for row in old}


def test_a_batch_that_repeats_another_has_rows_of_its_own(finished: tuple[Params, Paths]) -> None:
    """Rows were once looked up by key alone, so that those of the repeated batch were missing in the table."""
    params, paths = finished
    _repeat_the_first_batch(paths)
    jobs = score(params, paths)
    assert {job.batch for job in jobs} == {1}
    rows = {(row.replacement, row.weights, row.sequence_shard): row for row in read_scores(paths.scores)}
    for (replacement, weights, shard), row in rows.items():
        if shard in (2, 3):
            assert row.lm_loss == rows[replacement, weights, shard - 2].lm_loss


def _repeat_the_first_batch(paths: Paths) -> None:
    tokens, documents = (read(paths.corpus, "calibration") for read in (read_sequences, read_documents))
    tokens[2:4] = tokens[0:2]
    path = split_path(paths.corpus, "calibration")
    _, token_sha256 = write_split(path, map(PackedSequence, tokens, documents), SEQ_LEN)
    manifest = read_manifest(paths.corpus)
    split = replace(manifest.splits["calibration"], token_sha256=token_sha256, sha256=sha256(path))
    write_manifest(paths.corpus, replace(manifest, splits={**manifest.splits, "calibration": split}))
    cache(tiny_params(), paths)


def test_an_altered_record_is_scored_anew(finished: tuple[Params, Paths]) -> None:
    params, paths = finished
    table = paths.scores.read_bytes()
    damaged = sorted((paths.score_pieces / ".pieces").iterdir())[2]
    damaged.write_text(damaged.read_text().replace('"kl": 0.', '"kl": 1.', 1))
    assert {job.record for job in score(params, paths)} == {damaged.stem}
    assert paths.scores.read_bytes() == table


def test_damaged_weights_stop_the_scoring_and_name_the_command(finished: tuple[Params, Paths]) -> None:
    params, paths = finished
    (paths.score_pieces / ".pieces" / "block_001.batch_0000.json").unlink()
    flip_byte(paths.library / "block_001" / "ffn_24.safetensors")
    [group] = plan_groups.fn(params, paths)
    with pytest.raises(DamagedFileError, match=r"block_001/ffn_24.*dvc repro distill_blocks"):
        score_jobs.fn(group, params, paths)


def test_scores_do_not_touch_what_they_read(finished: tuple[Params, Paths]) -> None:
    params, paths = finished
    read = (paths.parent, paths.corpus, paths.activations, paths.library)
    before = [checksums(folder) for folder in read]
    shutil.rmtree(paths.score_pieces)
    assert score(params, paths) != []
    assert [checksums(folder) for folder in read] == before
