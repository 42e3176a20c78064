"""Model files: read without copying weights, written atomically.

Reading maps the file and parses it with the tensors' large `raw_data` left out (wire.py), so a
2 GB file costs no memory until weights are read.  External data is mapped too, after the checks that the onnx
project's security notes call for: the path stays inside the model's folder, goes through no symbolic link, the
file has no second hard link, and the stated range lies inside the file.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import TensorProto

from graphopt.errors import ModelError
from graphopt.tensors import LazyTensor, byte_size
from graphopt.wire import MAPPED, split_weights

# no symbolic link, and no waiting for the other end of a named pipe
_OPEN_FLAGS = os.O_RDONLY | sum(getattr(os, f"O_{name}", 0) for name in ("NOFOLLOW", "NONBLOCK", "BINARY"))

_MAX_LOCATION = 1000


class ModelFile:
    """One model file and the mapped bytes of its tensors; `path` is None for a model in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path or Path("<memory>")
        self.folder = path.parent if path else None
        self._maps: dict[Path, memoryview] = {}
        self.regions: list[memoryview] = []

    def parse(self) -> onnx.ModelProto:
        """Return the model with large initializers replaced by references into `regions`.

        Raises:
            ModelError: the file is missing, unreadable, or no ONNX model.
        """
        data = self._read()
        model = onnx.ModelProto()
        try:
            skeleton, self.regions = split_weights(data)
            model.ParseFromString(skeleton)
        except Exception as error:  # protobuf raises a different class in each implementation
            raise ModelError(
                "not an ONNX model, or a truncated one", at=str(self.path), hint=_what_is_it(bytes(data[:64]))
            ) from error
        return model

    def _read(self) -> memoryview:
        try:
            found = self.path.stat()
            if stat.S_ISDIR(found.st_mode):
                raise ModelError("this is a folder, not a model", at=str(self.path), hint="name the .onnx file in it")
            if not stat.S_ISREG(found.st_mode):
                raise ModelError("this is not an ordinary file", at=str(self.path))
            if found.st_size == 0:
                raise ModelError("the file is empty", at=str(self.path), hint="export or download the model again")
            with self.path.open("rb") as file:
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError as error:
            raise ModelError("no such model file", at=str(self.path), hint="check the path") from error
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            raise ModelError(f"cannot read the model: {error}", at=str(self.path)) from error

    def resolve(self, proto: TensorProto) -> LazyTensor:
        """Return a tensor whose data is a region of this file or of an external data file."""
        entries = {entry.key: entry.value for entry in proto.external_data}
        if MAPPED in entries and not proto.HasField("raw_data"):
            index = entries[MAPPED]
            if not (index.isdecimal() and int(index) < len(self.regions)):
                raise ModelError("tensor names a region that does not exist", at=f"initializer '{proto.name}'")
            inline = TensorProto()
            inline.CopyFrom(proto)
            inline.ClearField("external_data")
            inline.ClearField("data_location")
            return LazyTensor(inline, self.regions[int(index)])
        return LazyTensor(proto, self._external(proto, entries))

    def _external(self, proto: TensorProto, entries: dict[str, str]) -> memoryview:
        where = f"initializer '{proto.name}' in {self.path}"
        if self.folder is None:
            raise ModelError(
                "a model in memory with external data: where its file lies is not known",
                at=f"initializer '{proto.name}'",
                hint="give the path of the model, or load its external data first",
            )
        data = self._map(check_location(self.folder, entries.get("location", ""), where), where)
        offset = _number(entries.get("offset", "0"), "offset", where)
        wanted = byte_size(proto.data_type, proto.dims, proto.name)
        length = _number(entries.get("length", str(wanted)), "length", where)
        if length != wanted:
            raise ModelError(f"external data has {length} bytes where {wanted} belong", at=where)
        if offset + length > len(data):
            raise ModelError(
                f"external data ends at byte {offset + length}, its file has {len(data)}",
                at=where,
                hint="the data file is truncated, or belongs to another model",
            )
        return data[offset : offset + length]

    def _map(self, path: Path, where: str) -> memoryview:
        if path not in self._maps:
            try:
                descriptor = os.open(path, _OPEN_FLAGS)
                try:
                    self._maps[path] = _mapped(descriptor, f"external data '{path.name}'", where)
                finally:
                    os.close(descriptor)
            except FileNotFoundError as error:
                raise ModelError(
                    f"external data file '{path.name}' is missing", at=where, hint=f"put it into {self.folder}"
                ) from error
            except OSError as error:
                raise ModelError(f"cannot read external data '{path.name}': {error.strerror}", at=where) from error
        return self._maps[path]


def _mapped(descriptor: int, what: str, where: str) -> memoryview:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{what} is not an ordinary file", at=where)
    if found.st_nlink > 1:
        raise ModelError(f"{what} is a hard link", at=where, hint="make it a file of its own: copy it")
    return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if found.st_size else b"")


def check_location(folder: Path, location: str, where: str) -> Path:
    """Return the path of an external data file, refusing any that could leave `folder`.

    Raises:
        ModelError: empty, absolute, with `..`, or through a symbolic link.
    """
    parts = Path(location.replace("\\", "/")).parts  # Windows' spelling means a folder everywhere
    if not parts or "\0" in location or len(location) > _MAX_LOCATION:
        raise ModelError(f"external data has no usable location: {location[:40]!r}", at=where)
    if ".." in parts or location.startswith(("/", "\\", "~")) or ":" in location:
        raise ModelError(
            f"external data '{location}' lies outside the model's folder",
            at=where,
            hint="refused: a model may only name files beside it",
        )
    path = folder
    for part in parts:
        path = path / part
        if os.path.islink(path):  # noqa: PTH114  (Path.is_symlink raises for names that are too long)
            raise ModelError(
                f"external data '{location}' goes through a symbolic link",
                at=where,
                hint="refused: copy the data file beside the model",
            )
    return path


def _number(text: str, what: str, where: str) -> int:
    if not text.isdecimal() or len(text) > 19:
        raise ModelError(f"external data has an impossible {what}: '{text[:40]}'", at=where)
    return int(text)


def _what_is_it(head: bytes) -> str:
    known = {
        b"PK": "this looks like a zip archive (a PyTorch checkpoint, or a packed model): export it to ONNX",
        b"\x89HDF": "this looks like HDF5 (Keras): export it to ONNX",
        b"version https://git-lfs": "this is a Git LFS pointer: fetch the real file with 'git lfs pull'",
        b"<": "this looks like HTML or XML: the download went wrong",
        b"{": "this looks like JSON: graphopt reads binary .onnx files",
    }
    for magic, text in known.items():
        if head.startswith(magic):
            return text
    if head[4:8] in (b"ORTM", b"TFL3"):
        return "this is an ORT-format or TFLite file: graphopt reads .onnx"
    return "export or download the model again"


# --- writing ---------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name beside `path`; rename it only when all went well.

    Raises:
        ModelError: the folder is missing or not writable, or the disk is full; `path` is as it was.
    """
    temporary: str | None = None
    try:
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(_mode_for(path))
            Path(temporary).replace(path)
            temporary = None
        except OSError as error:
            raise _unwritable(path, error) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Make and remove a file beside `path`: only that tells whether one can be made.

    Raises:
        ModelError: it cannot.
    """
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ModelError:
    hint = "free some space" if error.errno == errno.ENOSPC else "check the folder and its permissions"
    return ModelError(f"cannot write the file: {error.strerror}", at=str(path), hint=hint)


def _mode_for(path: Path) -> int:
    """Return the permissions of the file being replaced, or those a new file gets."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def digest(chunks: Iterator[memoryview | bytes]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of `chunks` together."""
    hasher = hashlib.sha256()
    for chunk in chunks:
        hasher.update(chunk)
    return hasher.hexdigest()[:16]
