"""Descriptions of the keys of `measure_accuracy` in params.yaml; storage/sections.py has those of other sections."""

import string
from typing import Annotated, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from storage.fields import Section, expecting


class AccuracyTask(Section):
    """A benchmark for lm-eval: one of its own tasks, whose questions come from the hub, or questions of a file."""

    name: str = Field(min_length=1, description="With path any name; else lm-eval's name of a task or group.")
    path: str | None = Field(None, description="Local or s3:// Parquet file; null takes lm-eval's task from the hub.")
    form: str | None = Field(
        None,
        description="YAML file with a task as lm-eval writes it, for the columns of `path` (params/accuracy has some); "
        "null: multiple choice with the three keys below.",
    )
    examples: str | None = Field(
        None, description="Parquet file of examples before a question; null: other questions of `path`."
    )
    prompt: str = Field(
        "Question: {question}\nAnswer:",
        description="Text before a space and a choice; {column} is the file's column (path without form only).",
    )
    choices: str = Field("choices", description="Column with each question's list of choices (path without form only).")
    label: str = Field("label", description="Column with the right choice's index, from 0 (path without form only).")
    metric: str | None = Field(
        None,
        description="Metric by lm-eval's name, a mean over questions: acc (the likeliest choice counts), acc_norm (the "
        "likeliest per character), exact_match, ...; null: acc_norm where the task has it, then acc, then its first.",
    )
    filter: str | None = Field(
        None, description="How the answer is read from a text, by lm-eval's name; null: the task's first filter."
    )
    chat: bool = Field(False, description="Whether questions go through the parent's chat template.")
    num_fewshot: int | None = Field(
        None, ge=0, description="Examples before each question; null: the task's own, or 0."
    )
    limit: int | None = Field(None, ge=2, description="The first so many questions of each task; null is all.")

    @field_validator("prompt")
    @classmethod
    def _is_a_template(cls, prompt: str) -> str:
        list(string.Formatter().parse(prompt))
        return prompt

    @model_validator(mode="after")
    def _no_key_is_ignored(self) -> Self:
        set_keys = self.model_fields_set
        if self.path is None and (ignored := sorted(set_keys & {"form", "examples", "prompt", "choices", "label"})):
            raise ValueError(f"{ignored[0]} needs `path`: without one, the task is lm-eval's own")
        if self.form and (ignored := sorted(set_keys & {"prompt", "choices", "label"})):
            raise ValueError(f"{ignored[0]} and form exclude each other: the form says what is read of a row")
        return self

    @property
    def title(self) -> str:
        """Return the name in tables: with `chat` another one than without."""
        return f"{self.name}, chat" if self.chat else self.name


class HumanEval(Section):
    """HumanEval, pass@1: the models write programs, which run in processes that can do no harm (Linux)."""

    path: str = Field(
        min_length=1,
        description="Parquet file, or hub:<id>@<revision>, with columns prompt, entry_point and test.",
    )
    samples: int = Field(20, ge=1, description="Programs for each problem; pass@1 is the mean over them.")
    temperature: float = Field(0.2, ge=0, le=10, description="Logits are divided by it; 0: the likeliest token always.")
    top_p: float = Field(
        0.95, gt=0, le=1, description="Only the likeliest tokens that hold this share of the probability are drawn."
    )
    max_tokens: int = Field(512, ge=1, description="Longest program, in tokens.")
    limit: int | None = Field(None, ge=2, description="The first so many problems; null is all.")
    seconds: int = Field(
        5, ge=1, le=600, description="CPU time of a program, s; by the clock it has 5 s more, to start in."
    )
    memory_mib: int = Field(1024, ge=128, description="Memory of a program, MiB.")

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("at temperature 0 all samples are the same; set samples to 1, or raise the temperature")
        return self


class MtBench(Section):
    """MT-Bench: a judge behind an OpenAI HTTP API rates answers to questions of two turns, from 1 to 10."""

    path: str = Field(
        min_length=1,
        description="Parquet file, or hub:<id>@<revision>, with columns turns, reference (lists of texts), category.",
    )
    judge_url: Annotated[
        str,
        StringConstraints(pattern=r"^https?://[^@]+$"),
        expecting("http://HOST/v1 or https://HOST/v1 without a name or password in it"),
    ] = Field(
        description="Base URL of the judge's API, ending in /v1; its key is OPENAI_API_KEY in the environment.",
    )
    judge_model: str = Field(min_length=1, description="Name of the judge at that API.")
    max_tokens: int = Field(1024, ge=1, description="Longest answer, in tokens.")
    limit: int | None = Field(None, ge=2, description="The first so many questions; null is all.")
    requests_at_once: int = Field(4, ge=1, le=256, description="Ratings that the judge gives at the same time.")


class PositionLoss(Section):
    """Log-loss of parent and children by position in a document, or without `path` in a sequence of the corpus."""

    path: str | None = Field(
        None,
        description="Local or s3:// .parquet, .jsonl, .json or .txt file with long documents; null: the corpus's "
        "validation split, whose sequences end at prepare_corpus.seq_len.",
    )
    text: str = Field("text", description="Column with the text (path only).")
    documents: int = Field(8, ge=1, description="Documents: the longest of the file, or the first of the corpus.")
    tokens: int | None = Field(None, ge=2, description="Longest document, in tokens; null: the parent's context.")


class MeasureAccuracy(Section):
    """Accuracy of parent and child on public or own benchmarks, paired question by question."""

    tasks: tuple[AccuracyTask, ...] = Field((), description="Benchmarks for lm-eval (the extra `eval`).")
    human_eval: HumanEval | None = Field(None, description="HumanEval; null does not measure it.")
    mt_bench: MtBench | None = Field(None, description="MT-Bench; null does not measure it.")
    position_loss: PositionLoss | None = Field(None, description="Log-loss by position; null does not measure it.")
    sequences_per_batch: int = Field(8, ge=1, description="Choices or programs in one forward pass.")

    @model_validator(mode="after")
    def _titles_differ(self) -> Self:
        titles = [task.title for task in self.tasks]
        if twice := [title for title in titles if titles.count(title) > 1]:
            raise ValueError(f"two tasks have the name {twice[0]!r}; with `path`, any other name will do")
        return self
