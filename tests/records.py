"""Made-up records of artifacts, for tests of the stages that read them."""

from storage.model_config import ModelConfig
from storage.parent_info import ParentInfo


def parent_info(config: ModelConfig, name: str = "tiny", digest: str = "d1") -> ParentInfo:
    """Return what prepare_parent would write of a parent that has a geometry and no tensors."""
    return ParentInfo(name, "tests", "unknown", (), config, {}, digest)
