"""Arrays whose rows are read in any order: in memory up to a budget, in a temporary file beyond it, sparse as they are.

Training visits every row once an epoch in a new order, which a stream cannot give. Each array is kept as it came (one
row or thousands of them); a batch is gathered from the pieces that its rows are in.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

BUDGET = 1 << 31
"""Bytes of data held in memory, unless the caller says otherwise."""


class Piece(Protocol):
    """An array that was kept; `shape` and `dtype` are those of all of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        ...

    def take(self, rows: Array) -> Array:
        """Return these rows (int64) of the first axis, as a dense array of their own."""
        ...

    def all(self) -> Array:
        """Return the whole array."""
        ...


@dataclass(frozen=True)
class _Held:
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.array.dtype)

    def take(self, rows: Array) -> Array:
        return np.take(self.array, rows, axis=0)

    def all(self) -> Array:
        return self.array.copy()


@dataclass(frozen=True)
class _Sparse:
    matrix: Any  # scipy.sparse.csr_array: rows are found at once

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.matrix.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        found: np.dtype[Any] = self.matrix.dtype
        return found

    def take(self, rows: Array) -> Array:
        return np.asarray(self.matrix[rows].toarray())

    def all(self) -> Array:
        return np.asarray(self.matrix.toarray())


@dataclass(frozen=True)
class _Spilled:
    file: BinaryIO
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def take(self, rows: Array) -> Array:
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        size = out[:1].nbytes
        for place, row in enumerate(rows):
            out[place] = self._read(self.start + int(row) * size, size).reshape(self.shape[1:])
        return out

    def all(self) -> Array:
        size = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        return self._read(self.start, size).reshape(self.shape)

    def _read(self, start: int, size: int) -> Array:
        self.file.seek(start)
        return np.frombuffer(bytearray(self.file.read(size)), self.dtype)


@dataclass(frozen=True)
class Padded:
    """A piece of rank 2 of whole numbers, made wider: -1 behind what it holds."""

    piece: Piece
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape with the padding."""
        return (self.piece.shape[0], self.width)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        return self.piece.dtype

    def take(self, rows: Array) -> Array:
        """Return these rows."""
        return self._padded(self.piece.take(rows))

    def all(self) -> Array:
        """Return the whole array."""
        return self._padded(self.piece.all())

    def _padded(self, values: Array) -> Array:
        return np.pad(values, ((0, 0), (0, self.width - values.shape[1])), constant_values=-1)


class RowStore:
    """Keeps arrays.

    Args:
        budget: bytes held in memory; what comes after goes to a temporary file, which is gone with the store.

    Attributes:
        spilled: bytes in the file.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self._left = budget
        self._file: BinaryIO | None = None
        self.spilled = 0

    def keep(self, value: Any) -> Piece:
        """Return a piece that holds an array, or a sparse matrix of SciPy's."""
        if is_sparse(value):
            return _Sparse(value.tocsr())
        array = np.asarray(value)
        if array.nbytes <= self._left or array.dtype.hasobject or array.nbytes == 0:
            self._left -= array.nbytes
            return _Held(array)
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="graphopt-")  # noqa: SIM115 (lives as long as the store)
        start = self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self.spilled += array.nbytes
        return _Spilled(self._file, start, array.shape, array.dtype)


def is_sparse(value: Any) -> bool:
    """Tell whether a value is a sparse matrix or array of SciPy's; nothing is imported for it."""
    return type(value).__module__.startswith("scipy.sparse") and hasattr(value, "tocsr")


def gather(pieces: Sequence[Piece], piece: Array, row: Array) -> Array:
    """Return rows of several pieces as one array, in order.

    Args:
        pieces: all of one dtype, and of one shape but for the first axis.
        piece: int64 (rows,), which piece each row is in.
        row: int64 (rows,), where in it.
    """
    used = np.unique(piece)
    if len(used) == 1:
        return pieces[int(used[0])].take(row)
    first = pieces[int(used[0])]
    out = np.empty((len(row), *first.shape[1:]), first.dtype)
    for index in used:
        here = piece == index
        out[here] = pieces[int(index)].take(row[here])
    return out
