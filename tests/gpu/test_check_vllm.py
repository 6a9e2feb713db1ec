"""check_vllm without vLLM: its comparison on made-up answers, the whole script against a stand-in with our answers."""

import json
import math
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from storage.files import read_json
from storage.model_config import ModelConfig
from storage.nemotron_nas import to_nemotron_nas
from storage.variants import Attention, Ffn
from tasks.puzzle.model.child import DeciLMForCausalLM, NemotronNasConfig
from tests.clone import tiny_parent
from tests.gpu import check_vllm
from tests.gpu.check_vllm import PROMPTS, Answer, Comparison, compare, difference

STAND_IN = """
import json, pathlib, types

ANSWERS = json.loads(pathlib.Path(__file__).with_name("answers.json").read_text())

class SamplingParams:
    def __init__(self, temperature, max_tokens, logprobs, ignore_eos):
        assert (temperature, max_tokens, logprobs, ignore_eos) == (0.0, 16, 20, True)

class LLM:
    def __init__(self, model, dtype, **others):
        assert pathlib.Path(model, "config.json").is_file() and dtype == "float32"

    def generate(self, prompts, sampling):
        assert [prompt["prompt_token_ids"] for prompt in prompts] == ANSWERS["prompts"]
        return [self.answer(*answer) for answer in ANSWERS["answers"]]

    def answer(self, tokens, steps):
        logprobs = [{int(i): types.SimpleNamespace(logprob=p) for i, p in step.items()} for step in steps]
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(tokens), logprobs=logprobs)])
"""
"""A module with the part of vLLM that the program uses; it is imported in place of the real one."""


def answer(*steps: dict[int, float]) -> Answer:
    """Make an answer of greedy steps."""
    return [max(step, key=lambda token: step[token]) for step in steps], list(steps)


def test_a_token_that_one_list_lacks_is_at_most_its_least() -> None:
    assert difference({1: -1.0, 2: -2.0}, {1: -1.1, 2: -2.0}) == pytest.approx(0.1)
    assert difference({1: -1.0, 2: -2.0}, {1: -1.0, 3: -2.1}) == pytest.approx(0.1)  # 2: -2.1 at most, 3: -2.0 at most
    assert difference({1: -1.0, 2: -2.0}, {1: -1.0, 3: -1.5}) == pytest.approx(0.5)


def test_answers_are_compared_until_they_part() -> None:
    ours = answer({1: -0.5, 2: -1.5}, {3: -0.50, 4: -0.55}, {5: -0.1, 6: -3.0})
    assert compare(ours, ours, 0.1) == Comparison(3, 0.0, "")
    near_tie = answer({1: -0.5, 2: -1.5}, {4: -0.52, 3: -0.54}, {7: -0.2, 8: -2.0})
    steps, largest, wrong = compare(ours, near_tie, 0.1)
    assert (steps, wrong) == (2, "")
    assert math.isclose(largest, 0.04)
    off = answer({1: -0.5, 2: -1.7}, {3: -0.50, 4: -0.55}, {5: -0.1, 6: -3.0})
    assert compare(ours, off, 0.1).wrong == "a log-probability at step 0"
    clear = answer({2: -0.95, 1: -1.05}, {3: -0.50, 4: -0.55}, {5: -0.1, 6: -3.0})
    assert compare(ours, clear, 0.6).wrong == "the token at step 0"
    with pytest.raises(ValueError, match=r"argument"):
        compare(ours, answer({1: -0.5, 2: -1.5}), 0.1)


def test_prompts_are_sixteen() -> None:
    assert len(set(PROMPTS)) == 16


@pytest.mark.parametrize("error", [0.0, 0.2])
def test_the_script(
    error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, vllm = tmp_path / "nemotron-nas", tmp_path / "vllm"
    checkpoint.mkdir()
    tiny_parent(checkpoint)  # for its tokenizer
    geometry = ModelConfig.from_hf(read_json(checkpoint / "config.json", "the test"), "the test")
    blocks = [(Attention("gqa", 1), Ffn("gated", 40)), (Attention("no_op"), Ffn("gated", 96))]
    config = NemotronNasConfig(**to_nemotron_nas(geometry, blocks, {}, "float32"))
    for old in checkpoint.glob("*.safetensors*"):
        old.unlink()
    DeciLMForCausalLM(config).save_pretrained(checkpoint)
    monkeypatch.setattr(check_vllm, "resolve", lambda device, precision: ("cpu", precision))
    prompts = AutoTokenizer.from_pretrained(checkpoint)(PROMPTS)["input_ids"]
    answers = check_vllm.own_answers(checkpoint, prompts, "float32")
    worse = [(tokens, [{i: p - error for i, p in top.items()} for top in steps]) for tokens, steps in answers[:1]]
    vllm.mkdir()
    (vllm / "vllm.py").write_text(STAND_IN, encoding="utf-8")
    answers_json = {"prompts": prompts, "answers": [*worse, *answers[1:]]}
    (vllm / "answers.json").write_text(json.dumps(answers_json), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(vllm))
    monkeypatch.setattr(sys, "argv", ["check_vllm", "--checkpoint", str(checkpoint)])
    assert check_vllm.main() == (error > 0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 17
    assert lines[1].endswith("a log-probability at step 0" if error else "same")
    assert all(line.endswith("same") for line in lines[2:])


@pytest.mark.parametrize(
    ("checkpoint", "python", "words"),
    [
        ("nowhere", sys.executable, "nowhere holds no config.json"),
        ("here", "/nowhere/python", "/nowhere/python is no program"),
        ("here", sys.executable, "does not import vllm (ModuleNotFoundError"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_computed(
    checkpoint: str,
    python: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/config.json").write_text("{}")
    command = ["check_vllm", "--checkpoint", str(tmp_path / checkpoint), "--vllm-python", python]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        check_vllm.main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
