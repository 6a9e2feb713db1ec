"""The distance of an exported GGUF from the child in torch, on held-out tokens, computed by llama.cpp itself.

In: GGUF files, the child's checkpoint, held-out tokens. Out: KL, perplexity and top-1 agreement. llama.cpp gives the
hidden states behind the final norm; the LM head is applied here, as the file has it and with hidden states rounded as
llama.cpp rounds them, so that KL is over the whole vocabulary without logits of [tokens, vocabulary].
"""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from storage.checkpoints import Checkpoint, read_blocks
from storage.evaluation import ExportQuality
from storage.formats import FormatName
from storage.model_config import EMBEDDING, LM_HEAD, NORM
from storage.sections import Run
from tasks.engines.hidden_states import as_multiplied, head_of, hidden_states
from tasks.engines.llamacpp import check_installed
from tasks.puzzle.model.ahead import Ahead
from tasks.puzzle.model.boundaries import boundaries
from tasks.puzzle.model.device import Compute, prepare_compute
from tasks.puzzle.model.head import Head, Projected, compare_models
from tasks.puzzle.quality.evaluation import SequenceQuality, per_sequence, summarise


@dataclass(frozen=True)
class ExportedSequences:
    """Quality of every sequence: of the child in torch, float32, and of each of its files in llama.cpp."""

    in_torch: Sequence[SequenceQuality]
    files: Mapping[FormatName, Sequence[SequenceQuality]]


def compare_files(files: Mapping[FormatName, Path], child: Checkpoint, tokens: Tensor, run: Run) -> ExportedSequences:
    """Compare GGUF files as llama.cpp computes them with the child in torch, whose states are computed once for all.

    KL is of the child's distribution in torch, float32, to llama.cpp's, nats per token. Memory holds two LM heads.

    Args:
        files: GGUF files of the child, by format.
        child: the child's checkpoint.
        tokens: held-out token ids, [sequences, tokens] int64.
        run: device, and threads of torch and of llama.cpp.

    Raises:
        InputError: llama.cpp is not installed, or a file is damaged.
    """
    check_installed()
    reference = _in_torch(child, tokens, prepare_compute(run.device, "float32", run.threads))
    with torch.inference_mode():
        in_torch, *_ = compare_models(tokens, reference, [reference])
    in_llamacpp: dict[FormatName, Sequence[SequenceQuality]] = {}
    for name, path in files.items():
        model = _in_llamacpp(path, tokens, run.threads)
        with torch.inference_mode():
            losses, *_ = compare_models(tokens, reference, [model])
        in_llamacpp[name] = per_sequence(losses)
    return ExportedSequences(per_sequence(in_torch), in_llamacpp)


def export_quality(
    format_name: FormatName, parts: Sequence[ExportedSequences], documents: Sequence[int]
) -> ExportQuality:
    """Average the quality of a file over the sequences of all parts; `documents` has the document of each."""
    sequences = list(itertools.chain.from_iterable(part.files[format_name] for part in parts))
    in_torch = itertools.chain.from_iterable(part.in_torch for part in parts)
    lm_loss = statistics.fmean(sequence.lm_loss for sequence in in_torch)
    return ExportQuality(**asdict(summarise(sequences, documents)), torch_perplexity=math.exp(lm_loss))


def _in_torch(checkpoint: Checkpoint, tokens: Tensor, compute: Compute) -> Projected:
    """Compute the child's normalised hidden states and LM head, float32, block by block."""
    config, _ = read_blocks(checkpoint)
    head, norm = (
        checkpoint.tensor(name).to(*compute) for name in (EMBEDDING if config.tie_embeddings else LM_HEAD, NORM)
    )
    with torch.inference_mode():
        hidden = Head(norm, head, config.rms_norm_eps).normalise(last_hidden(checkpoint, tokens, compute, 1))
    return hidden.cpu(), head.cpu()


def _in_llamacpp(path: Path, tokens: Tensor, threads: int) -> Projected:
    """Compute the normalised hidden states and LM head of a GGUF file, float32, with llama.cpp."""
    head, head_type = head_of(path)
    hidden = np.stack([as_multiplied(states, head_type) for states in hidden_states(path, tokens.tolist(), threads)])
    return torch.from_numpy(hidden), torch.from_numpy(head)


def last_hidden(checkpoint: Checkpoint, tokens: Tensor, compute: Compute, sequences_per_batch: int) -> Tensor:
    """Compute a child's hidden states before the final norm, [sequences, tokens, hidden], block by block."""
    config, blocks = read_blocks(checkpoint)
    embedding = checkpoint.tensor(EMBEDDING).to(*compute)
    lazily = ((*blocks[i], checkpoint.block(i, *compute)) for i in range(config.num_blocks))
    read = Ahead(lazily, compute.device)
    return deque(boundaries(config, embedding, read, tokens, sequences_per_batch), maxlen=1).pop()
