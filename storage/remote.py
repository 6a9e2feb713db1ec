"""Local and s3:// addresses: an address or a pattern goes in, local files come out.

S3 is reached through s3fs. Endpoint, region and keys come only from the environment that every S3 tool reads
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, ...); no message repeats a value of them.
"""

import contextlib
import errno
import glob
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import s3fs
from aiohttp import ClientError
from botocore.exceptions import BotoCoreError, NoCredentialsError
from fsspec.callbacks import TqdmCallback

from storage.files import InputError, digest_of, sha256, write_whole

_S3 = "s3://"
_SETTINGS = "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
HUB_SETTINGS = "HF_TOKEN, HF_ENDPOINT and HTTPS_PROXY in the environment"
_MAGIC = re.compile(r"[*?[]")
_OUR_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def fetch(url: str, into: Path) -> Path:
    """Make a file or folder local.

    Args:
        url: a local path, s3://bucket/file or s3://bucket/folder.
        into: folder that receives what comes from S3, under the address's last name.

    Returns:
        A local path as it is; else the path of the copy. Each file of it is whole (written by rename).

    Raises:
        InputError: nothing is there, access is denied, the store cannot be reached, or the download ended early.
    """
    if not _is_s3(url):
        with _looked_up(url):
            path = Path(url).expanduser()
            if not path.exists():
                raise InputError(f"{url} does not exist (looked from {Path.cwd()}); check the path")
        return path
    store = _store(url)
    key = url.removeprefix(_S3).rstrip("/")
    with _explained(url):
        sizes = {info["name"]: int(info["size"]) for info in store.find(key, detail=True).values()}
    sizes = {name: size for name, size in sizes.items() if not name.endswith("/")}
    if not sizes:
        raise InputError(f"{url} does not exist: no such bucket, file or folder; check the address and {_SETTINGS}")
    target = into / PurePosixPath(key).name
    for name, size in sorted(sizes.items()):
        relative = PurePosixPath(name).relative_to(key)
        if ".." in relative.parts:
            raise InputError(f"{_S3}{name} would be written outside {target}; rename it in the store")
        _download(store, name, size, target / relative)
    return target


def expand(pattern: str) -> list[str]:
    """Return files that a local or s3:// pattern names, sorted.

    Args:
        pattern: the address of one file, or a glob (`*`, `?`, `[...]`, `**`). Every part of it that exists under this
            name is a name and no pattern.

    Raises:
        InputError: nothing matches, it is a folder, or the store refuses or cannot be reached.
    """
    if _is_s3(pattern):
        with _looked_up(pattern), _explained(pattern):
            infos = _s3_matches(_store(pattern), pattern.removeprefix(_S3))
        addresses = [_S3 + info["name"] for info in infos if info["type"] == "file"]
    else:
        with _looked_up(pattern):
            addresses = _local_matches(Path(pattern).expanduser())
    if not addresses:
        advice = f"check the address and {_SETTINGS}" if _is_s3(pattern) else f"looked from {Path.cwd()}"
        raise InputError(f"no file matches {pattern} ({advice}); for all files of a folder write folder/*.parquet")
    return sorted(addresses)


def _local_matches(pattern: Path) -> list[str]:
    """Return files that a local pattern names; hidden ones only by their whole path."""
    if pattern.exists():
        return [str(pattern)] if pattern.is_file() else []
    root = Path(pattern.anchor)
    matches = {root}
    for part in pattern.relative_to(root).parts:
        folders, matches = matches, set()
        for folder in folders:
            path = folder / part
            matches.update([path] if path.exists() else folder.glob(part))
    return [str(path) for path in matches if path.is_file() and not path.name.startswith(".")]


def _s3_matches(store: Any, key: str) -> list[dict[str, Any]]:
    """Return files and folders that a key or pattern of S3 names; the parts before the first pattern may be names."""
    names: list[str] = []
    parts = key.split("/")
    while parts and (not _MAGIC.search(parts[0]) or store.exists("/".join([*names, parts[0]]))):
        names.append(parts.pop(0))
    if not parts:
        return [store.info("/".join(names))]
    infos = store.glob("/".join([*map(glob.escape, names), *parts]), detail=True)
    return list(infos.values())


def fingerprint(url: str) -> str:
    """Return a digest that changes with the file's content: sha256 of a local file, the store's ETag and size on S3.

    Raises:
        InputError: the source cannot be read, as for :func:`fetch`.
    """
    if not _is_s3(url):
        return sha256(fetch(url, Path()))
    store = _store(url)
    with _explained(url):
        info = store.info(url)
    return digest_of({"etag": info.get("ETag"), "size": info["size"]})


def _is_s3(url: str) -> bool:
    if url.startswith(_S3):
        bucket = url.removeprefix(_S3).partition("/")[0]
        if not bucket or _MAGIC.search(bucket):
            raise InputError(f"{url} names no bucket; write {_S3}bucket/...")
        return True
    if match := re.match(r"[a-z][a-z0-9+.-]+://", url):
        raise InputError(f"{url}: {match[0]} addresses cannot be read; give a local path or {_S3}bucket/...")
    return False


def _store(url: str) -> Any:
    """Return a file system of its own for every call: s3fs otherwise keeps listings and settings of earlier ones.

    Checksums only where an operation needs them: stores that know S3 as it was refuse a request that names one.

    Raises:
        InputError: the settings for the store of `url` cannot be used.
    """
    config: dict[str, Any] = {"connect_timeout": 10, "retries": {"max_attempts": 3}}
    config |= dict.fromkeys(("request_checksum_calculation", "response_checksum_validation"), "when_required")
    store = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
    with _explained(url):
        try:
            store.connect()
        except BotoCoreError:  # some are ValueErrors, too
            raise
        except ValueError:
            raise InputError(
                f"{url} cannot be reached: the store's address is no URL, expected http://HOST:PORT or "
                f"https://HOST; check {_SETTINGS}"
            ) from None
    return store


def _download(store: Any, name: str, size: int, target: Path) -> None:
    """Copy one file of the store, with progress."""
    progress = TqdmCallback(
        tqdm_kwargs={"desc": f"download {target.name}", "unit": "B", "unit_scale": True, "disable": None}
    )
    with write_whole(target) as temporary:
        with _explained(_S3 + name):
            store.get_file(name, str(temporary), callback=progress)
        if temporary.stat().st_size != size:
            raise InputError(
                f"{_S3}{name}: the download ended after {temporary.stat().st_size} of {size} bytes; run it again"
            )


@contextlib.contextmanager
def _looked_up(address: str) -> Iterator[None]:
    """Turn an error of a name that no file can have, or of a folder that cannot be read, into one message."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~user of nobody
        raise InputError(f"{address[:200]} cannot be looked up ({error}); check the path") from None


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn an error of the store into one message for people; an error of the local disk passes unchanged."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{url} does not exist: no such bucket, file or folder; check the address") from None
    except PermissionError:
        raise InputError(f"{url}: access is denied; check {_SETTINGS}") from None
    except NoCredentialsError:
        raise InputError(f"{url}: there are no S3 credentials; set {_SETTINGS}") from None
    except (BotoCoreError, ClientError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _OUR_DISK:
            raise
        raise InputError(f"{url} cannot be reached ({type(error).__name__}); check {_SETTINGS}") from None
