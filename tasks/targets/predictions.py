"""The tables' predictions of a child: the numbers of architecture.json. No torch.

In: the child's blocks and score, the target's bounds at the child's operating point, the cost table. Out: records.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace

from storage.architecture import Predicted, PredictedSpeed, ReachedLimit, SharedSetting
from storage.files import InputError
from storage.metrics import MEMORY
from storage.variants import Replacement
from tasks.puzzle.costs.cost_table import GIB, CostTable, model_sizes
from tasks.puzzle.search.bounds import Bound
from tasks.puzzle.search.quantities import Quantity, measure, memory_in
from tasks.puzzle.search.score_rule import Score
from tasks.targets.parent_facts import ParentFacts


def predict(
    blocks: Sequence[Replacement], score: Score, bounds: Sequence[Bound], parent: ParentFacts, costs: CostTable
) -> Predicted:
    """Predict the sizes and speed of a child, absolute and relative to the parent.

    Args:
        blocks: the child's blocks.
        score: the child's sum of scores.
        bounds: the target's bounds at the child's operating point.
        parent: the parent.
        costs: sizes and milliseconds.

    Raises:
        InputError: the cost table lacks a row, or the parent has nothing by it.
    """
    memory = _reported_memory(bounds, parent)
    assert memory.context is not None, memory
    child, whole = (
        model_sizes(costs, model, memory.precision, memory.hardware, memory.engine) for model in (blocks, parent.blocks)
    )
    if not (whole.params and whole.block_params and whole.kv_bytes_per_token):
        raise InputError(
            f"the cost table gives the parent {whole.params} parameters, {whole.block_params} of them in blocks, and "
            f"{whole.kv_bytes_per_token} bytes of KV cache a token, expected more than 0 of each; correct the table"
        )
    speed = next((_speed(bound, costs, blocks) for bound in bounds if bound.quantity.metric.speed), None)
    return Predicted(
        score=score.mean,
        score_stderr=score.stderr,
        params=child.params,
        params_ratio=child.params / whole.params,
        block_params=child.block_params,
        block_params_ratio=child.block_params / whole.block_params,
        weight_gib=child.weight_bytes / GIB,
        kv_bytes_per_token=child.kv_bytes_per_token,
        kv_ratio=child.kv_bytes_per_token / whole.kv_bytes_per_token,
        memory_gib=child.memory_gib(memory.batch, memory.context, memory.tensor_parallel),
        batch=memory.batch,
        context=memory.context,
        tensor_parallel=memory.tensor_parallel,
        precision=memory.precision,
        throughput_ratio=speed.ratio if speed else None,
        speed=speed,
    )


def _reported_memory(bounds: Sequence[Bound], parent: ParentFacts) -> Quantity:
    """Pick reported memory: the memory constraint's, else at the speed constraint's place, else of one full context."""
    quantities = [bound.quantity for bound in bounds]
    for quantity in quantities:
        if quantity.metric.needs_context:
            return quantity
    for quantity in quantities:
        if quantity.setting:
            return memory_in(quantity.setting)
    precision = quantities[0].precision
    return Quantity(MEMORY, precision=precision, context=parent.config.context if parent.config else 1)


def _speed(bound: Bound, costs: CostTable, blocks: Sequence[Replacement]) -> PredictedSpeed:
    """Predict the speeds of child and parent where a limit on a speed holds."""
    setting = bound.quantity.setting
    assert setting is not None, bound
    return PredictedSpeed(
        metric=bound.quantity.metric.name,
        unit=bound.quantity.metric.unit,
        child=measure(costs, blocks, bound.quantity),
        parent=bound.parent_value,
        **asdict(setting),
        origin=costs.origin(setting),
    )


def reached_limit(bound: Bound, costs: CostTable, blocks: Sequence[Replacement]) -> ReachedLimit:
    """Return a limit with where it holds and what the tables predict of a child."""
    limit = ReachedLimit(
        name=bound.name,
        metric=bound.quantity.metric.name,
        kind="at_least" if bound.lower else "at_most",
        limit=bound.limit,
        predicted=bound.value(costs, blocks),
        relative=bound.relative,
        unit=bound.unit,
    )
    quantity = bound.quantity
    if quantity.setting:
        mix = [SharedSetting(**asdict(setting), share=share) for setting, share in quantity.mix]
        return replace(limit, **asdict(quantity.setting), mix=tuple(mix) if len(mix) > 1 else ())
    if quantity.metric.needs_context:
        return replace(
            limit,
            batch=quantity.batch,
            context=quantity.context,
            tensor_parallel=quantity.tensor_parallel,
            workspace_gib=quantity.workspace_bytes / GIB,
        )
    return limit
