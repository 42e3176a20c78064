"""What random cases of a rule's operators look like: input shapes, and attributes that a pattern leaves open.

`SHAPES[op](rng, shapes)` gives the shape of an operator's first unknown input from those known so far; operators that
are not listed take shapes that broadcast.  `PARAMETERS[op](rng, shapes, outputs)` gives attributes and parameter inputs
by name.  A draw may turn out invalid: the caller infers shapes and draws again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

Shape: TypeAlias = tuple[int, ...]
Random: TypeAlias = np.random.Generator

SIZES = (1, 2, 3, 4, 6)
"""Sizes of axes."""


def some_shape(rng: Random, low: int = 1, high: int = 4) -> Shape:
    """Return a shape of between `low` and `high` axes."""
    return tuple(int(s) for s in rng.choice(SIZES, rng.integers(low, high + 1)))


def broadcast_to(rng: Random, shape: Shape) -> Shape:
    """Return a shape that broadcasts to `shape`: itself, some axes 1, the first ones missing, or a scalar."""
    way = rng.integers(5)
    if way == 0:
        return ()
    if way == 1 and len(shape) > 1:
        channel = [1] * (len(shape) - 1)
        channel[0] = shape[1]
        return tuple(channel)
    if way == 2:
        return tuple(s if rng.random() < 0.5 else 1 for s in shape)
    if way == 3:
        return shape[int(rng.integers(len(shape) + 1)) :]
    return shape


def _conv(rng: Random, known: Sequence[Shape | None]) -> Shape:
    if not known:
        axes = 1 + int(rng.integers(1, 3))
        return (int(rng.integers(1, 3)), int(rng.choice((1, 2, 4))), *(int(s) for s in rng.integers(4, 8, axes)))
    x = known[0]
    if len(known) == 1 and x is not None:
        group = x[1] if rng.random() < 0.25 else 1
        kernel = tuple(int(k) for k in rng.choice((1, 1, 2, 3), len(x) - 2))
        return (int(rng.choice((1, 2, 3))) * group, x[1] // group, *kernel)
    return (known[1][0],) if len(known) > 1 and known[1] else ()


def _conv_transpose(rng: Random, known: Sequence[Shape | None]) -> Shape:
    if len(known) == 1 and known[0] is not None:
        kernel = tuple(int(k) for k in rng.choice((1, 2, 3), len(known[0]) - 2))
        return (known[0][1], int(rng.choice((1, 2, 3))), *kernel)
    if len(known) > 1 and known[1]:
        return (known[1][1],)
    return _conv(rng, known)


def _matmul(rng: Random, known: Sequence[Shape | None]) -> Shape:
    if not known or known[0] is None:
        return some_shape(rng, 2, 4)
    x, size = known[0], int(rng.choice(SIZES))
    batch = x[:-2] if rng.random() < 0.4 else ()
    return (*batch, x[-1], size) if x else ()


def _gemm(rng: Random, known: Sequence[Shape | None]) -> Shape:
    if not known:
        return some_shape(rng, 2, 2)
    if len(known) == 1 and known[0]:
        sizes = [known[0][int(rng.integers(2))], int(rng.choice(SIZES))]
        return tuple(sizes if rng.random() < 0.5 else sizes[::-1])
    return ((), (1,), (known[1][int(rng.integers(2))],) if known[1] else ())[int(rng.integers(3))]


def _per_channel(rng: Random, known: Sequence[Shape | None]) -> Shape:
    return some_shape(rng, 2, 4) if not known else ((known[0] or (1, 1))[1],)


def _last_axis(rng: Random, known: Sequence[Shape | None]) -> Shape:
    return some_shape(rng, 1, 4) if not known else (known[0] or (1,))[-1:]


def _pooled(rng: Random, _: Sequence[Shape | None]) -> Shape:
    axes = int(rng.integers(1, 3))
    return (int(rng.integers(1, 3)), int(rng.choice((1, 2, 4))), *(int(s) for s in rng.integers(3, 8, axes)))


def _gathered(rng: Random, known: Sequence[Shape | None]) -> Shape:
    return some_shape(rng, 1, 4) if not known else some_shape(rng, 0, 2)


SHAPES: Mapping[str, Callable[[Random, Sequence[Shape | None]], Shape]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "BatchNormalization": _per_channel,
    "InstanceNormalization": _per_channel,
    "LayerNormalization": _last_axis,
    "Gather": _gathered,
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize"), _pooled),
}


def _axis(rng: Random, shapes: Sequence[Shape], _: int) -> dict[str, Any]:
    rank = max(len(shapes[0]), 1)
    return {"axis": int(rng.integers(-rank, rank))}


def _reduce(rng: Random, shapes: Sequence[Shape], _: int) -> dict[str, Any]:
    rank = len(shapes[0])
    chosen = [i if rng.random() < 0.5 else i - rank for i in range(rank) if rng.random() < 0.5]
    return {"axes": chosen or [rank - 1 if rank else 0], "keepdims": int(rng.integers(2))}


def _transpose(rng: Random, shapes: Sequence[Shape], _: int) -> dict[str, Any]:
    return {"perm": [int(i) for i in rng.permutation(len(shapes[0]))]}


def _window(rng: Random, shapes: Sequence[Shape], _: int) -> dict[str, Any]:
    axes = len(shapes[0]) - 2
    pads = [int(p) for p in rng.integers(0, 2, 2 * axes)] if rng.random() < 0.5 else [0] * 2 * axes
    return {"pads": pads, "strides": [int(s) for s in rng.integers(1, 3, axes)]}


def _convolution(rng: Random, shapes: Sequence[Shape], outputs: int) -> dict[str, Any]:
    group = shapes[0][1] // max(shapes[1][1], 1) if len(shapes) > 1 and len(shapes[1]) > 2 else 1
    return {**_window(rng, shapes, outputs), "group": max(group, 1)}


def _pool(rng: Random, shapes: Sequence[Shape], outputs: int) -> dict[str, Any]:
    axes = len(shapes[0]) - 2
    return {**_window(rng, shapes, outputs), "kernel_shape": [int(k) for k in rng.integers(2, 4, axes)]}


def _reshape(rng: Random, shapes: Sequence[Shape], _: int) -> dict[str, Any]:
    sizes = [s for s in shapes[0] if s != 1] or [1]
    total = math.prod(sizes)
    first = int(rng.choice([d for d in range(1, total + 1) if total % d == 0] or [1]))
    target = [[-1], [first, total // max(first, 1)], [0, -1], [*shapes[0], 1], [1, -1]][int(rng.integers(5))]
    return {"shape": np.array(target, np.int64)}


def _squeeze(rng: Random, shapes: Sequence[Shape], _: int) -> dict[str, Any]:
    ones = [i for i, s in enumerate(shapes[0]) if s == 1]
    return {"axes": [i for i in ones if rng.random() < 0.7] or ones[:1] or [0]}


def _unsqueeze(rng: Random, shapes: Sequence[Shape], _: int) -> dict[str, Any]:
    rank = len(shapes[0]) + 1
    return {"axes": [int(rng.integers(-rank, rank))]}


def _slice(rng: Random, shapes: Sequence[Shape], _: int) -> dict[str, Any]:
    axis = int(rng.integers(max(len(shapes[0]), 1)))
    size = shapes[0][axis] if shapes[0] else 1
    start = int(rng.integers(size))
    end = int(rng.integers(start + 1, size + 1))
    return {"starts": [start], "ends": [end], "axes": [axis], "steps": [1 if rng.random() < 0.7 else 2]}


def _pad(rng: Random, shapes: Sequence[Shape], _: int) -> dict[str, Any]:
    pads = rng.integers(0, 3, (2, len(shapes[0])))
    if len(shapes[0]) > 2 and rng.random() < 0.7:
        pads[:, :2] = 0
    return {"pads": pads.reshape(-1)}


def _split(rng: Random, shapes: Sequence[Shape], outputs: int) -> dict[str, Any]:
    axis = int(rng.integers(max(len(shapes[0]), 1)))
    size = shapes[0][axis] if shapes[0] else 1
    borders = sorted(rng.choice(np.arange(1, max(size, outputs)), outputs - 1, replace=False))
    return {"axis": axis, "split": np.diff([0, *borders, size]).astype(np.int64)}


def _tile(rng: Random, shapes: Sequence[Shape], _: int) -> dict[str, Any]:
    return {"repeats": rng.integers(1, 3, len(shapes[0]))}


def _expand(rng: Random, shapes: Sequence[Shape], _: int) -> dict[str, Any]:
    return {"shape": np.array([s if s > 1 else rng.integers(1, 4) for s in shapes[0]], np.int64)}


def _gemm_attributes(rng: Random, _s: Sequence[Shape], _o: int) -> dict[str, Any]:
    return {
        "transA": int(rng.integers(2)), "transB": int(rng.integers(2)),
        "alpha": float(rng.choice((1.0, 0.5))), "beta": float(rng.choice((1.0, 1.0, 2.0))),
    }  # fmt: skip


def _clip(rng: Random, _s: Sequence[Shape], _o: int) -> dict[str, Any]:
    low, high = sorted(rng.normal(size=2))
    return {"min": np.array(low), "max": np.array(high)}


def _floats(names: Sequence[str], low: float = -1.0) -> Callable[[Random, Sequence[Shape], int], dict[str, Any]]:
    """Return a draw of floats from `low` up, of both signs where that allows, zero and one among them."""
    drawn = [v for v in (-0.5, 0.0, 0.25, 1.0, 1.75) if v > low]
    return lambda rng, _s, _o: {name: float(rng.choice(drawn)) for name in names}


PARAMETERS: Mapping[str, Callable[[Random, Sequence[Shape], int], dict[str, Any]]] = {
    **dict.fromkeys(("Softmax", "LogSoftmax", "Concat", "Gather", "ArgMax", "ArgMin", "Flatten", "Hardmax"), _axis),
    **dict.fromkeys(
        ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare"),
        _reduce,
    ),
    "Transpose": _transpose,
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Slice": _slice,
    "Pad": _pad,
    "Split": _split,
    "Tile": _tile,
    "Expand": _expand,
    "Gemm": _gemm_attributes,
    "Clip": _clip,
    "LeakyRelu": _floats(("alpha",)),
    "ThresholdedRelu": _floats(("alpha",)),
    "Selu": _floats(("alpha", "gamma"), 0.0),
    "Celu": _floats(("alpha",), 0.0),
    "Elu": _floats(("alpha",)),
    "HardSigmoid": _floats(("alpha", "beta")),
    "Cast": lambda rng, _s, _o: {"to": int(rng.choice((1, 10, 11, 7, 6)))},
}
