"""The order in which tasks run: one Prefect flow per DVC stage, with the same name.

Prefect reads its settings when it is first imported, so this package sets them before: a home of this clone's own, no
telemetry, few retries, and a console that shows our progress and errors only (the UI has the logs). Other Prefect
settings of the user are ignored (variables, profiles, files of the folder), except the address and credentials of a
running server. Local addresses bypass proxies. What else would end any command later is mended: closed streams, an
SSL_CERT_FILE without certificates, a proxy that httpx cannot take, a timeout that is no number.
"""

import importlib
import os
import re
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

HOME_NAME = ".prefect"
HOME = Path(HOME_NAME).resolve()

_READ_EARLY: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"), int),
    "HF_DATASETS_IN_MEMORY_MAX_SIZE": float,
    "HF_ENDPOINT": lambda url: urlsplit(url).port,
}
"""Variables that libraries read while they are imported, and as what."""
LOCAL_NAMES = ("127.0.0.1", "localhost")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_SETTINGS = {
    "PREFECT_HOME": str(HOME),
    "PREFECT_PROFILES_PATH": str(HOME / "profiles.toml"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    "PREFECT_CLIENT_MAX_RETRIES": "3",  # 14 s until a request calls the server dead; with the default a minute
}
_SERVER_ELSEWHERE = {
    *("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_CLIENT_CUSTOM_HEADERS"),
    *("PREFECT_API_SSL_CERT_FILE", "PREFECT_API_TLS_INSECURE_SKIP_VERIFY"),
}
_FILES = {".env": r"(?mi)^\s*(export\s+)?prefect_", "prefect.toml": "", "pyproject.toml": r"(?m)^\s*\[\s*tool\.prefect"}
"""Where else Prefect looks for settings in the working directory, and what such a file then contains."""


def without_prefect(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment without anything that sets Prefect, which takes names in any case."""
    return {name: value for name, value in environment.items() if not name.upper().startswith("PREFECT_")}


def _open_streams() -> None:
    """Open the standard streams that whoever started this process closed, in their order, onto nothing.

    A file would get such a stream's number, and what C libraries print would land in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)  # programs that this one starts have them open, too
            setattr(sys, name, os.fdopen(descriptor, "w" if number else "r"))


def _forget_certificates() -> None:
    """Take SSL_CERT_FILE out of the environment where it has none: Prefect's clients of this machine end over it."""
    if not (path := os.environ.get("SSL_CERT_FILE")):
        return
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        sys.stderr.write(f"warning: SSL_CERT_FILE is left aside: {path!r:.200} holds no certificates ({error})\n")
        del os.environ["SSL_CERT_FILE"]


def _is_taken(name: str, value: str) -> bool:
    """Tell whether httpx makes a client, as Prefect does, where this is the environment's only variable on proxies."""
    import httpx  # most environments have no such variable

    os.environ[name] = value
    try:
        httpx.Client(verify=False).close()
    except (ImportError, ValueError, httpx.InvalidURL):  # ImportError: SOCKS takes another package
        return False
    finally:
        del os.environ[name]
    return True


def _set_proxies() -> None:
    """Take what httpx refuses out of the environment's variables on proxies; have local addresses bypass them."""
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = [name for name in os.environ if name.lower() in ("no_proxy", *_PROXIES)]
    values = {name: os.environ.pop(name) for name in names}
    proxies = {name: value for name, value in values.items() if name.lower() in _PROXIES}
    taken = {name: value for name, value in proxies.items() if not value or _is_taken(name, value)}  # "": none
    for name in [name for name in proxies if name not in taken]:
        scheme = re.match(r"(?a)[\w+.-]{1,20}://", proxies[name])  # what follows may hold a password
        shown = f"{scheme[0]}..., which Prefect's client refuses" if scheme else "a text without a scheme"
        sys.stderr.write(f"warning: {name} is left aside: expected http://HOST:PORT, found {shown}\n")
    entries = []
    for entry in filter(None, map(str.strip, direct.split(","))):
        bare = entry[1:-1] if entry.startswith("[") and entry.endswith("]") else entry
        if bare in LOCAL_NAMES or _is_taken("no_proxy", bare):
            entries.append(bare)
        else:
            sys.stderr.write(f"warning: {entry!r:.100} in NO_PROXY is left aside: expected a name or an address\n")
    if entries != ["*"]:
        entries += [name for name in LOCAL_NAMES if name not in entries]
    os.environ.update(taken)
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(entries)


def _forget_unreadable() -> None:
    """Take variables out of the environment over which the import of a library ends."""
    for name, read in _READ_EARLY.items():
        try:
            if value := os.environ.get(name):
                read(value)
        except ValueError as error:
            sys.stderr.write(f"warning: {name} is left aside: {error!s:.200}\n")
            del os.environ[name]
            if name == "HF_ENDPOINT":  # a token for another hub than the one that is asked then
                os.environ.pop("HF_TOKEN", None)
    try:
        importlib.import_module("tqdm")
    except ValueError as error:
        names = [name for name in os.environ if name.startswith("TQDM_")]
        sys.stderr.write(f"warning: {', '.join(names)} left aside: {error!s:.200}\n")
        for name in names:
            del os.environ[name]


def _set_environment() -> None:
    keeps_address = bool(os.environ.get("PREFECT_API_URL"))
    for name in set(os.environ) - set(without_prefect(dict(os.environ))):
        of_this_run = name.startswith("PREFECT__")  # by Prefect's runner, for the run in this process
        if not of_this_run and not (keeps_address and name in _SERVER_ELSEWHERE):
            del os.environ[name]
    os.environ.update(_SETTINGS)
    os.environ["MPLBACKEND"] = "agg"  # figures are files; Jupyter hands its own one down, which need not be installed
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _forget_files() -> None:
    """Have Prefect read no settings from files of the working directory, where there are such."""
    if not any(_has_settings(Path(name), pattern) for name, pattern in _FILES.items()):
        return
    from prefect.settings.base import PrefectBaseSettings  # takes seconds, and most folders have no such file

    classes: list[type[PrefectBaseSettings]] = [PrefectBaseSettings]
    for settings in classes:
        classes += settings.__subclasses__()
        files = {"env_file": None, "toml_file": None, "pyproject_toml_table_header": ("none",)}
        cast("dict[str, Any]", settings.model_config).update(files)


def _has_settings(path: Path, pattern: str) -> bool:
    try:
        return path.is_file() and re.search(pattern, path.read_text(encoding="utf-8", errors="replace")) is not None
    except OSError:  # Prefect could not read it either
        return True


_open_streams()
_set_environment()
_forget_certificates()
_set_proxies()
_forget_unreadable()
_forget_files()
