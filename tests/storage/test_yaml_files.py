"""YAML that people write: read as DVC reads it, or refused in one sentence with its place, quickly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import load_yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.files import InputError
from storage.params import load, load_target
from storage.pipeline import read_pipeline
from storage.yaml_files import parse_foreign_yaml, read_yaml

ROOT = Path(__file__).parents[2]
PARAMS, PIPELINE = ((ROOT / name).read_bytes() for name in ("params.yaml", "dvc.yaml"))
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
PIECES = [
    *(
        b"&a ",
        b"*a ",
        b"<<: ",
        b"!!int ",
        b"!!bool ",
        b"[",
        b"{",
        b"]",
        b"}",
        b"? ",
        b": ",
        b"- ",
        b"\t",
        b"\x00",
        b"010",
    ),
    *(
        b"1:30",
        b"0x_",
        b"1e999",
        b".nan",
        b"9" * 5_000,
        b"9" * 20,
        b'"\\0"',
        b"~",
        b"%YAML 1.1\n",
        b"--- ",
        b"|\n",
        b"\xff",
    ),
    *(b"2024-01-01", b"null", b"'", b'"', b"[]", b"{}", b"- " * 40, b"-1", b"", b"\xef\xbb\xbf", b"0x" + b"f" * 5_000),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.yaml"


@pytest.mark.parametrize(
    "text",
    ["010", "0o10", "1:30", "190:20:30", "1_000", "1e-3", "yes", "off", "0x1F", "0b11", "~", "1.", ".5", "08", "<"],
)
def test_scalars_mean_what_they_mean_to_dvc(text: str, file: Path) -> None:
    """YAML 1.1 reads 8, 90, true and a text where 1.2 reads 10, texts and 0.001."""
    file.write_text(f"a: {text}\nb: &anchor {{c: 1}}\nd: {{<<: *anchor, e: 2}}\n")
    assert read_yaml(file) == load_yaml(str(file))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a: 1\nb: 2\na: 3", "line 3, column 1: the key a stands here a second time (first in line 1); keep one"),
        (b"a:\n  b: \xff", "line 2, column 6: byte 0xff is not UTF-8; save the file as UTF-8"),
        ("a: 1".encode("utf-16"), "line 1, column 1: byte 0xff is not UTF-8"),
        (b"a: 1\n\nb: \x00", "line 3, column 4: the character U+0000 cannot stand in YAML"),
        (b'a: "\\0"', "line 1, column 4: the text holds the control character U+0000"),
        (b"\ta: 1", "line 1, column 1: this is not valid YAML"),
        (b"a: [1,\n2", "line 3, column 1: this is not valid YAML"),
        (b"a: 2024-01-01", "line 1, column 4: 2024-01-01 is read as a timestamp; write it in quotes"),
        (b"a: 2024-99-99", "line 1, column 4: 2024-99-99 is read as a timestamp"),
        (b"a: {1: 2}", "line 1, column 5: keys are texts, found 1; write it in quotes"),
        (b"? [a]\n: 1", "line 1, column 3: keys are texts, found a list or mapping"),
        (b"a: !!python/none x", "line 1, column 4: the tag tag:yaml.org,2002:python/none cannot stand in settings"),
        (b"a: &x [*x]", "line 1, column 8: *x stands within what it names"),
        (b"a: *x", "line 1, column 4: this is not valid YAML"),
        (b"a: " + b"9" * 5_000, "line 1, column 4: a number of 5,000 characters"),
        (b"[" * 100_000, "line 1, column 33: more than 32 levels"),
        (b"- " * 100_000, "more than 32 levels"),
        (b"[" + b"a," * 100_000 + b"]", "more than 20,000 values"),
        (BOMB.encode(), "more than 20,000 values, aliases followed"),
        (b"#" * (1 << 21), "is larger than 1 MiB"),
    ],
)
def test_what_is_refused_is_named_with_its_place(content: bytes, problem: str, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(str(file))
    assert problem in str(caught.value)


def test_files_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path, problem in (
        (tmp_path, "is a folder"),
        (tmp_path / "none", "is missing; look again"),
        (tmp_path / "loop", "cannot be read"),
        (Path("/dev/zero"), "is a device"),
        (tmp_path / ("x" * 300), "cannot be read (File name too long)"),
    ):
        with pytest.raises(InputError) as caught:
            read_yaml(path, "look again")
        assert problem in str(caught.value)


def test_an_empty_file_is_null_and_a_byte_order_mark_nothing(file: Path) -> None:
    file.write_bytes(b"# nothing\n")
    assert read_yaml(file) is None
    file.write_text("a: 1", encoding="utf-8-sig")
    assert read_yaml(file) == {"a": 1}


def test_yaml_of_strangers_may_hold_more_but_is_no_deeper(file: Path) -> None:
    """They write the front matter of model cards; a deep one ended the process with a segmentation fault."""
    assert parse_foreign_yaml("date: 2024-01-01\n1: !!str 2", file)[1] == "2"
    for text in ("[" * 100_000 + "]" * 100_000, "a: !!bool x", "a: !!timestamp x", "!!omap x", "a: 2024-99-99"):
        with pytest.raises(InputError, match=r"a\.yaml"):
            parse_foreign_yaml(text, file)


@st.composite
def damaged(draw: Callable[[st.SearchStrategy[Any]], Any], whole: bytes) -> bytes:
    """Draw a file with some places overwritten by what a slip, or somebody who means harm, leaves there."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start, length = draw(st.integers(0, len(data))), draw(st.sampled_from([0, 0, 1, 3, 30, 400]))
        data[start : start + length] = draw(st.sampled_from(PIECES) | st.binary(max_size=4))
    return bytes(data)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged(PARAMS) | damaged(PIPELINE) | st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join))
def test_a_damaged_file_is_read_or_an_input_error(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    for read in (load, load_target, read_pipeline):
        try:
            read(file)
        except InputError as error:
            assert 0 < len(str(error)) < 10_000
