"""Convolutions and pools over any number of spatial axes, as functions of torch.

Pads are explicit, asymmetric ones and `auto_pad` included; ceil modes leave a last window out that would start behind
the input and its first pads, as ORT does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from graphopt.bridge.operands import along, lowest, product
from graphopt.bridge.table import Table
from graphopt.errors import ModelError

Sizes: TypeAlias = Sequence[int]

_CONV = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
_MAX = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
_AVERAGE = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)


def _of_rank(functions: Sequence[Any], x: torch.Tensor) -> Any:
    if not 3 <= x.ndim <= 5:
        raise ModelError(f"torch has convolutions and pools of 1 to 3 spatial axes, not {x.ndim - 2}")
    return functions[x.ndim - 3]


def _pads(
    auto_pad: str, pads: Sizes | None, sizes: Sizes, kernel: Sizes, strides: Sizes, dilations: Sizes, *,
    least: int | None = 0,
) -> tuple[tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    """Return the pads before and after each spatial axis; automatic ones add up to `least` or more."""
    count = len(sizes)
    if auto_pad in {"NOTSET", ""}:
        pads = tuple(pads or (0,) * (2 * count))
        return tuple(pads[:count]), tuple(pads[count:])
    if auto_pad == "VALID":
        return (0,) * count, (0,) * count
    whole = [
        (-(-n // s) - 1) * s + (k - 1) * d + 1 - n for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    return _halves(whole if least is None else [max(n, least) for n in whole], upper=auto_pad == "SAME_UPPER")


def _halves(whole: Sizes, *, upper: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return totals cut in two; the odd one goes to the end (`upper`) or to the begin."""
    shifted = tuple(n if upper else n + 1 for n in whole)
    begin = tuple(-(-n // 2) if n < 0 else n // 2 for n in shifted)  # towards zero
    return begin, tuple(n - b for n, b in zip(whole, begin, strict=True))


def padded(x: torch.Tensor, begin: Sizes, end: Sizes, value: float = 0.0) -> torch.Tensor:
    """Return x with constants around its last axes; negative pads crop."""
    if not any(begin) and not any(end):
        return x
    flat = [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]
    return functional.pad(x, flat, value=value)


def conv(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None, *, auto_pad: str = "NOTSET",
    dilations: Sizes | None = None, group: int = 1, kernel_shape: Sizes | None = None,
    pads: Sizes | None = None, strides: Sizes | None = None,
) -> torch.Tensor:  # fmt: skip
    ones = (1,) * (x.ndim - 2)
    strides, dilations = strides or ones, dilations or ones
    begin, end = _pads(auto_pad, pads, x.shape[2:], kernel_shape or w.shape[2:], strides, dilations)
    call = _of_rank(_CONV, x)
    if x.ndim == 4 and x.device.type == "cpu" and torch.is_grad_enabled():
        # oneDNN's gradients take 0.65 to 1 of the time so, those of depthwise weights least
        x = x.contiguous(memory_format=torch.channels_last)
    if begin == end:
        return call(x, w, b, strides, begin, dilations, group)
    return call(padded(x, begin, end), w, b, strides, 0, dilations, group)


def conv_transpose(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None, *, auto_pad: str = "NOTSET",
    dilations: Sizes | None = None, group: int = 1, kernel_shape: Sizes | None = None,
    output_padding: Sizes | None = None, output_shape: Sizes | None = None, pads: Sizes | None = None,
    strides: Sizes | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the transposed convolution: computed without pads, which are cut off then."""
    count = x.ndim - 2
    strides, dilations = strides or (1,) * count, dilations or (1,) * count
    more = output_padding or (0,) * count
    kernel = kernel_shape or w.shape[2:]
    lengths = [
        (n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    if output_shape is None and auto_pad in {"SAME_UPPER", "SAME_LOWER"}:
        full = zip(x.shape[2:], strides, lengths, more, strict=True)
        output_shape = [min(n * s, length + m) for n, s, length, m in full]
    if output_shape:
        output_shape = tuple(output_shape)[-count:]
        whole = [max(n + m - o, 0) for n, m, o in zip(lengths, more, output_shape, strict=True)]
        begin, _ = _halves(whole, upper=auto_pad == "SAME_UPPER")
    else:
        begin, end = _pads(auto_pad, pads, lengths, kernel, strides, dilations)
        output_shape = [n + m - p - q for n, m, p, q in zip(lengths, more, begin, end, strict=True)]
    call = _of_rank(_TRANSPOSED, x)
    out = call(x, w, None, strides, 0, 0, group, dilations)
    after = [o - n + p for o, n, p in zip(output_shape, lengths, begin, strict=True)]
    out = padded(out, [-p for p in begin], after)
    return out if b is None else out + along(b, 1, x.ndim)


class _Windows:
    """Where the windows of a pool lie, by spatial axis: kernel, stride, dilation, pads, and how many there are."""

    def __init__(
        self, x: torch.Tensor, kernel: Sizes, strides: Sizes | None, dilations: Sizes | None, pads: Sizes | None,
        auto_pad: str, *, ceil: bool,
    ) -> None:  # fmt: skip
        ones = (1,) * len(kernel)
        self.sizes = tuple(x.shape[2:])
        self.kernel, self.strides, self.dilations = tuple(kernel), tuple(strides or ones), tuple(dilations or ones)
        # ORT's pools leave dilations out of automatic pads, and cut elements off where strides jump over them
        self.begin, self.end = _pads(auto_pad, pads, self.sizes, kernel, self.strides, ones, least=None)
        self.spans = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))
        self.count = tuple(self._windows(axis, ceil=ceil) for axis in range(len(kernel)))
        self.after = tuple(
            (c - 1) * s + span - n - p
            for c, s, span, n, p in zip(self.count, self.strides, self.spans, self.sizes, self.begin, strict=True)
        )
        """Pads behind each axis with which the windows come out even: negative where elements stay unused."""

    def _windows(self, axis: int, *, ceil: bool) -> Any:
        stride, room = self.strides[axis], self.sizes[axis] + self.begin[axis]
        over = room + self.end[axis] - self.spans[axis]
        count = (-(-over // stride) if ceil else over // stride) + 1
        return count - 1 if ceil and (count - 1) * stride >= room else count

    @property
    def plain(self) -> bool:
        """Whether torch's pools take the pads: alike on both sides, at most half a window, with windows as they are."""
        fits = all(0 <= 2 * p <= k for p, k in zip(self.begin, self.kernel, strict=True))
        return fits and self.begin == self.end and all(a <= p for a, p in zip(self.after, self.end, strict=True))

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sums of the windows of x, zeros around it."""
        x = padded(x, self.begin, self.after)
        for axis, (span, stride, dilation) in enumerate(zip(self.spans, self.strides, self.dilations, strict=True), 2):
            x = x.unfold(axis, span, stride)[..., ::dilation].sum(-1)
        return x

    def inside(self, axis: int, like: torch.Tensor, *, pads: bool) -> torch.Tensor:
        """Return for each window how many of its places along an axis are elements, or elements and pads."""
        starts = torch.arange(self.count[axis], device=like.device) * self.strides[axis]
        places = starts[:, None] + torch.arange(self.kernel[axis], device=like.device) * self.dilations[axis]
        places = places - self.begin[axis]
        low, high = (-self.begin[axis], self.end[axis]) if pads else (0, 0)
        return ((places >= low) & (places < self.sizes[axis] + high)).sum(1).to(like.dtype)


def max_pool(
    x: torch.Tensor, *, kernel_shape: Sizes, auto_pad: str = "NOTSET", ceil_mode: int = 0,
    dilations: Sizes | None = None, pads: Sizes | None = None, storage_order: int = 0, strides: Sizes | None = None,
    outputs: int = 1,
) -> Any:  # fmt: skip
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil=bool(ceil_mode))
    pool = _of_rank(_MAX, x)
    how = (windows.kernel, windows.strides)
    if outputs == 1 and windows.plain:
        return pool(x, *how, windows.begin, windows.dilations)
    wide = padded(x, windows.begin, windows.after, lowest(x.dtype))
    if outputs == 1:
        return pool(wide, *how, 0, windows.dilations)
    out, places = pool(wide, *how, 0, windows.dilations, return_indices=True)
    return out, _global_places(places, wide.shape[2:], windows, x, by_column=bool(storage_order))


def _global_places(
    places: torch.Tensor, wide: Sizes, windows: _Windows, x: torch.Tensor, *, by_column: bool
) -> torch.Tensor:
    """Return places in the padded image of each channel as places in all of x."""
    coordinates = []
    for length, before in zip(reversed(wide), reversed(windows.begin), strict=True):
        coordinates.append(places % length - before)
        places = places // length
    order = zip(coordinates[::-1], windows.sizes, strict=True)
    flat = torch.zeros_like(places)
    for coordinate, length in reversed(list(order)) if by_column else order:
        flat = flat * length + coordinate
    first = torch.arange(x.shape[0] * x.shape[1], device=x.device) * product(windows.sizes)
    return flat + first.reshape(x.shape[0], x.shape[1], *[1] * (x.ndim - 2))


def average_pool(
    x: torch.Tensor, *, kernel_shape: Sizes, auto_pad: str = "NOTSET", ceil_mode: int = 0, count_include_pad: int = 0,
    dilations: Sizes | None = None, pads: Sizes | None = None, strides: Sizes | None = None,
) -> torch.Tensor:  # fmt: skip
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil=bool(ceil_mode))
    if windows.plain and set(windows.dilations) == {1}:
        pool = _of_rank(_AVERAGE, x)
        return pool(x, windows.kernel, windows.strides, windows.begin, False, bool(count_include_pad))
    out = windows.sums(x)
    for axis in range(len(windows.sizes)):
        out = out / along(windows.inside(axis, x, pads=bool(count_include_pad)), axis + 2, x.ndim)
    return out


def lp_pool(
    x: torch.Tensor, *, kernel_shape: Sizes, auto_pad: str = "NOTSET", ceil_mode: int = 0, p: int = 2,
    dilations: Sizes | None = None, pads: Sizes | None = None, strides: Sizes | None = None,
) -> torch.Tensor:  # fmt: skip
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil=bool(ceil_mode))
    return _root(windows.sums(x.abs() ** p), p)


def global_lp_pool(x: torch.Tensor, p: int = 2) -> torch.Tensor:
    return torch.linalg.vector_norm(x, p, _spatial(x), keepdim=True)


def _root(x: torch.Tensor, p: int) -> torch.Tensor:
    """Return the p-th root of what is not negative; its gradient at zero is zero."""
    some = x > 0
    return torch.where(some, torch.where(some, x, torch.ones_like(x)) ** (1 / p), torch.zeros_like(x))


def _spatial(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def global_average_pool(x: torch.Tensor) -> torch.Tensor:
    return x.mean(_spatial(x), keepdim=True)


def global_max_pool(x: torch.Tensor) -> torch.Tensor:
    return x.amax(_spatial(x), keepdim=True)


def max_unpool(
    x: torch.Tensor, places: torch.Tensor, output_shape: Any = None, *, kernel_shape: Sizes,
    pads: Sizes | None = None, strides: Sizes | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return a tensor of zeros with x at its places of all of the output."""
    count = len(kernel_shape)
    strides, pads = strides or (1,) * count, pads or (0,) * (2 * count)
    least = [
        (n - 1) * s + k - p - q
        for n, s, k, p, q in zip(x.shape[2:], strides, kernel_shape, pads[:count], pads[count:], strict=True)
    ]
    inferred = (*x.shape[:2], *least)
    out = x.new_zeros(product(inferred)).scatter(0, places.flatten(), x.flatten()).reshape(inferred)
    if output_shape is None:
        return out
    wanted = tuple(int(n) for n in output_shape)[2:]
    return padded(out, (0,) * count, [n - m for n, m in zip(wanted, least, strict=True)])


TABLE: Table = {
    "Conv": conv, "ConvTranspose": conv_transpose, "MaxPool": max_pool, "AveragePool": average_pool, "LpPool": lp_pool,
    "GlobalAveragePool": global_average_pool, "GlobalMaxPool": global_max_pool, "GlobalLpPool": global_lp_pool,
    "MaxUnpool": max_unpool,
}  # fmt: skip
