"""The throughput of a checkpoint from its config.json alone, as a user asks for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from storage.files import write_json
from storage.nemotron_nas import to_nemotron_nas
from tests.benchmarks.bench_engine_model import CHILD, CONFIG
from tests.clone import ROOT

CONFIG_70B = ROOT / "params/llama-3.1-70b.config.json"
KEYS = {
    *("hardware", "precision", "scenario", "tensor_parallel", "batch", "tokens_per_s_per_gpu", "prefill_ms"),
    *("step_ms", "weights_gib", "kv_gib", "origin", "breakdown"),
}


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "flows.cli", "estimate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_one_json_object_and_a_text_that_fits_a_terminal() -> None:
    ended = run("--config", str(CONFIG_70B), "--scenario", "128/1024", "--tensor-parallel", "1", "--json")
    assert ended.returncode == 0, ended.stderr
    estimate = json.loads(ended.stdout)
    assert estimate.keys() >= KEYS
    assert (estimate["origin"], estimate["batch"], estimate["tensor_parallel"]) == ("modelled", 32, 1)
    assert estimate["tokens_per_s_per_gpu"] == pytest.approx(1274, rel=0.05)
    for part in ("prefill_ms", "step_ms"):
        assert sum(times[part] for times in estimate["breakdown"].values()) == pytest.approx(estimate[part])
    text = run("--config", str(CONFIG_70B), "--tensor-parallel", "1").stdout
    assert f"{estimate['tokens_per_s_per_gpu']:,.0f} generated tokens/s per GPU, MODELLED" in text
    *lines, fitted = text.splitlines()
    assert max(map(len, lines)) <= 100 and fitted.startswith("  constants fitted")


def test_in_flight_batches_are_asked_for_by_the_engines_name() -> None:
    arguments = (
        "--config",
        str(CONFIG_70B),
        "--hardware",
        "h200-sxm",
        "--scenario",
        "128/2048",
        "--tensor-parallel",
        "1",
    )
    estimate = json.loads(run(*arguments, "--engine", "tensorrt-llm-inflight", "--json").stdout)
    assert (estimate["engine"], estimate["batch"]) == ("tensorrt-llm-inflight", 200)
    text = run(*arguments, "--engine", "tensorrt-llm-inflight").stdout
    assert (
        f"{estimate['tokens_per_s_per_gpu']:,.0f} generated tokens/s per GPU, MODELLED (tensorrt-llm-inflight)" in text
    )


def test_a_heterogeneous_checkpoint(tmp_path: Path) -> None:
    config = to_nemotron_nas(CONFIG, CHILD.blocks, {}, "bfloat16")
    write_json(tmp_path / "config.json", config)
    estimate = json.loads(run("--config", str(tmp_path / "config.json"), "--json").stdout)
    assert estimate["tokens_per_s_per_gpu"] == pytest.approx(6472, rel=0.12)
    assert (estimate["batch"], estimate["tensor_parallel"]) == (256, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--hardware", "h100"), "hardware 'h100' has no data sheet"),
        (("--hardware", "a100-80gb-sxm"), "a100-80gb-sxm has no units for fp8 (has: bfloat16"),
        (("--hardware", "rtx-4090", "--tensor-parallel", "1"), "do not fit into 1 x"),
        (("--scenario", "128"), "expected INPUT/OUTPUT tokens"),
        (("--engine", "vllm"), "invalid choice: 'vllm' (choose from"),
        (("--batch", "0"), "expected a number of at least 1, or best"),
        (("--config", "missing.json"), "missing.json"),
    ],
)
def test_what_is_wrong_is_one_error(arguments: tuple[str, ...], words: str) -> None:
    given = arguments if "--config" in arguments else ("--config", str(CONFIG_70B), *arguments)
    ended = run(*given, "--json")
    assert ended.returncode == 2 and ended.stdout == "" and "Traceback" not in ended.stderr
    assert words in " ".join(ended.stderr.split())
