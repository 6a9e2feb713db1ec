"""Fifty prompts in llama.cpp and in torch: the parent and every child of a finished run, each exported format.

Run: `python -m tests.studies.llamacpp_parity [--tokens 16]` where artifacts/ are (a minute a file on two cores).
In F32, which is written for this alone, the tolerance holds; the others show what their rounding does.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer

from storage.gguf_child import write_gguf
from storage.gguf_tokenizer import add_tokenizer
from storage.params import load
from storage.paths import Paths
from tasks.checkpoints.exports import CheckpointToExport, read_checkpoint
from tasks.checkpoints.gguf_files import PARENT, gguf_files
from tasks.puzzle.model.child import DeciLMForCausalLM, build
from tasks.puzzle.model.device import prepare_compute
from tests.parity import LOG_PROBABILITY_ERROR, compare, prompts


def main() -> None:
    """Compare and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.studies.llamacpp_parity", description=__doc__)
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    tokens, paths = parser.parse_args().tokens, Paths()
    folders = {PARENT: (paths.parent, paths.parent_exports)}
    folders |= {name: (paths.distilled(name), paths.exports(name)) for name in load().targets}
    sys.stdout.write(
        f"{'model':<10} {'file':<10} {'steps':>6} {'other tokens':>13} {'largest error':>14} {'mean':>9}\n"
    )
    for name, (checkpoint, exports) in folders.items():
        source = read_checkpoint(name, checkpoint, "dvc repro")
        model, words = _in_torch(source), AutoTokenizer.from_pretrained(checkpoint)
        with tempfile.TemporaryDirectory() as scratch:
            files = {"F32": _write_f32(source, Path(scratch) / "model.gguf"), **gguf_files(name, exports)}
            for kind, path in files.items():
                parity = compare(path, model, prompts(words), words.vocab["a"], tokens, LOG_PROBABILITY_ERROR)
                sys.stdout.write(
                    f"{name:<10} {kind:<10} {parity.positions:>6} {parity.different_tokens:>13} "
                    f"{parity.largest_error:>14.6f} {parity.mean_error:>9.6f}\n"
                )
                sys.stdout.flush()


def _in_torch(source: CheckpointToExport) -> DeciLMForCausalLM:
    tensors = {key: source.checkpoint.tensor(key) for key in source.checkpoint.files}
    return build(source.config, source.blocks, tensors, prepare_compute("cpu", "float32", 2))


def _write_f32(source: CheckpointToExport, path: Path) -> Path:
    tokenizer = partial(add_tokenizer, folder=source.checkpoint.folder, vocab_size=source.config.vocab_size)
    rows = source.checkpoint.tensor
    write_gguf(
        path, source.config, source.blocks, lambda key: iter([rows(key).float().numpy()]), "F32", tokenizer=tokenizer
    )
    return path


if __name__ == "__main__":
    main()
