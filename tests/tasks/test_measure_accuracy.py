"""Accuracy of tiny models against log-likelihoods summed by hand, from files and from lm-eval's own task."""

import importlib.util
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from storage.checkpoints import CheckpointWriter
from storage.files import DamagedFileError, InputError, read_sealed, write_json
from storage.model_config import EMBEDDING, NORM
from storage.nemotron_nas import to_nemotron_nas
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.sections import AccuracyTask
from storage.variants import Attention, Ffn, Replacement
from tasks import measure_accuracy as stage
from tasks.prepare_parent import prepare_parent
from tasks.puzzle.model.assembly import compose
from tasks.puzzle.model.child import DeciLMForCausalLM
from tasks.puzzle.quality.accuracy import Comparison
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tests.clone import tiny_parent
from tests.settings import tiny_params
from tests.tiny import flip_byte

TARGET = "small"
NO_ATTENTION, NO_FFN = Attention("no_op"), Ffn("no_op")
ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Artifacts with a parent, an all-parent child as `assembled` and a pruned one as `distilled`, and questions."""

    paths: Paths
    rows: list[Row]

    def params(self, *tasks: Row, **run: Any) -> Params:
        return tiny_params(measure_accuracy={"tasks": list(tasks), "sequences_per_batch": 3}, run=run)

    def file(self, name: str, rows: list[Row]) -> str:
        path = self.paths.root.parent / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)

    def measured(self, task: Row) -> Comparison:
        task_accuracy = stage.measure.fn(AccuracyTask.model_validate(task), TARGET, self.params(task), self.paths)
        return task_accuracy.comparison

    def by_hand(self, model: str, text: Callable[[Row], str], metric: str, rows: list[Row]) -> list[int]:
        """Return a model's choice in each row, by the sum of float32 log-probabilities of the choice's tokens."""
        folder = {
            "parent": self.paths.parent,
            "assembled": self.paths.assembled(TARGET),
            "distilled": self.paths.distilled(TARGET),
        }[model]
        loader: Any = AutoModelForCausalLM if model == "parent" else DeciLMForCausalLM
        causal, tokenizer = loader.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

        def score(prompt: str, choice: str) -> float:
            ids, start = tokenizer(f"{prompt} {choice}").input_ids, len(tokenizer(prompt).input_ids)
            with torch.no_grad():
                log_probabilities = causal(torch.tensor([ids])).logits[0].log_softmax(-1)
            total = sum(float(log_probabilities[position - 1, ids[position]]) for position in range(start, len(ids)))
            return total / len(choice) if metric == "acc_norm" else total

        scores = [[score(text(row), choice) for choice in row["choices"]] for row in rows]
        return [row.index(max(row)) for row in scores]


def write_child(folder: Path, parent: Parent, blocks: list[tuple[Attention, Ffn]]) -> None:
    """Write a child of the parent's own weights without some subblocks."""
    cpu, writer = torch.device("cpu"), CheckpointWriter(folder, 2**30)
    writer.add({EMBEDDING: parent.checkpoint.tensor(EMBEDDING), NORM: parent.checkpoint.tensor(NORM)})
    for index, (attention, ffn) in enumerate(blocks):
        replacement = Replacement(index, 1, attention, ffn)
        tensors = compose(parent.config, parent.block(index, cpu, torch.float32), replacement, lambda _: {})
        writer.add({f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()})
    write_json(folder / "config.json", to_nemotron_nas(parent.config, blocks, parent.info.special_tokens, "float32"))
    for file in parent.folder.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    writer.finish()


def random_rows(count: int) -> list[Row]:
    """Draw questions of random words, with two to four choices of different lengths."""
    rng = random.Random(0)
    words = ["block", "child", "parent", "library", "cost", "search", "score", "kl", "a", "token"]

    def phrase(shortest: int, longest: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(shortest, longest)))

    choices = [[phrase(1, 6) + f" {i}" for i in range(rng.randint(2, 4))] for _ in range(count)]
    return [{"question": phrase(3, 8), "choices": texts, "label": rng.randrange(len(texts))} for texts in choices]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("accuracy")
    tiny_parent(root / "source")
    paths = Paths(root / "artifacts")
    prepare_parent.fn(tiny_params(prepare_parent={"source": str(root / "source")}), paths)
    parent = Parent(paths.parent)
    attention, ffn = parent_attention(parent.config), parent_ffn(parent.config)
    write_child(paths.assembled(TARGET), parent, [(attention, ffn)] * parent.config.num_blocks)
    pruned = [(attention, ffn), (NO_ATTENTION, ffn), (attention, NO_FFN), (NO_ATTENTION, NO_FFN)]
    write_child(paths.distilled(TARGET), parent, pruned)
    return Case(paths, random_rows(60))


def question(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer:"


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_accuracy_is_the_likeliest_choice_counted_by_hand(case: Case, metric: str) -> None:
    """The labels are the parent's choices counted by hand, so that one wrong choice of 60 shows."""
    taken = case.by_hand("parent", question, metric, case.rows)
    rows = [{**row, "label": choice} for row, choice in zip(case.rows, taken, strict=True)]
    comparison = case.measured({"name": "own", "path": case.file(metric, rows), "metric": metric})
    pruned = case.by_hand("distilled", question, metric, case.rows)
    same = sum(mine == theirs for mine, theirs in zip(pruned, taken, strict=True))
    assert 0 < same < len(rows), "the test's own assumption: the pruned child differs somewhere"
    assert comparison.parent.accuracy == 1
    assert comparison.children["distilled"].accuracy == pytest.approx(same / len(rows))
    assert comparison.children["distilled"].accuracy_preserved == pytest.approx(same / len(rows))
    assert comparison.chance == pytest.approx(sum(1 / len(row["choices"]) for row in rows) / len(rows))
    assert not comparison.parent_at_chance


def test_the_two_metrics_take_different_choices(case: Case) -> None:
    """Otherwise the test above could not tell the metrics apart."""
    acc, acc_norm = (case.by_hand("parent", question, metric, case.rows) for metric in ("acc", "acc_norm"))
    assert acc != acc_norm


def test_an_all_parent_child_answers_as_the_parent(case: Case) -> None:
    taken = case.by_hand("parent", question, "acc_norm", case.rows)
    labels = [(choice + index % 2) % 2 for index, choice in enumerate(taken)]
    rows = [{**row, "label": label} for row, label in zip(case.rows, labels, strict=True)]
    child = case.measured({"name": "own", "path": case.file("equal", rows)}).children["assembled"]
    assert 0 < child.accuracy < 1
    assert (child.difference, child.difference_stderr) == (0, 0)


def test_columns_prompt_and_limit_are_the_tasks_own(case: Case) -> None:
    taken = case.by_hand("parent", lambda row: row["question"], "acc", case.rows)
    rows = [
        {"query": row["question"], "endings": row["choices"], "gold": choice if index < 10 else choice - 1}
        for index, (row, choice) in enumerate(zip(case.rows, taken, strict=True))
        if index < 10 or choice > 0
    ]
    task = {
        "name": "own",
        "path": case.file("columns", rows),
        "metric": "acc",
        "prompt": "{query}",
        "choices": "endings",
        "label": "gold",
    }
    limited, whole = case.measured({**task, "limit": 10}), case.measured(task)
    assert (limited.questions, limited.parent.accuracy) == (10, 1)
    assert whole.questions == len(rows)
    assert whole.parent.accuracy == pytest.approx(10 / len(rows))


def test_examples_before_a_question_are_the_same_for_every_model_and_follow_the_seed(case: Case) -> None:
    task = {"name": "own", "path": case.file("shots", case.rows[:12]), "num_fewshot": 2}
    digests = []
    for changed, seed in ((task, 0), (task, 0), (task, 1), ({**task, "num_fewshot": 0}, 0)):
        params = case.params(changed, seed=seed)
        measured = stage.measure.fn(AccuracyTask.model_validate(changed), TARGET, params, case.paths)
        digests.append(measured.comparison.question_digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_task_of_the_hub_gives_what_the_same_questions_give_from_a_file(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is lm-eval's own piqa; `datasets` prefers a folder of its name in the working directory to the hub."""
    two = [{**row, "choices": row["choices"][:2], "label": row["label"] % 2} for row in case.rows]
    from_file = case.measured({"name": "own", "path": case.file("two", two)})
    hub = pa.Table.from_pylist(
        [
            {"goal": row["question"], "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["label"]}
            for row in two
        ]
    )
    folder = tmp_path / "baber" / "piqa"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        pq.write_table(hub, folder / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    piqa = case.measured({"name": "piqa"})
    assert (from_file.parent, from_file.children) == (piqa.parent, piqa.children)
    assert from_file.chance == piqa.chance == 0.5


def test_a_file_in_s3_is_read_as_a_local_one(case: Case, bucket: str) -> None:
    local = case.file("remote", case.rows[:4])
    s3fs.S3FileSystem(skip_instance_cache=True).put_file(local, f"{bucket}/questions.parquet")
    in_s3, in_file = ({"name": "own", "path": path} for path in (f"{bucket}/questions.parquet", local))
    [task] = stage.plan_tasks.fn(case.params(in_s3))
    assert stage.questions_of(task) == stage.questions_of(AccuracyTask.model_validate(in_file))


def test_the_stage_writes_tasks_in_order_and_is_quiet(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """There is no progress bar, since stderr is not a terminal here; the table is returned."""
    tasks = [{"name": name, "path": case.file(name, case.rows[:8])} for name in ("one", "two")]
    params = case.params(*tasks)
    measured = [stage.measure.fn(task, TARGET, params, case.paths) for task in stage.plan_tasks.fn(params)]
    table = stage.write_accuracy.fn(TARGET, measured, params, case.paths)
    written = read_sealed(case.paths.accuracy(TARGET), "the test")
    assert (written["target"], written["dtype"]) == (TARGET, "float32")
    assert [task["name"] for task in written["tasks"]] == ["one", "two"]
    assert list(written["tasks"][0]["models"]) == ["parent", "assembled", "distilled"]
    assert "one: 8 questions, acc_norm, chance" in table
    assert capfd.readouterr() == ("", "")


def test_no_task_is_no_accuracy_and_no_lm_eval(tmp_path: Path) -> None:
    """The check runs in a new process, since this process has imported lm-eval."""
    program = f"""
import sys
from pathlib import Path
from storage.paths import Paths
from tasks import measure_accuracy as stage
from tests.settings import tiny_params
params = tiny_params()
assert stage.plan_tasks.fn(params) == []
sys.stdout.write(stage.write_accuracy.fn("small", [], params, Paths(Path({str(tmp_path)!r}))))
assert "lm_eval" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "no accuracy was measured" in ended.stdout
    assert read_sealed(Paths(tmp_path).accuracy("small"), "the test")["tasks"] == []


def rejected(case: Case, task: Row) -> str:
    with pytest.raises(InputError) as caught:
        stage.plan_tasks.fn(case.params(task))
    return str(caught.value)


def test_what_cannot_be_asked_is_said_before_a_model_is_loaded(case: Case, tmp_path: Path) -> None:
    rows = case.rows[:4]
    (tmp_path / "text.parquet").write_text("no Parquet", encoding="utf-8")
    assert "nowhere.parquet does not exist" in rejected(case, {"name": "own", "path": "nowhere.parquet"})
    assert "is not a Parquet file" in rejected(case, {"name": "own", "path": str(tmp_path / "text.parquet")})
    path = case.file("wrong", rows)
    message = rejected(case, {"name": "own", "path": path, "prompt": "{query}"})
    assert f"{path} has no column 'query' (has: question, choices, label)" in message
    assert "needs at least 6" in rejected(case, {"name": "own", "path": path, "num_fewshot": 5})
    beyond = case.file("beyond", [*rows, {**rows[0], "label": 4}])
    assert "beyond.parquet, row 4: expected" in rejected(case, {"name": "own", "path": beyond})
    null = case.file("null", [*rows, {**rows[0], "question": None}])
    assert "null.parquet, row 4: column 'question' is null" in rejected(case, {"name": "own", "path": null})


def test_names_that_lm_eval_cannot_serve(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no task 'hellaswagg', did you mean hellaswag?" in rejected(case, {"name": "hellaswagg"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "questions of piqa cannot be loaded from the hub" in rejected(case, {"name": "piqa"})


def test_a_missing_extra_is_one_message_with_the_command(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    message = rejected(case, {"name": "own", "path": case.file("extra", case.rows[:4])})
    assert ".venv/bin/pip install -c constraints.txt -e '.[eval]'" in message


def test_a_damaged_checkpoint_is_found(case: Case, tmp_path: Path) -> None:
    shutil.copytree(case.paths.root, tmp_path / "artifacts")
    paths = Paths(tmp_path / "artifacts")
    flip_byte(next(paths.assembled(TARGET).glob("*.safetensors")))
    task = {"name": "own", "path": case.file("damaged", case.rows[:4])}
    with pytest.raises(DamagedFileError, match=f"dvc repro assemble_child@{TARGET}"):
        stage.measure.fn(AccuracyTask.model_validate(task), TARGET, case.params(task), paths)
