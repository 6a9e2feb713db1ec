"""Metrics of our own against numbers counted by hand."""

import math
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from storage.files import InputError
from tasks.accuracy.questions import read_rows
from tasks.puzzle.quality import harness
from tasks.puzzle.quality.harness import hub_tasks, local_tasks, probability_of_true, rouge_l

ROWS = [{"text": f"{number} and 1?", "right": str(number + 1), "kind": "sum"} for number in range(4)]
FORM: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "text",
    "doc_to_target": "right",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def test_rouge_l_is_f1_of_the_longest_common_subsequence() -> None:
    """Of `police killed the gunman` the other has `police the gunman`: 3 of 4 words, and 3 of its own 4."""
    assert rouge_l(["police killed the gunman"], ["police kill the gunman"]) == pytest.approx(0.75)
    assert rouge_l(["one two three"], ["one two three"]) == 1
    assert rouge_l(["one two three"], ["four"]) == 0


def test_the_probability_of_true_answers_is_normalised_over_all() -> None:
    answers = [(math.log(0.3), False), (math.log(0.1), False), (math.log(0.2), True)]
    assert probability_of_true({"mc2_labels": [1, 0, 1]}, answers) == {"acc": pytest.approx(0.5 / 0.6)}
    from_hub = {"mc2_targets": {"labels": [0, 1, 0]}, "mc1_targets": {"labels": [1, 0]}}
    assert probability_of_true(from_hub, answers) == {"acc": pytest.approx(0.1 / 0.6)}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"process_results": "probability_of_truth"}, "process_results of its form one of probability_of_true, found"),
        ({"process_results": "rouge_l"}, "expected as process_results of its form one of"),
        ({"metric_list": [{"metric": "rouge"}]}, "metric of its form one of .*exact_match.*rouge_l, found 'rouge'"),
        ({"metric_list": [{"metric": "bleu", "hf_evaluate": True}]}, "hf_evaluate would load code from the hub"),
        ({"metric_list": "acc"}, "expected as metric_list of its form a list of {metric: name}, found 'acc'"),
        ({"metric_list": ["acc"]}, "expected as metric_list"),
        ({"metric_list": [{"aggregation": "mean"}]}, "expected as metric_list"),
        ({"metric_list": None}, "expected as metric_list"),
        ({"group_by": "subject"}, r"group_by .* 'subject'; .* found None \(columns: text, right, kind\)"),
        ({"num_fewshot": "4"}, "expected as num_fewshot of its form a number of examples, found '4'"),
        ({"num_fewshot": 4}, "num_fewshot 4 needs at least 5 rows to take examples from, found 4"),
    ],
)
def test_a_form_that_cannot_be_asked_is_one_sentence_and_loads_no_code(
    changed: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(local_tasks("own", FORM, ROWS, None, 3)) == ["own"]
    assert list(local_tasks("own", {**FORM, "group_by": "kind"}, ROWS, None, None)) == ["own_sum"]
    monkeypatch.setattr("evaluate.load", lambda name: pytest.fail(f"{name} is looked for on the hub"))
    with pytest.raises(InputError, match=problem):
        local_tasks("own", {**FORM, **changed}, ROWS, None, None)


@pytest.mark.parametrize("takes_questions", [False, True])
def test_examples_are_of_the_kind_of_the_question(takes_questions: bool) -> None:
    rows = [{**row, "kind": kind} for kind in ("sum", "product") for row in ROWS]
    examples = None if takes_questions else [{**row, "text": "an example"} for row in rows]
    tasks = local_tasks("own", {**FORM, "group_by": "kind"}, rows, examples, 2)
    assert tasks.keys() == {"own_sum", "own_product"}
    for name, task in tasks.items():
        shown = list(task.fewshot_docs() or ())
        assert {f"own_{row['kind']}" for row in (*task.eval_docs, *shown)} == {name}
        assert {row["text"] == "an example" for row in shown} == {not takes_questions}


@pytest.mark.parametrize("error", [ValueError("no such config"), datasets.exceptions.DatasetsError("no such split")])
def test_whatever_the_hub_raises_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(harness, "_hub", lambda: SimpleNamespace(all_tasks=["piqa"], load=load))
    with pytest.raises(InputError, match=r"questions of piqa cannot be loaded from the hub.*no such"):
        hub_tasks("piqa")
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match=r"hub:some/set@main cannot be loaded .*no such"):
        read_rows("hub:some/set@main", (), "here")
