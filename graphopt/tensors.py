"""ONNX tensors as lazy values: nothing is decoded, mapped or copied before somebody asks for it.

`LazyTensor` stands in an `onnx_graphsurgeon.Constant` for one `TensorProto` (data inside it, or in a mapped
region of another file), `LazySparse` for one `SparseTensorProto`.  Arrays come out read-only, so an array that
is still the one loaded here is known to be unedited and its proto is emitted as it came.
"""

from __future__ import annotations

import functools
import math
import mmap
import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import ModelError

MAX_TENSOR_BYTES = 1 << 40
"""Declared sizes above this are refused unread (a model is data from a stranger)."""

MAX_DENSE_BYTES = 1 << 31
"""Sparse tensors are not made dense beyond this."""

_MAX_RANK = 32

_BITS = {
    TensorProto.UINT4: 4, TensorProto.INT4: 4, TensorProto.FLOAT4E2M1: 4,
    **{getattr(TensorProto, name): 2 for name in ("UINT2", "INT2") if hasattr(TensorProto, name)},
    **{getattr(TensorProto, n): 6 for n in ("FLOAT6E2M3", "FLOAT6E3M2") if hasattr(TensorProto, n)},
}  # fmt: skip
_FIELD_BITS = {kind: bits for kind, bits in _BITS.items() if bits != 6}  # int32_data holds 6-bit elements one by one


@functools.cache
def numpy_dtype(data_type: int) -> np.dtype[Any] | None:
    """Return the NumPy (or ml_dtypes) dtype of a `TensorProto.DataType`, None for 0 and unknown numbers."""
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(data_type))
    except (KeyError, ValueError):
        return None


def onnx_dtype(dtype: np.dtype[Any] | type[Any]) -> int:
    """Return the `TensorProto.DataType` of a NumPy dtype.

    Raises:
        ModelError: ONNX has no such type.
    """
    return _onnx_dtype(np.dtype(dtype))


@functools.cache
def _onnx_dtype(dtype: np.dtype[Any]) -> int:
    if dtype.kind in "OSU":
        return int(TensorProto.STRING)
    try:
        return int(helper.np_dtype_to_tensor_dtype(dtype))
    except (KeyError, ValueError) as error:
        raise ModelError(f"ONNX has no tensor type for NumPy's {dtype}", hint="convert the array first") from error


def is_float(dtype: np.dtype[Any] | None) -> bool:
    """Tell whether `dtype` is a floating-point type, ml_dtypes' small floats included."""
    if dtype is None:
        return False
    return dtype.kind == "f" or (dtype.kind == "V" and dtype.name.startswith(("bfloat", "float")))


def stored_bytes(values: LazyTensor | LazySparse | np.ndarray[Any, Any]) -> int:
    """Return the bytes that values take in a file: NumPy keeps numbers of 4 bits in a byte each."""
    if isinstance(values, np.ndarray) and values.dtype.kind != "O":
        bits = _BITS.get(onnx_dtype(values.dtype))
        return int(values.nbytes) if bits is None else (values.size * bits + 7) // 8
    return int(values.nbytes)


def byte_size(data_type: int, dims: Sequence[int], name: str) -> int:
    """Return the bytes that `raw_data` of this type and shape must have (strings: 0).

    Raises:
        ModelError: a negative dimension or a size beyond reason.
    """
    if any(dim < 0 for dim in dims):
        raise ModelError(f"tensor has a negative dimension: {list(dims)}", at=f"initializer '{name}'")
    if len(dims) > _MAX_RANK:
        raise ModelError(f"tensor has {len(dims)} dimensions", at=f"initializer '{name}'")
    count = math.prod(dims)
    if math.prod(dim or 1 for dim in dims) > MAX_TENSOR_BYTES:  # NumPy refuses such a shape even when it is empty
        raise ModelError(f"tensor has an impossible shape: {list(dims)}", at=f"initializer '{name}'")
    if data_type == TensorProto.STRING:
        return 0
    dtype = numpy_dtype(data_type)
    if dtype is None:
        raise ModelError(f"tensor has an unknown element type: {data_type}", at=f"initializer '{name}'")
    size = (count * _BITS[data_type] + 7) // 8 if data_type in _BITS else count * dtype.itemsize
    if size > MAX_TENSOR_BYTES:
        raise ModelError(
            f"tensor declares {size} bytes", at=f"initializer '{name}'", hint="the file is damaged or hostile"
        )
    return size


class LazyTensor(gs.ir.tensor.LazyValues):  # type: ignore[misc]
    """The values of one `TensorProto`, decoded when first read.

    Args:
        proto: the tensor; with external data, its reference.
        data: the mapped bytes of external data, None when the data is inside `proto`.
    """

    def __init__(self, proto: TensorProto, data: memoryview | None = None) -> None:
        self.tensor = proto
        self.data = data
        self.shape = tuple(proto.dims)
        self.nbytes = byte_size(proto.data_type, proto.dims, proto.name)
        dtype = numpy_dtype(proto.data_type)
        assert dtype is not None  # or its size would not be known
        self.dtype = dtype
        self._check_size()
        self._loaded: weakref.ref[np.ndarray[Any, Any]] | None = None

    def _check_size(self) -> None:
        found = len(self.data) if self.data is not None else len(self.tensor.raw_data)
        inline = self.data is None and not self.tensor.HasField("raw_data")
        if self.tensor.HasField("segment"):
            raise ModelError("tensor is split into segments", at=f"initializer '{self.tensor.name}'")
        if self.tensor.data_type == TensorProto.STRING and not inline:
            raise ModelError("strings cannot be raw data", at=f"initializer '{self.tensor.name}'")
        if inline:
            field = helper.tensor_dtype_to_field(self.tensor.data_type)
            stored, wanted = len(getattr(self.tensor, field)), _stored_elements(self.tensor)
            if stored != wanted:
                raise ModelError(
                    f"tensor of shape {list(self.shape)} holds {stored} elements where {wanted} belong",
                    at=f"initializer '{self.tensor.name}'",
                    hint="the file is damaged",
                )
        elif found != self.nbytes:
            raise ModelError(
                f"tensor of shape {list(self.shape)} holds {found} bytes where {self.nbytes} belong",
                at=f"initializer '{self.tensor.name}'",
                hint="the file is truncated or damaged",
            )

    def load(self) -> np.ndarray[Any, Any]:
        """Return the values as a read-only array; mapped data is not copied.

        Raises:
            ModelError: a string is not UTF-8.
        """
        array = self._loaded() if self._loaded is not None else None
        if array is None:
            array = self._decode()
            array.flags.writeable = False
            self._loaded = weakref.ref(array)
        return array

    def _decode(self) -> np.ndarray[Any, Any]:
        if self.data is None:
            return _to_array(self.tensor).view()
        if self.tensor.data_type in _BITS:
            inline = TensorProto(data_type=self.tensor.data_type, dims=self.tensor.dims, raw_data=bytes(self.data))
            return _to_array(inline)
        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)

    def is_loaded_as(self, values: object) -> bool:
        """Tell whether `values` is the very array that `load` returned."""
        return self._loaded is not None and self._loaded() is values

    def raw(self) -> bytes | memoryview:
        """Return the bytes as `raw_data` would hold them, without copying mapped data."""
        if self.data is not None:
            return self.data
        if self.tensor.HasField("raw_data"):
            return self.tensor.raw_data
        return encode(self.load(), "").raw_data

    def header(self, name: str) -> TensorProto:
        """Return the tensor under `name` without any data."""
        out = TensorProto(dims=self.tensor.dims, data_type=self.tensor.data_type)
        out.metadata_props.extend(self.tensor.metadata_props)
        if self.tensor.HasField("doc_string"):
            out.doc_string = self.tensor.doc_string
        if name or self.tensor.HasField("name"):
            out.name = name
        return out

    def proto(self, name: str, *, inline: bool = True) -> TensorProto:
        """Return the tensor under `name`, with external data put inside it when `inline`."""
        out = TensorProto()
        self.put(out, name, inline=inline)
        return out

    def put(self, out: TensorProto, name: str, *, inline: bool = True) -> None:
        """Put what `proto` returns into an empty message, which spares a copy of the data."""
        out.CopyFrom(self.tensor)
        if out.name != name:  # setting an empty name would make it a field that is there
            out.name = name
        if inline and self.data is not None:
            out.ClearField("external_data")
            out.ClearField("data_location")
            out.raw_data = bytes(self.data)


class LazySparse(gs.ir.tensor.LazyValues):  # type: ignore[misc]
    """The values of one `SparseTensorProto`; reading makes them dense, in their own dtype.

    `nbytes` is what is stored, not what the dense form takes.
    """

    def __init__(self, proto: onnx.SparseTensorProto) -> None:
        self.tensor = proto
        self.shape = tuple(proto.dims)
        self._dense = byte_size(proto.values.data_type, proto.dims, proto.values.name)
        self.dtype = np.dtype(helper.tensor_dtype_to_np_dtype(proto.values.data_type))
        self.nbytes = self._check()
        self._loaded: weakref.ref[np.ndarray[Any, Any]] | None = None

    def _check(self) -> int:
        """Return the bytes stored; the shapes of values and indices must agree, and the data be inside."""
        name, values, indices = self.tensor.values.name, self.tensor.values, self.tensor.indices
        where = f"sparse initializer '{name}'"
        if TensorProto.EXTERNAL in (values.data_location, indices.data_location):
            raise ModelError("a sparse tensor with external data", at=where, hint="store it in the model itself")
        stored = LazyTensor(values).nbytes + LazyTensor(indices).nbytes
        count = math.prod(values.dims)
        flat, wide = [count], [count, len(self.shape)]
        if indices.data_type != TensorProto.INT64 or list(indices.dims) not in (flat, wide):
            raise ModelError(f"{count} values with indices of shape {list(indices.dims)}", at=where)
        found = _to_array(indices)
        limits = np.array([math.prod(self.shape)] if found.ndim == 1 else self.shape)
        if count and ((found < 0) | (found >= limits)).any():
            raise ModelError("an index lies outside the shape", at=where, hint="the file is damaged")
        return stored

    def load(self) -> np.ndarray[Any, Any]:
        """Return the dense values as a read-only array.

        Raises:
            ModelError: too large to be made dense.
        """
        array = self._loaded() if self._loaded is not None else None
        if array is not None:
            return array
        where = f"sparse initializer '{self.tensor.values.name}'"
        if self._dense > MAX_DENSE_BYTES:
            raise ModelError(f"a sparse tensor of {self._dense} bytes in dense form", at=where)
        values, indices = _to_array(self.tensor.values), _to_array(self.tensor.indices)
        array = np.zeros(self.shape, dtype=values.dtype)
        if indices.ndim == 1:
            array.reshape(-1)[indices] = values
        else:
            array[tuple(indices.T)] = values
        array.flags.writeable = False
        self._loaded = weakref.ref(array)
        return array

    def is_loaded_as(self, values: object) -> bool:
        """Tell whether `values` is the very array that `load` returned."""
        return self._loaded is not None and self._loaded() is values

    def sparse_proto(self, name: str) -> onnx.SparseTensorProto:
        """Return the sparse tensor under `name`."""
        out = onnx.SparseTensorProto()
        out.CopyFrom(self.tensor)
        if out.values.name != name:
            out.values.name = name
        return out


SPARSE_OVERHEAD = 128
"""Bytes that a sparse tensor takes besides its elements, about, with the node that holds it."""


def sparse_form(values: np.ndarray[Any, Any], name: str) -> onnx.SparseTensorProto | None:
    """Return floats as a sparse tensor under `name`; None where that is not smaller.

    Each element takes its place (int64, in the flat tensor) beside its value: it is smaller below a third of float32.
    A negative zero, which a mask multiplied with leaves, comes back as a positive one.
    """
    if values.dtype.kind != "f" or values.ndim == 0:
        return None
    places = np.flatnonzero(values).astype(np.int64)
    if len(places) * (8 + values.dtype.itemsize) + SPARSE_OVERHEAD >= values.nbytes:
        return None
    out = onnx.SparseTensorProto(dims=values.shape)
    encode_into(out.values, np.ascontiguousarray(values).reshape(-1)[places], name)
    encode_into(out.indices, places, "")
    return out


def _to_array(proto: TensorProto) -> np.ndarray[Any, Any]:
    """Return an inline tensor's values."""
    try:
        return np.asarray(numpy_helper.to_array(proto))
    except UnicodeDecodeError as error:
        raise ModelError("a string is not UTF-8", at=f"tensor '{proto.name}'") from error


def _stored_elements(proto: TensorProto) -> int:
    """Return how many entries the typed field of an inline tensor must have."""
    count = int(math.prod(proto.dims))
    if proto.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        return 2 * count
    if proto.data_type in _FIELD_BITS:
        return (count * _FIELD_BITS[proto.data_type] + 7) // 8
    return count


def mappings(weights: Iterable[object]) -> list[mmap.mmap]:
    """Return the mapped files that these weights lie in, each once."""
    views = (values.data for values in weights if isinstance(values, LazyTensor) and values.data is not None)
    found = {id(view.obj): view.obj for view in views}
    return [mapped for mapped in found.values() if isinstance(mapped, mmap.mmap)]


def release(mapped: Iterable[mmap.mmap]) -> None:
    """Give back the memory of pages already read; who reads them again gets them from the file again."""
    advice = getattr(mmap, "MADV_DONTNEED", None)  # not on Windows
    if advice is not None:
        for one in mapped:
            one.madvise(advice)


def encode(values: np.ndarray[Any, Any], name: str) -> TensorProto:
    """Return `values` as a `TensorProto` (raw data, little endian; strings as `string_data`)."""
    out = TensorProto()
    encode_into(out, values, name)
    return out


def encode_into(out: TensorProto, values: np.ndarray[Any, Any], name: str) -> None:
    """Put what `encode` returns into an empty message, which spares a copy of the data."""
    data_type = onnx_dtype(values.dtype)
    if values.dtype.kind in "biufc" and sys.byteorder == "little":
        out.raw_data = values.tobytes()
    elif values.dtype.kind in "OSU":
        out.string_data.extend(_as_bytes(v) for v in values.reshape(-1))
    else:  # small types are packed
        out.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape)))
        out.ClearField("dims")
    out.dims.extend(values.shape)
    out.data_type = data_type
    if name:
        out.name = name


def _as_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def same_dtype(a: np.dtype[Any] | None, b: np.dtype[Any] | None) -> bool:
    """Compare dtypes, where either may be unknown (None equals only None)."""
    return (a is None) == (b is None) and (a is None or a == b)


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
