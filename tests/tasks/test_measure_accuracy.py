"""Accuracy of tiny models against log-likelihoods summed and texts written by hand, from files and the hub's form."""

import importlib.util
import json
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

from flows.ui.overrides import with_profile
from storage.accuracy import BenchmarkAccuracy, Estimate, read_accuracy
from storage.accuracy_sections import AccuracyTask
from storage.checkpoints import Checkpoint, CheckpointWriter
from storage.files import DamagedFileError, InputError, write_json
from storage.model_config import EMBEDDING, NORM
from storage.nemotron_nas import to_nemotron_nas
from storage.params import Params, load
from storage.parent import Parent
from storage.parent_info import read_parent_info
from storage.paths import Paths
from storage.variants import Attention, Ffn, Replacement
from tasks import measure_accuracy as stage
from tasks.accuracy.models import AskedModel, PlannedBenchmark
from tasks.accuracy.questions import planned_task
from tasks.prepare_parent import prepare_parent
from tasks.puzzle.model.assembly import compose
from tasks.puzzle.model.child import DeciLMForCausalLM
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

    def measured(self, task: Row, **run: Any) -> BenchmarkAccuracy:
        return stage.measure.fn(planned(task, **run), TARGET, self.params(task, **run), self.paths)

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


def planned(task: Row, *, seed: int = 0) -> PlannedBenchmark:
    return planned_task(AccuracyTask.model_validate(task), seed, sequences_per_batch=3)


def has_mean(mean: float, estimate: Estimate | None) -> bool:
    """Tell whether there is an estimate, and it has this mean."""
    return estimate is not None and estimate.mean == pytest.approx(mean)


def write_child(folder: Path, parent: Parent, blocks: list[tuple[Attention, Ffn]]) -> None:
    """Write a child of the parent's own weights without some subblocks."""
    cpu, writer = torch.device("cpu"), CheckpointWriter(folder, 2**30)
    writer.add({EMBEDDING: parent.checkpoint.tensor(EMBEDDING), NORM: parent.checkpoint.tensor(NORM)})
    for index, (attention, ffn) in enumerate(blocks):
        replacement = Replacement(index, 1, attention, ffn)
        tensors = compose(parent.config, parent.block(index, cpu, torch.float32), replacement, lambda _: {})
        writer.add({f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()})
    write_json(folder / "config.json", to_nemotron_nas(parent.config, blocks, parent.info.special_tokens, "float32"))
    for file in (*parent.folder.glob("tokenizer*"), *parent.folder.glob("chat_template*")):
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
    assert comparison.parent.mean == 1
    assert has_mean(same / len(rows), comparison.children["distilled"].accuracy)
    assert has_mean(same / len(rows), comparison.children["distilled"].preserved)
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
    assert 0 < child.accuracy.mean < 1
    assert child.difference == Estimate(0, 0)


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
    assert (limited.questions, limited.parent.mean) == (10, 1)
    assert whole.questions == len(rows)
    assert whole.parent.mean == pytest.approx(10 / len(rows))


def test_examples_before_a_question_are_the_same_for_every_model_and_follow_the_seed(case: Case) -> None:
    task = {"name": "own", "path": case.file("shots", case.rows[:12]), "num_fewshot": 2}
    runs = ((task, 0), (task, 0), (task, 1), ({**task, "num_fewshot": 0}, 0))
    digests = [case.measured(changed, seed=seed).questions_digest for changed, seed in runs]
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
    assert planned(in_s3).key == planned(in_file).key


def test_the_stage_writes_tasks_in_order_and_is_quiet(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """There is no progress bar, since stderr is not a terminal here; the table is returned."""
    tasks = [{"name": name, "path": case.file(name, case.rows[:8])} for name in ("one", "two")]
    params = case.params(*tasks)
    measured = [
        stage.measure.fn(task, TARGET, params, case.paths) for task in stage.plan_benchmarks.fn(params, case.paths)
    ]
    table = stage.write_measured.fn(TARGET, measured, (), params, case.paths)
    written = read_accuracy(TARGET, case.paths)
    assert (written.target, written.dtype) == (TARGET, "float32")
    assert written.benchmarks == tuple(measured)
    assert [benchmark.name for benchmark in written.benchmarks] == ["one", "two"]
    assert list(written.benchmarks[0].children) == ["assembled", "distilled"]
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
paths = Paths(Path({str(tmp_path)!r}))
assert stage.plan_benchmarks.fn(params, paths) == []
sys.stdout.write(stage.write_measured.fn("small", [], (), params, paths))
assert "lm_eval" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "no accuracy was measured" in ended.stdout
    assert read_accuracy("small", Paths(tmp_path)).benchmarks == ()


def rejected(case: Case, task: Row) -> str:
    with pytest.raises(InputError) as caught:
        stage.plan_benchmarks.fn(case.params(task), case.paths)
    return str(caught.value)


def test_what_cannot_be_asked_is_said_before_a_model_is_loaded(case: Case, tmp_path: Path) -> None:
    rows = case.rows[:4]
    (tmp_path / "text.parquet").write_text("no Parquet", encoding="utf-8")
    assert "nowhere.parquet does not exist" in rejected(case, {"name": "own", "path": "nowhere.parquet"})
    assert "is not a Parquet file" in rejected(case, {"name": "own", "path": str(tmp_path / "text.parquet")})
    path = case.file("wrong", rows)
    message = rejected(case, {"name": "own", "path": path, "prompt": "{query}"})
    assert f"{path} has no column 'query' (has: question, choices, label)" in message
    assert "num_fewshot 4 needs at least 5 rows" in rejected(case, {"name": "own", "path": path, "num_fewshot": 4})
    few = {"examples": case.file("few", rows[:2]), "num_fewshot": 3}
    assert "needs at least 3 rows to take examples from, found 2" in rejected(
        case, {"name": "own", "path": path, **few}
    )
    beyond = case.file("beyond", [*rows, {**rows[0], "label": 4}])
    assert "beyond.parquet, row 4: expected" in rejected(case, {"name": "own", "path": beyond})
    null = case.file("null", [*rows, {**rows[0], "question": None}])
    assert "null.parquet, row 4: column 'question' is null" in rejected(case, {"name": "own", "path": null})


def test_texts_templates_and_documents_are_checked_when_planning(case: Case, tmp_path: Path) -> None:
    def stopped(paths: Paths, **section: Any) -> str:
        with pytest.raises(InputError) as caught:
            stage.plan_benchmarks.fn(tiny_params(measure_accuracy=section), paths)
        return str(caught.value)

    context = read_parent_info(case.paths.parent).config.context
    judge = {"judge_url": "http://127.0.0.1:1/v1", "judge_model": "none"}
    for name, setting in (("human_eval", {}), ("mt_bench", judge)):
        message = stopped(case.paths, **{name: {"path": "none.parquet", "max_tokens": context, **setting}})
        assert f"measure_accuracy.{name}.max_tokens is {context}, which leaves no room for a prompt" in message
    assert "none.txt does not exist" in stopped(case.paths, position_loss={"path": "none.txt"})
    paths = Paths(tmp_path / "artifacts")
    shutil.copytree(case.paths.parent, paths.parent, ignore=shutil.ignore_patterns("chat_template*"))
    config = json.loads((paths.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    write_json(paths.parent / "tokenizer_config.json", config)
    chat = {"name": "own", "path": case.file("mute", case.rows[:4]), "chat": True}
    assert "has no chat template that can be read" in stopped(paths, tasks=[chat])


def test_a_checkpoints_settings_of_generation_are_in_the_key(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "parent"
    shutil.copytree(case.paths.parent, folder, ignore=shutil.ignore_patterns("generation_config.json"))
    digests = {AskedModel("parent", Checkpoint(folder, "rebuild", is_foreign=True)).digest}
    for penalty in (1.0, 1.3):
        write_json(folder / "generation_config.json", {"repetition_penalty": penalty})
        digests.add(AskedModel("parent", Checkpoint(folder, "rebuild", is_foreign=True)).digest)
    assert len(digests) == 3


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
    shutil.copytree(case.paths.root, tmp_path / "artifacts", ignore=shutil.ignore_patterns("answers"))
    paths = Paths(tmp_path / "artifacts")
    flip_byte(next(paths.assembled(TARGET).glob("*.safetensors")))
    task = {"name": "own", "path": case.file("damaged", case.rows[:4])}
    with pytest.raises(DamagedFileError, match=f"dvc repro assemble_child@{TARGET}"):
        stage.measure.fn(planned(task), TARGET, case.params(task), paths)


def test_a_rerun_asks_no_model_twice(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another limit, other questions or another model are asked anew; the name of a benchmark is none of that."""
    shutil.copytree(case.paths.root, tmp_path / "artifacts", ignore=shutil.ignore_patterns("answers"))
    paths = Paths(tmp_path / "artifacts")
    loaded: list[str] = []
    load = AskedModel.load

    def counted(model: AskedModel, *arguments: Any, **options: Any) -> Any:
        loaded.append(model.name)
        return load(model, *arguments, **options)

    monkeypatch.setattr(AskedModel, "load", counted)

    def measured(**changed: Any) -> BenchmarkAccuracy:
        loaded.clear()
        task = {"name": "own", "path": case.file("again", case.rows[:6]), **changed}
        return stage.measure.fn(planned(task), TARGET, case.params(task), paths)

    first = measured()
    assert loaded == ["parent", "assembled", "distilled"]
    assert (measured(), loaded) == (first, [])
    assert measured(limit=3) != first and loaded == ["parent", "assembled", "distilled"]
    assert measured(path=case.file("others", case.rows[6:12])) != first and len(loaded) == 3
    shutil.rmtree(paths.distilled(TARGET))
    shutil.copytree(paths.assembled(TARGET), paths.refined(TARGET))
    again = measured()
    assert loaded == [], "the refined child has the assembled one's weights"
    assert list(again.children) == ["assembled", "refined"]


def sentences(count: int) -> list[Row]:
    """Return rows of Winogrande by partial scoring: two contexts, one continuation."""
    rng = random.Random(1)
    words = ["block", "child", "parent", "library", "cost"]
    return [
        {
            "context_options": [" ".join(rng.choices(words, k=4)) for _ in range(2)],
            "continuation": " ".join(rng.choices(words, k=3)),
            "label": rng.randrange(2),
        }
        for _ in range(count)
    ]


def test_winogrande_takes_the_context_that_makes_its_end_likeliest(case: Case) -> None:
    rows = sentences(24)
    model: Any = AutoModelForCausalLM.from_pretrained(case.paths.parent)
    tokenizer: Any = AutoTokenizer.from_pretrained(case.paths.parent)

    def score(context: str, end: str) -> float:
        ids, start = tokenizer(f"{context} {end}").input_ids, len(tokenizer(context).input_ids)
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(log_probabilities[position - 1, ids[position]]) for position in range(start, len(ids)))

    for row in rows:
        scores = [score(context, row["continuation"]) for context in row["context_options"]]
        row["label"] = scores.index(max(scores))
    rows[0]["label"] = 1 - rows[0]["label"]
    form = str(ROOT / "params/accuracy/winogrande.yaml")
    measured = case.measured({"name": "winogrande", "path": case.file("winogrande", rows), "form": form})
    assert measured.parent.mean == pytest.approx(23 / 24)
    assert measured.chance == 0.5


def test_the_true_answers_share_of_truthfulqa(case: Case) -> None:
    """mc2 is a share of probability, and a guesser gets the share of true answers."""
    rows = [
        {
            "question": row["question"],
            "mc2_choices": row["choices"],
            "mc2_labels": [1] + [0] * (len(row["choices"]) - 1),
        }
        for row in case.rows[:6]
    ]
    form = str(ROOT / "params/accuracy/truthfulqa.yaml")
    measured = case.measured({"name": "truthfulqa", "path": case.file("truthful", rows), "form": form})
    assert 0 < measured.parent.mean < 1
    assert measured.chance == pytest.approx(sum(1 / len(row["mc2_choices"]) for row in rows) / len(rows))
    assert measured.children["assembled"].difference == Estimate(0, 0)


def test_mmlu_shows_examples_of_the_questions_subject(case: Case) -> None:
    def row(subject: str, index: int) -> Row:
        return {"subject": subject, "question": f"{subject} {index}", "choices": list("wxyz"), "label": index % 4}

    questions = [row(subject, index) for index in range(3) for subject in ("high_art", "law")]
    shown = [row(subject, index) for index in range(5, 8) for subject in ("high_art", "law")]
    form = str(ROOT / "params/accuracy/mmlu.yaml")
    task = {"name": "mmlu", "path": case.file("mmlu", questions), "form": form, "num_fewshot": 2}
    examples = {"examples": case.file("dev", shown)}
    with_dev, own = case.measured({**task, **examples}), case.measured(task)
    assert (with_dev.questions, with_dev.chance, with_dev.metric) == (6, 0.25, "acc")
    assert with_dev.questions_digest != own.questions_digest
    lacking = {"examples": case.file("half", shown[::2])}
    assert "found 0 of 'law', which is asked" in rejected(case, {**task, **lacking})
    short = {"examples": case.file("short", shown[:5])}
    assert "num_fewshot 3 needs at least 3 rows to take examples from, found 2 of 'law'" in rejected(
        case, {**task, **short, "num_fewshot": 3}
    )


def test_texts_that_a_model_writes_are_compared_with_the_right_ones(case: Case, tmp_path: Path) -> None:
    """The right text is what the parent writes for half of the questions: exact match is one half."""
    model: Any = AutoModelForCausalLM.from_pretrained(case.paths.parent)
    tokenizer: Any = AutoTokenizer.from_pretrained(case.paths.parent)
    rows = []
    for index, row in enumerate(case.rows[:8]):
        ids = tokenizer(question(row), return_tensors="pt")
        written = model.generate(**ids, do_sample=False, max_new_tokens=5, pad_token_id=0)[0, ids.input_ids.shape[1] :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        rows.append({"question": row["question"], "answer": text if index % 2 else f"{text} and more"})
    form = tmp_path / "written.yaml"
    form.write_text(
        "output_type: generate_until\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\n'
        "doc_to_target: answer\n"
        "generation_kwargs: {until: [none-such], max_gen_toks: 5, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
        encoding="utf-8",
    )
    measured = case.measured({"name": "written", "path": case.file("written", rows), "form": str(form)})
    assert measured.parent.mean == 0.5 and measured.chance == 0
    assert measured.children["assembled"].difference == Estimate(0, 0), "generate() of the child is the parent's"
    assert measured.children["distilled"].accuracy.mean < 0.5


def test_gsm8k_and_xlsum_are_asked_as_their_forms_say(case: Case, tmp_path: Path) -> None:
    """A tiny model solves nothing, but the number is read by the filter that is named, and examples come first."""
    form = (ROOT / "params/accuracy/gsm8k.yaml").read_text(encoding="utf-8")
    short = tmp_path / "gsm8k.yaml"  # the tiny model's context is short
    short.write_text(form.replace("do_sample: false", "do_sample: false, max_gen_toks: 4"), encoding="utf-8")
    sums = [{"question": f"add {number}", "answer": f"so\n#### {number}"} for number in range(4)]
    task = {"name": "gsm8k", "path": case.file("gsm8k", sums), "form": str(short), "num_fewshot": 1, "limit": 2}
    measured = case.measured({**task, "filter": "flexible-extract"})
    assert (measured.questions, measured.metric, measured.chance) == (2, "exact_match, flexible-extract", 0)
    assert measured.questions_digest != case.measured({**task, "num_fewshot": 0}).questions_digest
    assert "has no filter 'last'" in rejected(case, {**task, "filter": "last"})
    news = [{"text": row["question"], "summary": row["choices"][0]} for row in case.rows[:2]]
    xlsum = {"name": "xlsum", "path": case.file("xlsum", news), "form": str(ROOT / "params/accuracy/xlsum.yaml")}
    assert planned(xlsum).benchmark.metric == "rouge_l"


def test_a_chat_template_changes_what_is_asked(case: Case) -> None:
    task = {"name": "own", "path": case.file("chat", case.rows[:4])}
    assert case.measured(task).questions_digest != case.measured({**task, "chat": True}).questions_digest
    assert AccuracyTask.model_validate({**task, "chat": True}).title == "own, chat"


def test_every_ready_list_is_valid_and_names_the_announcements_benchmarks() -> None:
    params = load(ROOT / "params.yaml")
    for profile in ("accuracy", "accuracy_files"):
        tasks = with_profile(params, ROOT / f"params/{profile}.yaml").measure_accuracy.tasks
        names = {task.name for task in tasks}
        announced = {"winogrande", "arc_challenge", "mmlu", "hellaswag", "gsm8k", "arc_easy", "piqa"}
        assert announced <= names and any(name.startswith("truthfulqa") for name in names)
        assert {"mmlu, chat", "gsm8k, chat"} <= {task.title for task in tasks}
        for form in filter(None, (task.form for task in tasks)):
            assert (ROOT / form).is_file(), form
