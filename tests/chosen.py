"""An architecture.json that no search wrote, for tests that only need a child's blocks."""

from collections.abc import Sequence

from storage.architecture import ChosenArchitecture, ParentIdentity, Predicted, ReachedLimit
from storage.scenario import Setting
from storage.variants import Replacement

PREDICTED = Predicted(
    score=0.5,
    score_stderr=0.01,
    params=1,
    params_ratio=1.0,
    block_params=1,
    block_params_ratio=1.0,
    weight_gib=1.0,
    kv_bytes_per_token=8,
    kv_ratio=1.0,
    memory_gib=1.0,
    batch=1,
    context=8,
    tensor_parallel=1,
    precision="float32",
    throughput_ratio=None,
    speed=None,
)


def chosen_architecture(
    blocks: Sequence[Replacement], name: str, digest: str, target: str = "small", label: str = "Small"
) -> ChosenArchitecture:
    """Make a child of these blocks without limits; name and digest are the parent's."""
    return ChosenArchitecture(target, label, ParentIdentity(name, digest), tuple(blocks), (), PREDICTED, ())


def speed_limit(metric: str, limit: float, setting: Setting, name: str = "speed") -> ReachedLimit:
    """Make a lower limit on a speed relative to the parent's, which the tables predict to be just met."""
    return ReachedLimit(
        name=name,
        metric=metric,
        kind="at_least",
        limit=limit,
        predicted=limit,
        relative=True,
        unit="x the parent's",
        hardware=setting.hardware,
        engine=setting.engine,
        precision=setting.precision,
        tensor_parallel=setting.tensor_parallel,
        scenario=setting.scenario,
        batch=setting.batch,
    )
