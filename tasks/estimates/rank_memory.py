"""What one rank of a global distillation holds in memory (`distill_child.ranks`), counted from sizes. No torch.

In: sizes of parent and child, params. Out: bytes. Masters, moments and gradients are split over the ranks; whole blocks
exist while they compute; states are those of the batch of one forward pass (tasks/puzzle/distill/sharded.py). The best
weights so far, the file of a checkpoint as it is written, and states that wait for a streamed teacher are on the CPU.
"""

from tasks.estimates.stage_case import StageCase

_TRAINED_BYTES = 4 + 8 + 4  # a weight in float32, AdamW's two moments, its gradient
_CPU_CHUNK = 128  # tokens whose logits exist at once (tasks/puzzle/distill/gkd.py), in four tensors of float32
_GPU_LOGITS = 2**25


def rank_bytes(case: StageCase) -> float:
    """Count the bytes that each rank holds on its device at the peak; 0 where GKD has no ranks."""
    gkd, config = case.params.distill_child, case.config
    if not gkd.ranks or not gkd.tokens:
        return 0.0
    sequences = min(gkd.sequences_per_batch, _sequences_of_step(case))
    width, batch_tokens = case.compute_bytes, sequences * case.params.prepare_corpus.seq_len
    shards = 0.0 if gkd.offload else _trained_bytes(case)
    # a block and the next one, each as gathered and as copied out of that; gradients, and the same in float32
    blocks = case.block_params * (4 * width + width + 4)
    at_boundaries = (2 * config.num_blocks + 1) * config.hidden_size
    in_block = 12 * config.hidden_size + 4 * config.intermediate_size
    states = batch_tokens * (width * (at_boundaries + in_block) + 16 * config.hidden_size)
    is_on_gpu = case.params.run.device.startswith("cuda")
    logits = _GPU_LOGITS if is_on_gpu else _CPU_CHUNK * config.vocab_size
    outside = width * case.outside_params + 16.0 * logits
    on_cpu = 0.0 if is_on_gpu else cpu_bytes(case)
    return shards + blocks + states + outside + _teacher_bytes(case) + on_cpu


def cpu_bytes(case: StageCase) -> float:
    """Count the bytes that each rank holds on the CPU, wherever it computes."""
    gkd, config, width = case.params.distill_child, case.config, case.compute_bytes
    shards = case.kept_share * config.num_blocks * case.block_params / gkd.ranks * (width + 4)
    shards += _trained_bytes(case) if gkd.offload else 0.0
    if gkd.teacher != "streamed":
        return shards
    waiting = (
        _sequences_of_step(case) * case.params.prepare_corpus.seq_len * (config.num_blocks + 1) * config.hidden_size
    )
    return shards + width * waiting


def _sequences_of_step(case: StageCase) -> int:
    """Count the sequences of a step that a rank gets at most."""
    return -(-case.params.distill_child.sequences_per_step // case.params.distill_child.ranks)


def _trained_bytes(case: StageCase) -> float:
    """Count the bytes of a rank's masters, moments and gradients."""
    weights = case.kept_share * case.config.num_blocks * case.block_params
    return weights / case.params.distill_child.ranks * _TRAINED_BYTES


def _teacher_bytes(case: StageCase) -> float:
    """Count the bytes of a live teacher's share and the blocks that it gathers, or of a streamed one's block."""
    gkd, width = case.params.distill_child, case.compute_bytes
    if gkd.teacher == "streamed":
        return float(width * case.block_params)
    if case.has_live_teacher:
        return width * case.block_params * (case.config.num_blocks / gkd.ranks + 4)
    return 0.0
