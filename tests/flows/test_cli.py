"""The command `puzzle`: its list, errors, start and examples; the installed entry point; `python` without a venv."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flows import cli
from flows.cli import COMMANDS, parser_of
from tests.clone import ROOT

DOCUMENTS = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
VENV = Path(sys.prefix)


def _run(*command: str | Path, folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process that has no activated venv."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": os.environ["HOME"]}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_alone_it_lists_every_command_with_a_phrase(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([])
    listed = dict(re.findall(r"^  ([a-z-]+)  +(.+)$", capsys.readouterr().out, re.M))
    assert listed == COMMANDS
    modules = {path.stem.replace("_", "-") for path in (ROOT / "flows/commands").glob("[a-z]*.py")}
    assert modules == set(COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["explian"])
    assert ended.value.code == 2
    assert "no command 'explian', did you mean explain?" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_that_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    program, command, *arguments = shlex.split(capsys.readouterr().out.rpartition("example:\n")[2])
    assert (program, command) == ("puzzle", name)
    parser_of(name).parse_args(arguments)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_docs_parse(document: str) -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.M | re.S)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("puzzle "):
                _, name, *arguments = shlex.split(line, comments=True)
                parser_of(name).parse_args(arguments)


def test_help_imports_neither_torch_nor_prefect() -> None:
    """Each takes longer to import than `--help` may take."""
    code = """
import sys
from flows.cli import COMMANDS, parser_of
print(*(name for name in COMMANDS for slow in ("torch", "prefect") if parser_of(name) and slow in sys.modules))
"""
    ended = _run(sys.executable, "-c", code)
    assert (ended.stdout, ended.stderr) == ("\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("search_architecture",), "search_architecture runs per target; add --target with one of like-51b, like-40b"),
        (("measure_costs", "--target", "like-51b"), "measure_costs is the same for all targets; leave --target out"),
        (("report", "--target", "like"), "leave --target out"),
        (("assemble_child", "--target", "like-51"), "unknown target 'like-51', did you mean like-51b?"),
    ],
)
def test_a_stage_gets_a_target_where_it_runs_per_target(arguments: tuple[str, ...], words: str) -> None:
    ended = _run(sys.executable, "-m", "flows.cli", "stage", *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and words in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_the_installed_command_ends_with_the_codes_of_the_shell(tmp_path: Path) -> None:
    """Outside a clone, and where the venv is not activated."""
    puzzle = VENV / "bin/puzzle"
    assert _run(puzzle, folder=tmp_path).returncode == 0
    ended = _run(puzzle, "explain", "--target", "like-51b", "--block", "17", folder=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("error: ") and "params.yaml" in ended.stderr
    assert _run(puzzle, "explain", folder=tmp_path).returncode == 2  # argparse's own


def test_what_python_starts_finds_the_same_python() -> None:
    """dvc.yaml says `python`; `.venv/bin/dvc repro` needs no activated venv (Makefile: PTH)."""
    code = "import subprocess; subprocess.run(['python', '-c', 'import sys; print(sys.prefix)'], check=True)"
    ended = _run(VENV / "bin/python", "-c", code)
    assert (ended.returncode, ended.stdout.strip()) == (0, str(VENV)), ended.stderr


def test_a_closed_stream_is_no_file_that_libraries_print_into(tmp_path: Path) -> None:
    """A file that is opened next would get its number; and sys.stdout would be None."""
    code = "import flows, os; file = open('artifact', 'w'); print('a line'); os.write(2, b'of a C library'); "
    code += "raise SystemExit(os.system('echo a line of a program that it starts'))"
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} <&- >&- 2>&-"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, check=False).returncode == 0
    assert (tmp_path / "artifact").read_bytes() == b""


PROXIES = {
    "ALL_PROXY": "socks5h://127.0.0.1:1080",
    "all_proxy": "socks://127.0.0.1:1080/",
    "HTTP_PROXY": "htp://me:s3cret@127.0.0.1:1",
    "http_proxy": "http://me:pw@h:1",
    "no_proxy": "10.1.0.0/16, [::1],fe80::/10,.corp",
}
"""Proxies of curl, of GNOME, mistyped; one that works; and exceptions from them, two as httpx cannot take them."""


def test_variables_for_other_programs_end_no_command() -> None:
    """Jupyter hands its backend down to `!dvc repro`; conda leaves SSL_CERT_FILE behind of environments that went."""
    code = "import flows, matplotlib, os; print(os.environ.get('SSL_CERT_FILE'), matplotlib.get_backend())"
    code += "; import huggingface_hub, tqdm, httpx; httpx.Client().close()"
    code += "; print(*map(os.environ.get, ('http_proxy', 'no_proxy', 'NO_PROXY', 'HF_TOKEN', 'https_proxy')))"
    early = {
        "HF_TOKEN": "of another hub",
        "https_proxy": "",
        "HF_HUB_ETAG_TIMEOUT": "5 s",
        "HF_ENDPOINT": "http://[::1",
        "TQDM_NCOLS": "wide",
        "TQDM_ASCII": "1",
    }
    others = {"MPLBACKEND": "module://matplotlib_inline.none_such", "SSL_CERT_FILE": "/none/such", **early, **PROXIES}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **others},
        capture_output=True,
        text=True,
        check=False,
    )
    direct = "10.1.0.0/16,::1,.corp,127.0.0.1,localhost"
    taken = f"None agg\nhttp://me:pw@h:1 {direct} {direct} None \n"
    assert (ended.returncode, ended.stdout) == (0, taken), ended.stderr
    assert "s3cret" not in ended.stderr
    assert [line.partition(" left aside: ")[0] for line in ended.stderr.splitlines()] == [
        "warning: SSL_CERT_FILE is",
        "warning: ALL_PROXY is",
        "warning: all_proxy is",
        "warning: HTTP_PROXY is",
        "warning: 'fe80::/10' in NO_PROXY is",
        "warning: HF_HUB_ETAG_TIMEOUT is",
        "warning: HF_ENDPOINT is",
        "warning: TQDM_NCOLS, TQDM_ASCII",
    ]
