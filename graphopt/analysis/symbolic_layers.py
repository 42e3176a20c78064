"""Shape rules of layers: products, windows that slide, blocks that move between channels and space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from graphopt.analysis.facts import Fact, Shape, Site
from graphopt.analysis.symbolic_expr import (
    Expr,
    Size,
    add,
    broadcast,
    ceil_divide,
    floor_divide,
    multiply,
    quotient,
    subtract,
)

Facts: TypeAlias = list[Fact] | None
Rule: TypeAlias = Callable[[Site], Facts]

BOOL = np.dtype(bool)
INT64 = np.dtype(np.int64)


def first_like(site: Site, shape: Shape, dtype: np.dtype[np.generic] | None = None) -> Facts:
    """Return the fact of an only output, of the first input's type unless another is given."""
    return [Fact(dtype if dtype is not None else site.fact().dtype, shape)]


def broadcast_shapes(shapes: Sequence[Shape]) -> Shape:
    """Return what shapes broadcast to, None where a rank is unknown or they do not fit."""
    result: tuple[Size, ...] = ()
    for shape in shapes:
        if shape is None:
            return None
        longer, shorter = (result, shape) if len(result) >= len(shape) else (shape, result)
        found = list(longer)
        for axis in range(1, len(shorter) + 1):
            size = broadcast(longer[-axis], shorter[-axis])
            if size is None:
                return None
            found[-axis] = size
        result = tuple(found)
    return result


def _matmul(site: Site) -> Facts:
    a, b = site.shape(), site.shape(1)
    if not a or not b:
        return None
    left, right = a if len(a) > 1 else (1, *a), b if len(b) > 1 else (*b, 1)
    outer = broadcast_shapes([left[:-2], right[:-2]])
    if outer is None:
        return None
    return first_like(site, (*outer, *(left[-2:-1] if len(a) > 1 else ()), *(right[-1:] if len(b) > 1 else ())))


def _gemm(site: Site) -> Facts:
    a, b = site.shape(), site.shape(1)
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return first_like(site, site.unknown_shape(2))
    return first_like(site, (a[1 if site.attr("transA", 0) else 0], b[0 if site.attr("transB", 0) else 1]))


def _window(site: Site, kernel: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Return (extent, stride, padding before, padding after) per spatial axis."""
    count = len(kernel)
    dilations = site.attr("dilations", None) or [1] * count
    strides = site.attr("strides", None) or [1] * count
    pads = site.attr("pads", None) or [0] * (2 * count)
    return [((kernel[i] - 1) * dilations[i] + 1, strides[i], pads[i], pads[i + count]) for i in range(count)]


def _slid(site: Site, sizes: Sequence[Size], kernel: Sequence[int]) -> list[Size]:
    """Return the sizes of the places of a window."""
    padding = site.attr("auto_pad", "NOTSET")
    found: list[Size] = []
    for size, (extent, stride, before, after) in zip(sizes, _window(site, kernel), strict=True):
        if padding in ("SAME_UPPER", "SAME_LOWER"):
            found.append(ceil_divide(size, stride))
            continue
        padded = size if padding == "VALID" else add(size, before + after)
        room = subtract(padded, extent)
        if not site.attr("ceil_mode", 0) or quotient(room, stride) is not None:
            found.append(add(floor_divide(room, stride), 1))
        elif after + stride <= extent:
            found.append(add(ceil_divide(room, stride), 1))
        else:  # a last window that would begin in the padding does not count, in some versions
            found.append(site.fresh())
    return found


def _conv(site: Site) -> Facts:
    x, w = site.shape(), site.shape(1)
    kernel = _numbers(w[2:]) if w is not None else None
    if x is None or w is None or kernel is None or len(x) != len(w):
        return None
    return first_like(site, (x[0], w[0], *_slid(site, x[2:], kernel)))


def needed_sizes(site: Site) -> Iterator[tuple[str, int]]:
    """Yield symbols and the least that they must be for ORT to run a Conv: a window fits into its padded input."""
    x, w = site.shape(), site.shape(1)
    kernel = _numbers(w[2:]) if site.node.op == "Conv" and w is not None else None
    if x is None or kernel is None or len(x) != len(kernel) + 2:
        return
    same = site.attr("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")
    for size, (extent, _, before, after) in zip(x[2:], _window(site, kernel), strict=True):
        least = 1 if same else extent - before - after
        terms = dict(size.terms) if isinstance(size, Expr) else {}
        least -= terms.pop((), 0)
        if least > 0 and list(terms.values()) == [1] and len(next(iter(terms))) == 1:
            yield next(iter(terms))[0].name, least


def _numbers(sizes: Sequence[Size]) -> list[int] | None:
    return [int(s) for s in sizes if isinstance(s, int)] if all(isinstance(s, int) for s in sizes) else None


def _conv_transpose(site: Site) -> Facts:
    x, w = site.shape(), site.shape(1)
    kernel = _numbers(w[2:]) if w is not None else None
    plain = site.attr("auto_pad", "NOTSET") == "NOTSET" and "output_shape" not in site.node.attrs
    if x is None or w is None or kernel is None or len(x) != len(w) or not plain:
        return None
    extra = site.attr("output_padding", None) or [0] * len(kernel)
    sizes: list[Size] = []
    for size, (extent, stride, before, after), more in zip(x[2:], _window(site, kernel), extra, strict=True):
        sizes.append(add(multiply(subtract(size, 1), stride), extent + more - before - after))
    return first_like(site, (x[0], multiply(w[1], int(site.attr("group", 1))), *sizes))


def _pool(site: Site) -> Facts:
    x, kernel = site.shape(), site.attr("kernel_shape", None)
    if x is None or not kernel or len(x) != len(kernel) + 2:
        return None
    shape = (x[0], x[1], *_slid(site, x[2:], [int(k) for k in kernel]))
    return [Fact(site.fact().dtype, shape), Fact(INT64, shape)][: len(site.node.outputs)]


def _global_pool(site: Site) -> Facts:
    x = site.shape()
    return None if x is None or len(x) < 2 else first_like(site, (x[0], x[1], *[1] * (len(x) - 2)))


def _depth_to_space(site: Site) -> Facts:
    x, block = site.shape(), int(site.attr("blocksize", 1))
    depth = quotient(x[1], block * block) if x is not None and len(x) == 4 else None
    if x is None or depth is None:
        return None
    return first_like(site, (x[0], depth, multiply(x[2], block), multiply(x[3], block)))


def _space_to_depth(site: Site) -> Facts:
    x, block = site.shape(), int(site.attr("blocksize", 1))
    if x is None or len(x) != 4:
        return None
    height, width = (quotient(d, block) for d in x[2:])
    if height is None or width is None:
        return None
    return first_like(site, (x[0], multiply(x[1], block * block), height, width))


def _attention(site: Site) -> Facts:
    q, v = site.shape(), site.shape(2)
    if q is None or v is None or len(q) != 4 or len(v) != 4 or len(site.node.outputs) > 1:
        return None
    return first_like(site, (*q[:3], v[3]))


LAYERS: Mapping[str, Rule] = {
    "MatMul": _matmul, "Gemm": _gemm, "Conv": _conv, "ConvTranspose": _conv_transpose, "MaxPool": _pool,
    "AveragePool": _pool, "GlobalAveragePool": _global_pool, "GlobalMaxPool": _global_pool,
    "GlobalLpPool": _global_pool, "DepthToSpace": _depth_to_space, "SpaceToDepth": _space_to_depth,
    "Attention": _attention,
}  # fmt: skip
"""Operator -> its rule."""
