"""Values on the host: shape arithmetic as Python numbers, so that `torch.compile` sees one graph without breaks.

A host value is a number (an integer or boolean tensor of rank 0) or a flat tuple of numbers (rank 1, int64 or bool).
Shapes, indices and small integer constants travel so; everything else is a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import torch
from onnx import TensorProto

from graphopt.bridge.tensors import to_array
from graphopt.errors import ModelError
from graphopt.tensors import numpy_dtype

Host: TypeAlias = "int | float | bool | tuple[int | float | bool, ...]"

LARGEST = 64
"""Elements of a constant up to which it travels as a host value."""

_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)

_KINDS: Mapping[Any, Any] = {
    np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64, np.dtype(np.float16): torch.float32,
    np.dtype(ml_dtypes.bfloat16): torch.float32, np.dtype(np.bool_): torch.bool,
    np.dtype(np.int8): torch.int8, np.dtype(np.int16): torch.int16, np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64, np.dtype(np.uint8): torch.uint8, np.dtype(np.uint16): torch.int32,
    np.dtype(np.uint32): torch.int64, np.dtype(np.uint64): torch.int64,
    np.dtype(ml_dtypes.int4): torch.int8, np.dtype(ml_dtypes.uint4): torch.uint8,
    np.dtype(np.complex64): torch.complex64, np.dtype(np.complex128): torch.complex128,
}  # fmt: skip
"""NumPy's dtype -> the torch one that holds its values; half precision has float32 masters, unsigned and 4-bit integers
go into a wider type."""

_CODES: Mapping[int, Any] = {
    code: _KINDS[dtype] for code in TensorProto.DataType.values() if (dtype := numpy_dtype(code)) in _KINDS
}
"""`TensorProto.DataType` -> torch's dtype: a plain table, which `torch.compile` can read."""


def is_host(value: object) -> bool:
    """Tell whether a value is a number or a tuple of numbers, not a tensor."""
    if isinstance(value, tuple):
        return all(isinstance(item, _NUMBERS) for item in value)
    return isinstance(value, _NUMBERS)


def as_tensor(value: Any, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return a value as a tensor; tensors as they are.

    Args:
        value: a host value (rank 0, or rank 1 for a tuple) or a tensor; None stays None.
        like: gives the device and, for an operand of elementwise arithmetic, the dtype; by default integers are int64,
            booleans bool and floats float32.
    """
    if value is None or isinstance(value, torch.Tensor):
        return value
    if like is not None:
        return torch.tensor(value, dtype=like.dtype, device=like.device)
    return torch.tensor(value, dtype=_kind_of(value))


def _kind_of(value: Any) -> Any:
    first = value[0] if isinstance(value, tuple) and value else value
    if isinstance(first, bool | torch.SymBool):
        return torch.bool
    return torch.float32 if isinstance(first, float | torch.SymFloat) else torch.int64


def host_of(array: np.ndarray[Any, Any]) -> Host | None:
    """Return a constant as a host value, None where it is too large, of higher rank or of another type."""
    wide = array.dtype in (np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.bool_))
    if not wide or array.ndim > 1 or array.size > LARGEST:
        return None
    values = array.tolist()
    return tuple(values) if isinstance(values, list) else values


def torch_kind(kind: int | np.dtype[Any]) -> Any:
    """Return the torch dtype that holds a tensor of this `TensorProto.DataType` or NumPy dtype.

    Raises:
        ModelError: torch has none (strings, 8-bit floats).
    """
    found = _CODES.get(kind) if isinstance(kind, int) else _KINDS.get(np.dtype(kind))
    if found is None:
        shown = TensorProto.DataType.Name(kind) if isinstance(kind, int) else str(kind)
        raise ModelError(f"torch has no tensors of type {shown}", hint="the bridge computes on numbers, in float32")
    return found


def known_to_torch(dtype: np.dtype[Any]) -> bool:
    """Tell whether torch has tensors that hold values of this dtype."""
    return dtype in _KINDS


def to_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return a copy of an array as a tensor of the same shape (0-d stays 0-d).

    Raises:
        ModelError: torch has no such type.
    """
    kind = torch_kind(array.dtype)
    plain = str(kind).removeprefix("torch.")  # the NumPy dtype of the same name
    return torch.from_numpy(np.array(array, dtype=plain, order="C", copy=True).reshape(array.shape))


def to_numpy(tensor: torch.Tensor, dtype: np.dtype[Any] | None = None) -> np.ndarray[Any, Any]:
    """Return a tensor's values as a new array, rounded to `dtype` where one is given (0-d stays 0-d)."""
    values = to_array(tensor)
    return np.array(values, dtype=dtype, order="C", copy=True).reshape(values.shape)


def total(sizes: Sequence[int]) -> int:
    """Return the product of sizes, as elements of a shape."""
    count = 1
    for size in sizes:
        count *= size
    return count
