"""evaluate_child: qualities on every domain are those of whole models, and errors are those of its documents."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from storage.architecture import Baseline, Baselines, write_baselines
from storage.corpus import read_sequences
from storage.documents import TRAINING_MIX
from storage.evaluation import CHILD_STATES, Evaluation, Exports, read_evaluation, write_evaluation
from storage.files import DamagedFileError, InputError, sha256, write_sealed
from storage.params import Params
from storage.parent import Parent
from storage.paths import EXPORTS_OVERVIEW, Paths
from storage.tables import write_throughput
from storage.variants import Attention, Ffn, Replacement
from tasks import evaluate_child
from tasks.checkpoints.export_quality import ExportedSequences
from tasks.evaluate_child import MeasuredBatch
from tasks.puzzle.model.child import DeciLMForCausalLM  # importing it is what makes children load
from tasks.puzzle.quality.evaluation import SequenceQuality
from tasks.puzzle.search_space import parent_blocks
from tasks.puzzle.standard_error import standard_error
from tests.chosen import PREDICTED
from tests.report_run import RATE, throughput_rows
from tests.settings import SEQ_LEN, tiny_params
from tests.stages import assemble_blocks
from tests.tiny import SIZES, tiny_corpus, tiny_model

BLOCKS = (
    Replacement(0, 1, Attention("gqa", 2), Ffn("gated", 96)),
    Replacement(1, 1, Attention("gqa", 1), Ffn("gated", 48)),
    Replacement(2, 1, Attention("no_op"), Ffn("gated", 24)),
)
OTHER_BLOCKS = (*BLOCKS[:1], replace(BLOCKS[1], ffn=Ffn("no_op")), *BLOCKS[2:])


@pytest.fixture(scope="module")
def made(_finished: tuple[Params, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Paths]:
    """Make a child whose correction changed nothing, another one in place of the distilled; a domain `prose`."""
    params, finished = _finished
    paths = Paths(shutil.copytree(finished, tmp_path_factory.mktemp("made") / "artifacts"))
    tiny_corpus(paths.corpus, SIZES["vocab_size"], SEQ_LEN, domains=("prose",))
    assemble_blocks(params, paths, list(OTHER_BLOCKS))
    paths.assembled("small").rename(paths.distilled("small"))
    assemble_blocks(params, paths, list(BLOCKS))
    shutil.copytree(paths.assembled("small"), paths.refined("small"))
    baselines = {
        "parent_again": Baseline("decoupled", None, parent_blocks(Parent(paths.parent).config), PREDICTED),
        "child_again": Baseline("decoupled", None, BLOCKS, PREDICTED),
        "untrained": Baseline("initial", None, BLOCKS, PREDICTED),
        "depth": Baseline("decoupled", infeasible="too tight"),
    }
    write_baselines(paths.baselines("small"), Baselines("small", baselines))
    write_throughput(paths.throughput("small"), throughput_rows(RATE))
    return params, paths


def evaluated(params: Params, paths: Paths) -> Evaluation:
    batches = evaluate_child.plan_batches(params, paths)
    measured = [evaluate_child.measure_quality.fn(batch, "small", params, paths) for batch in batches]
    evaluate_child.write_evaluation.fn("small", measured, [], params, paths)
    return read_evaluation("small", paths)


@pytest.fixture(scope="module")
def evaluation(made: tuple[Params, Paths]) -> Evaluation:
    return evaluated(*made)


@pytest.mark.parametrize(("domain", "split"), [(TRAINING_MIX, "validation"), ("prose", "domain_prose")])
def test_a_domains_qualities_are_those_of_whole_models(
    domain: str, split: str, made: tuple[Params, Paths], evaluation: Evaluation
) -> None:
    _, paths = made
    tokens = torch.from_numpy(read_sequences(paths.corpus, split)).long()
    models = tiny_model("llama"), AutoModelForCausalLM.from_pretrained(paths.distilled("small"), dtype=torch.float32)
    with torch.inference_mode():
        parent, child = (model(tokens).logits[:, :-1] for model in models)
    assert isinstance(models[1], DeciLMForCausalLM)
    losses = [functional.cross_entropy(logits.mT, tokens[:, 1:]) for logits in (parent, child)]
    kl = functional.kl_div(child.log_softmax(-1), parent.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    measured = evaluation.domains[domain]
    assert (measured.tokens, measured.sequences, measured.documents) == (8 * SEQ_LEN, 8, 8)
    assert measured.parent.perplexity == pytest.approx(losses[0].exp().item(), rel=1e-4)
    assert measured.distilled.perplexity == pytest.approx(losses[1].exp().item(), rel=1e-4)
    assert measured.distilled.kl == pytest.approx(kl.mean().item(), rel=1e-3)
    assert measured.distilled.kl_stderr == pytest.approx(standard_error(kl.mean(-1).tolist(), range(8)), rel=1e-3)
    agreement = (parent.argmax(-1) == child.argmax(-1)).double().mean().item()
    assert measured.distilled.top1_agreement == pytest.approx(agreement, abs=1.5 / tokens.numel())  # a tie


def test_equal_models_have_equal_qualities(evaluation: Evaluation) -> None:
    """The correction changed nothing; two baselines are the parent and the assembled child, made from the library."""
    for measured in evaluation.domains.values():
        assert measured.refined == measured.assembled
        assert measured.parent.kl == 0 and measured.paired["refined"].kl_difference == 0
        assert measured.baselines.keys() == {"parent_again", "child_again", "untrained"}
        assert measured.baselines["parent_again"].kl == pytest.approx(0, abs=1e-6)
        assert measured.paired["child_again"].kl_difference == pytest.approx(0, abs=1e-5)
        assert measured.paired["untrained"].kl_difference != 0
        difference = measured.distilled.kl - measured.assembled.kl
        assert measured.paired["distilled"].kl_difference == pytest.approx(difference)
        assert (measured.baselines["untrained"].sequences, measured.baselines["untrained"].documents) == (4, 4)


def test_a_row_for_each_sequence_of_each_model(made: tuple[Params, Paths], evaluation: Evaluation) -> None:
    _, paths = made
    rows = pq.read_table(paths.evaluation("small").with_suffix(".parquet")).to_pylist()
    assert len(rows) == 2 * (4 * 8 + 3 * 4)
    mine = [row for row in rows if (row["domain"], row["model"]) == ("prose", "distilled")]
    assert [row["document"] for row in mine] == [row["sequence"] for row in mine] == list(range(8))
    assert fmean(row["kl"] for row in mine) == pytest.approx(evaluation.domains["prose"].distilled.kl)


def test_a_small_domain_is_taken_whole_and_a_small_validation_split_is_an_error(made: tuple[Params, Paths]) -> None:
    params, paths = made
    sizes = {"tokens": 12 * SEQ_LEN, "domain_baseline_tokens": 3 * SEQ_LEN}
    larger = params.model_copy(update={"evaluate_child": params.evaluate_child.model_copy(update=sizes)})
    batches = evaluate_child.plan_batches(larger, paths)
    in_prose = [(batch.sequences[-1], batch.has_baselines) for batch in batches if batch.domain == "prose"]
    assert in_prose == [(2, True), (6, False), (7, False)]
    with pytest.raises(InputError, match=r"8 sequences of 16 tokens, 12 are wanted; raise prepare_corpus\.valid"):
        for batch in batches:
            evaluate_child.measure_quality.fn(batch, "small", larger, paths)


def made_up(domain: str, documents: list[int], kls: Sequence[float]) -> MeasuredBatch:
    """Return the same qualities for parent and child."""
    sequences = [SequenceQuality(kl, 2.0, 0.5, 0.9) for kl in kls]
    return MeasuredBatch(domain, documents, dict.fromkeys(("parent", *CHILD_STATES), sequences))


def test_errors_cluster_by_document_and_one_document_has_none(made: tuple[Params, Paths], tmp_path: Path) -> None:
    params, made_paths = made
    paths = Paths(tmp_path / "artifacts")
    shutil.copytree(made_paths.root, paths.root)
    kls, documents = [0.1, 0.3, 0.2, 0.6], [0, 0, 1, 2]
    batches = [made_up(TRAINING_MIX, documents[:2], kls[:2]), made_up(TRAINING_MIX, documents[2:], kls[2:])]
    evaluate_child.write_evaluation.fn("small", [*batches, made_up("prose", [5, 5], kls[:2])], [], params, paths)
    measured = read_evaluation("small", paths)
    training, prose = measured.domains[TRAINING_MIX], measured.domains["prose"]
    assert (training.sequences, training.documents) == (4, 3)
    assert training.assembled.kl_stderr == pytest.approx(standard_error(kls, documents))
    assert (prose.sequences, prose.documents) == (2, 1)
    assert prose.assembled.kl == pytest.approx(0.2)
    assert prose.assembled.kl_stderr is None and prose.paired["refined"].stderr is None
    assert measured.mean("distilled").kl == pytest.approx((0.3 + 0.2) / 2)
    assert measured.mean("distilled").kl_stderr is None


def test_a_batch_has_the_documents_of_its_split(made: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch) -> None:
    params, paths = made
    batch = evaluate_child.plan_batches(params, paths)[-1]
    assert (batch.domain, batch.sequences) == ("prose", range(4, 8))
    read = {("domain_prose", 4, 8): np.array([2, 2, 3, 5])}
    monkeypatch.setattr(evaluate_child, "read_documents", lambda _, *sequences: read[sequences])
    assert evaluate_child.measure_quality.fn(batch, "small", params, paths).documents == [2, 2, 3, 5]


def test_exports_have_the_documents_that_they_were_compared_on() -> None:
    sequences = [SequenceQuality(0.1, 2.0, 0.5, 0.9)] * 2
    exported = [ExportedSequences(sequences, {})]
    assert evaluate_child._exports(exported, [4, 4, 5, 6], tiny_params()) == Exports(2 * SEQ_LEN, 1, {})


def test_the_mean_over_domains_counts_each_alike(evaluation: Evaluation) -> None:
    first, second = (measured.distilled for measured in evaluation.domains.values())
    mean = evaluation.mean("distilled")
    assert mean.kl == pytest.approx((first.kl + second.kl) / 2)
    assert first.kl_stderr and second.kl_stderr and mean.kl_stderr
    assert mean.kl_stderr**2 == pytest.approx((first.kl_stderr**2 + second.kl_stderr**2) / 4)
    assert mean.perplexity**2 == pytest.approx(first.perplexity * second.perplexity)


def test_a_file_that_vanished_from_exports_is_an_error(made: tuple[Params, Paths], tmp_path: Path) -> None:
    """It dropped out of the comparison without a word, where the stage was run without DVC."""
    params, _ = made
    paths = Paths(tmp_path / "artifacts")
    path = paths.exports("small") / "gguf-f16/small-F16.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    listed = {"gguf-f16/small-F16.gguf": {"bytes": 7, "sha256": sha256(path)}}
    formats = {"gguf-f16": {"files": listed}, "nemotron-nas": {"files": {}}}
    write_sealed(paths.exports("small") / EXPORTS_OVERVIEW, {"formats": formats})
    assert evaluate_child.exported_files("small", params, paths) == {"gguf-f16": path}
    path.unlink()
    with pytest.raises(InputError, match=r"small-F16\.gguf is missing.*run `dvc repro export_child@small`"):
        evaluate_child.exported_files("small", params, paths)
    (paths.exports("small") / EXPORTS_OVERVIEW).unlink()
    with pytest.raises(InputError, match=r"exports\.json is missing; run `dvc repro export_child@small`"):
        evaluate_child.exported_files("small", params, paths)


def test_a_record_without_the_trainings_own_domain_is_damaged(evaluation: Evaluation, tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    paths.child("small").mkdir(parents=True)
    without = {name: measured for name, measured in evaluation.domains.items() if name != TRAINING_MIX}
    write_evaluation(paths.evaluation("small"), replace(evaluation, domains=without))
    with pytest.raises(DamagedFileError, match="has no domain 'training'; run `dvc repro evaluate_child@small`"):
        read_evaluation("small", paths)
