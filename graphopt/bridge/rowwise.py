"""Whether a model treats the rows of its inputs alone: seen by running it, since names of axes prove nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
Run: TypeAlias = Callable[[Mapping[str, Array]], Mapping[str, Array]]

TOLERANCE = 1e-3
"""Of the largest value: kernels add up in another order for another number of rows, and quantized ones step."""


def rows_move(run: Run, feeds: Mapping[str, Array], values: Mapping[str, Array], name: str, rows: int) -> bool:
    """Tell whether a tensor's rows change places as those of the feeds do.

    Args:
        run: the model.
        feeds: all with as many rows along axis 0.
        values: what the model makes of them.
        name: the tensor.
        rows: how many.
    """
    before = values[name]
    if not before.shape or before.shape[0] != rows:
        return False
    order = np.roll(np.arange(rows), 1)
    after = run({fed: value[order] for fed, value in feeds.items()})[name]
    return close(after, before[order])


def close(a: Array, b: Array) -> bool:
    """Tell whether two results are the same up to how they were added up."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind in "OSUb" or not a.size:
        return bool(np.array_equal(a, b))
    x, y = a.astype(np.float64), b.astype(np.float64)
    return bool(np.abs(x - y).max() <= TOLERANCE * max(np.abs(y).max(), 1e-30))
