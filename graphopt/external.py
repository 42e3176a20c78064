"""Model files: read without copying weights, written atomically.

Reading maps the file and parses it with the initializers' large `raw_data` left out (`split_weights`), so a
2 GB file costs no memory until weights are read.  External data is mapped too, after the checks that the onnx
project's security notes call for: the path stays inside the model's folder, goes through no symbolic link, the
file has no second hard link, and the stated range lies inside the file.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import TensorProto

from graphopt.errors import ModelError
from graphopt.tensors import LazyTensor, byte_size

MAPPED = "graphopt.mapped"
"""Key of the `external_data` entry that numbers a region of `ModelFile.regions`."""

_MIN_SPLIT = 1024
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 7, 5, 9, 13, 14


class ModelFile:
    """One model file and the mapped bytes of its tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
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
        if self.path.is_dir():
            raise ModelError(
                "this is a folder, not a model", at=str(self.path), hint="name the .onnx file in it"
            )
        try:
            size = self.path.stat().st_size
            if size == 0:
                raise ModelError(
                    "the file is empty", at=str(self.path), hint="export or download the model again"
                )
            with self.path.open("rb") as file:
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError as error:
            raise ModelError("no such model file", at=str(self.path), hint="check the path") from error
        except OSError as error:
            raise ModelError(f"cannot read the model: {error.strerror}", at=str(self.path)) from error

    def resolve(self, proto: TensorProto) -> LazyTensor:
        """Return a tensor whose data is a region of this file or of an external data file."""
        entries = {entry.key: entry.value for entry in proto.external_data}
        if MAPPED in entries and not proto.HasField("raw_data"):
            index = entries[MAPPED]
            if not (index.isdecimal() and int(index) < len(self.regions)):
                raise ModelError(
                    "tensor names a region that does not exist", at=f"initializer '{proto.name}'"
                )
            inline = TensorProto()
            inline.CopyFrom(proto)
            inline.ClearField("external_data")
            inline.ClearField("data_location")
            return LazyTensor(inline, self.regions[int(index)])
        return LazyTensor(proto, self._external(proto, entries))

    def _external(self, proto: TensorProto, entries: dict[str, str]) -> memoryview:
        where = f"initializer '{proto.name}' in {self.path}"
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
                flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
                descriptor = os.open(path, flags)
            except FileNotFoundError as error:
                raise ModelError(
                    f"external data file '{path.name}' is missing",
                    at=where,
                    hint=f"put it into {self.folder}",
                ) from error
            except OSError as error:
                raise ModelError(
                    f"cannot read external data '{path.name}': {error.strerror}", at=where
                ) from error
            with os.fdopen(descriptor, "rb") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise ModelError(f"external data '{path.name}' is not an ordinary file", at=where)
                if found.st_nlink > 1:
                    raise ModelError(
                        f"external data '{path.name}' is a hard link",
                        at=where,
                        hint="make it a file of its own: copy it",
                    )
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if found.st_size else b""
                self._maps[path] = memoryview(mapped)
        return self._maps[path]


def check_location(folder: Path, location: str, where: str) -> Path:
    """Return the path of an external data file, refusing any that could leave `folder`.

    Raises:
        ModelError: empty, absolute, with `..`, or through a symbolic link.
    """
    parts = Path(location).parts
    if not location or "\0" in location:
        raise ModelError("external data has no location", at=where)
    if Path(location).is_absolute() or ".." in parts or location.startswith(("/", "\\")) or ":" in parts[0]:
        raise ModelError(
            f"external data '{location}' lies outside the model's folder",
            at=where,
            hint="refused: a model may only name files beside it",
        )
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
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


# --- the protobuf wire format, as far as initializers need it ------------------------------------------


def split_weights(data: memoryview) -> tuple[bytes, list[memoryview]]:
    """Return the serialized `ModelProto` without the large `raw_data` of initializers, and those regions.

    Each region taken out is replaced by an `external_data` entry `MAPPED` holding its index.  Raises
    ValueError on malformed data.
    """
    regions: list[memoryview] = []

    def tensor(start: int, end: int) -> list[bytes | memoryview]:
        raw = [f for f in _fields(data, start, end) if f[0] == _TENSOR_RAW and f[1] == _BYTES]
        if len(raw) != 1 or raw[0][4] - raw[0][3] < _MIN_SPLIT:
            return [data[start:end]]
        _, _, begin, content, stop = raw[0]
        regions.append(data[content:stop])
        entry = _message(1, MAPPED.encode()) + _message(2, str(len(regions) - 1).encode())
        location = _varint(_TENSOR_LOCATION << 3 | _VARINT) + _varint(TensorProto.EXTERNAL)
        return [data[start:begin], data[stop:end], _message(_TENSOR_EXTERNAL, entry), location]

    def graph(start: int, end: int) -> list[bytes | memoryview]:
        return _replaced(data, start, end, _GRAPH_INITIALIZER, tensor)

    skeleton = b"".join(_replaced(data, 0, len(data), _MODEL_GRAPH, graph))
    return skeleton, regions


def _replaced(
    data: memoryview,
    start: int,
    end: int,
    number: int,
    rewrite: Callable[[int, int], list[bytes | memoryview]],
) -> list[bytes | memoryview]:
    """Return the message's bytes with every field `number` passed through `rewrite`."""
    pieces: list[bytes | memoryview] = []
    copied = start
    for field, wire, begin, content, stop in _fields(data, start, end):
        if field != number or wire != _BYTES:
            continue
        inner = rewrite(content, stop)
        pieces += [
            data[copied:begin],
            _varint(number << 3 | _BYTES),
            _varint(sum(len(p) for p in inner)),
            *inner,
        ]
        copied = stop
    pieces.append(data[copied:end])
    return pieces


def _fields(data: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (number, wire type, start of key, start of content, end) of each field of a message."""
    position = start
    while position < end:
        begin = position
        key, position = _read_varint(data, position, end)
        wire = key & 7
        if wire == _BYTES:
            length, position = _read_varint(data, position, end)
            stop = position + length
        elif wire == _VARINT:
            _, stop = _read_varint(data, position, end)
        elif wire in (_FIXED64, _FIXED32):
            stop = position + (8 if wire == _FIXED64 else 4)
        else:
            raise ValueError(f"wire type {wire}")
        if stop > end:
            raise ValueError("truncated field")
        yield key >> 3, wire, begin, position, stop
        position = stop


def _read_varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    result = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
    raise ValueError("truncated number")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


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
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(_mode_for(path))
            Path(temporary).replace(path)
            temporary = None
        except OSError as error:
            hint = "free some space" if error.errno == 28 else "check the folder and its permissions"
            raise ModelError(f"cannot write the file: {error.strerror}", at=str(path), hint=hint) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


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
