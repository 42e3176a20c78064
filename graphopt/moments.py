"""Second moments of what a layer reads against what it is to give: all that linear least squares needs.

X are rows of a layer's input (see `graphopt.layer_inputs`), Y the same rows of a tensor of another model.  Samples are
told apart into those to fit on and those to judge by.  `graphopt.sweep` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from graphopt.layer_inputs import GramRequest

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Fit:
    """A layer that is to give what a tensor of the reference holds.

    Attributes:
        label: of the layer, for the caller.
        request: the rows of its input, in the model as it is.
        target: tensor of the reference.
        axis: that of its channels.
        channels: which of them (None: all), in the layer's own order.
        block: pixels of the target that one row makes, along each spatial axis (transposed convolutions); columns of Y
            are then (channels, block…).
        minus: tensor of the model as it is whose value is taken off the target: what is added to the layer's output
            before it is compared.
    """

    label: str
    request: GramRequest
    target: str
    axis: int
    channels: Array | None = None
    block: tuple[int, ...] = ()
    minus: str = ""


@dataclass
class Moments:
    """Sums over rows x of X and y of Y: float64, all less a fixed origin.  `a + b` is what the rows of both give.

    Attributes:
        xx: XᵀX, (group, width, width).
        xy: XᵀY, (group, width, outputs).
        x_sum: (group, width).
        y_sum: (group, outputs).
        yy: sums of squares, (group, outputs).
        x_origin: what was taken off each row of X before (group, width), numbers that float32 has.
        y_origin: the same of Y (group, outputs).
        count: number of rows.
    """

    xx: Array
    xy: Array
    x_sum: Array
    y_sum: Array
    yy: Array
    x_origin: Array
    y_origin: Array
    count: int = 0

    @classmethod
    def empty(cls, x_origin: Array, y_origin: Array) -> Moments:
        """Return the moments of no rows, to be taken from these origins."""
        x_origin, y_origin = (v.astype(np.float32).astype(np.float64) for v in (x_origin, y_origin))
        group, width = x_origin.shape
        outputs = y_origin.shape[1]
        return cls(
            np.zeros((group, width, width)), np.zeros((group, width, outputs)), np.zeros((group, width)),
            np.zeros((group, outputs)), np.zeros((group, outputs)), x_origin, y_origin,
        )  # fmt: skip

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.xx + other.xx, self.xy + other.xy, self.x_sum + other.x_sum, self.y_sum + other.y_sum,
            self.yy + other.yy, self.x_origin, self.y_origin, self.count + other.count,
        )  # fmt: skip

    def add(self, x: Array, y: Array) -> None:
        """Add rows: float, (rows, group, width) and (rows, group, outputs)."""
        x = np.ascontiguousarray((x - self.x_origin.astype(np.float32)).transpose(1, 0, 2), np.float32)
        y = np.ascontiguousarray((y - self.y_origin.astype(np.float32)).transpose(1, 0, 2), np.float32)
        if len(x) == 1:
            self.xx[0] += x[0].T @ x[0]
            self.xy[0] += x[0].T @ y[0]
        else:  # many small products: one for both
            both = np.concatenate([x, y], axis=2)
            product = both.transpose(0, 2, 1) @ both
            width = x.shape[2]
            self.xx += product[:, :width, :width]
            self.xy += product[:, :width, width:]
        self.x_sum += x.sum(axis=1, dtype=np.float64)
        self.y_sum += y.sum(axis=1, dtype=np.float64)
        self.yy += np.einsum("gro,gro->go", y, y, dtype=np.float64)
        self.count += x.shape[1]

    @property
    def x_mean(self) -> Array:
        """Mean row of X, (group, width)."""
        return np.asarray(self.x_origin + self.x_sum / max(self.count, 1))

    @property
    def y_mean(self) -> Array:
        """Mean row of Y, (group, outputs)."""
        return np.asarray(self.y_origin + self.y_sum / max(self.count, 1))


@dataclass
class Split:
    """Moments of the rows to fit on, and of those to judge by; the latter may have none."""

    train: Moments
    held_out: Moments

    @property
    def whole(self) -> Moments:
        """Those of all rows."""
        return self.train + self.held_out
