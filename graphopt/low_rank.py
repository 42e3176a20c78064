"""A matrix as two thin ones, by what its product loses: x·W + b  ->  (x·W·Q)·Qᵀ + b', with orthonormal columns in Q.

Q holds the directions in which the outputs Y = X·W spread most: the leading eigenvectors of their covariance

    C = Wᵀ·cov(X)·W,        error²(r) = sum of the eigenvalues after the r-th / sum of all

No other matrix of rank r loses less of the centred outputs (reduced-rank regression: Izenman 1975; the projection of
outputs as in Chen and others, DRONE, NeurIPS 2021), and nothing is inverted, so that few samples do no harm but that of
knowing little.  The mean passes through the bias: b' = b + d - d·Q·Qᵀ, d the mean of X·W.  With cov(X) = I this is the
singular value decomposition: what remains where there are no samples.

A convolution becomes a matrix in several ways (`splits`); each gives another pair of convolutions:

    wide      (channels · kernel, outputs)             k x k to r channels, then 1x1       Zhang and others, 2016
    narrow    (channels, kernel · outputs)             1x1 to r channels, then k x k
    spatial   (channels · height, width · outputs)     k x 1 to r channels, then 1 x k     Jaderberg and others, 2014
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
Way: TypeAlias = Literal["product", "wide", "narrow", "spatial", "table"]

WIDEST = 6144
"""Size of an eigenvalue problem that is still solved (a minute or two)."""

RIDGE = 1e-4
"""Part of the outputs' power that every direction of the input is taken to have: samples do not show all of them."""

_FAINT = 1e-12
"""Eigenvalues below this part of the largest are rounding."""


@dataclass(frozen=True)
class Factors:
    """Two matrices whose product stands for one.

    Attributes:
        first: float64 (inputs, rank).
        second: float64 (rank, outputs).
    """

    first: Array
    second: Array

    @property
    def product(self) -> Array:
        """What they stand for: (inputs, outputs)."""
        return np.asarray(self.first @ self.second)


@dataclass(frozen=True)
class Spectrum:
    """What each rank of a matrix keeps.

    Attributes:
        matrix: (inputs, outputs), of any float type.
        basis: (outputs, directions), orthonormal, those that hold most first.
        energies: (directions,), what each holds of the outputs' power.
        total: the power of the outputs.
    """

    matrix: Array
    basis: Array
    energies: Array
    total: float

    def error(self, rank: int) -> float:
        """Return the relative error of the outputs at a rank: 0 for nothing lost, 1 for nothing kept."""
        if self.total <= 0.0:
            return 0.0
        return math.sqrt(max(0.0, 1.0 - float(self.energies[:rank].sum()) / self.total))

    def rank_within(self, error: float) -> int:
        """Return the least rank whose relative error is at most this."""
        left = 1.0 - np.cumsum(self.energies) / self.total if self.total > 0.0 else np.zeros(len(self.energies))
        within = np.flatnonzero(left <= error**2 + _FAINT)
        return int(within[0]) + 1 if len(within) else len(self.energies)

    def factors(self, rank: int) -> Factors:
        """Return the factors of a rank, the values between them of variance one each on what `energies` came from."""
        basis = self.basis[:, :rank]
        floor = _FAINT * max(float(self.energies[0]), 1e-300)
        spread = np.sqrt(np.maximum(self.energies[:rank], floor)) if self.total > 0.0 else np.ones(basis.shape[1])
        return Factors(self.matrix.astype(np.float64) @ basis / spread, basis.T * spread[:, None])


def spectrum(matrix: Array, *, inputs: Array | None = None, outputs: Array | None = None) -> Spectrum:
    """Return what each rank of a matrix keeps, by second moments of inputs or outputs, or by the matrix alone.

    Args:
        matrix: (inputs, outputs).
        inputs: covariance of the rows that it is multiplied with, (inputs, inputs).
        outputs: in its place, that of the products, (outputs, outputs).
    """
    rows, columns = matrix.shape
    if outputs is None and columns > rows:
        return _by_inputs(matrix, inputs)
    wide = matrix.astype(np.float64)
    plain = wide.T @ wide
    found = outputs
    if found is None:
        found = plain if inputs is None else wide.T @ inputs @ wide
    found = (found + found.T) / 2
    total, power = float(np.trace(found)), float(np.trace(plain))
    if total <= 0.0:  # constant outputs: nothing is known
        found, total = plain, power
    _, vectors = np.linalg.eigh(found + plain * (RIDGE * total / power) if power > 0.0 else found)
    basis = vectors[:, ::-1][:, : min(rows, columns)]
    energies = np.maximum(np.einsum("ik,ij,jk->k", basis, found, basis, optimize=True), 0.0)
    return Spectrum(matrix, basis, energies, total)


def _by_inputs(stored: Array, covariance: Array | None) -> Spectrum:
    """Return the spectrum of a matrix with fewer inputs than outputs: problems of the smaller size only."""
    matrix = stored.astype(np.float64)
    known = np.eye(len(matrix)) if covariance is None else (covariance + covariance.T) / 2
    power = float(np.sum(np.square(matrix)))
    total = float(np.sum((known @ matrix) * matrix))
    if total <= 0.0:
        known, total = np.eye(len(matrix)), power
    ridged = known + np.eye(len(matrix)) * (RIDGE * total / power if power > 0.0 else 0.0)
    values, vectors = np.linalg.eigh(ridged)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    weighed = root @ matrix
    values, vectors = np.linalg.eigh(weighed @ weighed.T)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    scale = np.sqrt(np.maximum(values, _FAINT * max(float(values[0]), 1e-300)))
    basis = weighed.T @ vectors / scale
    made = matrix @ basis
    energies = np.maximum(np.sum(made * (known @ made), axis=0), 0.0)
    return Spectrum(stored, basis, energies, total)


@dataclass(frozen=True)
class Split:
    """One way to write a layer as two.

    Attributes:
        way: its name; `table` is an embedding's, which is looked up in the first factor, and saves only bytes.
        shape: of the weight: (inputs, outputs), or (outputs, channels, kernel…) of a convolution.
        macs: multiply-accumulates per rank and place of the output (of a table: elements that are stored).
        whole: those of the layer as it is.
    """

    way: Way
    shape: tuple[int, ...]
    macs: int
    whole: int

    @property
    def flat(self) -> bool:
        """Whether the weight is the matrix."""
        return self.way in ("product", "table")

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        if self.flat:
            return self.shape[0], self.shape[1]
        outputs, channels, *kernel = self.shape
        if self.way == "wide":
            return channels * math.prod(kernel), outputs
        if self.way == "narrow":
            return channels, math.prod(kernel) * outputs
        return channels * kernel[0], kernel[1] * outputs

    @property
    def limit(self) -> int:
        """The largest rank that takes fewer multiply-accumulates than the layer as it is."""
        return min(*self.size, (self.whole - 1) // self.macs)

    def matrix(self, weight: Array) -> Array:
        """Return a weight as the matrix to be factorised, of the same type."""
        if self.flat:
            return weight
        if self.way == "wide":
            return weight.reshape(len(weight), -1).T
        if self.way == "narrow":
            return np.moveaxis(weight, 0, -1).reshape(weight.shape[1], -1)
        return weight.transpose(1, 2, 3, 0).reshape(self.size)

    def weights(self, factors: Factors) -> tuple[Array, Array]:
        """Return the weights of the two layers."""
        first, second = factors.first, factors.second
        if self.flat:
            return first, second
        (outputs, channels, *kernel), rank = self.shape, first.shape[1]
        ones = [1] * len(kernel)
        if self.way == "wide":
            return first.T.reshape(rank, channels, *kernel), second.T.reshape(outputs, rank, *ones)
        if self.way == "narrow":
            turned = second.reshape(rank, *kernel, outputs)
            return first.T.reshape(rank, channels, *ones), np.moveaxis(turned, -1, 0)
        height, width = kernel
        down = first.T.reshape(rank, channels, height, 1)
        return down, second.reshape(rank, 1, width, outputs).transpose(3, 0, 1, 2)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the two layers' weights at a rank."""
        if self.flat:
            return (self.shape[0], rank), (rank, self.shape[1])
        outputs, channels, *kernel = self.shape
        ones = [1] * len(kernel)
        if self.way == "wide":
            return (rank, channels, *kernel), (outputs, rank, *ones)
        if self.way == "narrow":
            return (rank, channels, *ones), (outputs, rank, *kernel)
        return (rank, channels, kernel[0], 1), (outputs, rank, 1, kernel[1])

    def whole_weight(self, matrix: Array) -> Array:
        """Return a matrix in the weight's own shape."""
        if self.flat:
            return matrix
        outputs, channels, *kernel = self.shape
        if self.way == "wide":
            return matrix.T.reshape(self.shape)
        if self.way == "narrow":
            return np.moveaxis(matrix.reshape(channels, *kernel, outputs), -1, 0)
        return matrix.reshape(channels, *kernel, outputs).transpose(3, 0, 1, 2)

    def summed(self, row: Array) -> Array:
        """Return what a row of products (columns,) is for each output, its taps added up: (outputs,)."""
        outputs = self.shape[1] if self.flat else self.shape[0]
        return np.asarray(row.reshape(-1, outputs).sum(axis=0))


def product_split(inputs: int, outputs: int) -> Split:
    """Return the split of a matrix product."""
    return Split("product", (inputs, outputs), inputs + outputs, inputs * outputs)


def table_split(rows: int, columns: int) -> Split:
    """Return the split of an embedding table."""
    return Split("table", (rows, columns), rows + columns, rows * columns)


def conv_splits(shape: Sequence[int], strides: Sequence[int]) -> tuple[Split, ...]:
    """Return the splits of an ungrouped convolution, of a weight (outputs, channels, kernel…)."""
    outputs, channels, *kernel = (int(size) for size in shape)
    taps, between = math.prod(kernel), math.prod(strides)
    whole = outputs * channels * taps
    own = (outputs, channels, *kernel)
    found = [Split("wide", own, channels * taps + outputs, whole)]
    if taps > 1:
        found.append(Split("narrow", own, channels * between + outputs * taps, whole))
    if len(kernel) == 2 and min(kernel) > 1:
        height, width = kernel
        found.append(Split("spatial", own, channels * height * strides[1] + outputs * width, whole))
    return tuple(found)


def rounded(rank: int, limit: int, multiple: int = 0) -> int:
    """Return a rank rounded up to what kernels are made for, or `limit` rounded down to it where that is exceeded.

    Args:
        rank: wanted.
        limit: at most.
        multiple: 0 for 16, 4 or 1, whichever the limit leaves a choice with.
    """
    step = multiple or natural_step(limit)
    return min(-(-rank // step) * step, limit // step * step)


def natural_step(limit: int) -> int:
    """Return the multiple that ranks up to a limit are rounded to: a vector's width (AVX-512), a block's least, 1."""
    return 16 if limit >= 64 else 4 if limit >= 16 else 1
