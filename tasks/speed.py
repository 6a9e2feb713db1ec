"""Parent and child as whole models in memory, to be timed beside each other; whether this machine is the timed one."""

from storage.checkpoints import Checkpoint, read_blocks
from storage.model_config import ModelConfig
from storage.parent import Parent
from storage.paths import TIMINGS
from storage.records import Attention, Ffn
from storage.tables import read_timings
from tasks.puzzle.child import DeciLMForCausalLM, build
from tasks.puzzle.device import Compute
from tasks.puzzle.variants import parent_attention, parent_ffn


def parent_and_child(parent: Parent, child: Checkpoint, device: Compute) -> tuple[DeciLMForCausalLM, DeciLMForCausalLM]:
    """Both as the same class, so that they differ in their blocks alone."""
    own = [(parent_attention(parent.config), parent_ffn(parent.config))] * parent.config.num_blocks
    config, blocks = read_blocks(child)
    return _whole(parent.checkpoint, parent.config, own, device), _whole(child, config, blocks, device)


def _whole(
    checkpoint: Checkpoint, config: ModelConfig, blocks: list[tuple[Attention, Ffn]], device: Compute
) -> DeciLMForCausalLM:
    return build(config, blocks, {name: checkpoint.tensor(name) for name in checkpoint.files}, device)


def is_timed_machine(hardware: str, here: str) -> bool:
    """Whether the timings of that name were taken on a machine like this one."""
    path = TIMINGS / f"{hardware}.parquet"
    return path.is_file() and {row.machine for row in read_timings(path)} == {here}
