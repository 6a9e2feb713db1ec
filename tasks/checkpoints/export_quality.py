"""The distance of an exported GGUF from the child in torch, on held-out tokens, computed by llama.cpp itself.

In: a GGUF file, the child's checkpoint, held-out tokens. Out: KL, perplexity and top-1 agreement. llama.cpp gives the
hidden states behind the final norm; the LM head is applied here, as the file has it and with hidden states rounded as
llama.cpp rounds them, so that KL is over the whole vocabulary without logits of [tokens, vocabulary].
"""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from storage.checkpoints import Checkpoint, read_blocks
from storage.evaluation import ExportQuality
from storage.model_config import EMBEDDING, LM_HEAD, NORM
from storage.sections import Run
from tasks.engines.hidden_states import as_multiplied, head_of, hidden_states
from tasks.engines.llamacpp import check_installed
from tasks.puzzle.model.boundaries import boundaries
from tasks.puzzle.model.device import Compute, prepare_compute
from tasks.puzzle.model.head import Head, Projected, compare_models
from tasks.puzzle.quality.evaluation import per_sequence, summarise


def export_quality(file: Path, child: Checkpoint, tokens: Tensor, run: Run) -> ExportQuality:
    """Quality of a GGUF file as llama.cpp computes it, against the child in torch.

    KL is of the child's distribution in torch, float32, to llama.cpp's, nats per token.

    Args:
        file: GGUF file of the child.
        child: the child's checkpoint.
        tokens: held-out token ids, [sequences, tokens] int64.
        run: device, and threads of torch and of llama.cpp.

    Raises:
        InputError: llama.cpp is not installed, or the file is damaged.
    """
    check_installed()
    reference = _in_torch(child, tokens, prepare_compute(run.device, "float32", run.threads))
    with torch.inference_mode():
        in_torch, in_llamacpp = compare_models(tokens, reference, [reference, _in_llamacpp(file, tokens, run.threads)])
    quality = summarise(per_sequence(in_llamacpp))
    return ExportQuality(**asdict(quality), torch_perplexity=math.exp(in_torch.lm_loss.mean()))


def _in_torch(checkpoint: Checkpoint, tokens: Tensor, compute: Compute) -> Projected:
    """The child's normalised hidden states and LM head, float32, block by block."""
    config, _ = read_blocks(checkpoint)
    head, norm = (
        checkpoint.tensor(name).to(*compute) for name in (EMBEDDING if config.tie_embeddings else LM_HEAD, NORM)
    )
    with torch.inference_mode():
        hidden = Head(norm, head, config.rms_norm_eps).normalise(last_hidden(checkpoint, tokens, compute, 1))
    return hidden.cpu(), head.cpu()


def _in_llamacpp(path: Path, tokens: Tensor, threads: int) -> Projected:
    """The normalised hidden states and LM head of a GGUF file, float32, as llama.cpp computes them."""
    head, head_type = head_of(path)
    hidden = np.stack([as_multiplied(states, head_type) for states in hidden_states(path, tokens.tolist(), threads)])
    return torch.from_numpy(hidden), torch.from_numpy(head)


def last_hidden(checkpoint: Checkpoint, tokens: Tensor, compute: Compute, sequences_per_batch: int) -> Tensor:
    """A child's hidden states before the final norm, [sequences, tokens, hidden], one block in memory at a time."""
    config, blocks = read_blocks(checkpoint)
    embedding = checkpoint.tensor(EMBEDDING).to(*compute)
    lazily = ((*blocks[i], checkpoint.block(i, *compute)) for i in range(config.num_blocks))
    *_, last = boundaries(config, embedding, lazily, tokens, sequences_per_batch)
    return last
