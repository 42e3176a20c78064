"""The kernel of GPTQ, its kin and SparseGPT: inputs are settled one by one, later ones make up for the errors.

A layer computes X W.  Changing W by D costs trace(Dᵀ H D) on the samples, H = XᵀX.  Once a row of W is settled
(rounded, or set to zero), the best that the rows behind it can do is linear in its error.  With UᵀU = H⁻¹, U upper
triangular, it is

    error = (row i - settled) / U[i, i]        row j -= U[i, j] error    for all j > i

Sources: Hassibi, Stork: Optimal Brain Surgeon, 1993; Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023 (the factor,
and the updates in blocks); Frantar, Alistarh: SparseGPT, ICML 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
Settle: TypeAlias = Callable[[Array, Array], Array]
"""Takes which input of each group it is (group,) and their values (group, outputs); returns what these become."""

LAZY = 128
"""Inputs after which all those behind them are brought up to date."""


def inverse_factor(matrix: Array) -> Array:
    """Return the upper triangular U with UᵀU = matrix⁻¹, of each of (group, n, n) symmetric positive definite ones.

    With the order of rows and columns turned round, the Cholesky factor of the matrix is upper triangular; its inverse
    is U.  So the inverse of the matrix is never formed.

    Raises:
        numpy.linalg.LinAlgError: one is not positive definite.
    """
    from scipy.linalg.lapack import dtrtri  # noqa: PLC0415  (slow to import, for those who need it)

    lower = np.linalg.cholesky(np.asarray(matrix, np.float64)[:, ::-1, ::-1])
    found = np.empty_like(lower)
    for group, factor in enumerate(lower):
        found[group] = np.tril(dtrtri(factor, lower=1)[0])[::-1, ::-1]
    return found


def carry(
    weight: Array,
    matrix: Array,
    settle: Settle,
    *,
    ordered: bool = True,
    ahead: Callable[[slice, Array, Array], None] | None = None,
    block: int = 0,
) -> Array:
    """Settle a weight input by input; return what it becomes.

    Args:
        weight: (group, inputs, outputs), float32 or float64: what is computed in, but for the factor.
        matrix: H of each group, positive definite, (group, inputs, inputs).
        settle: see `Settle`.
        ordered: the inputs of the largest diagonal first (act-order): these have most others to make up for them.
        ahead: told of each block of inputs before its first is settled: where it lies, its values as they are by then
            (group, block, outputs), and the diagonal of U there (group, block).
        block: inputs of a block (0: `LAZY`); those behind it are brought up to date when it is done.
    """
    inputs, block = weight.shape[1], block or LAZY
    order = np.broadcast_to(np.arange(inputs), weight.shape[:2])
    if ordered:
        order = np.argsort(-np.diagonal(matrix, axis1=-2, axis2=-1), axis=-1, kind="stable")
    sorted_rows = np.take_along_axis(matrix, order[:, :, None], axis=1)
    factor = inverse_factor(np.take_along_axis(sorted_rows, order[:, None, :], axis=2)).astype(weight.dtype)
    pivots = np.diagonal(factor, axis1=-2, axis2=-1)
    left = np.take_along_axis(weight, order[:, :, None], axis=1)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        if ahead is not None:
            ahead(slice(start, stop), left[:, start:stop], pivots[:, start:stop])
        errors = np.empty_like(left[:, start:stop])
        for i in range(start, stop):
            settled = settle(order[:, i], left[:, i])
            errors[:, i - start] = error = (left[:, i] - settled) / pivots[:, i, None]
            left[:, i] = settled
            left[:, i + 1 : stop] -= factor[:, i, i + 1 : stop, None] * error[:, None]
        left[:, stop:] -= np.swapaxes(factor[:, start:stop, stop:], 1, 2) @ errors
    found = np.empty_like(left)
    np.put_along_axis(found, np.broadcast_to(order[:, :, None], left.shape), left, axis=1)
    return found
