"""Convolutions of enlarged images, computed before enlarging: one convolution per phase of the output.

    Conv(Resize_nearest(x, s), w)  ->  DepthToSpace(Concat(Conv(x, w_pq) for p, q < s), s)
    Conv(Concat(Resize_nearest(x, s), y), w)  ->  the same of x, + Conv(y, w')
    f(DepthToSpace(Concat(xs)))    ->  DepthToSpace(Concat(f(x) for x in xs))

Output row s·i + p reads rows floor((s·i + p + a - pad) / s) = i + floor((p + a - pad) / s) of x, for each row a of w:
the rows of w that meet the same row of x add up.  A 3×3 kernel over an image enlarged twice needs 16 products
instead of 36, enlarged four times 36 instead of 144.  Rows outside of x are zero on both sides.

Putting the phases together costs moved bytes, so it pays from some tens of channels on (measured on one AVX-512 core:
32 channels even, 64 at 0.75, 256 at 0.54 of the time).  For decoders: U-Nets, detectors' pyramids, generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from graphopt.registry import register
from graphopt.rewrite import Constant, Many, Match, Op, Rule, RulePass, Value

Array = np.ndarray[Any, Any]

PRODUCTS = 256
"""Multiplications saved for each element of the output, from which putting phases together pays."""

SUM = 128
"""The same for adding the result to another."""

_FLOOR = {
    ("asymmetric", "floor"),
    ("half_pixel", "round_prefer_floor"),
    ("half_pixel", "round_prefer_ceil"),
    ("half_pixel_symmetric", "round_prefer_floor"),
    ("half_pixel_symmetric", "round_prefer_ceil"),
}
"""Modes of Resize in which output i reads input floor(i / s) for every whole s (asymmetric rounding does not)."""


def _scale(scales: Array) -> int:
    """Return the whole factor by which both image axes grow, 0 where there is none."""
    values = scales.reshape(-1)
    if values.size != 4 or values[0] != 1 or values[1] != 1 or values[2] != values[3]:
        return 0
    return int(values[2]) if values[2] == int(values[2]) and values[2] > 1 else 0


def _offsets(phase: int, scale: int, kernel: int, dilation: int, pad: int) -> list[int]:
    """Return, for each row of a kernel, the row of the small image that it meets, relative to the output's."""
    return [(phase + a * dilation - pad) // scale for a in range(kernel)]


def _folded(w: Array, axis: int, offsets: Sequence[int]) -> Array:
    """Return the kernel with the rows added up that meet the same row."""
    span = range(min(offsets), max(offsets) + 1)
    rows = [w.take([a for a, o in enumerate(offsets) if o == row], axis).sum(axis) for row in span]
    return np.stack(rows, axis)


def _window(m: Match, kernel: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """Return dilations and first pads of the Conv where it keeps sizes, None where it does not."""
    conv = m["conv"]
    dilations = list(conv.param("dilations") or (1, 1))
    pads = list(conv.param("pads") or (0, 0, 0, 0))
    if list(conv.param("strides") or (1, 1)) != [1, 1] or conv.param("group") != 1:
        return None
    if (conv.attrs.get("auto_pad") or "NOTSET") not in ("NOTSET", b"NOTSET"):
        return None
    keeps = all(pads[i] * 2 == dilations[i] * (kernel[i] - 1) and pads[i] == pads[i + 2] for i in range(2))
    return (dilations, pads) if keeps else None


class UpsampledConv(Rule):
    """Conv(Resize_nearest(x, s), w)  ->  DepthToSpace(Concat(Conv(x, w_pq)…), s)"""

    min_opset = 13
    types = frozenset({"float32"})
    shapes: ClassVar = {"x": "n c h v", "w": "m c k l"}

    @staticmethod
    def pattern(op: Op, x: Value, roi: Value | None, scales: Constant, w: Constant, b: Constant | None) -> Value:
        return op.Conv(op.Resize(x, roi, scales, mode="nearest", name="resize"), w, b, name="conv")

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        """Return images, kernels that mostly keep their size, and every mode of Resize."""
        scale, kernel, dilation = int(rng.integers(2, 5)), int(rng.choice((1, 3, 3, 5))), int(rng.choice((1, 1, 2)))
        pad = dilation * (kernel - 1) // 2
        modes = [*sorted(_FLOOR), ("asymmetric", "ceil"), ("half_pixel", "floor"), ("align_corners", "floor")]
        mode, rounding = modes[int(rng.integers(len(modes)))]
        return {
            "x": (1, 3, 4, 5), "w": (2, 3, kernel, kernel), "b": (2,), "conv.dilations": [dilation] * 2,
            "scales": np.array([1, 1, scale, scale if rng.random() < 0.9 else 1.5], np.float32).astype(np.float64),
            "conv.pads": [pad] * 4 if rng.random() < 0.9 else [0, pad, pad, pad], "conv.group": 1,
            "conv.strides": [1, 1] if rng.random() < 0.9 else [2, 2],
            "resize.coordinate_transformation_mode": mode, "resize.nearest_mode": rounding,
        }  # fmt: skip

    @staticmethod
    def check(scales: Constant, w: Constant, m: Match) -> str | None:
        mode, rounding = (_text(m["resize"].param(n)) for n in ("coordinate_transformation_mode", "nearest_mode"))
        if (mode, rounding) not in _FLOOR:
            return f"Resize takes its neighbour by {mode} and {rounding}"
        if not _scale(scales.values):
            return f"Resize by {scales.values.reshape(-1).tolist()} is not by one whole number"
        if _window(m, w.values.shape[2:]) is None:
            return "the Conv has groups or strides, or changes the size"
        return None

    @staticmethod
    def worth(scales: Constant, w: Constant, m: Match) -> str | None:
        return _too_few(m, _scale(scales.values), w.values.shape, PRODUCTS)

    @staticmethod
    def rewrite(op: Op, x: Value, scales: Constant, w: Constant, b: Constant | None, m: Match) -> Value:
        return _phases(op, x, _scale(scales.values), w.wide, b, m)


class UpsampledAndSkippedConv(Rule):
    """Conv(Concat(Resize_nearest(x, s), y), w)  ->  DepthToSpace(Concat(Conv(x, w_pq)…), s) + Conv(y, w')"""

    min_opset = 13
    types = frozenset({"float32"})
    shapes: ClassVar = {"x": "n c h v", "w": "m d k l"}

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        """Return two images for three channels of the kernel."""
        found = UpsampledConv.examples(rng)
        tall, broad = (round(size * s) for size, s in zip((4, 5), found["scales"][2:], strict=True))
        return {**found, "x": (1, 1, 4, 5), "y": (1, 2, tall, broad)}

    @staticmethod
    def pattern(
        op: Op, x: Value, y: Value, roi: Value | None, scales: Constant, w: Constant, b: Constant | None
    ) -> Value:
        up = op.Resize(x, roi, scales, mode="nearest", name="resize")
        both = op.any(op.Concat(up, y, axis=1, name="first"), op.Concat(y, up, axis=1, name="last"))
        return op.Conv(both, w, b, name="conv")

    @staticmethod
    def check(x: Value, scales: Constant, w: Constant, m: Match) -> str | None:
        if x.shape is None or not isinstance(x.shape[1], int):
            return "the number of enlarged channels is unknown"
        return UpsampledConv.check(scales, w, m)

    @staticmethod
    def worth(x: Value, scales: Constant, w: Constant, m: Match) -> str | None:
        assert x.shape is not None
        shape = (w.values.shape[0], int(x.shape[1] or 0), *w.values.shape[2:])
        return _too_few(m, _scale(scales.values), shape, PRODUCTS + SUM)

    @staticmethod
    def rewrite(op: Op, x: Value, y: Value, scales: Constant, w: Constant, b: Constant | None, m: Match) -> Value:
        assert x.shape is not None
        channels = int(x.shape[1] or 0)
        parts = np.split(w.wide, [channels if "first" in m else w.values.shape[1] - channels], axis=1)
        large, small = parts if "first" in m else reversed(parts)
        return _phases(op, x, _scale(scales.values), large, None, m) + m["conv"].again(y, small, b)


def _too_few(m: Match, scale: int, shape: Sequence[int], wanted: int) -> str | None:
    """Return that phases save less than `wanted` products for each output, if they do."""
    _, channels, rows, columns = shape
    window = _window(m, (rows, columns))
    assert window is not None
    sums = [
        sum(len(set(_offsets(p, scale, k, d, pad))) for p in range(scale))
        for k, d, pad in zip((rows, columns), *window, strict=False)
    ]
    saved = (rows * columns * scale * scale - sums[0] * sums[1]) * channels / (scale * scale)
    return None if saved >= wanted else f"{saved:.0f} products saved for each output are too few ({wanted})"


def _phases(op: Op, x: Value, scale: int, w: Array, b: Value | None, m: Match) -> Value:
    """Return the convolution of the enlarged image."""
    window = _window(m, w.shape[2:])
    assert window is not None
    phases = []
    for p in range(scale):
        for q in range(scale):
            rows, columns = (
                _offsets(phase, scale, w.shape[2 + i], window[0][i], window[1][i]) for i, phase in enumerate((p, q))
            )
            kernel = _folded(_folded(w, 2, rows), 3, columns)
            pads = [-min(rows), -min(columns), max(rows), max(columns)]
            if min(pads) < 0:  # a phase that reads the image's inside only: zeros widen its kernel to the middle
                kernel, pads = _widened(kernel, pads)
            phases.append(op.Conv(x, kernel, b, pads=pads, kernel_shape=list(kernel.shape[2:])))
    return op.DepthToSpace(op.Concat(*phases, axis=1), blocksize=scale, mode="DCR")


def _widened(kernel: Array, pads: Sequence[int]) -> tuple[Array, list[int]]:
    """Return a kernel with zeros added where a pad would be negative, and the pads."""
    more = [max(0, -p) for p in pads]
    wide = np.pad(kernel, ((0, 0), (0, 0), (more[0], more[2]), (more[1], more[3])))
    return wide, [max(0, p) for p in pads]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


_ACTIVATIONS = ("Relu", "LeakyRelu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh")
"""What ORT makes a part of a Conv."""


class ActivationOfPhases(Rule):
    """f(DepthToSpace(Concat(xs)))  ->  DepthToSpace(Concat(f(x) for x in xs))      f a part of each Conv, then"""

    types = frozenset({"float32"})

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        """Return images of four channels."""
        return {"xs": (1, 4 * int(rng.integers(1, 3)), 3, 2), "space.blocksize": 2}

    @staticmethod
    def pattern(op: Op, xs: Many) -> Value:
        space = op.DepthToSpace(op.Concat(xs, axis=1), name="space")
        return op.any(*(getattr(op, name)(space, name="f") for name in _ACTIVATIONS))

    @staticmethod
    def worth(xs: Sequence[Value]) -> str | None:
        made = all(len(x.tensor.inputs) == 1 and x.tensor.inputs[0].op == "Conv" for x in xs)
        return None if made else "not all that is joined comes out of a Conv"

    @staticmethod
    def rewrite(op: Op, xs: Sequence[Value], m: Match) -> Value:
        return m["space"].again(op.Concat(*(m["f"].again(x) for x in xs), axis=1))


@register
@dataclass(frozen=True)
class LowerUpsampling(RulePass):
    """Compute convolutions of enlarged images before enlarging, phase by phase.

    Exact up to the rounding of sums of weights.  Refuses groups, strides, other neighbours than the nearest before,
    and what saves too few products to pay for putting the phases together.
    """

    name: ClassVar[str] = "lower-upsampling"
    stage: ClassVar[Literal["canonical", "lowering"]] = "lowering"
    optional: ClassVar[bool] = True
    rules: ClassVar = (UpsampledConv, UpsampledAndSkippedConv, ActivationOfPhases)
