"""What a linear layer multiplies its weight with, as the rows of a matrix X; and XᵀX of them, added up as they come.

    MatMul, Gemm     each vector along the contracted axis is a row
    Conv             each patch under the kernel is a row (im2col), in the order of the weight's axes after the first
    ConvTranspose    each pixel's channels are a row
    groups           the row is cut into equal parts, one for each group

A layer's output is X Wᵀ, so the squared error that a change D of its weight makes over all samples is trace(D XᵀX Dᵀ):
the Gram matrix XᵀX holds all that rounding, pruning and least squares need to know of any number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.errors import DataError
from graphopt.ops import is_standard

Array: TypeAlias = np.ndarray[Any, Any]

CHUNK_BYTES = 1 << 24
"""Bytes of rows that are made and multiplied at a time."""

WIDEST = 8192
"""Columns of a row from which on a Gram matrix is not taken: it would hold more than half a GB, and its inverse takes
minutes (the first dense layer of VGG-19 has 25,088)."""

LARGEST = 1e15
"""Magnitude from which on values are left out: sums of their squares would pass the range of float32."""


ROUNDING = 4e-7
"""Part of a sum of squares that is not told from rounding: rows are float32."""


@dataclass(frozen=True)
class Window:
    """The patches that a convolution sees, in the terms of ONNX's Conv: one entry for each spatial axis.

    Attributes:
        kernel: its shape.
        strides: steps between patches.
        dilations: steps inside a patch.
        pads: zeros before each axis, then after each axis.
        auto_pad: NOTSET, VALID, SAME_UPPER or SAME_LOWER; all but the first make `pads` void.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"

    def padding(self, spatial: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return the zeros before and after each spatial axis of an input of these sizes."""
        axes = len(self.kernel)
        if self.auto_pad == "NOTSET":
            return [(self.pads[i], self.pads[i + axes]) for i in range(axes)]
        if self.auto_pad == "VALID":
            return [(0, 0)] * axes
        found = []
        for size, kernel, stride, dilation in zip(spatial, self.kernel, self.strides, self.dilations, strict=True):
            reach = (kernel - 1) * dilation + 1
            total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
            small, large = total // 2, total - total // 2
            found.append((small, large) if self.auto_pad == "SAME_UPPER" else (large, small))
        return found


@dataclass(frozen=True)
class GramRequest:
    """The Gram matrix to be collected of one tensor.

    Attributes:
        tensor: its name, in the main graph.
        width: columns of a row: of one group, where there are several.
        axis: the one that holds a row's elements: -1 for MatMul, 1 for convolutions.  Ignored with a window.
        window: the patches that are the rows, where the tensor (N, C, spatial…) feeds a Conv.
        group: parts of each row that have a matrix of their own each.
    """

    tensor: str
    width: int
    axis: int = -1
    window: Window | None = None
    group: int = 1


@dataclass
class Gram:
    """Second moments of the rows X of a layer's input.  `a + b` is what the rows of both give together.

    Attributes:
        matrix: XᵀX, summed over the rows: float64, (width, width), or (group, width, width) of several groups.
        total: sum of the rows: float64, (width,) or (group, width).
        count: number of rows.
        dropped: rows left out because they held NaN, infinities or values from `LARGEST` on.
    """

    matrix: Array
    total: Array
    count: int = 0
    dropped: int = 0

    @classmethod
    def empty(cls, request: GramRequest) -> Gram:
        """Return the Gram matrix of no rows."""
        lead = () if request.group == 1 else (request.group,)
        return cls(np.zeros((*lead, request.width, request.width)), np.zeros((*lead, request.width)))

    @property
    def mean(self) -> Array:
        """Mean row, of the shape of `total`; zeros where there are no rows."""
        return self.total / max(self.count, 1)

    @property
    def groups(self) -> Array:
        """The matrices as (group, width, width), whatever the number of groups."""
        return self.matrix.reshape(-1, *self.matrix.shape[-2:])

    def covariance(self) -> Array:
        """Return the covariance of the rows (divided by `count`), of the shape of `matrix`.

        A column that varies by less than float32 rounds its square is constant: its row and column are zeros, where
        the difference of two large moments would leave noise of either sign.
        """
        moment, mean = self.matrix / max(self.count, 1), self.mean
        found = moment - mean[..., :, None] * mean[..., None, :]
        power = np.diagonal(moment, axis1=-2, axis2=-1)
        varies = np.diagonal(found, axis1=-2, axis2=-1) > ROUNDING * power
        return np.asarray(found * (varies[..., :, None] & varies[..., None, :]))

    def __add__(self, other: Gram) -> Gram:
        count, dropped = self.count + other.count, self.dropped + other.dropped
        return Gram(self.matrix + other.matrix, self.total + other.total, count, dropped)

    def add(self, request: GramRequest, values: Array, limit: int = 0, rng: np.random.Generator | None = None) -> None:
        """Add the rows of one more tensor.

        Args:
            request: what the Gram was made for.
            values: the tensor, of any float type.
            limit: rows at most, drawn by `rng` without replacement (0: all).
            rng: for the draw.

        Raises:
            DataError: the tensor has not the layout that the request says.
        """
        for rows in row_chunks(request, values, limit, rng):
            usable = (np.abs(rows) < LARGEST).all(axis=(1, 2))
            if not usable.all():
                self.dropped += int((~usable).sum())
                rows = rows[usable]  # noqa: PLW2901  (the same rows, less some)
            self.count += len(rows)
            self.total += rows.sum(axis=0, dtype=np.float64).reshape(self.total.shape)
            if request.group == 1:
                self.matrix += rows[:, 0].T @ rows[:, 0]
            else:
                by_group = rows.transpose(1, 0, 2)
                self.matrix += by_group.transpose(0, 2, 1) @ by_group


def row_chunks(
    request: GramRequest, values: Array, limit: int = 0, rng: np.random.Generator | None = None
) -> Iterator[Array]:
    """Yield the rows of a tensor, some MB at a time: float32, (rows, group, width).

    Raises:
        DataError: the tensor has not the layout that the request says.
    """
    view = _patches(request, values) if request.window else np.moveaxis(np.asarray(values), request.axis, -1)
    kernel = 1 + len(request.window.kernel) if request.window else 1
    places, width = view.shape[: view.ndim - kernel], math.prod(view.shape[view.ndim - kernel :])
    if width != request.group * request.width:
        raise DataError(
            f"rows of {request.group} × {request.width} elements are expected, not of {width}",
            at=f"tensor '{request.tensor}' of shape {list(np.shape(values))}",
        )
    count = math.prod(places)
    step = max(1, CHUNK_BYTES // max(4 * width, 1))
    chosen = None
    if limit and limit < count:
        chosen = np.sort((rng or np.random.default_rng(0)).choice(count, limit, replace=False))
    for start in range(0, limit if chosen is not None else count, step):
        flat = np.arange(start, min(start + step, count)) if chosen is None else chosen[start : start + step]
        rows = view[np.unravel_index(flat, places)] if places else view[None]
        yield np.ascontiguousarray(rows, np.float32).reshape(len(flat), request.group, request.width)


def _patches(request: GramRequest, values: Array) -> Array:
    """Return all patches of a convolution's input as a view: (N, out…, C, kernel…)."""
    window = request.window
    assert window is not None
    axes = len(window.kernel)
    if values.ndim != axes + 2:
        raise DataError(
            f"a tensor of {axes + 2} dimensions is expected, not of {values.ndim}", at=f"tensor '{request.tensor}'"
        )
    padded = np.pad(values, [(0, 0), (0, 0), *window.padding(values.shape[2:])])
    reach = tuple((k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True))
    if any(size < r for size, r in zip(padded.shape[2:], reach, strict=True)):
        return np.empty((0, *[1] * axes, values.shape[1], *window.kernel), np.float32)
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + axes)))
    steps = tuple(slice(None, None, s) for s in window.strides)
    inside = tuple(slice(None, None, d) for d in window.dilations)
    view = view[(slice(None), slice(None), *steps, *inside)]
    return np.moveaxis(view, 1, 1 + axes)


def request_of(node: gs.Node, weight: Sequence[int]) -> GramRequest | None:
    """Return the request for the rows that a node multiplies its weight (input 1, of this shape) with.

    None where they are no rows of one matrix: operators that are not linear layers, batched weights.
    """
    shape = tuple(int(size) for size in weight)
    tensor = node.inputs[0].name
    if is_standard(node, "MatMul") and len(shape) == 2:
        return GramRequest(tensor, shape[0])
    if is_standard(node, "Gemm") and len(shape) == 2:
        width = shape[1] if node.attrs.get("transB", 0) else shape[0]
        return GramRequest(tensor, width, axis=0 if node.attrs.get("transA", 0) else -1)
    group = node.attrs.get("group", 1)
    if not isinstance(group, int) or len(shape) < 3:
        return None
    if is_standard(node, "ConvTranspose"):
        return GramRequest(tensor, shape[0] // group, axis=1, group=group)
    if is_standard(node, "Conv"):
        return GramRequest(tensor, math.prod(shape[1:]), 1, _window(node, shape[2:]), group)
    return None


def _window(node: gs.Node, kernel: tuple[int, ...]) -> Window:
    ones = [1] * len(kernel)
    auto_pad = node.attrs.get("auto_pad", "NOTSET")
    return Window(
        kernel,
        tuple(node.attrs.get("strides", ones)),
        tuple(node.attrs.get("dilations", ones)),
        tuple(node.attrs.get("pads", [0, 0] * len(kernel))),
        auto_pad.decode() if isinstance(auto_pad, bytes) else auto_pad,
    )
