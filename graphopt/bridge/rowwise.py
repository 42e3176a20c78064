"""Whether a model treats the rows of its inputs alone: seen by running it, since names of axes prove nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from graphopt.errors import DataError
from graphopt.tensors import is_float

Array: TypeAlias = np.ndarray[Any, Any]
Run: TypeAlias = Callable[[Mapping[str, Array]], Mapping[str, Array]]

TOLERANCE = 0.02
"""Of the deviation of the values: kernels add up in another order for another number of rows, and of codes of 8 bits
some then fall a step further; rows that depend on each other differ by more."""


def rows_move(run: Run, feeds: Mapping[str, Array], names: Iterable[str], rows: int) -> bool:
    """Tell whether tensors' rows change places as those of the feeds do.

    Args:
        run: the model.
        feeds: all with as many rows along axis 0.
        names: of the tensors.
        rows: how many.
    """
    order = np.roll(np.arange(rows), 1)
    try:
        before, after = run(feeds), run({fed: value[order] for fed, value in feeds.items()})
    except DataError:
        return False
    return all(_has_rows(before[n], rows) and _close(after[n], before[n][order], before[n]) for n in names)


def rows_stand_alone(run: Run, feeds: Mapping[str, Array], names: Iterable[str]) -> bool:
    """Tell whether a model gives for two rows at once what it gives for each of them.

    Args:
        run: the model.
        feeds: all with two rows along axis 0.
        names: of the tensors.
    """
    try:
        both = run(feeds)
        singles = [run({fed: value[i : i + 1] for fed, value in feeds.items()}) for i in range(2)]
    except DataError:
        return False
    return all(
        _has_rows(both[n], 2) and all(_close(one[n], both[n][i : i + 1], both[n]) for i, one in enumerate(singles))
        for n in names
    )


def _has_rows(value: Array, rows: int) -> bool:
    return isinstance(value, np.ndarray) and value.ndim > 0 and value.shape[0] == rows


def _close(a: Array, b: Array, whole: Array) -> bool:
    """Tell whether two results are the same up to how they were added up; of others than floats, in shape.

    `whole` is what says how much such values vary.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not is_float(a.dtype) or not a.size:
        return True  # decisions between near equals may fall either way
    x, y, z = (v.astype(np.float64) for v in (a, b, whole))
    if not (np.isfinite(x).all() and np.isfinite(z).all()):
        return bool(np.array_equal(np.isfinite(x), np.isfinite(y)))
    scale = max(float(z.std()), 1e-2 * float(np.sqrt(np.mean(z**2))), 1e-30)
    return bool(np.sqrt(np.mean((x - y) ** 2)) <= TOLERANCE * scale)
