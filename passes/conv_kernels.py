"""Convolutions as values: what is left of two that add up, or that follow each other.

    (W, b, window)     out[i] = b + sum over j of W[j] · x[i·stride - before + j·dilation]

    sum          equal strides and dilations: both kernels laid into the smallest window that holds both
    pointwise after any      W = W2 · W1, b = W2 · b1 + b2, strides multiply: floor(floor(a / s) / t) = floor(a / st)
    any after pointwise      the same with the kernel on the left; the zeros that the second one pads with are not
                             what the first one makes of zeros, unless it has no bias
    groups       blocks along the diagonal: the result has as many as both have in common (the gcd)

All results are float64; whoever makes a node of them rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

LARGEST = 1 << 30
"""Multiply-accumulates of a product of weights, above which it is left alone (about a second)."""


@dataclass(frozen=True)
class Window:
    """Where a convolution looks; one number per spatial axis each."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def padded(self) -> bool:
        """Whether it looks beyond its input."""
        return any(self.before) or any(self.after)

    @property
    def pointwise(self) -> bool:
        """Whether it looks at one place of its input, and never beyond."""
        return all(k == 1 for k in self.size) and not self.padded

    @property
    def shrinkage(self) -> tuple[int, ...]:
        """By how much the input shrinks before it is strided over."""
        edges = zip(self.size, self.dilation, self.before, self.after, strict=True)
        return tuple((k - 1) * d - b - a for k, d, b, a in edges)


@dataclass(frozen=True)
class Kernel:
    """A convolution with constant weights.

    Attributes:
        weight: [outputs, inputs / group, *window], of any float type; read only where it is computed with.
        bias: [outputs], None for none, float64.
        group: number of groups.
        window: where it looks.
    """

    weight: Array
    bias: Array | None
    group: int
    window: Window

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return int(self.weight.shape[1]) * self.group

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return int(self.weight.shape[0])

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of the Conv that it is."""
        found = self.window
        return {
            "kernel_shape": list(found.size),
            "strides": list(found.stride),
            "dilations": list(found.dilation),
            "pads": [*found.before, *found.after],
            "group": self.group,
        }


def window_of(attrs: Mapping[str, Any], size: Sequence[int]) -> Window | str:
    """Return where a Conv with these attributes and this kernel looks, or why that is not known.

    Args:
        attrs: as the node states them.
        size: of the kernel.
    """
    rank = len(size)
    stride = tuple(attrs.get("strides") or [1] * rank)
    dilation = tuple(attrs.get("dilations") or [1] * rank)
    pads = list(attrs.get("pads") or [0] * 2 * rank)
    kind = attrs.get("auto_pad", "NOTSET")
    kind = kind.decode() if isinstance(kind, bytes) else kind
    if kind == "VALID":
        pads = [0] * 2 * rank
    elif kind != "NOTSET":
        if any(s != 1 for s in stride):
            return f"auto_pad is {kind} and the stride is not 1"
        total = [(k - 1) * d for k, d in zip(size, dilation, strict=True)]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = less + more if kind == "SAME_UPPER" else more + less
    if len(stride) != rank or len(dilation) != rank or len(pads) != 2 * rank:
        return "its attributes do not fit its kernel"
    return Window(tuple(size), stride, dilation, tuple(pads[:rank]), tuple(pads[rank:]))


def regrouped(weight: Array, group: int, wanted: int) -> Array:
    """Return the weight of a convolution in `group` groups as one in `wanted`, a divisor of that; float64."""
    weight = weight.astype(np.float64)
    if group == wanted:
        return weight
    outputs, width = weight.shape[0], weight.shape[1]
    ratio = group // wanted
    wide = np.zeros((outputs, width * ratio, *weight.shape[2:]))
    rows = outputs // group
    for block in range(group):
        columns = (block % ratio) * width
        wide[block * rows : (block + 1) * rows, columns : columns + width] = weight[block * rows : (block + 1) * rows]
    return wide


def hull(a: Window, b: Window) -> Window | str:
    """Return the smallest window that holds two, or why there is none."""
    if a.stride != b.stride:
        return f"strides {list(a.stride)} and {list(b.stride)} differ"
    if a.shrinkage != b.shrinkage:
        return "the outputs differ in size"
    dilation = []
    for axis, (m, n) in enumerate(zip(a.size, b.size, strict=True)):
        step = a.dilation[axis] if m > 1 else b.dilation[axis] if n > 1 else 1
        if n > 1 and step != b.dilation[axis]:
            return f"dilations {list(a.dilation)} and {list(b.dilation)} differ"
        if (a.before[axis] - b.before[axis]) % step:
            return "the kernels lie between each other's taps"
        dilation.append(step)
    before = tuple(map(max, a.before, b.before))
    after = tuple(map(max, a.after, b.after))
    edges = zip(before, after, dilation, a.shrinkage, strict=True)
    size = tuple((s + p + q) // d + 1 for p, q, d, s in edges)
    return Window(size, a.stride, tuple(dilation), before, after)


def laid_into(kernel: Kernel, window: Window, group: int) -> Array:
    """Return the weight of a convolution that does the same with a larger window and fewer groups."""
    weight = regrouped(kernel.weight, kernel.group, group)
    wide = np.zeros((*weight.shape[:2], *window.size))
    own = kernel.window
    edges = zip(window.before, own.before, window.dilation, own.size, strict=True)
    places = tuple(slice((p - q) // d, (p - q) // d + k) for p, q, d, k in edges)
    wide[(slice(None), slice(None), *places)] = weight
    return wide


def added(a: Kernel, b: Kernel) -> Kernel | str:
    """Return the convolution that gives the sum of two on one input, or why there is none."""
    if a.outputs != b.outputs or a.inputs != b.inputs:
        return f"they make {a.outputs} channels of {a.inputs} and {b.outputs} of {b.inputs}"
    window = hull(a.window, b.window)
    if isinstance(window, str):
        return window
    group = math.gcd(a.group, b.group)
    weight = laid_into(a, window, group) + laid_into(b, window, group)
    return Kernel(weight, _plus(a.bias, b.bias), group, window)


def sum_macs(a: Kernel, b: Kernel) -> tuple[int, int]:
    """Return the multiply-accumulates per output element of two convolutions, and of their sum as one."""
    window = hull(a.window, b.window)
    group = math.gcd(a.group, b.group)
    whole = 0 if isinstance(window, str) else a.inputs // group * math.prod(window.size)
    return math.prod(a.weight.shape[1:]) + math.prod(b.weight.shape[1:]), whole


def diagonal(scale: Array, shift: Array | None, axes: int) -> Kernel:
    """Return the depthwise convolution over so many axes that multiplies each channel and adds to it."""
    one, none = (1,) * axes, (0,) * axes
    return Kernel(scale.reshape(-1, 1, *one), shift, scale.size, Window(one, one, one, none, none))


def why_not_composed(first: Window, second: Window, *, biased: bool) -> str | None:
    """Return why one convolution behind another is not one, None where it is.

    Args:
        first: the one that is applied first.
        second: the other.
        biased: whether the first one has a bias other than zero.
    """
    if second.pointwise:
        return None
    if not first.pointwise or any(s != 1 for s in first.stride):
        return "neither is 1x1 without padding and stride"
    if second.padded and biased:
        return "the padding between them does not see the bias of the first"
    return None


def product_macs(first: Kernel, second: Kernel) -> tuple[int, int]:
    """Return the multiply-accumulates per output place of two in a row, and of their product."""
    between = math.prod(second.window.stride)
    before = first.weight.size * between + second.weight.size
    group = math.gcd(first.group, second.group)
    taps = math.prod(first.window.size) * math.prod(second.window.size)
    return before, second.outputs * (first.inputs // group) * taps


def outline(first: Kernel, second: Kernel) -> Kernel | str:
    """Return what two in a row are as one, all zeros; or why they are not."""
    if first.outputs != second.inputs:
        return f"{first.outputs} channels meet {second.inputs}"
    group = math.gcd(first.group, second.group)
    own = first.window if second.window.pointwise else second.window
    window = replace(own, stride=_times(first.window.stride, second.window.stride))
    zeros = np.broadcast_to(np.zeros(()), (second.outputs, first.inputs // group, *window.size))
    return Kernel(zeros, None, group, window)


def composed(first: Kernel, second: Kernel) -> Kernel | str:
    """Return one convolution for two in a row (see `why_not_composed`), or why there is none."""
    whole = outline(first, second)
    if isinstance(whole, str):
        return whole
    group = whole.group
    if whole.weight.size * (first.outputs // group) > LARGEST:
        return "the product of the weights is too much work"
    one = regrouped(first.weight, first.group, group)
    two = regrouped(second.weight, second.group, group)
    left = two.reshape(group, -1, first.outputs // group, math.prod(second.window.size))
    right = one.reshape(group, first.outputs // group, 1, -1)
    if second.window.pointwise:
        weight = np.matmul(left[..., 0], right[:, :, 0])
    else:
        swapped = np.matmul(left.transpose(0, 3, 1, 2), right.transpose(0, 2, 1, 3))
        weight = swapped.transpose(0, 2, 3, 1)
    bias = second.bias
    if first.bias is not None:
        seen = np.matmul(left.sum(axis=3), first.bias.reshape(group, -1, 1)).reshape(-1)
        bias = _plus(seen, bias)
    return replace(whole, weight=weight.reshape(whole.weight.shape), bias=bias)


def trimmed(kernel: Kernel) -> Kernel:
    """Return the same convolution without the zeros at the rim of its kernel, as far as padding makes up for them."""
    used = (kernel.weight[:1] != 0).any(axis=(0, 1))  # nearly always settles it
    if not used.all():
        used = (kernel.weight != 0).any(axis=(0, 1))
    window, places = kernel.window, []
    before, after = list(window.before), list(window.after)
    for axis, step in enumerate(window.dilation):
        others = tuple(a for a in range(used.ndim) if a != axis)
        at = np.flatnonzero(used.any(axis=others))
        low, high = (int(at[0]), int(at[-1])) if at.size else (0, 0)
        low = min(low, before[axis] // step)
        high = max(high, window.size[axis] - 1 - after[axis] // step, low)
        before[axis] -= low * step
        after[axis] -= (window.size[axis] - 1 - high) * step
        places.append(slice(low, high + 1))
    size = tuple(p.stop - p.start for p in places)
    weight = kernel.weight[(slice(None), slice(None), *places)]
    dilation = tuple(1 if k == 1 else d for k, d in zip(size, window.dilation, strict=True))
    return replace(kernel, weight=weight, window=Window(size, window.stride, dilation, tuple(before), tuple(after)))


def _plus(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return np.asarray(a + b)


def _times(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x * y for x, y in zip(a, b, strict=True))
