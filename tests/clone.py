"""A temporary git clone of the working tree around a tiny real parent, and the project's commands run in it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from storage.params import Params
from tests.tiny import SIZES

ROOT = Path(__file__).parents[1]
SEQ_LEN = 16
NUM_BLOCKS = 4
TIMINGS = "tiny-cpu"
END = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SECONDS = 900


@dataclass(frozen=True)
class Ended:
    """A command that ended: exit code and what it wrote."""

    code: int
    out: str
    err: str

    def ran(self) -> list[str]:
        """Return stages that `dvc repro` ran, in order."""
        lines = [line for line in self.out.splitlines() if line.startswith("Running stage")]
        return [line.split("'")[1] for line in lines]


@dataclass(frozen=True)
class Clone:
    """A clone in `folder`; `environment` is added to this process's own."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def artifacts(self) -> Path:
        """Return the folder of its artifacts."""
        return self.folder / "artifacts"

    def child(self, target: str) -> Path:
        """Return the folder of all artifacts of one target."""
        return self.artifacts / "children" / target

    def json(self, path: str) -> Any:
        """Read a JSON file under artifacts/."""
        return json.loads((self.artifacts / path).read_text(encoding="utf-8"))

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """Start `python -m <command>` as the leader of its own process group."""
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=self.all_variables(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str) -> Ended:
        """Run `python -m <command>` until it ends, well or not."""
        process = self.start(*command)
        try:
            out, err = process.communicate(timeout=_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return Ended(process.returncode, out, err)

    def must(self, *command: str) -> Ended:
        """Run a command that has to succeed."""
        ended = self.run(*command)
        assert ended.code == 0, f"{command} ended with {ended.code}:\n{ended.out}\n{ended.err}"
        return ended

    def stale(self) -> set[str]:
        """Return stages that `dvc status` calls changed."""
        return set(json.loads(self.must("dvc", "status", "--json").out))

    def kill_when(self, is_time: Callable[[], bool], *command: str) -> None:
        """Start a command and kill its whole process group with SIGKILL as soon as `is_time`."""
        process = self.start(*command)
        end = time.monotonic() + _SECONDS
        while not is_time():
            ended = process.poll() is not None
            if ended or time.monotonic() > end:
                os.killpg(process.pid, signal.SIGKILL) if not ended else None
                raise AssertionError(f"{command} ended before it could be killed:\n{process.communicate()}")
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL

    def set_params(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change params.yaml."""
        path = self.folder / "params.yaml"
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        change(values)
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def all_variables(self) -> dict[str, str]:
        """Return commands' environment: no server but the clone's or a given one, this interpreter first on PATH."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "PUZZLE_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", "")])
        site = {"DVC_SITE_CACHE_DIR": str(self.folder.parent / "dvc-site"), "DVC_NO_ANALYTICS": "1"}
        return {**variables, **site, "PATH": path, "COLUMNS": "200", **self.environment}


def make_clone(folder: Path, params: dict[str, Any]) -> Clone:
    """Make a clone of the files that git would carry to another machine, committed, with params for a tiny parent."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "storage/timings/", "dvc.lock")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    author = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
    for command in (("init", "-q"), ("add", "-A"), (*author, "commit", "-q", "-m", "clone")):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return Clone(folder)


def tiny_parent(folder: Path) -> None:
    """Write a random Llama of 4 blocks with a byte-level BPE tokenizer, chat template, licence and model card."""
    texts = [document["text"] for document in _documents(0, 200)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, chat_template=CHAT_TEMPLATE)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": NUM_BLOCKS, "vocab_size": len(fast), "eos_token_id": fast.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(folder, max_shard_size="100KB")
    (folder / "LICENSE").write_text("The tiny licence.\n", encoding="utf-8")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")


def tiny_documents(folder: Path) -> None:
    """Write text.jsonl, chats.jsonl and, of other words, other.jsonl: random words, no paragraph twice."""
    folder.mkdir()
    texts = _documents(1, 400)
    turns = [[document["text"] for document in _documents(seed, 200)] for seed in (2, 3)]
    chats = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in zip(*turns, strict=True)
    ]
    for name, documents in (("text", texts), ("chats", chats), ("other", _documents(4, 60))):
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _documents(seed: int, count: int) -> list[dict[str, str]]:
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefgilmnoprstu", k=chance.randint(2, 8))) for _ in range(300)]
    return [{"text": " ".join(chance.choices(words, k=chance.randint(20, 40))) + "."} for _ in range(count)]


def tiny_run_params(parent: Path, documents: Path) -> dict[str, Any]:
    """Return params.yaml of the clones: enough work in BLD and scoring to be killed in its middle, seconds in all."""
    values: dict[str, Any] = {
        "run": {"seed": 0, "dtype": "float32", "device": "cpu", "threads": 1, "workers": 2},
        "storage": {"root": None},
        "prepare_parent": {"source": str(parent)},
        "prepare_corpus": _corpus(documents),
        **_library(),
        "measure_costs": {
            "timings": [TIMINGS],
            "hardware": ["h100-sxm"],
            "precision": "float32",
            "scenarios": ["8/8"],
            "batches": [2],
            "threads": 1,
            "copies": 2,
            "repeats": 3,
        },
        "refine_child": {"tokens": 64 * SEQ_LEN, "held_out_tokens": 8 * SEQ_LEN},
        "distill_child": {
            "teacher": "auto",
            "cosine_weight": 1.0,
            "tokens": 32 * SEQ_LEN,
            "sequences_per_step": 2,
            "held_out_tokens": 8 * SEQ_LEN,
            "checkpoint_steps": 2,
        },
        "export_child": {"formats": ["nemotron-nas", "gguf-f16", "gguf-q8_0"]},
        "evaluate_child": {
            "tokens": 12 * SEQ_LEN,
            "baseline_tokens": 6 * SEQ_LEN,
            "domain_baseline_tokens": 2 * SEQ_LEN,
            "export_tokens": 6 * SEQ_LEN,
            "sequences_per_batch": 5,
        },
        "benchmark_throughput": {"scenarios": ["8/8"], "batches": [1, 2], "repeats": 2},
        "report": {"png_dpi": 50},
        "targets": _targets(),
    }
    return {section: values.get(section, {}) for section in Params.model_fields}


def _corpus(documents: Path) -> dict[str, Any]:
    """Return the section prepare_corpus: texts and chats in every split, and the words of other.jsonl in a domain."""

    def files(name: str, **more: Any) -> dict[str, Any]:
        return {"kind": "files", "path": str(documents / name), **more}

    return {
        "sources": [files("text.jsonl", weight=3.0), files("chats.jsonl", messages="messages")],
        "seq_len": SEQ_LEN,
        "train_tokens": 288 * SEQ_LEN,
        "calibration_tokens": 72 * SEQ_LEN,
        "validation_tokens": 12 * SEQ_LEN,
        "domains": {"other": {"sources": [files("other.jsonl")], "tokens": 6 * SEQ_LEN}},
    }


def _library() -> dict[str, Any]:
    """Return sections of the stages that train the library and score it."""
    return {
        "cache_activations": {"dtype": "float32", "sequences_per_shard": 48, "sequences_per_batch": 8},
        "distill_blocks": {
            "fit_tokens": 64 * SEQ_LEN,
            "tokens": 256 * SEQ_LEN,
            "variant_tokens": {},
            "sequences_per_step": 1,
            "learning_rate": 0.002,
            "held_out_tokens": 8 * SEQ_LEN,
            "importance_tokens": 32 * SEQ_LEN,
            "ffn_ratios": [0.5, 0.25],
            "width_multiple": 8,
            "linear": True,
            "spans": [],
        },
        "score_blocks": {
            "tokens": 64 * SEQ_LEN,
            "initial_tokens": 32 * SEQ_LEN,
            "blocks_per_group": 1,
            "sequences_per_batch": 4,
        },
    }


def _targets() -> dict[str, Any]:
    """Return a target of sizes, which any child's speed meets, and one of memory and modelled speed."""
    scenario = {"scenario": "8/8", "batch": 2, "precision": "float32"}
    timed = {"metric": "decode_throughput", "at_least_ratio": 0.01, "hardware": TIMINGS, **scenario}
    modelled = {"metric": "decode_throughput", "at_least_ratio": 1.1, "hardware": "h100-sxm", "engine": "roofline"}
    small = {
        "block_params": {"metric": "block_params", "at_most_ratio": 0.7, "precision": "float32"},
        "kv": {"metric": "kv_bytes", "at_most_ratio": 0.8, "precision": "float32"},
        "decode": timed,  # what a busy machine times decides nothing here
    }
    held = {"metric": "memory_gib", "at_most_ratio": 0.85, "batch": 64, "context": 128, "precision": "float32"}
    return {
        "small": {"label": "Small", "constraints": small},
        "fast": {"label": "Fast", "constraints": {"memory": held, "decode": {**modelled, **scenario}}},
    }
