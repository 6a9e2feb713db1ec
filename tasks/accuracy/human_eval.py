"""HumanEval (Chen et al. 2021, arXiv 2107.03374): models write functions, tests say whether they are right.

In: problems with a prompt, tests and a function's name. Out: pass@1 of each problem, the share of its programs that
pass. Each runs in a process that can do no harm (tasks/engines/programs.py); where there is none such, none runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from storage.accuracy_sections import HumanEval
from storage.code_digest import code_digest
from storage.files import InputError, digest_of
from tasks.accuracy.models import Keep, PlannedBenchmark
from tasks.accuracy.questions import read_rows
from tasks.accuracy.writing import batches, continuations
from tasks.engines.programs import Limits, check_confinement, runs_to_its_end
from tasks.puzzle.model.writing import Drawing
from tasks.puzzle.quality.accuracy import Answers, Benchmark

NAME = "HumanEval"
_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""A function ends where one of these begins (the paper, section 3.1)."""


@dataclass(frozen=True)
class Problem:
    """A function to be written: its head and docstring, and a program that tests what `entry_point` names."""

    prompt: str
    entry_point: str
    test: str

    def program(self, body: str) -> str:
        """Return the function with a body, and its tests."""
        return f"{self.prompt}{body}\n\n{self.test}\n\ncheck({self.entry_point})"


def planned_human_eval(settings: HumanEval, seed: int, sequences_per_batch: int) -> PlannedBenchmark:
    """Read the problems and try the limits.

    Raises:
        InputError: the file cannot be used, or programs cannot be kept from doing harm on this machine.
    """
    limits = Limits(settings.seconds, settings.memory_mib)
    check_confinement(limits)
    problems = _problems(settings)
    questions = digest_of([[problem.prompt, problem.entry_point, problem.test] for problem in problems])
    metric = f"pass@1 of {settings.samples}"

    def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, _: Keep) -> Answers:
        shares = []
        for index, problem in enumerate(tqdm(problems, desc=NAME, unit="problem", disable=None)):
            bodies = continuations(
                model,
                tokenizer,
                tokenizer(problem.prompt)["input_ids"],
                Drawing(settings.temperature, settings.top_p),
                settings.max_tokens,
                batches(settings.samples, sequences_per_batch),
                seed + index,
                _STOPS,
            )
            shares.append(share_that_passes(problem, list(bodies), limits))
        return Answers(questions, tuple(shares), (0.0,) * len(shares))

    code = code_digest("tasks.accuracy.human_eval:planned_human_eval", "tasks.engines.confine:confine")
    asking = settings.model_dump(exclude={"path"})
    return PlannedBenchmark(
        benchmark=Benchmark(NAME, metric, f"temperature {settings.temperature}", settings.limit),
        key={"questions": questions, "asking": asking, "batch": sequences_per_batch, "seed": seed, "code": code},
        ask=ask,
    )


def _problems(settings: HumanEval) -> list[Problem]:
    used_by = "measure_accuracy.human_eval.path"
    rows = read_rows(settings.path, ("prompt", "entry_point", "test"), used_by)[: settings.limit]
    if len(rows) < 2:
        raise InputError(f"{settings.path} has {len(rows)} rows; {used_by} needs at least 2")
    return [Problem(str(row["prompt"]), str(row["entry_point"]), str(row["test"])) for row in rows]


def share_that_passes(problem: Problem, bodies: Sequence[str], limits: Limits) -> float:
    """Run a problem's programs, equal ones once; return the share that passes the tests."""
    passes = {body: runs_to_its_end(problem.program(body), limits) for body in dict.fromkeys(bodies)}
    return sum(passes[body] for body in bodies) / len(bodies)
