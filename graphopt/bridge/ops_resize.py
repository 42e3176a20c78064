"""Resize, Upsample and Pad, as functions of torch.

Resize works axis by axis: each element of an output axis is a sum of a few elements of the input axis, by the mode and
by where the coordinate transformation puts it.  Coordinates are computed in float32, as ORT does, so that ties fall
alike.  What torch's `interpolate` computes in the same way is left to it.  Source: ONNX operator Resize, opset 19.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from graphopt.bridge.operands import number, numbers, positive
from graphopt.bridge.table import Op, Table
from graphopt.errors import ModelError

_SLACK = 1 + 1e-7
"""What is computed in float32 may be a rounding below an integer or a tie, where ORT rounds up."""

_SMOOTH = {3: "linear", 4: "bilinear", 5: "trilinear"}
"""Rank -> torch's name of the linear mode."""


@dataclass(frozen=True)
class Axis:
    """One axis that is resized.

    Attributes:
        length: elements before.
        out: elements after.
        scale: as given; without scales out / length.
        roi: the part that is taken, as fractions (tf_crop_and_resize).
    """

    length: int
    out: int
    scale: float
    roi: tuple[float, float] = (0.0, 1.0)

    @property
    def regular(self) -> bool:
        """Whether the scale is what the lengths say."""
        return abs(self.scale * self.length - self.out) < 1e-4 * self.out

    @property
    def whole(self) -> int:
        """How many times each element is repeated, 0 where the scale is no integer."""
        return self.out // self.length if self.length and self.out % self.length == 0 and self.regular else 0


def _asymmetric(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return x / torch.full_like(x, axis.scale)  # division by a number would multiply by its reciprocal


def _half_pixel(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return _asymmetric(x + 0.5, axis) - 0.5


def _pytorch_half_pixel(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return _half_pixel(x, axis) if axis.out > 1 else torch.zeros_like(x)


def _half_pixel_for_nearest(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return _asymmetric(x + 0.5, axis)


def _half_pixel_symmetric(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    adjustment = axis.out / (torch.full_like(x, axis.scale) * axis.length)
    return axis.length / 2 * (1 - adjustment) + _asymmetric(x + 0.5, axis) - 0.5


def _align_corners(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return x * (axis.length - 1) / (axis.out - 1) if axis.out > 1 else torch.zeros_like(x)


def _crop(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    start, end = axis.roi
    last = axis.length - 1
    if axis.out == 1:
        return torch.zeros_like(x) + 0.5 * (start + end) * last
    return start * last + x * ((end - start) * last / (axis.out - 1))


_COORDINATES: Mapping[str, Callable[[torch.Tensor, Axis], torch.Tensor]] = {
    "asymmetric": _asymmetric, "half_pixel": _half_pixel, "pytorch_half_pixel": _pytorch_half_pixel,
    "tf_half_pixel_for_nn": _half_pixel_for_nearest, "half_pixel_symmetric": _half_pixel_symmetric,
    "align_corners": _align_corners, "tf_crop_and_resize": _crop,
}  # fmt: skip

_NEAREST: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "round_prefer_floor": lambda x: torch.ceil(x - 0.5), "round_prefer_ceil": lambda x: torch.floor(x * _SLACK + 0.5),
    "floor": torch.floor, "ceil": torch.ceil,
}  # fmt: skip

_ALIKE = frozenset({"half_pixel", "pytorch_half_pixel", "half_pixel_symmetric"})
"""Coordinates that are the same wherever the scale is what the lengths say and more than one element comes out."""


@dataclass(frozen=True)
class _Way:
    """How elements are found: the attributes of Resize."""

    mode: str
    coordinates: str
    nearest: str
    cubic: float = -0.75
    exclude: bool = False
    extrapolation: float = 0.0
    antialias: bool = False

    def places(self, axis: Axis, device: Any) -> torch.Tensor:
        """Return where in the input axis each element of the output lies."""
        if self.coordinates not in _COORDINATES:
            raise ModelError(f"Resize has no coordinates '{self.coordinates}'")
        x = torch.arange(axis.out, dtype=torch.float32, device=device)
        if axis.scale == 1:
            return x  # even where a part is asked for: ORT takes none of an axis that keeps its length
        return _COORDINATES[self.coordinates](x, axis)

    def taps(self, axis: Axis, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which elements each element of the output is made of, (out, taps), and their weights."""
        scale = min(axis.scale, 1.0) if self.antialias else 1.0
        reach = 1 if self.mode == "linear" else 2
        start = math.floor(-reach / scale) + 1
        offsets = torch.arange(start, 2 - start, device=x.device)
        x = x.clamp(0, axis.length - 1) if self.mode == "linear" and not self.antialias else x
        places = torch.floor(x)[:, None] + offsets
        distance = ((places - x[:, None]) * scale).abs()
        weights = (1 - distance).clamp(min=0) if self.mode == "linear" else self._cubic(distance)
        if self.exclude:
            weights = weights * ((places >= 0) & (places < axis.length))
        if self.exclude or self.antialias:
            weights = weights / weights.sum(1, keepdim=True)
        return places.clamp(0, axis.length - 1).long(), weights

    def _cubic(self, d: torch.Tensor) -> torch.Tensor:
        """Return the weights of Keys' cubic convolution at distances d."""
        a = self.cubic
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))

    def apply(self, x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
        """Return x resized along one axis."""
        places = self.places(axis, x.device)
        if self.mode == "nearest":
            found = _NEAREST[self.nearest](places).clamp(0, axis.length - 1).long()
            out = x.index_select(dim, found)
        else:
            taken, weights = self.taps(axis, places)
            matrix = torch.zeros(axis.out, axis.length, device=x.device).scatter_add(1, taken, weights)
            out = (x.movedim(dim, -1) @ matrix.to(x.dtype).t()).movedim(-1, dim)
        if self.coordinates != "tf_crop_and_resize":
            return out
        outside = (places < 0) | (places > axis.length - 1)
        shape = [-1 if i == dim else 1 for i in range(x.ndim)]
        return torch.where(outside.reshape(shape), torch.full_like(out[:1, :1], self.extrapolation), out)

    def quick(self, x: torch.Tensor, axes: Mapping[int, Axis]) -> torch.Tensor | None:
        """Return what torch's own kernel computes, None where it does something else."""
        spatial = tuple(range(2, x.ndim))
        if x.ndim not in _SMOOTH or not axes or not set(axes) <= set(spatial) or not x.is_floating_point():
            return None
        size = [axes[i].out if i in axes else x.shape[i] for i in spatial]
        if 0 in size or 0 in x.shape:
            return None
        if self.mode == "nearest":
            same = (self.coordinates, self.nearest) == ("asymmetric", "floor")
            same = same or (self.coordinates in _ALIKE and self.nearest.startswith("round"))
            return functional.interpolate(x, size=size) if same and all(a.whole for a in axes.values()) else None
        if self.mode != "linear" or self.antialias or not all(a.regular and a.out > 1 for a in axes.values()):
            return None
        if self.coordinates not in {*_ALIKE, "align_corners"}:
            return None
        corners = self.coordinates == "align_corners"
        return functional.interpolate(x, size=size, mode=_SMOOTH[x.ndim], align_corners=corners)


def _resized(x: torch.Tensor, way: _Way, axes: Mapping[int, Axis]) -> torch.Tensor:
    if way.mode == "nearest" and way.nearest not in _NEAREST:
        raise ModelError(f"Resize has no nearest mode '{way.nearest}'")
    if way.mode not in {"nearest", "linear", "cubic"}:
        raise ModelError(f"Resize has no mode '{way.mode}'")
    crops = way.coordinates == "tf_crop_and_resize"
    changed = {i: a for i, a in axes.items() if crops or a.out != a.length or (a.scale != 1 and not way.antialias)}
    quick = way.quick(x, changed)
    if quick is not None:
        return quick
    for dim, axis in changed.items():
        x = way.apply(x, dim, axis)
    return x


def _axes(x: torch.Tensor, chosen: Sequence[int], sizes: Any, scales: Any, policy: str) -> dict[int, Axis]:
    """Return the axes that are named, with their new lengths."""
    lengths = [x.shape[i] for i in chosen]
    wanted, factors = numbers(sizes), numbers(scales)
    if wanted and policy != "stretch":
        choose = min if policy == "not_larger" else max
        factor = choose(n / m for n, m in zip(wanted, lengths, strict=True))
        factors = (factor,) * len(lengths)
        wanted = tuple(math.floor(m * factor + 0.5) for m in lengths)
    elif wanted:
        factors = tuple(n / m for n, m in zip(wanted, lengths, strict=True))
    else:
        wanted = tuple(math.floor(m * s * _SLACK) for m, s in zip(lengths, factors, strict=True))
    return {i: Axis(m, n, s) for i, m, n, s in zip(chosen, lengths, wanted, factors, strict=True)}


def resize(
    x: torch.Tensor, roi: Any = None, scales: Any = None, sizes: Any = None, *, mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel", nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75, exclude_outside: int = 0, extrapolation_value: float = 0.0, antialias: int = 0,
    axes: Sequence[int] | None = None, keep_aspect_ratio_policy: str = "stretch",
) -> torch.Tensor:  # fmt: skip
    chosen = tuple(range(x.ndim)) if axes is None else tuple(positive(axis, x.ndim) for axis in axes)
    named = _axes(x, chosen, sizes, scales, keep_aspect_ratio_policy)
    if coordinate_transformation_mode == "tf_crop_and_resize":
        part = numbers(roi)
        bounds = zip(part[: len(chosen)], part[len(chosen) :], strict=True)
        named = {i: Axis(a.length, a.out, a.scale, roi) for (i, a), roi in zip(named.items(), bounds, strict=True)}
    way = _Way(
        mode, coordinate_transformation_mode, nearest_mode, cubic_coeff_a, bool(exclude_outside), extrapolation_value,
        bool(antialias),
    )  # fmt: skip
    return _resized(x, way, named)


def resize_10(x: torch.Tensor, scales: Any, mode: str = "nearest") -> torch.Tensor:
    """Return x resized: the nearest element is the lower one, the upper one where it shrinks."""
    for dim, axis in _axes(x, range(x.ndim), None, scales, "stretch").items():
        x = _resized(x, _Way(mode, "asymmetric", "ceil" if axis.scale < 1 else "floor"), {dim: axis})
    return x


def upsample(x: torch.Tensor, scales: Any, mode: str = "nearest") -> torch.Tensor:
    mode = "linear" if mode == "bilinear" else mode
    return _resized(x, _Way(mode, "asymmetric", "floor"), _axes(x, range(x.ndim), None, scales, "stretch"))


def pad(x: torch.Tensor, pads: Any, value: Any = None, axes: Any = None, mode: str = "constant") -> torch.Tensor:
    """Return x with elements around it: constants, or its own by `mode`; negative pads crop."""
    counts = numbers(pads)
    half = len(counts) // 2
    chosen = tuple(positive(axis, x.ndim) for axis in numbers(axes)) if axes is not None else tuple(range(half))
    around = {axis: (counts[i], counts[i + half]) for i, axis in enumerate(chosen)}
    if mode == "constant":
        flat = [n for axis in reversed(range(x.ndim)) for n in around.get(axis, (0, 0))]
        while flat and flat[-1] == flat[-2] == 0:
            flat = flat[:-2]
        return functional.pad(x, flat, value=0 if value is None else number(value)) if flat else x
    for axis, (begin, end) in around.items():
        if begin or end:
            x = x.index_select(axis, _sources(x.shape[axis], begin, end, mode, x.device))
    return x


def _sources(length: int, begin: int, end: int, mode: str, device: Any) -> torch.Tensor:
    """Return the place that each element of a padded axis comes from."""
    places = torch.arange(-begin, length + end, device=device)
    if mode == "edge":
        return places.clamp(0, length - 1)
    if mode == "wrap":
        return places % length
    if mode != "reflect":
        raise ModelError(f"Pad has no mode '{mode}'")
    period = max(2 * (length - 1), 1)
    places = places % period
    return torch.where(places < length, places, period - places)


TABLE: Table = {
    "Resize": (Op(1, resize_10, host=True, numbers=(1,)), Op(11, resize, host=True, numbers=(1, 2, 3))),
    "Upsample": Op(1, upsample, host=True, numbers=(1,)), "Pad": Op(1, pad, host=True, numbers=(1, 2, 3)),
}  # fmt: skip
