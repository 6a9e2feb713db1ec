"""The parent's geometry before its weights are here."""

from pathlib import Path

from storage.files import InputError
from storage.gguf import PACKAGE, GgufModel, embedded_parent
from storage.json_files import read_object
from storage.model_config import ModelConfig


def parent_geometry(source: str, config_json: Path | None = None) -> tuple[str, ModelConfig]:
    """Return the parent's name for people, and its geometry.

    Args:
        source: prepare_parent.source.
        config_json: the parent's config.json; None: the one that lies in a source on this machine.

    Raises:
        InputError: there is no config.json without fetching the parent, or its architecture is not supported.
    """
    if config_json is not None:
        return str(config_json), ModelConfig.from_hf(read_object(config_json, "the download"), str(config_json))
    if source == f"package:{PACKAGE}":
        return source, ModelConfig.from_hf(GgufModel(embedded_parent()[0]).config(), source)
    if (Path(source) / "config.json").is_file():
        return source, ModelConfig.from_hf(read_object(Path(source) / "config.json", "the download"), source)
    raise InputError(
        f"prepare_parent.source {source} has no config.json on this machine; give its geometry with --parent "
        "CONFIG_JSON (its config.json alone, no weights)"
    )
