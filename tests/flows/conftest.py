"""A Prefect server that the tests of a file share."""

from collections.abc import Iterator

import pytest

from tests.clone import ROOT, Clone


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the API address of a server for this file."""
    clone = Clone(tmp_path_factory.mktemp("server"), {"PYTHONPATH": str(ROOT)})
    try:
        yield clone.must("flows.server", "start").out.split()[-1] + "/api"
    finally:
        clone.must("flows.server", "stop")
