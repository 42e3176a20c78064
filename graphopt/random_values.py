"""A shape and what an input is used for -> values that the model can run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.inputs import Control, InputUse
from graphopt.analysis.shapes import Shapes
from graphopt.model import ValueSpec
from graphopt.tensors import is_float

Array: TypeAlias = np.ndarray[Any, Any]
Shape: TypeAlias = tuple[int, ...]

STYLES = ("normal", "fractions", "small", "ones", "zeros")
"""How free inputs are filled, in the order they are tried: floats standard normal or in 0..1, integers below 10 or
0 and 1, then all ones, all zeros."""

SMOOTH = "smooth"
"""Like `normal`, but floats vary slowly, as images and sounds do: networks answer to that with larger activations, and
limits and thresholds show that white noise never reaches."""

SMOOTH_AXIS = 8
"""Axes shorter than this are not smoothed."""

DEFAULT_LENGTH = 16
"""Of windows and other outputs whose length an input sets and nothing else tells."""

_WORDS = np.array(["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"], dtype=object)


@dataclass
class Filler:
    """Fills the inputs of one feed.

    Attributes:
        shapes: types inferred in the graph.
        planned: the shapes chosen for the inputs.
        rng: the source of all randomness.
        style: one of `STYLES`, or `SMOOTH`.
        variant: the number of the feed; what controls the graph takes turns with it.
    """

    shapes: Shapes
    planned: Mapping[int, Shape]
    rng: np.random.Generator
    style: str = "normal"
    variant: int = 0
    made: dict[str, Any] = field(default_factory=dict)

    def known(self, tensor: gs.Tensor) -> Shape | None:
        """Return a tensor's shape if it is planned or all known."""
        return self.planned.get(id(tensor)) or self.shapes.of(tensor).static

    def fill(self, spec: ValueSpec, use: InputUse, shape: Shape) -> Array:
        """Return values for an input."""
        dtype = spec.dtype or np.dtype(np.float32)
        if dtype.kind in "OSU":
            return np.asarray(self.rng.choice(_WORDS, shape), dtype=object).reshape(shape)
        if use.is_index and dtype.kind in "iu":
            return self._indices(use, shape).astype(dtype)
        for control in use.controls:
            values = CONTROL_VALUES[control.kind](self, control, shape, dtype)
            if values is not None:
                return np.broadcast_to(np.asarray(values), shape).astype(dtype)
        if "mask" in spec.name.lower() and dtype.kind in "iub":
            return self._mask(shape).astype(dtype)
        if use.constants and (dtype.kind in "iub" or shape in ((), (1,))):
            return np.full(shape, self._compared(use.constants)).astype(dtype)
        return self._free(shape, dtype)

    def _indices(self, use: InputUse, shape: Shape) -> Array:
        bounds = list(use.bounds)
        for tensor, axis in use.open_bounds:
            size = self.known(tensor)
            bounds.append(size[axis] if size is not None and -len(size) <= axis < len(size) else 2)
        return self.rng.integers(0, max(1, min(bounds)), shape)

    def _mask(self, shape: Shape) -> Array:
        """Return ones; from the second feed on, rows end in zeros."""
        mask = np.ones(shape, dtype=np.int64)
        if self.variant and shape and shape[-1] > 1:
            mask[..., -(shape[-1] // 4 or 1) :] = 0
        return mask

    def _compared(self, constants: list[float]) -> float:
        """Return one of the numbers that the input is compared with, in turns with another."""
        choices = list(dict.fromkeys(constants))
        if len(choices) == 1:
            choices.append(choices[0] // 2 if abs(choices[0]) > 1 else choices[0] + 1)
        return choices[self.variant % len(choices)]

    def _free(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        if self.style in ("ones", "zeros"):
            return np.full(shape, 1 if self.style == "ones" else 0).astype(dtype)
        if dtype.kind == "b":
            return self.rng.integers(0, 2, shape).astype(bool)
        if dtype.kind == "c":
            return (self.rng.standard_normal(shape) + 1j * self.rng.standard_normal(shape)).astype(dtype)
        if is_float(dtype):
            if self.style == SMOOTH:
                return smooth_noise(self.rng, shape).astype(dtype)
            drawn = self.rng.standard_normal(shape) if self.style == "normal" else self.rng.random(shape)
            return np.asarray(drawn).astype(dtype)
        return self.rng.integers(0, 2 if self.style == "small" else 10, shape).astype(dtype)


def smooth_noise(rng: np.random.Generator, shape: Shape) -> Array:
    """Return noise of unit power that varies slowly along the axes of space or time; white where there are none.

    Two scales, an eighth and a thirty-second of the axis, and a little white noise.
    """
    from scipy import ndimage  # noqa: PLC0415  (half a second, for those who need it)

    noise = rng.standard_normal(shape)
    axes = [a for a in range(max(1, len(shape) - 3), len(shape)) if shape[a] >= SMOOTH_AXIS]
    axes = axes[-2:] if len(shape) >= 4 else axes[-1:]
    if not axes:
        return noise
    total = 0.3 * noise
    for part in (8, 32):
        sigma = [shape[a] / part if a in axes else 0.0 for a in range(len(shape))]
        field = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
        total += field / _rms(field)
    return np.asarray(total / _rms(total))


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) or 1.0


Make: TypeAlias = "Callable[[Filler, Control, Shape, np.dtype[Any]], Any]"


def _output(filler: Filler, control: Control, index: int = 0) -> Shape | None:
    return filler.known(control.node.outputs[index])


def _data(filler: Filler, control: Control) -> Shape | None:
    return filler.known(control.node.inputs[0])


def _count(shape: Shape) -> int:
    return shape[0] if shape else 1


def _target_shape(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    out = _output(filler, control)
    if out is not None and len(out) == _count(shape):
        return out
    return [2] * _count(shape)


def _reshape(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    out, data, n = _output(filler, control), _data(filler, control), _count(shape)
    if out is not None and len(out) == n:
        return out
    kept = list(data or ())[: n - 1]
    return [*kept, *[1] * (n - 1 - len(kept)), -1]


def _expand(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    out, data, n = _output(filler, control), _data(filler, control), _count(shape)
    if out is not None and len(out) >= n:
        return out[-n:]
    return data if data is not None and len(data) == n else [1] * n


def _tile(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    out, data, n = _output(filler, control), _data(filler, control), _count(shape)
    if out is not None and data is not None and len(out) == len(data) == n and all(data):
        return [o // d for o, d in zip(out, data, strict=True)]
    return [1] * (n - 1) + [2]


def _ends(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    out, n = _output(filler, control), _count(shape)
    return out[:n] if out is not None and len(out) >= n else [2**31 - 1] * n


def _axes(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    del filler, control
    return range(_count(shape))


def _new_axes(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    out = _output(filler, control)
    ones = [i for i, size in enumerate(out or ()) if size == 1]
    return ones[: _count(shape)] if len(ones) >= _count(shape) else range(_count(shape))


def _one_axes(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    data = _data(filler, control)
    ones = [i for i, size in enumerate(data or ()) if size == 1]
    return ones[: _count(shape)] if len(ones) >= _count(shape) else range(_count(shape))


def _reduced_axes(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    out, data, n = _output(filler, control), _data(filler, control), _count(shape)
    if out is not None and data is not None and len(out) == len(data):
        shrunk = [i for i, (o, d) in enumerate(zip(out, data, strict=True)) if o != d]
        if len(shrunk) == n:
            return shrunk
    if out is not None and data is not None and len(out) == len(data) - 1 == len(data) - n:
        return [next((i for i in range(len(data)) if (*data[:i], *data[i + 1 :]) == out), 0)]
    return range(n)


def _ratio(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    out, data = _output(filler, control), _data(filler, control)
    if out is not None and data is not None and len(out) == len(data) == _count(shape) and all(data):
        return [o / d for o, d in zip(out, data, strict=True)]
    return [2.0 if i >= _count(shape) - 2 else 1.0 for i in range(_count(shape))]


def _sizes(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    out, data, n = _output(filler, control), _data(filler, control), _count(shape)
    if out is not None and len(out) == n:
        return out
    axes = control.node.attrs.get("axes")
    if out is not None and axes is not None and len(axes) == n:
        return [out[a] for a in axes]
    return [size * (2 if i >= n - 2 else 1) for i, size in enumerate((data or (1,) * n)[-n:])]


def _pads(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    out, data, n = _output(filler, control), _data(filler, control), _count(shape) // 2
    if out is not None and data is not None and len(out) == len(data) == n:
        grown = [o - d for o, d in zip(out, data, strict=True)]
        return [*[g // 2 for g in grown], *[g - g // 2 for g in grown]]
    return [0] * n + [1] * n


def _split(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    axis, data = int(control.node.attrs.get("axis", 0)), _data(filler, control)
    outs = [filler.known(t) for t in control.node.outputs]
    if control.node.op == "Split" and all(o is not None for o in outs) and len(outs) == _count(shape):
        return [o[axis] for o in outs if o is not None]
    if data is None:
        return [1] * _count(shape)
    size, n = data[axis], _count(shape)
    return [size // n] * (n - 1) + [size - size // n * (n - 1)] if shape else min(2, size)


def _k(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    del shape
    out, axis = _output(filler, control), int(control.node.attrs.get("axis", -1))
    if control.node.op == "TopK" and out is not None:
        return out[axis]
    data = _data(filler, control)
    return min(2, data[axis]) if control.node.op == "TopK" and data is not None else 2


def _depth(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    del shape
    out = _output(filler, control)
    return out[int(control.node.attrs.get("axis", -1))] if out is not None else 10


def _limit(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    del shape
    out = _output(filler, control)
    return out[0] if out else 5


def _lengths(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    """Return full lengths, and in later feeds shorter ones for all rows but the first."""
    data, node = _data(filler, control), control.node
    if not data:
        return 1
    axis = int(node.attrs.get("time_axis", node.attrs.get("layout", 0)))
    lengths = np.full(shape, data[axis])
    if filler.variant and shape and shape[0] > 1:
        lengths[1:] = max(1, data[axis] // 2)
    return lengths


def _length(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    del shape
    out = _output(filler, control)
    return out[-1] if out and control.node.op.endswith("Window") else DEFAULT_LENGTH


def _output_tail(filler: Filler, control: Control, shape: Shape, _: np.dtype[Any]) -> Any:
    out, n = _output(filler, control), _count(shape)
    return out[-n:] if out is not None and len(out) >= n else [5] * n


def _positive(filler: Filler, _c: Control, shape: Shape, dtype: np.dtype[Any]) -> Any:
    if is_float(dtype):
        return 0.1 + filler.rng.random(shape)
    return filler.rng.integers(1, 10, shape) if dtype.kind in "iu" else None


def _condition(filler: Filler, _c: Control, _s: Shape, _d: np.dtype[Any]) -> Any:
    return filler.variant % 2 == 0


def _fixed(value: float) -> Make:
    def make(_f: Filler, _c: Control, _s: Shape, _d: np.dtype[Any]) -> Any:
        return value

    return make


def _drawn(low: float, high: float) -> Make:
    def make(filler: Filler, _c: Control, shape: Shape, dtype: np.dtype[Any]) -> Any:
        return filler.rng.uniform(low, high, shape) if is_float(dtype) else None

    return make


CONTROL_VALUES: dict[str, Make] = {
    "condition": _condition, "trip-count": _fixed(3), "true": _fixed(1), "false": _fixed(0), "zeros": _fixed(0),
    "ones": _fixed(1), "half": _fixed(0.5), "low": _fixed(-0.5), "high": _fixed(0.5), "small": _fixed(2),
    "rate": _fixed(8192), "quarter-rate": _fixed(2048), "length": _length, "length-2": _fixed(2 * DEFAULT_LENGTH),
    "stride": _fixed(4), "reshape": _reshape, "expand": _expand, "tile": _tile, "shape": _target_shape,
    "output-shape": _target_shape, "output-tail": _output_tail, "starts": _fixed(0), "ends": _ends, "axes": _axes,
    "k": _k, "roi": lambda _f, _c, shape, _d: [0.0] * (_count(shape) // 2) + [1.0] * (_count(shape) // 2),
    "scales": _ratio, "sizes": _sizes, "limit": _limit, "pads": _pads, "new-axes": _new_axes, "one-axes": _one_axes,
    "split": _split, "depth": _depth, "lengths": _lengths, "reduced-axes": _reduced_axes, "positive": _positive,
    "fractions": _drawn(0.0, 1.0), "unit": _drawn(-1.0, 1.0), "above-one": _drawn(1.0, 3.0),
    "distinct": lambda _f, _c, shape, _d: np.arange(int(np.prod(shape))).reshape(shape),
}  # fmt: skip
"""What controls the graph -> values of an input's shape (or that broadcast to it); None leaves the choice open."""
