"""Shapes, movement of elements, and casts, as functions of torch.

Host values (tuples and numbers, `host.py`) go through wherever the result is of rank 1 at most and small; the rest are
tensors.  What was an attribute in old opsets and is an input now is the same parameter.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from graphopt.bridge.host import LARGEST, as_tensor, is_host, torch_kind, total
from graphopt.bridge.operands import aligned, number, numbers, positive, spread
from graphopt.bridge.table import Op, Table


def shape(x: Any, start: int = 0, end: int | None = None) -> tuple[int, ...]:
    sizes = tuple(x.shape) if isinstance(x, torch.Tensor) else (len(x),) if isinstance(x, tuple) else ()
    return sizes[start:end]


def size(x: Any) -> int:
    return total(shape(x))


def identity(x: Any) -> Any:
    return x


def cast(x: Any, to: int, saturate: int = 1, round_mode: str = "up") -> Any:
    return _converted(x, torch_kind(to))


def cast_like(x: Any, like: Any, saturate: int = 1, round_mode: str = "up") -> Any:
    return _converted(x, as_tensor(like).dtype)


def _converted(x: Any, kind: torch.dtype) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to(kind)
    if kind is torch.bool:
        return spread(bool, x)
    return spread(float if kind.is_floating_point else math.trunc, x)


def reshape(x: Any, shape: Any, allowzero: int = 0) -> Any:
    wanted = numbers(shape)
    if is_host(x):
        row = numbers(x)
        if wanted in {(-1,), (len(row),)} or (wanted == (0,) and isinstance(x, tuple)):
            return row
        if not wanted:
            return row[0]
        x = as_tensor(x)
    if not allowzero:
        wanted = tuple(x.shape[i] if n == 0 else n for i, n in enumerate(wanted))
    return x.reshape(wanted)


def flatten(x: torch.Tensor, axis: int = 1) -> torch.Tensor:
    return x.reshape(total(x.shape[:axis]), total(x.shape[axis:]))


def transpose(x: Any, perm: Any = None) -> Any:
    if is_host(x):
        return x
    return x.permute(tuple(perm) if perm is not None else tuple(reversed(range(x.ndim))))


def squeeze(x: Any, axes: Any = None) -> Any:
    if is_host(x):
        return x[0] if isinstance(x, tuple) and len(x) == 1 else x
    return x.squeeze() if axes is None else x.squeeze(numbers(axes))


def unsqueeze(x: Any, axes: Any) -> Any:
    added = numbers(axes)
    if is_host(x) and not isinstance(x, tuple) and len(added) == 1:
        return (x,)
    x = as_tensor(x)
    rank = x.ndim + len(added)
    for axis in sorted(positive(axis, rank) for axis in added):
        x = x.unsqueeze(axis)
    return x


def concat(*values: Any, axis: int) -> Any:
    if all(map(is_host, values)):
        return sum(values, ())
    return torch.cat(aligned(*values), axis)


def split(x: Any, split: Any = None, axis: int = 0, num_outputs: int | None = None, outputs: int = 1) -> Any:
    """Return the parts: by sizes, or in equal ones of which the last may be smaller."""
    length = len(x) if isinstance(x, tuple) else x.shape[axis]
    sizes = numbers(split)
    if split is None:
        count = num_outputs or outputs
        each = -(-length // count)
        sizes = (each,) * (count - 1) + (length - each * (count - 1),)
    if isinstance(x, tuple):
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        parts = tuple(x[end - n : end] for n, end in zip(sizes, ends, strict=True))
    else:
        parts = tuple(torch.split(x, sizes, axis))
    return parts if outputs > 1 else parts[0]


def sliced(x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    starts, ends, strides = numbers(starts), numbers(ends), numbers(steps)
    chosen = numbers(axes) or tuple(range(len(starts)))
    for start, end, axis, step in zip(starts, ends, chosen, strides or (1,) * len(starts), strict=True):
        if isinstance(x, tuple):
            x = x[start:end:step]
        elif step > 0:
            x = x[(slice(None),) * positive(axis, x.ndim) + (slice(start, end, step),)]
        else:
            x = _backwards(x, positive(axis, x.ndim), range(x.shape[axis])[start:end:step])
    return x


def _backwards(x: torch.Tensor, axis: int, places: range) -> torch.Tensor:
    if not places:
        return x.narrow(axis, 0, 0)
    return x[(slice(None),) * axis + (slice(places[-1], places[0] + 1, -places.step),)].flip(axis)


def expand(x: Any, shape: Any) -> Any:
    wanted = numbers(shape)
    if is_host(x) and len(wanted) <= 1:
        row, count = numbers(x), total(wanted)
        if not wanted or count == 1:
            return x if not wanted else row
        if len(row) != 1:
            return row
        if count <= LARGEST:
            return row * count
    x = as_tensor(x)
    return x.expand(torch.broadcast_shapes(tuple(x.shape), wanted))


def tile(x: Any, repeats: Any) -> Any:
    counts = numbers(repeats)
    if isinstance(x, tuple) and len(x) * counts[0] <= LARGEST:
        return x * counts[0]
    return as_tensor(x).repeat(counts)


def constant_of_shape(shape: Any, value: Any = (0.0, torch.float32)) -> Any:
    sizes = numbers(shape)
    filling, kind = value
    if kind in {torch.int64, torch.bool} and len(sizes) <= 1 and total(sizes) <= LARGEST:
        return (filling,) * sizes[0] if sizes else filling
    return torch.full(sizes, filling, dtype=kind, device=_device(shape))


def _device(value: Any) -> Any:
    return value.device if isinstance(value, torch.Tensor) else None


def ranged(start: Any, limit: Any, delta: Any, stash_type: int = 1) -> Any:
    first, end, step = number(start), number(limit), number(delta)
    if all(map(is_host, (start, limit, delta))) and all(isinstance(v, int) for v in (first, end, step)):
        places = range(first, end, step)
        return tuple(places) if len(places) <= LARGEST else torch.arange(first, end, step)
    like = next((v for v in (start, limit, delta) if isinstance(v, torch.Tensor)), None)
    count = max(math.ceil((end - first) / step), 0)
    if like is None:
        return torch.arange(count) * as_tensor(step) + as_tensor(first)
    return (torch.arange(count, device=like.device) * step + first).to(like.dtype)


def trilu(x: Any, k: Any = None, upper: int = 1) -> torch.Tensor:
    diagonal = 0 if k is None else number(k)
    x = as_tensor(x)
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def eye_like(x: torch.Tensor, dtype: int | None = None, k: int = 0) -> torch.Tensor:
    kind = x.dtype if dtype is None else torch_kind(dtype)
    return torch.diag_embed(torch.ones(max(x.shape), dtype=kind, device=x.device), k)[: x.shape[0], : x.shape[1]]


def depth_to_space(x: torch.Tensor, blocksize: int, mode: str = "DCR") -> torch.Tensor:
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        parts = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, c // (b * b), h * b, w * b)


def space_to_depth(x: torch.Tensor, blocksize: int, mode: str = "DCR") -> torch.Tensor:
    n, c, h, w = x.shape
    b = blocksize
    parts = x.reshape(n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return parts.permute(order).reshape(n, c * b * b, h // b, w // b)


TABLE: Table = {
    "Shape": Op(1, shape, host=True), "Size": Op(1, size, host=True), "Identity": Op(1, identity, host=True),
    "Cast": Op(1, cast, host=True), "CastLike": Op(1, cast_like, host=True), "Reshape": Op(1, reshape, host=True),
    "Transpose": Op(1, transpose, host=True), "Squeeze": Op(1, squeeze, host=True),
    "Unsqueeze": Op(1, unsqueeze, host=True), "Concat": Op(1, concat, host=True), "Split": Op(1, split, host=True),
    "Slice": Op(1, sliced, host=True), "Expand": Op(1, expand, host=True), "Tile": Op(1, tile, host=True),
    "ConstantOfShape": Op(1, constant_of_shape, host=True), "Range": Op(1, ranged, host=True),
    "Trilu": Op(1, trilu, host=True), "Flatten": flatten, "EyeLike": eye_like, "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
}  # fmt: skip
