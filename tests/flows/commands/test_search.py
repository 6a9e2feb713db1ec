"""The search from files alone, as a user runs it: processes in an empty folder, answers against brute force."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from storage.tables import write_costs, write_scores
from tests.clone import ROOT
from tests.search_tables import SPEED, costs, scores

LAYERS, VARIANTS = 4, 4


def library(seed: int = 0) -> dict[str, Any]:
    """Make up layers: the first variant is the parent's."""
    rng = random.Random(seed)
    return {
        f"layer_{layer}": {
            f"variant_{number}": {
                "stats": {
                    "runtime_ms": 4.0 - number + rng.random(),
                    "memory_mib": 8.0 - number,
                    "num_params": 100 * number,
                },
                "metrics": {"kl_div": 0.0 if number == 0 else rng.random(), "lm_loss": 3.0 + number},
            }
            for number in range(VARIANTS)
        }
        for layer in range(LAYERS)
    }


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "flows.cli", "search", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def best(content: dict[str, Any], runtime: float, memory: float) -> float | None:
    """Return the least sum of kl_div within both limits."""
    sums = []
    for names in itertools.product(range(VARIANTS), repeat=LAYERS):
        chosen = [content[f"layer_{layer}"][f"variant_{number}"] for layer, number in enumerate(names)]
        total_runtime = sum(variant["stats"]["runtime_ms"] for variant in chosen)
        total_memory = sum(variant["stats"]["memory_mib"] for variant in chosen)
        if total_runtime <= runtime and total_memory <= memory:
            sums.append(sum(variant["metrics"]["kl_div"] for variant in chosen))
    return min(sums, default=None)


def test_a_published_library_is_searched_in_an_empty_folder(tmp_path: Path) -> None:
    content = library()
    (tmp_path / "lib.json").write_text(json.dumps(content), encoding="utf-8")
    limits = ("--limit", "runtime_ms=11", "--limit", "memory_mib=27")
    more = ("--metric", "kl_div", "--alternatives", "2", "--min-distance", "0.5")
    ended = run(tmp_path, "--block-library", "lib.json", *limits, *more, "--json")
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert {"status", "objective", "bound", "gap", "seconds", "totals", "choices", "binding"} <= answer.keys()
    assert answer["objective"] == pytest.approx(best(content, 11, 27)) and answer["status"] == "optimal"
    for stat, total in answer["totals"].items():
        stats = [content[layer][name]["stats"][stat] for layer, name in answer["choices"].items()]
        assert total == pytest.approx(sum(stats))
    assert answer["totals"]["runtime_ms"] <= 11 and answer["totals"]["memory_mib"] <= 27
    assert list(answer["choices"]) == [f"layer_{layer}" for layer in range(LAYERS)]
    assert len(answer["alternatives"]) == 2
    for other in answer["alternatives"]:
        assert sum(answer["choices"][layer] != name for layer, name in other["choices"].items()) >= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lib.json"]
    text = run(tmp_path, "--block-library", "lib.json", *limits, *more)
    assert f"optimal: kl_div {answer['objective']:.6g}" in text.stdout


def test_odd_names_of_variants_reach_no_terminal_raw(tmp_path: Path) -> None:
    variant = {"stats": {"runtime_ms": 1}, "metrics": {"kl_div": 0}}
    (tmp_path / "lib.json").write_text(json.dumps({"layer_0": {"\x1b[2Jodd\ud800": variant}}), encoding="utf-8")
    ended = run(tmp_path, "--block-library", "lib.json", "--metric", "kl_div")
    assert ended.returncode == 0, ended.stderr
    assert r"\x1b[2Jodd\ud800" in ended.stdout and "\x1b" not in ended.stdout


def test_a_published_library_without_a_choice_says_what_can_be_reached(tmp_path: Path) -> None:
    (tmp_path / "lib.json").write_text(json.dumps(library()), encoding="utf-8")
    ended = run(tmp_path, "--block-library", "lib.json", "--limit", "runtime_ms=1", "--metric", "kl_div", "--json")
    assert ended.returncode == 3
    answer = json.loads(ended.stdout)
    assert answer["status"] == "infeasible"
    fastest = 0.0
    for layer in library().values():
        fastest += min(variant["stats"]["runtime_ms"] for variant in layer.values())
    assert answer["conflicts"] == [{"limit": "runtime_ms", "best": pytest.approx(fastest)}]
    assert "best reachable" in ended.stderr and "loosen one (--limit)" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--limit", "runtime=1", "--metric", "kl_div"), "no stat 'runtime', did you mean runtime_ms?"),
        (("--limit", "runtime_ms", "--metric", "kl_div"), "expected STAT=N"),
        (("--limit", "runtime_ms=-1", "--metric", "kl_div"), "expected STAT=N"),
        (("--limit", "runtime_ms=1e308", "--metric", "kl_div"), "above 0, at most 1e+30"),
        (("--metric", "kl"), "no metric 'kl'"),
        (("--metric", "kl_div", "--min-distance", "0"), "min_distance: Input should be greater than 0"),
    ],
)
def test_wrong_arguments_get_one_error(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "lib.json").write_text(json.dumps(library()), encoding="utf-8")
    ended = run(tmp_path, "--block-library", "lib.json", *arguments)
    assert ended.returncode == 2 and ended.stdout == "" and "Traceback" not in ended.stderr
    assert words in ended.stderr


def test_tables_of_a_user_need_no_artifact(tmp_path: Path) -> None:
    write_scores(tmp_path / "mine.parquet", scores(random.Random(0)))
    write_costs(tmp_path / "costs.parquet", costs())
    limits = {
        "size": {"metric": "block_params", "at_most_ratio": 0.7},
        "speed": {"metric": "decode_throughput", "at_least_ratio": 1.1, **SPEED},
    }
    (tmp_path / "target.yaml").write_text(yaml.safe_dump({"label": "Mine", "constraints": limits}), encoding="utf-8")
    files = ("--scores", "mine.parquet", "--costs", "costs.parquet", "--target", "target.yaml", "--out", "out")
    ended = run(tmp_path, *files)
    assert ended.returncode == 0, ended.stderr
    size, speed = json.loads((tmp_path / "out/architecture.json").read_text(encoding="utf-8"))["constraints"]
    assert (size["name"], speed["name"]) == ("size", "speed")
    assert size["predicted"] <= 0.7
    limits["speed"]["at_least_ratio"] = 1e5
    (tmp_path / "target.yaml").write_text(yaml.safe_dump({"label": "Mine", "constraints": limits}), encoding="utf-8")
    before = (tmp_path / "out/architecture.json").read_bytes()
    ended = run(tmp_path, *files)
    assert ended.returncode == 3 and "best reachable" in ended.stderr
    assert (tmp_path / "out/architecture.json").read_bytes() == before
    (tmp_path / "target.yaml").write_text("label: x\nconstraint: {}\n", encoding="utf-8")
    ended = run(tmp_path, *files)
    assert ended.returncode == 2 and "unknown key constraint, did you mean constraints?" in ended.stderr
