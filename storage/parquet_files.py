"""Parquet tables with a seal: a digest of schema and values in the metadata, beside a checksum of every page.

In and out: Arrow tables. A table that this project writes is compared with its seal when it is read, so that a damaged
file is an error and never other values. Tables of others carry none and are read as they are where that is allowed.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.files import SEAL, damaged, digest_of, write_whole

_SEALED_BY = "sealed_by"
_PROJECT = "puzzle pipeline"
"""The second mark: a flipped bit in the name of the seal leaves this one."""


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table with its seal; the same table gives the same bytes."""
    metadata = {SEAL: _digest(table), _SEALED_BY: _PROJECT}
    with write_whole(path) as temporary:
        sealed = table.replace_schema_metadata(metadata)
        pq.write_table(sealed, temporary, compression="zstd", write_page_checksum=True)


def read_table(path: Path, rebuild: str, takes_foreign: bool = False) -> pa.Table:
    """Read a table and compare it with its seal.

    Args:
        path: a file that exists.
        rebuild: the command that makes the table anew.
        takes_foreign: whether a table without a seal is read as well, as others write it.

    Raises:
        DamagedFileError: it is no Parquet file, or not the table that was written.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:  # read_table imports pandas, a second
            table = file.read()
            table.validate(full=True)
        marks = table.schema.metadata or {}
        is_foreign = takes_foreign and not {SEAL.encode(), _SEALED_BY.encode()} & marks.keys()
        is_whole = is_foreign or marks.get(SEAL.encode()) == _digest(table).encode()
    except (pa.ArrowException, OSError, ValueError, OverflowError, TypeError) as error:  # TypeError: texts become bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yours = "; correct it if it is yours" if takes_foreign else ""
        raise damaged(path, f"is not a whole Parquet file ({reason}{yours})", rebuild) from error
    if not is_whole:
        way_out = ", or take the seal out of its metadata if you changed it yourself" if takes_foreign else ""
        raise damaged(path, f"is damaged (its values are not those that were sealed{way_out})", rebuild)
    return table


def _digest(table: pa.Table) -> str:
    """Return the digest of names, types, units and values, whatever their chunks."""
    fields: list[Any] = []
    for field in table.schema:
        metadata = {str(key, "utf-8"): str(value, "utf-8") for key, value in (field.metadata or {}).items()}
        metadata.pop("PARQUET:field_id", None)  # the reader's
        fields.append([field.name, str(field.type), field.nullable, metadata])
    return digest_of([fields, table.to_pydict()])
