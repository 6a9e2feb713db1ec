"""Does vLLM compute a child as this project does? Greedy tokens and log-probabilities of 16 prompts, side by side.

Run where a GPU is, and vLLM in an environment of its own (PYTHON): `python -m tests.gpu.check_vllm --checkpoint
artifacts/children/like-51b/exports/nemotron-nas --vllm-python PYTHON`. A row a prompt; exit status 1 if one differs.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer

from tasks.puzzle.model.child import DeciLMForCausalLM
from tasks.puzzle.model.device import prepare_compute, resolve

Answer = tuple[list[int], list[dict[int, float]]]
"""The answer to a prompt: the greedy tokens, and at each step the log-probabilities of the likeliest tokens."""
NEW_TOKENS, TOP = 16, 20
OPENINGS = ("The capital of France is", "Water boils at", "def add(a, b):", "In the year 1969,")
PROMPTS = [opening + ending for opening in OPENINGS for ending in ("", " and then", "\n\n1.", " Here is why:")]
TOLERANCE = {"bfloat16": 1.0, "float32": 0.1}
"""Largest difference of a log-probability among the 20 likeliest that counts as right.

bfloat16, 8 significant bits: two right implementations (SDPA and eager attention of SmolLM2-135M, 256 steps) differ by
0.16 at the median step and 0.75 at most. float32: an eighth of that, since attention on a GPU may multiply in TF32, 11
bits."""
PROGRAM = """import json, pathlib, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    question = json.loads(pathlib.Path(sys.argv[1]).read_text())
    prompts = [{"prompt_token_ids": ids} for ids in question["prompts"]]
    answers = LLM(**question["engine"]).generate(prompts, SamplingParams(**question["sampling"]))
    rows = []
    for answer in answers:
        output = answer.outputs[0]
        steps = [{i: token.logprob for i, token in step.items()} for step in output.logprobs]
        rows.append((list(output.token_ids), steps))
    pathlib.Path(sys.argv[2]).write_text(json.dumps(rows))
"""


class Comparison(NamedTuple):
    """Steps until the answers part, the largest difference of a log-probability in them, and the error or nothing."""

    steps: int
    largest: float
    wrong: str


def difference(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """Return the largest difference of a log-probability; what a list lacks is at most as likely as its least one."""
    pairs = [(value, theirs.get(token, min(value, *theirs.values()))) for token, value in ours.items()]
    pairs += [(value, min(value, *ours.values())) for token, value in theirs.items() if token not in ours]
    return max(abs(mine - theirs) for mine, theirs in pairs)


def compare(ours: Answer, theirs: Answer, tolerance: float) -> Comparison:
    """Compare step by step, until the tokens part: from there on the two answer different prompts."""
    largest = 0.0
    for step, (mine, top, other, others) in enumerate(zip(*ours, *theirs, strict=True)):
        largest = max(largest, difference(top, others))
        if largest > tolerance:
            return Comparison(step + 1, largest, f"a log-probability at step {step}")
        if mine != other:
            best, second = sorted(top.values(), reverse=True)[:2]
            return Comparison(step + 1, largest, f"the token at step {step}" if best - second > tolerance else "")
    return Comparison(len(ours[0]), largest, "")


def own_answers(checkpoint: Path, prompts: list[list[int]], precision: str) -> list[Answer]:
    """Return answers of this project's class, without a cache, so that nothing but the model itself is compared."""
    compute, answers = prepare_compute(*resolve("auto", precision), torch.get_num_threads()), []
    model: Any = nn.Module.to(DeciLMForCausalLM.from_pretrained(checkpoint, dtype=compute.dtype), compute.device)
    for ids in prompts:
        tokens, top = list(ids), []
        for _ in range(NEW_TOKENS):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([tokens], device=compute.device), logits_to_keep=1).logits[0, -1]
            values, indices = torch.log_softmax(logits.float(), -1).topk(TOP)
            top.append(dict(zip(indices.tolist(), values.tolist(), strict=True)))
            tokens.append(next(iter(top[-1])))
        answers.append((tokens[len(ids) :], top))
    return answers


def vllm_answers(python: Path, checkpoint: Path, prompts: list[list[int]], precision: str) -> list[Answer]:
    """Return answers of vLLM, in a process of its own, with the code that is in the export."""
    engine = {"model": str(checkpoint), "dtype": precision, "max_model_len": 256, "enforce_eager": True}
    engine |= {"gpu_memory_utilization": 0.7, "trust_remote_code": True}
    sampling = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "logprobs": TOP, "ignore_eos": True}
    with tempfile.TemporaryDirectory() as folder:
        program, question, answer = (Path(folder) / name for name in ("ask.py", "question.json", "answer.json"))
        program.write_text(PROGRAM, encoding="utf-8")
        question.write_text(json.dumps({"engine": engine, "sampling": sampling, "prompts": prompts}), encoding="utf-8")
        subprocess.run([python, program, question, answer], check=True)
        read = json.loads(answer.read_text(encoding="utf-8"))
    return [(ids, [{int(token): value for token, value in step.items()} for step in steps]) for ids, steps in read]


def main() -> int:
    """Get the answers of both, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check_vllm", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a nemotron-nas export")
    parser.add_argument("--vllm-python", type=Path, default=Path(sys.executable), help="interpreter that has vLLM")
    parser.add_argument("--precision", default="float32", choices=sorted(TOLERANCE), help="of both")
    args = parser.parse_args()
    if not (args.checkpoint / "config.json").is_file():
        parser.error(f"{args.checkpoint} holds no config.json; name a nemotron-nas export")
    if shutil.which(args.vllm_python) is None:
        parser.error(f"{args.vllm_python} is no program; name the interpreter of an environment that has vLLM")
    tried = subprocess.run([args.vllm_python, "-c", "import vllm"], check=False, capture_output=True, text=True)
    if tried.returncode:
        reason = (tried.stderr.splitlines() or ["no word"])[-1]
        parser.error(f"{args.vllm_python} does not import vllm ({reason}); name an interpreter that does")
    prompts = AutoTokenizer.from_pretrained(args.checkpoint)(PROMPTS)["input_ids"]
    ours = own_answers(args.checkpoint, prompts, args.precision)
    theirs = vllm_answers(args.vllm_python, args.checkpoint, prompts, args.precision)
    rows = [compare(mine, other, TOLERANCE[args.precision]) for mine, other in zip(ours, theirs, strict=True)]
    sys.stdout.write(f"{'prompt':<42} {'steps':>5} {'largest':>8} (of {TOLERANCE[args.precision]} allowed)\n")
    for prompt, row in zip(PROMPTS, rows, strict=True):
        sys.stdout.write(f"{prompt!r:<42} {row.steps:>5} {row.largest:>8.4f}  {row.wrong or 'same'}\n")
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
