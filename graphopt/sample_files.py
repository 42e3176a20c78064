"""Sample files -> feeds: `.npz` read row by row out of the archive, folders, ONNX test data.

Files may come from strangers: nothing is unpickled, and no more memory is taken than a file can fill.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from numpy.lib import format as npy
from onnx import TensorProto, numpy_helper

from graphopt.errors import DataError, did_you_mean
from graphopt.model import ValueSpec
from graphopt.samples import Feeds, Samples, fits

MAX_RATIO = 1100
"""deflate cannot expand further (1032 times): an archive that claims more lies about its sizes."""

MAX_WHOLE_BYTES = 1 << 31
"""Largest array that is read in one piece."""


class Member:
    """One array inside an `.npz`, read from the front in pieces."""

    def __init__(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
        self.name = info.filename.removesuffix(".npy")
        self.where = f"array '{self.name}' in {path}"
        self._archive, self._info = archive, info
        self._stream: IO[bytes] = archive.open(info)
        try:
            self.shape, self.fortran, self.dtype = self._header()
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"not a NumPy array: {error}", at=self.where) from error
        self._check_size()

    def _header(self) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        version = npy.read_magic(self._stream)
        if version == (1, 0):
            return npy.read_array_header_1_0(self._stream)
        if version == (2, 0):
            return npy.read_array_header_2_0(self._stream)
        raise ValueError(f"format version {version}")

    def _check_size(self) -> None:
        if self.dtype.hasobject:
            raise DataError(
                "the array holds pickled objects, which are not read",
                at=self.where,
                hint="save numbers, or text as dtype 'U'",
            )
        claimed = math.prod(self.shape) * self.dtype.itemsize
        held = self._info.file_size - self._stream.tell()
        if claimed != held:
            raise DataError(
                f"the array claims {claimed} bytes and holds {held}", at=self.where, hint="the file is damaged"
            )
        if self._info.file_size > 1 << 20 and self._info.file_size > MAX_RATIO * max(1, self._info.compress_size):
            raise DataError(
                "the archive claims more than it can hold", at=self.where, hint="the file is damaged or hostile"
            )

    def read(self, rows: int | None) -> np.ndarray[Any, Any]:
        """Return the next rows, or all of the array.

        Raises:
            DataError: the file ends early, or the piece is too large to be read at once.
        """
        if self.fortran and len(self.shape) > 1 and rows is not None:
            raise DataError("the array is stored column by column and cannot be streamed", at=self.where,
                            hint="save numpy.ascontiguousarray(array)")  # fmt: skip
        shape = self.shape if rows is None else (rows, *self.shape[1:])
        size = math.prod(shape) * self.dtype.itemsize
        if size > MAX_WHOLE_BYTES:
            raise DataError(
                f"one feed would take {size} bytes", at=self.where, hint="use a smaller --batch, or a folder of .npz"
            )
        try:
            data = self._stream.read(size)
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise DataError(f"the archive is damaged: {error}", at=self.where) from error
        if len(data) != size:
            raise DataError("the array ends early", at=self.where, hint="the file is damaged")
        array = np.frombuffer(bytearray(data), self.dtype)
        return array.reshape(shape[::-1]).T if self.fortran else array.reshape(shape)


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"not an .npz file: {error}", at=str(path)) from error


def _members(archive: zipfile.ZipFile, path: Path, specs: Mapping[str, ValueSpec]) -> dict[str, Member]:
    """Return the inputs' arrays; arrays of other names (labels) are left alone."""
    infos = {i.filename.removesuffix(".npy"): i for i in archive.infolist() if i.filename.endswith(".npy")}
    for name, spec in specs.items():
        if name not in infos:
            hint = did_you_mean(name, infos) or f"the file has: {', '.join(infos) or 'no arrays'}"
            raise DataError(f"the file has no array for input '{name}'", at=str(path), hint=hint)
        if spec.kind != "tensor":
            raise DataError(
                f"input '{name}' is a {spec.kind}, which .npz cannot hold",
                at=str(path),
                hint="use test_data_set_* or file.py:function",
            )
    return {name: Member(archive, infos[name], path) for name in specs}


def _other_names(path: Path, specs: Mapping[str, ValueSpec]) -> list[str]:
    with _open(path) as archive:
        return [n for i in archive.infolist() if (n := i.filename.removesuffix(".npy")) not in specs]


def from_npz(path: Path, specs: Mapping[str, ValueSpec], batch: int) -> Samples:
    """Return feeds cut out of the arrays of one `.npz` (see `graphopt.data`)."""
    unused = _other_names(path, specs)
    rest = f" (not an input: {', '.join(unused)})" if unused else ""
    return Samples(lambda: _cut(path, specs, batch), f"{path}{rest}")


def _cut(path: Path, specs: Mapping[str, ValueSpec], batch: int) -> Iterator[Feeds]:
    with _open(path) as archive:
        members = _members(archive, path, specs)
        plans = {name: _plan(members[name], specs[name], batch) for name in specs}
        counts = {name: count for name, (count, _) in plans.items() if count is not None}
        total = min(counts.values(), default=1)
        uneven = [name for name, count in counts.items() if count != total]
        if uneven:
            listed = ", ".join(f"'{name}' {count}" for name, count in counts.items())
            size = f" (a feed has up to {batch} rows)" if batch > 1 else ""
            raise DataError(f"the arrays give different numbers of feeds: {listed}{size}", at=str(path))
        constant = {name: members[name].read(None) for name, (count, _) in plans.items() if count is None}
        for index in range(total):
            feed = dict(constant)
            for name in counts:
                feed[name] = _next(members[name], plans[name][1], index)
            yield {name: feed[name] for name in specs}


def _plan(member: Member, spec: ValueSpec, batch: int) -> tuple[int | None, int]:
    """Return (number of feeds, rows of each; 0 rows: one entry each); None feeds: the same array for all of them."""
    rank = None if spec.shape is None else len(spec.shape)
    have = len(member.shape)
    if rank is None or have == rank + 1:
        return (member.shape[0] if have else None), 0
    if have != rank:
        raise DataError(
            f"rank {have} where input '{spec.name}' has {rank}", at=member.where,
            hint=f"rank {rank} is cut along its first axis, rank {rank + 1} is one feed per entry",
        )  # fmt: skip
    assert spec.shape is not None
    if rank == 0:
        return None, 0
    first = spec.shape[0]
    if not isinstance(first, int):
        return -(-member.shape[0] // batch), batch
    if batch not in (1, first):
        raise DataError(f"the model takes batches of {first}, not {batch}", at=member.where, hint=f"--batch {first}")
    if first == 0 or (first != 1 and fits(member.shape, spec.shape)):
        return None, 0  # exactly one feed of an input with a fixed first axis: a state, a table
    if member.shape[0] % first:
        raise DataError(
            f"{member.shape[0]} entries do not make batches of {first}, which the model takes", at=member.where
        )
    return member.shape[0] // first, first


def _next(member: Member, rows: int, index: int) -> np.ndarray[Any, Any]:
    if rows == 0:
        return member.read(1)[0]  # type: ignore[no-any-return]
    return member.read(min(rows, member.shape[0] - index * rows))


def from_folder(path: Path, specs: Mapping[str, ValueSpec]) -> Samples:
    """Return feeds of a folder: `.npz` files, an ONNX test data set, or several of those.

    Raises:
        DataError: the folder has none of them.
    """
    files = sorted(p for p in path.iterdir() if p.suffix == ".npz")
    if files:
        return Samples(lambda: (_whole(file, specs) for file in files), f"{len(files)} feeds of {path}")
    sets = [path] if _is_test_data(path) else sorted((p for p in path.iterdir() if _is_test_data(p)), key=_number)
    if not sets:
        raise DataError(
            "the folder holds no samples", at=str(path), hint="it needs .npz files or test_data_set_* with input_0.pb"
        )
    return Samples(lambda: (_test_data(folder, specs) for folder in sets), f"{len(sets)} test data sets of {path}")


def _number(path: Path) -> tuple[int, str]:
    digits = re.search(r"\d+$", path.name)
    return (int(digits[0]) if digits else 0, path.name)


def _is_test_data(path: Path) -> bool:
    return path.is_dir() and (path.name.startswith("test_data_set_") or (path / "input_0.pb").is_file())


def _whole(path: Path, specs: Mapping[str, ValueSpec]) -> Feeds:
    with _open(path) as archive:
        return {name: member.read(None) for name, member in _members(archive, path, specs).items()}


def _test_data(folder: Path, specs: Mapping[str, ValueSpec]) -> Feeds:
    feed: Feeds = {}
    for index, spec in enumerate(specs.values()):
        path = folder / f"input_{index}.pb"
        if not path.is_file():
            raise DataError(f"the test data have no input_{index}.pb for input '{spec.name}'", at=str(folder))
        feed[spec.name] = _read_proto(path, spec)
    return feed


def _read_proto(path: Path, spec: ValueSpec) -> Any:
    kinds = {"tensor": TensorProto, "sequence": onnx.SequenceProto, "optional": onnx.OptionalProto}
    if spec.kind not in kinds:
        raise DataError(f"input '{spec.name}' is a {spec.kind}, which test data cannot hold", at=str(path))
    proto = kinds[spec.kind]()
    try:
        proto.ParseFromString(path.read_bytes())
        return _decode(proto)
    except (ValueError, TypeError, onnx.checker.ValidationError) as error:
        raise DataError(f"not a {spec.kind} in ONNX's format: {error}", at=str(path)) from error
    except Exception as error:
        if type(error).__module__.startswith("google.protobuf"):
            raise DataError(f"not a {spec.kind} in ONNX's format", at=str(path), hint="the file is damaged") from error
        raise


def _decode(proto: Any) -> Any:
    if isinstance(proto, TensorProto):
        if proto.data_location == TensorProto.EXTERNAL:
            raise ValueError("the data lie in another file")
        array = np.asarray(numpy_helper.to_array(proto))
        if proto.data_type == TensorProto.STRING:
            return np.array([v.decode() if isinstance(v, bytes) else v for v in array.reshape(-1)], object).reshape(
                array.shape
            )
        return array
    if isinstance(proto, onnx.OptionalProto):
        field = {1: "tensor_value", 3: "sequence_value"}.get(proto.elem_type)
        return _decode(getattr(proto, field)) if field else None
    if proto.elem_type not in (onnx.SequenceProto.TENSOR, onnx.SequenceProto.SEQUENCE):
        raise ValueError("a sequence of this type is not read")
    items = proto.tensor_values if proto.elem_type == onnx.SequenceProto.TENSOR else proto.sequence_values
    return [_decode(item) for item in items]
