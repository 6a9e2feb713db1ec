"""The whole pipeline as a user runs it: a git clone, `dvc repro`, a real Prefect server, a tiny random parent.

One clone runs undisturbed. The other runs beside it with the same inputs, for the first target only, and is killed,
damaged and mended on its way; in the end both must hold the same bytes. Tests below the fixtures look at what
is there and change the undisturbed clone further, in the order of the file.
"""

import json
import os
import re
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from storage.corpus import read_sequences
from storage.evaluation import CHILD_STATES
from storage.library import Library
from storage.parent import Parent
from storage.pipeline import read_pipeline
from storage.tables import read_throughput
from storage.variants import Architecture
from tasks.engines.llamacpp import ChatOptions, LlamaCpp
from tasks.puzzle.model.child import DeciLMForCausalLM, build  # importing it is what makes children load
from tasks.puzzle.model.device import Compute
from tasks.tensors.replacements import ReplacementWeights
from tests.clone import (
    NUM_BLOCKS,
    ROOT,
    SEQ_LEN,
    TIMINGS,
    Clone,
    Ended,
    make_clone,
    tiny_documents,
    tiny_parent,
    tiny_run_params,
)
from tests.reference import replace_block
from tests.stages import checksums
from tests.tiny import SIZES, flip_byte

TARGETS = ("small", "fast")
PIPELINE = read_pipeline(ROOT / "dvc.yaml")
REPORT = "report"
SHARED = tuple(stage.name for stage in PIPELINE if not stage.per_target and stage.name != REPORT)
PER_TARGET = tuple(stage.name for stage in PIPELINE if stage.per_target)
ALL_STAGES = {*SHARED, *(f"{stage}@{target}" for stage in PER_TARGET for target in TARGETS), REPORT}
TABLE = f"storage/timings/{TIMINGS}.parquet"
DAMAGED = "activations/train/boundary_003/shard_000.arrow"  # blocks 2 and 3 read it


@dataclass(frozen=True)
class Interrupted:
    """Pieces that were finished when a stage was killed: file -> (mtime, bytes), then and after the next run."""

    before: dict[str, tuple[int, bytes]]
    after: dict[str, tuple[int, bytes]]


@dataclass(frozen=True)
class Damaged:
    """What distill_blocks did with a shard that lost a byte: how it ended, and its records before and after."""

    ended: Ended
    before: set[str]
    after: set[str]


@dataclass(frozen=True)
class Built:
    """Both clones, finished, and what happened on the way."""

    undisturbed: Clone
    disturbed: Clone
    first_run: list[str]
    distill: Interrupted
    damaged: Damaged
    score: Interrupted


@pytest.fixture(scope="module")
def clones(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Clone, Clone]]:
    """Yield two clones with one Prefect server, the first one's, which computes on worker processes."""
    root = tmp_path_factory.mktemp("clones")
    tiny_parent(root / "parent")
    tiny_documents(root / "documents")
    params = tiny_run_params(root / "parent", root / "documents")
    first = make_clone(root / "undisturbed", {**params, "execution": {"runner": "processes"}})
    try:
        started = first.must("flows.server", "start")
        url = started.out.split()[-1]
        second = make_clone(root / "disturbed", params)
        yield first, Clone(second.folder, {"PREFECT_API_URL": f"{url}/api"})
    finally:
        first.must("flows.server", "stop")


@pytest.fixture(scope="module")
def built(clones: tuple[Clone, Clone]) -> Built:
    """Run both clones to their end, at the same time."""
    undisturbed, disturbed = clones
    with ThreadPoolExecutor() as pool:
        timed = pool.submit(_time, undisturbed)
        ran = pool.submit(_undisturbed, undisturbed, timed)
        interrupted = pool.submit(_disturbed, disturbed, timed)
        return Built(undisturbed, disturbed, ran.result(), *interrupted.result())


def _time(clone: Clone) -> tuple[list[str], bytes]:
    """Time the machine, which needs the parent; return the stages that ran for it, and the table."""
    ran = clone.must("dvc", "repro", "prepare_parent").ran()
    clone.must("flows.cli", "time-machine", TIMINGS)
    return ran, (clone.folder / TABLE).read_bytes()


def _undisturbed(clone: Clone, timed: "Future[tuple[list[str], bytes]]") -> list[str]:
    ran, _ = timed.result()
    return ran + clone.must("dvc", "repro").ran()


def _disturbed(clone: Clone, timed: "Future[tuple[list[str], bytes]]") -> tuple[Interrupted, Damaged, Interrupted]:
    clone.must("dvc", "repro", "cache_activations")
    library, scores = clone.artifacts / "library", clone.artifacts / "score_pieces"

    clone.kill_when(lambda: bool(_trained(library)), "dvc", "repro", "distill_blocks")
    before = _finished(library)
    damaged = _damage(clone, library)
    clone.must("dvc", "repro", "distill_blocks")
    distill = Interrupted(before, _finished(library))

    clone.kill_when(lambda: len(_records(scores)) > 2, "dvc", "repro", "score_blocks")
    before = _finished(scores)
    clone.must("dvc", "repro", "score_blocks")
    score = Interrupted(before, _finished(scores))

    (clone.folder / TABLE).parent.mkdir(exist_ok=True)
    (clone.folder / TABLE).write_bytes(timed.result()[1])  # input data: git brings it
    clone.must("dvc", "repro", "assemble_child@small")
    clone.kill_when((clone.child("small") / ".gkd/.pieces/state.json").is_file, "dvc", "repro", "distill_child@small")
    assert not (clone.child("small") / "gkd.json").exists()
    clone.must("dvc", "repro", "export_child@small")
    return distill, damaged, score


def _damage(clone: Clone, library: Path) -> Damaged:
    """Flip a byte of a shard, let distill_blocks find it, and do what its message says."""
    before = _records(library)
    flip_byte(clone.artifacts / DAMAGED, -3000)
    ended = clone.run("flows.distill_blocks")
    command = re.search(r"run `(dvc repro \w+)`", ended.err)
    assert command, ended
    after = _records(library)
    clone.must(*command[1].split())
    return Damaged(ended, before, after)


def _records(folder: Path) -> set[str]:
    return {path.stem for path in (folder / ".pieces").glob("[!.]*.json")}


def _trained(library: Path) -> set[str]:
    return {name for name in _records(library) if not name.endswith("channel_order")}


def _finished(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return every file that a record accounts for, and the records."""
    files = set()
    for name in _records(folder):
        record = folder / ".pieces" / f"{name}.json"
        files |= {record, *(folder / file for file in json.loads(record.read_text(encoding="utf-8"))["files"])}
    return {str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def _api(clone: Clone, path: str, body: dict[str, Any]) -> Any:
    """Ask the clone's Prefect server, with the token that it wants of whoever sends something."""
    address = f"http://127.0.0.1:{_port(clone)}/api"
    with urllib.request.urlopen(f"{address}/csrf-token?client=tests") as reply:
        token = json.load(reply)["token"]
    headers = {"Content-Type": "application/json", "Prefect-Csrf-Client": "tests", "Prefect-Csrf-Token": token}
    with urllib.request.urlopen(
        urllib.request.Request(f"{address}{path}", json.dumps(body).encode(), headers)
    ) as reply:
        return json.load(reply)


def _port(clone: Clone) -> int:
    return int(json.loads((clone.folder / ".prefect/server.json").read_text(encoding="utf-8"))["port"])


def _one_error(ended: Ended, code: int, *words: str) -> None:
    """Check that stderr is one message with these words, with this exit code and no traceback."""
    assert ended.code == code, ended
    assert "Traceback" not in ended.err + ended.out, ended.err
    assert len(re.findall(r"^error: ", ended.err, re.M)) == 1, ended.err
    for word in words:
        assert word in ended.err, (word, ended.err)


# --- one run ---------------------------------------------------------------------------------------------------------


def test_every_stage_ran_once(built: Built) -> None:
    assert sorted(built.first_run) == sorted(ALL_STAGES)
    early = [stage for stage in built.first_run if stage != "prepare_parent"][:2]
    # they refuse timings that lack a variant, and a tokenizer that llama.cpp lacks, before anything is trained
    assert sorted(early) == ["export_parent", "measure_costs"]


def test_a_second_repro_runs_nothing(built: Built) -> None:
    assert built.undisturbed.must("dvc", "repro").ran() == []
    assert built.undisturbed.stale() == set()


def test_the_demo_closes_with_the_children_beside_the_parent(built: Built) -> None:
    """Nothing is stale, so that it only times the machine to a scratch file and prints; the server was there before."""
    shown = built.undisturbed.must("flows.demo")
    assert shown.ran() == []
    *_, table = shown.out.partition("\nmodel ")
    lines = table.splitlines()
    children = [f"{label} {state}" for label in ("Small", "Fast") for state in CHILD_STATES]
    assert [line[:19].strip() for line in lines[1:21] if line[0] != " "] == ["parent", *children]
    assert "KL of baselines less the assembled child's, training, 6 documents:" in table
    assert "KL of baselines less the assembled child's, other, 2 documents:" in table
    assert max(map(len, lines)) <= 100
    for name in ("block_params", "kv_bytes", "memory_gib", "decode_throughput"):
        assert name in table
    assert built.undisturbed.must("flows.server", "start").out.startswith("found")
    assert built.undisturbed.stale() == set()


def test_git_sees_the_lock_file_and_the_timings_only(built: Built) -> None:
    """Artifacts, server and caches are ignored."""
    status = subprocess.run(
        ["git", "status", "--porcelain", "-uall"],
        cwd=built.undisturbed.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert status.stdout.split() == ["??", "dvc.lock", "??", TABLE]


def test_flows_ran_on_the_one_server(built: Built) -> None:
    flows = {flow["name"] for flow in _api(built.undisturbed, "/flows/filter", {})}
    assert flows == {*SHARED, *PER_TARGET, REPORT}
    assert not (built.disturbed.folder / ".prefect/server.json").exists()


def test_the_server_listens_on_this_machine_only(built: Built) -> None:
    """All of 127/8 reaches a server that listens everywhere; ours answers on 127.0.0.1 alone."""
    for address, answers in (("127.0.0.1", True), ("127.0.0.2", False)):
        with socket.socket() as probe:
            assert (probe.connect_ex((address, _port(built.undisturbed))) == 0) is answers


@pytest.mark.parametrize("target", TARGETS)
def test_architecture_and_search_say_what_the_issue_asks_for(built: Built, target: str) -> None:
    chosen = built.undisturbed.json(f"children/{target}/architecture.json")
    assert {"target", "parent", "blocks", "predicted", "constraints"} <= chosen.keys()
    assert chosen["target"] == target
    fields = {"score", "params", "params_ratio", "block_params_ratio", "kv_ratio", "memory_gib", "batch"}
    assert fields | {"throughput_ratio"} <= chosen["predicted"].keys()
    assert [index for block in chosen["blocks"] for index in block["parent_blocks"]] == list(range(NUM_BLOCKS))
    for block in chosen["blocks"]:
        assert {"kind", "num_kv_heads"} <= block["attention"].keys()
        assert {"kind", "intermediate_size"} <= block["ffn"].keys()
    search = built.undisturbed.json(f"children/{target}/search.json")
    assert {"solver", "status", "objective", "bound", "gap", "seconds", "binding"} <= search.keys()
    assert search["status"] == "optimal"
    assert search["bound"] <= search["objective"] * (1 + 1e-9)
    assert search["objective"] == pytest.approx(chosen["predicted"]["score"])


def test_tables_have_the_columns_of_the_design(built: Built) -> None:
    scores = pq.read_table(built.undisturbed.artifacts / "scores.parquet")
    assert {"first_block", "span", "attention", "ffn", "weights", "around", "sequence_shard", "tokens"} <= {
        *scores.column_names
    }
    assert {"kl", "lm_loss", "top1_agreement"} <= set(scores.column_names)
    costs = pq.read_table(built.undisturbed.artifacts / "costs.parquet")
    assert {"component", "variant", "first_block", "span", "hardware", "engine", "precision"} <= {*costs.column_names}
    assert {"tensor_parallel", "scenario", "batch", "prefill_ms", "decode_ms"} <= set(costs.column_names)
    assert {"weight_bytes", "kv_bytes_per_token", "params", "origin", "how"} <= set(costs.column_names)
    origins = set(zip(costs["engine"].to_pylist(), costs["origin"].to_pylist(), strict=True))
    assert origins == {("torch", "measured"), ("roofline", "modelled")}


# --- the children ----------------------------------------------------------------------------------------------------


def _source_parent(built: Built) -> Any:
    """Return the parent as transformers reads its source, float32."""
    return AutoModelForCausalLM.from_pretrained(built.undisturbed.folder.parent / "parent").train(False)


def _child(built: Built, target: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(built.undisturbed.child(target) / "assembled")
    assert isinstance(model, DeciLMForCausalLM)
    return model.train(False)


def _reference_child(built: Built, target: str) -> Any:
    """Put the child together by hand in transformers' own Llama, from the parent's source and the library's files."""
    model = _source_parent(built)
    library = built.undisturbed.artifacts / "library"
    for block in built.undisturbed.json(f"children/{target}/architecture.json")["blocks"]:
        first, *others = block["parent_blocks"]
        folder = library / (f"span_{first:03d}_{1 + len(others)}" if others else f"block_{first:03d}")
        stays = {name: value.clone() for name, value in model.model.layers[first].state_dict().items()}
        if others:
            stays = load_file(folder / "whole.safetensors")
        heads, width = block["attention"]["num_kv_heads"], block["ffn"]["intermediate_size"]
        changed = {
            ("self_attn", "input_layernorm"): ("attention", heads, SIZES["num_key_value_heads"], f"kv_{heads}"),
            ("mlp", "post_attention_layernorm"): ("ffn", width, SIZES["intermediate_size"], f"ffn_{width}"),
        }
        tensors: dict[str, Tensor] = {}
        for prefixes, (half, size, parents, name) in changed.items():
            if size == parents:
                tensors |= {key: value for key, value in stays.items() if key.startswith(prefixes)}
            elif block[half]["kind"] == "linear":
                tensors |= load_file(folder / f"{half}_linear.safetensors")
            elif size:
                tensors |= load_file(folder / f"{name}.safetensors")
        replace_block(model, first, tensors)
        for index in others:
            replace_block(model, index, {})
    return model


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    """Check that they are equal up to float32 sums in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def _validation(built: Built) -> Tensor:
    return torch.from_numpy(read_sequences(built.undisturbed.artifacts / "corpus", "validation")).long()


@pytest.mark.parametrize("target", TARGETS)
def test_a_child_is_what_library_and_parent_make(built: Built, target: str) -> None:
    tokens = _validation(built)
    with torch.inference_mode():
        actual, expected = _child(built, target)(tokens).logits, _reference_child(built, target)(tokens).logits
    _assert_close(actual, expected)


def test_children_differ_from_the_parent_in_both_subblocks(built: Built) -> None:
    """Else the comparison above would show little."""
    blocks = [
        block
        for target in TARGETS
        for block in built.undisturbed.json(f"children/{target}/architecture.json")["blocks"]
    ]
    assert {block["attention"]["num_kv_heads"] for block in blocks} - {SIZES["num_key_value_heads"]}
    assert {block["ffn"]["intermediate_size"] for block in blocks} - {SIZES["intermediate_size"]}


@pytest.mark.parametrize("target", TARGETS)
def test_a_child_generates_with_its_cache(built: Built, target: str) -> None:
    """Chat template and tokenizer travel with it; the cache changes the time only."""
    folder = built.undisturbed.child(target) / "assembled"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "a few words"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    child = _child(built, target)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (child.generate(**prompt, **settings, use_cache=use) for use in (True, False))
    assert cached.shape[1] == prompt["input_ids"].shape[1] + 12
    assert torch.equal(cached, plain)
    with torch.inference_mode():
        whole = child(cached).logits
        first = child(cached[:, :-1], use_cache=True)
        last = child(cached[:, -1:], past_key_values=first.past_key_values, use_cache=True)
    _assert_close(torch.cat([first.logits, last.logits], 1), whole)


@pytest.mark.parametrize("target", TARGETS)
def test_licence_and_card_travel_with_a_child(built: Built, target: str) -> None:
    folder = built.undisturbed.child(target) / "assembled"
    assert (folder / "LICENSE").read_text(encoding="utf-8") == "The tiny licence.\n"
    assert "mit" in (folder / "README.md").read_text(encoding="utf-8")


# --- what was measured -----------------------------------------------------------------------------------------------


def _sizes(built: Built, folder: Path) -> tuple[int, int, int]:
    """Count, of a checkpoint's own tensors: parameters in blocks, all bytes, KV bytes per token (float32)."""
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    in_blocks = sum(value.numel() for name, value in tensors.items() if name.startswith("model.layers."))
    cached = sum(len(value) for name, value in tensors.items() if name.endswith(("k_proj.weight", "v_proj.weight")))
    return in_blocks, sum(value.nbytes for value in tensors.values()), 4 * cached


@pytest.mark.parametrize("target", TARGETS)
def test_constraints_hold_as_measured(built: Built, target: str) -> None:
    """Sizes are counted in the child's files. Speed is timed where a machine was named; a modelled GPU has none."""
    child = _sizes(built, built.undisturbed.child(target) / "assembled")
    parent = _sizes(built, built.undisturbed.artifacts / "parent")
    memory = [weights + 64 * 128 * per_token for _, weights, per_token in (child, parent)]
    expected = {
        "block_params": child[0] / parent[0],
        "kv_bytes": child[2] / parent[2],
        "memory_gib": memory[0] / memory[1],
    }
    evaluation = built.undisturbed.json(f"children/{target}/evaluation.json")
    for limit in evaluation["constraints"]:
        if limit["kind"] == "at_most":
            assert limit["measured"] == pytest.approx(expected[limit["metric"]], rel=1e-9)
            assert limit["measured"] <= limit["limit"]
            assert limit["predicted"] == pytest.approx(limit["measured"])
        else:
            assert limit["predicted"] >= limit["limit"]
            assert (limit["measured"] is None) == (limit["engine"] == "roofline")
            assert limit["measured"] is None or limit["measured"] >= limit["limit"]
    timed = [limit for limit in evaluation["constraints"] if limit.get("engine") == "torch"]
    assert bool(timed) == (evaluation["speed"] is not None)
    rows = [
        row for row in read_throughput(built.undisturbed.child(target) / "throughput.parquet") if row.phase == "decode"
    ]
    for limit in timed:
        speeds = {row.model: row.measured_tokens_per_s or 0 for row in rows if row.batch == limit["batch"]}
        ratio = speeds["child"] / speeds["parent"]
        assert limit["measured"] == pytest.approx(ratio)


@pytest.mark.parametrize("target", TARGETS)
def test_the_exported_file_says_what_the_distilled_child_says(built: Built, target: str) -> None:
    """In llama.cpp: a chat in its template, and the quality that evaluation.json has of both files."""
    exports = built.undisturbed.child(target) / "exports"
    engine = LlamaCpp(exports / f"gguf-f16/{target}-F16.gguf", threads=1, sequences=1, context=64)
    words: Any = AutoTokenizer.from_pretrained(exports / "nemotron-nas")
    chat = [{"role": "user", "content": "abc"}]
    prompt = words.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(exports / "nemotron-nas", dtype=torch.float32)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    completed = engine.complete(prompt, 1, logprobs=20)["choices"][0]["logprobs"]["content"][0]
    for token in completed["top_logprobs"]:
        assert token["logprob"] == pytest.approx(
            expected[token["id"]].item(), abs=0.04
        )  # F16, as docs/runtimes.md found
    [*pieces] = engine.chat(chat, ChatOptions(max_tokens=1))
    assert pieces[-1].prompt_tokens == len(prompt)
    measured = built.undisturbed.json(f"children/{target}/evaluation.json")["exports"]
    assert measured["tokens"] == 6 * SEQ_LEN
    assert set(measured["formats"]) == {"gguf-f16", "gguf-q8_0"}
    for quality in measured["formats"].values():
        assert 0 <= quality["kl"] < 1e-3
        assert quality["perplexity"] == pytest.approx(quality["torch_perplexity"], rel=0.01)
    assert built.undisturbed.json(f"children/{target}/exports/exports.json")["runtimes"]["llama.cpp"]["takes"] == [
        "GGUF"
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_quality_is_what_the_whole_models_give(built: Built, target: str) -> None:
    tokens = _validation(built)
    with torch.inference_mode():
        parent, child = (model(tokens).logits[:, :-1] for model in (_source_parent(built), _child(built, target)))
    kl = functional.kl_div(child.log_softmax(-1), parent.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    losses = [functional.cross_entropy(logits.mT, tokens[:, 1:]) for logits in (parent, child)]
    domains = built.undisturbed.json(f"children/{target}/evaluation.json")["domains"]
    assert [(name, measured["sequences"]) for name, measured in domains.items()] == [("training", 12), ("other", 6)]
    evaluation = domains["training"]
    assert {"kl", "kl_stderr", "perplexity", "top1_agreement"} <= evaluation["assembled"].keys()
    assert evaluation["parent"]["kl"] == pytest.approx(0, abs=1e-6)
    assert evaluation["parent"]["perplexity"] == pytest.approx(float(losses[0].exp()), rel=1e-4)
    assert evaluation["assembled"]["perplexity"] == pytest.approx(float(losses[1].exp()), rel=1e-4)
    assert evaluation["assembled"]["kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    agreement = (parent.argmax(-1) == child.argmax(-1)).float().mean()
    assert evaluation["assembled"]["top1_agreement"] == pytest.approx(float(agreement), abs=0.006)  # one tie in 180
    rows = pq.read_table(built.undisturbed.child(target) / "evaluation.parquet").to_pylist()
    place = ("training", "assembled")
    of_child = [row for row in rows if (row["domain"], row["model"]) == place]
    kl_of_child = [row["kl"] for row in sorted(of_child, key=lambda row: row["sequence"])]
    assert kl_of_child == pytest.approx(kl.mean(-1).tolist(), rel=1e-3)


@pytest.mark.parametrize("name", ["uniform", "untrained", "random_0"])
def test_a_baseline_is_measured_as_its_whole_model_would_be(built: Built, name: str) -> None:
    """Paired with the assembled child on the sequences that both have."""
    chosen = built.undisturbed.json("children/small/baselines.json")["baselines"][name]
    parent, library = Parent(built.undisturbed.artifacts / "parent"), Library(built.undisturbed.artifacts / "library")
    blocks, cpu = Architecture.from_json(chosen["blocks"]).blocks, torch.device("cpu")
    tensors = {key: parent.checkpoint.tensor(key) for key in parent.checkpoint.files if "layers" not in key}
    read = ReplacementWeights(parent, library, cpu, torch.float32)
    for index, replacement in enumerate(blocks):
        block = read.tensors(replacement, "initial" if name == "untrained" else "decoupled")
        tensors |= {f"model.layers.{index}.{short}": tensor for short, tensor in block.items()}
    variants = [(block.attention, block.ffn) for block in blocks]
    model = build(parent.config, variants, tensors, Compute(cpu, torch.float32))
    tokens = _validation(built)[:6]
    with torch.inference_mode():
        theirs, ours = (network(tokens).logits[:, :-1].log_softmax(-1) for network in (_source_parent(built), model))
    kl = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean(-1)
    evaluation = built.undisturbed.json("children/small/evaluation.json")["domains"]["training"]
    assert (evaluation["baselines"][name]["sequences"], evaluation["baselines"][name]["documents"]) == (6, 6)
    assert evaluation["baselines"][name]["kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    rows = pq.read_table(built.undisturbed.child("small") / "evaluation.parquet").to_pylist()
    first = [row for row in rows if row["domain"] == "training" and row["sequence"] < 6]
    child = [row["kl"] for row in first if row["model"] == "assembled"]
    difference = [baseline - assembled for baseline, assembled in zip(kl.tolist(), child, strict=True)]
    paired = evaluation["paired"][name]
    assert paired["kl_difference"] == pytest.approx(fmean(difference), rel=1e-2, abs=1e-5)
    assert paired["stderr"] == pytest.approx(stdev(difference) / 6**0.5, rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_speed_is_measured_beside_predicted_from_this_machines_timings(built: Built, target: str) -> None:
    """Those timings are of batch 2; whether the target's limit names them, or is on a modelled GPU, is the same."""
    rows = read_throughput(built.undisturbed.child(target) / "throughput.parquet")
    measured = [row for row in rows if row.measured_ms is not None]
    assert {(row.batch, row.predicted_hardware) for row in measured} == {(1, None), (2, TIMINGS)}
    assert {row.hardware for row in measured} == {TIMINGS}
    assert {row.hardware for row in rows if row.modelled_tokens_per_s is not None} == {"h100-sxm"}


# --- killed, damaged, resumed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["distill", "score"])
def test_a_killed_stage_repeats_no_finished_piece(built: Built, stage: str) -> None:
    interrupted: Interrupted = getattr(built, stage)
    assert interrupted.before
    assert interrupted.before.keys() < interrupted.after.keys()  # it was killed in its middle
    assert {name: interrupted.after[name] for name in interrupted.before} == interrupted.before


def test_a_flipped_byte_is_found_and_mended_by_what_the_message_says(built: Built) -> None:
    _one_error(built.damaged.ended, 4, DAMAGED, "damaged", "dvc repro cache_activations")
    assert built.damaged.before <= built.damaged.after  # finished pieces are kept


def test_bits_that_flip_in_place_are_right_after_a_repro(built: Built) -> None:
    """DVC trusts its cache unread, so no artifact may share bytes with it; the next test compares all other files."""
    clone = built.disturbed
    paths = ("scores.parquet", "children/small/architecture.json", "library/block_000/kv_1.safetensors")
    files = [clone.artifacts / path for path in (*paths, "children/small/assembled/model.safetensors")]
    before = [file.read_bytes() for file in files]
    for file in files:
        flip_byte(file, -200)
    clone.must("dvc", "repro", "distill_child@small")
    assert [file.read_bytes() for file in files] == before


def test_a_bit_that_rots_without_a_new_date_is_mended_by_what_the_message_says(built: Built) -> None:
    """DVC goes by the date and calls the stage up to date; the stage that reads the file does not."""
    clone, file = built.disturbed, built.disturbed.child("small") / "architecture.json"
    before, state = file.read_bytes(), file.stat()
    flip_byte(file, -200)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert clone.must("dvc", "repro", "search_architecture@small").ran() == []
    ended = clone.run("flows.assemble_child", "--target", "small")
    _one_error(ended, 4, "architecture.json", "run `dvc repro search_architecture@small`")
    clone.must("dvc", "repro", "search_architecture@small")
    assert file.read_bytes() == before


def test_both_clones_hold_the_same_bytes(built: Built) -> None:
    """Killed and mended or not, on threads or processes: library, scores, architectures and children are one."""
    for folder in ("parent", "corpus", "activations", "library", "score_pieces"):
        assert checksums(built.undisturbed.artifacts / folder) == checksums(built.disturbed.artifacts / folder), folder
    for child in ("assembled", "distilled"):
        assert checksums(built.undisturbed.child("small") / child) == checksums(
            built.disturbed.child("small") / child
        ), child
    kl_of_child = [f"children/small/{name}.json" for name in ("architecture", "gkd", "exports/exports")]
    for file in ("scores.parquet", "costs.parquet", *kl_of_child):
        assert (built.undisturbed.artifacts / file).read_bytes() == (built.disturbed.artifacts / file).read_bytes(), (
            file
        )


# --- what a change makes stale ---------------------------------------------------------------------------------------


def test_a_learning_rate_reruns_from_distill_blocks(built: Built) -> None:
    def faster(params: dict[str, Any]) -> None:
        params["distill_blocks"]["learning_rate"] *= 2

    def back(params: dict[str, Any]) -> None:
        params["distill_blocks"]["learning_rate"] /= 2

    built.undisturbed.set_params(faster)
    assert built.undisturbed.stale() == {"distill_blocks"}
    would_run = set(built.undisturbed.must("dvc", "repro", "--dry", "--force-downstream").ran())
    built.undisturbed.set_params(back)
    upstream = {"prepare_parent", "write_text", "prepare_corpus", "cache_activations", "measure_costs", "export_parent"}
    assert would_run == ALL_STAGES - upstream


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        (
            "tasks/puzzle/search/mip.py",
            {f"search_{result}@{target}" for result in ("architecture", "baselines") for target in TARGETS},
        ),
        ("tasks/puzzle/distill/bld.py", {"distill_blocks"}),
        ("flows/distill_blocks.py", set()),
    ],
)
def test_an_edited_file_makes_its_stages_stale(built: Built, file: str, stale: set[str]) -> None:
    path = built.undisturbed.folder / file
    source = path.read_bytes()
    path.write_bytes(source + b"# a comment\n")
    assert built.undisturbed.stale() == stale
    path.write_bytes(source)


def test_a_comment_in_bld_trains_nothing_again(built: Built) -> None:
    """DVC runs the stage, for a file changed; the stage finds all of its pieces, for no code did."""

    def trainings() -> int:
        return int(_api(built.undisturbed, "/task_runs/count", {"task_runs": {"name": {"like_": "train_block"}}}))

    before, library = trainings(), checksums(built.undisturbed.artifacts / "library")
    assert before >= NUM_BLOCKS
    with (built.undisturbed.folder / "tasks/puzzle/distill/bld.py").open("a", encoding="utf-8") as file:
        file.write("# a comment\n")
    assert built.undisturbed.must("dvc", "repro").ran() == ["distill_blocks"]
    assert trainings() == before
    assert checksums(built.undisturbed.artifacts / "library") == library


def test_a_changed_constraint_reruns_its_target_only(built: Built) -> None:
    kept = (built.undisturbed.folder / "params.yaml").read_bytes()
    built.undisturbed.set_params(
        lambda params: params["targets"]["fast"]["constraints"]["memory"].update(at_most_ratio=0.7)
    )
    would_run = built.undisturbed.must("dvc", "repro", "--dry", "--force-downstream").ran()
    (built.undisturbed.folder / "params.yaml").write_bytes(kept)
    assert set(would_run) == {*(f"{stage}@fast" for stage in PER_TARGET), REPORT}


def test_an_infeasible_target_stops_nobody_else(built: Built) -> None:
    def change(params: dict[str, Any]) -> None:
        params["targets"]["small"]["constraints"]["decode"]["at_least_ratio"] = 1000.0
        params["targets"]["fast"]["constraints"]["memory"]["at_most_ratio"] = 0.7

    kept = {path: path.read_bytes() for path in built.undisturbed.child("small").glob("*.json")}
    built.undisturbed.set_params(change)
    ended = built.undisturbed.run("dvc", "repro", "--keep-going", "search_architecture@small", "assemble_child@fast")
    assert ended.code != 0
    assert sorted(ended.ran()) == ["assemble_child@fast", "search_architecture@fast", "search_architecture@small"]
    assert "exited with 3" in ended.err
    assert re.search(r"error: no child of small exists.*\n.*decode: decode_throughput.*>= 1000x.*best", ended.err)
    assert "Traceback" not in ended.err
    assert {path: path.read_bytes() for path in kept} == kept
    limits = built.undisturbed.json("children/fast/architecture.json")["constraints"]
    assert [limit["limit"] for limit in limits if limit["name"] == "memory"] == [0.7]
    child, parent = (
        _sizes(built, folder)
        for folder in (built.undisturbed.child("fast") / "assembled", built.undisturbed.artifacts / "parent")
    )
    assert (child[1] + 64 * 128 * child[2]) / (parent[1] + 64 * 128 * parent[2]) <= 0.7


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_misspelt_key_is_refused_with_the_nearest(built: Built) -> None:
    def misspell(params: dict[str, Any]) -> None:
        params["distill_blocks"]["lerning_rate"] = 1e-3

    clone = built.disturbed
    clone.set_params(misspell)
    ended = clone.run("flows.search_architecture", "--target", "small")
    _one_error(ended, 2, "unknown key distill_blocks.lerning_rate", "did you mean learning_rate?")
    clone.set_params(lambda params: params["distill_blocks"].pop("lerning_rate"))


def test_an_unknown_target_is_refused_with_the_nearest(built: Built) -> None:
    _one_error(built.disturbed.run("flows.search_architecture", "--target", "smal"), 2, "'smal'", "did you mean small?")


def test_a_truncated_source_is_refused_and_the_parent_stays(built: Built, tmp_path: Path) -> None:
    tiny_parent(tmp_path / "truncated")
    file = sorted((tmp_path / "truncated").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    before = checksums(built.disturbed.artifacts / "parent")
    built.disturbed.set_params(lambda params: params["prepare_parent"].update(source=str(tmp_path / "truncated")))
    _one_error(built.disturbed.run("flows.prepare_parent"), 4, file.name, "not a whole safetensors file")
    assert checksums(built.disturbed.artifacts / "parent") == before
