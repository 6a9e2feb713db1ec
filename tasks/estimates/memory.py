"""What does not fit is refused by name and bytes before any work: a stage, and those that follow it.

In: the stages, params, the parent's geometry, the memory of the machine and of its device. The estimates are modelled
(tasks/estimates/stage_estimates.py), and hours of other stages would lie before the error of the one that fails.
"""

from collections.abc import Mapping, Sequence

from storage.files import InputError
from storage.model_config import ModelConfig
from storage.params import Params
from storage.pipeline import PipelineStage
from tasks.engines.machine import Memory
from tasks.estimates.stage_estimates import ON_WORKERS, estimate_memory

_GIB = 2**30
_LESS_AT_ONCE = "lower run.workers, or the sequences that the stage takes at once"
_WAYS_OUT: Mapping[str, str] = {
    "write_text": "lower write_text.rows, or take text that is there (prepare_corpus.sources of kind files or hub)",
    "cache_activations": "lower run.workers or cache_activations.sequences_per_shard",
    "distill_blocks": "lower run.workers, or train fewer variants (distill_blocks.ffn_ratios)",
    "score_blocks": "lower run.workers, score_blocks.blocks_per_group or score_blocks.sequences_per_batch",
    "export_parent": "lower run.workers or export_child.max_shard_gib",
    "export_child": "lower run.workers or export_child.max_shard_gib",
    "benchmark_throughput": "set benchmark_throughput.engines to [] and take no limit on measured speed",
}
"""What lowers the memory of a stage, for people."""
_ON_HOST = {"prepare_parent", "measure_costs", "prepare_corpus", "search_architecture", "search_baselines"} | {
    "assemble_child",
    "export_child",
    "export_parent",
    "report",
}
"""Stages that compute in the machine's own memory, whatever `run.device` is."""


def check_memory(
    stage: str, pipeline: Sequence[PipelineStage], config: ModelConfig, params: Params, memory: Memory
) -> None:
    """Refuse a stage where it, or one behind it in the pipeline, needs more memory than there is.

    Args:
        stage: the stage that is about to run.
        pipeline: the stages in the order of dvc.yaml.
        config: the parent's geometry.
        params: the project's params, with `auto` resolved for this machine.
        memory: what there is.

    Raises:
        InputError: a stage does not fit; the message has its name, the bytes, and what lowers them.
    """
    names = [stage_of_pipeline.name for stage_of_pipeline in pipeline]
    for name, (on_device, on_host) in estimate_memory(pipeline[names.index(stage) :], config, params).items():
        kind, gkd = name.partition("@")[0], params.distill_child
        if params.execution.runner == "ray" and kind in ON_WORKERS:
            continue  # Ray puts a piece where execution.memory_gib is left
        if kind in _ON_HOST:
            on_device, on_host = 0.0, on_device
        if kind == "distill_child" and gkd.ranks > memory.gpus > 0:  # as torchrun deals them out over machines
            on_host *= memory.gpus / gkd.ranks
        for needed, available, where, is_of_host in (
            (on_device, memory.device, params.run.device, False),
            (on_host, memory.host, "this machine", True),
        ):
            if needed > available:
                raise InputError(
                    f"{name} needs {needed / _GIB:,.1f} GiB of memory (modelled), {where} has "
                    f"{available / _GIB:,.1f} GiB: {_way_out(kind, params, is_of_host)}, or take a machine with more"
                )


def _way_out(kind: str, params: Params, is_of_host: bool) -> str:
    """Say what lowers the memory of a stage; of distill_child what is not set yet."""
    gkd = params.distill_child
    if kind != "distill_child":
        return _WAYS_OUT.get(kind, _LESS_AT_ONCE)
    ways = []
    if gkd.sequences_per_batch > 1 and not is_of_host:
        ways.append("lower distill_child.sequences_per_batch")
    if not gkd.ranks:
        ways.append("set distill_child.ranks to your number of GPUs")
    elif not is_of_host:
        ways.append("take more distill_child.ranks, a GPU each")
    if is_of_host and gkd.offload:
        ways.append("set distill_child.offload to false")
    elif not is_of_host and not gkd.offload:
        ways.append("set distill_child.offload to true (with ranks)")
    ways.append("set distill_child.tokens to 0 (the corrected child goes on, refine_child needs one block)")
    return ", ".join(ways)
