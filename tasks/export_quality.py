"""How far an exported GGUF is from the child in torch, on held-out tokens, computed by llama.cpp itself.

What llama.cpp gives is the hidden state behind the final norm; its LM head is applied here, as the file has it and with
hidden states rounded as llama.cpp rounds them, so that KL is over the whole vocabulary without [tokens, vocabulary].
"""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from storage.checkpoints import Checkpoint, read_blocks
from storage.model_config import EMBEDDING, LM_HEAD, NORM
from storage.sections import Run
from tasks.engines.hidden_states import as_multiplied, head_of, hidden_states
from tasks.engines.llamacpp import check_installed
from tasks.puzzle.boundaries import boundaries
from tasks.puzzle.device import Compute, compute
from tasks.puzzle.evaluation import per_sequence, summarise
from tasks.puzzle.head import Head, Projected, compare_models


def export_quality(file: Path, child: Checkpoint, tokens: Tensor, run: Run) -> dict[str, float]:
    """{kl, kl_stderr, perplexity, top1_agreement, torch_perplexity} of a GGUF file as llama.cpp computes it.

    KL is of the child's distribution in torch, float32, to llama.cpp's, nats per token.

    Args:
        file: of the child.
        child: its checkpoint.
        tokens: held-out ones, [sequences, tokens] int64.
        run: device, and threads of torch and of llama.cpp.

    Raises:
        InputError: llama.cpp is not installed, or the file is damaged.
    """
    check_installed()
    reference = _in_torch(child, tokens, compute(run.device, "float32", run.threads))
    with torch.inference_mode():
        own, found = compare_models(tokens, reference, [reference, _in_llamacpp(file, tokens, run.threads)])
    return {**asdict(summarise(per_sequence(found))), "torch_perplexity": math.exp(own.lm_loss.mean())}


def _in_torch(checkpoint: Checkpoint, tokens: Tensor, device: Compute) -> Projected:
    """The child's normalised hidden states and LM head, float32, block by block."""
    config, _ = read_blocks(checkpoint)
    head, norm = (
        checkpoint.tensor(name).to(device.device, device.dtype)
        for name in (EMBEDDING if config.tie_embeddings else LM_HEAD, NORM)
    )
    with torch.inference_mode():
        hidden = Head(norm, head, config.rms_norm_eps).normalise(last_hidden(checkpoint, tokens, device, 1))
    return hidden.cpu(), head.cpu()


def _in_llamacpp(path: Path, tokens: Tensor, threads: int) -> Projected:
    """The same of a GGUF file."""
    head, kind = head_of(path)
    hidden = np.stack([as_multiplied(one, kind) for one in hidden_states(path, tokens.tolist(), threads)])
    return torch.from_numpy(hidden), torch.from_numpy(head)


def last_hidden(checkpoint: Checkpoint, tokens: Tensor, device: Compute, sequences_per_batch: int) -> Tensor:
    """A child's hidden states before the final norm, [sequences, tokens, hidden], one block in memory at a time."""
    config, blocks = read_blocks(checkpoint)
    embedding = checkpoint.tensor(EMBEDDING).to(device.device, device.dtype)
    lazily = ((*blocks[i], checkpoint.block(i, device.device, device.dtype)) for i in range(config.num_blocks))
    *_, last = boundaries(config, embedding, lazily, tokens, sequences_per_batch)
    return last
