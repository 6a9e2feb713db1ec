"""What people see of an error: one message, whatever files of others bring into it."""

import os
import subprocess
import sys

import pytest

from flows.errors import run_cleanly
from storage.files import DamagedFileError, InputError
from tests.clone import ROOT


def ended(error: Exception) -> int | str | None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_cleanly(fail)
    return end.value.code


def test_names_of_others_give_a_terminal_no_orders_and_no_walls_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(InputError(f"tensor a\x1b[2J\u202e{'b' * 9_000}\n  and a second problem")) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: tensor a\\x1b[2J\\u202ebbb")
    assert message.endswith("b…\n  and a second problem\n") and len(message) < 2_100


def test_an_error_of_the_system_is_one_message_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(NotADirectoryError(20, "Not a directory", "artifacts/library")) == 2
    assert capsys.readouterr().err == "error: artifacts/library: Not a directory; look at this path, and run it again\n"
    assert ended(DamagedFileError("index.parquet is damaged")) == 4


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    def fail() -> None:
        raise OSError("without a file")

    with pytest.raises(OSError, match="without a file"):
        run_cleanly(fail)


@pytest.mark.parametrize("imported", ["flows.stage", "flows.errors"])
def test_a_warning_of_ours_is_shown_once_whatever_prefect_does_with_logging(imported: str) -> None:
    code = (
        f"import logging, {imported}; from flows.errors import run_cleanly; log = logging.getLogger('storage.files');"
        "run_cleanly(lambda: (__import__('flows.stage'), log.info('unsaid'), log.warning('said')))"
    )
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=ROOT, check=True)
    assert ended.stderr == b"WARNING: said\n"


@pytest.mark.parametrize("length", [10, 1_000_000])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_nobody_reads_to_its_end_is_no_error(length: int, unbuffered: str) -> None:
    """As in `puzzle plan | head`: less than a buffer, which Python writes when it ends, and more than a pipe holds."""
    code = f"import sys; from flows.errors import run_cleanly; run_cleanly(lambda: sys.stdout.write('x' * {length}))"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as out:
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, cwd=ROOT, env=environment, check=False)
    assert (ended.returncode, ended.stderr) == (141, b"")
