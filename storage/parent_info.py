"""puzzle_parent.json, the description of the parent beside its checkpoint: geometry, provenance, licence. No torch.

prepare_parent writes it; every stage that needs the parent's geometry or digest reads it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from storage.files import write_sealed
from storage.json_records import read_record
from storage.model_config import ModelConfig

INFO = "puzzle_parent.json"
REBUILD = "dvc repro prepare_parent"


@dataclass(frozen=True)
class ParentInfo:
    """The parent's description; the fields are the keys of puzzle_parent.json, in its order.

    Attributes:
        name: the model's name.
        source: its origin: a folder, an address, `hub:<id>@<revision>` or `package:<name>==<version>`.
        licence: the licence's name from the model card, `see licence files` or `unknown`.
        licence_files: names of the licence files in the parent's folder.
        config: geometry.
        special_tokens: token ids of config.json by key, those that it has of bos, eos and pad.
        digest: content digest of geometry and all tensors.
    """

    name: str
    source: str
    licence: str
    licence_files: tuple[str, ...]
    config: ModelConfig
    special_tokens: Mapping[str, int | list[int] | None]
    digest: str


def read_parent_info(folder: Path) -> ParentInfo:
    """Read puzzle_parent.json of a parent's folder.

    Raises:
        InputError: it is missing.
        DamagedFileError: it is not what was written, or a field is missing or has the wrong type.
    """
    return read_record(folder / INFO, ParentInfo, REBUILD)


def write_parent_info(folder: Path, info: ParentInfo) -> None:
    """Write puzzle_parent.json into a parent's folder."""
    write_sealed(folder / INFO, asdict(info))
