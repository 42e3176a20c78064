"""Reductions and searches along axes.

`axes` is an attribute in old opsets and an input in new ones: the same parameter here.  No axes mean all of them, or
none where `noop_with_empty_axes` is set.  A shape that is summed or multiplied up on the host stays there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphopt.bridge.host import as_tensor, is_host, total
from graphopt.bridge.operands import lowest, number, numbers, positive
from graphopt.bridge.table import Op, Table

Reduction = Callable[[torch.Tensor, tuple[int, ...], bool], torch.Tensor]


def _reduced(reduction: Reduction, x: Any, axes: Any, keepdims: int, noop: int) -> torch.Tensor:
    x = as_tensor(x)
    chosen = tuple(positive(axis, x.ndim) for axis in numbers(axes))
    if not chosen and not noop:
        chosen = tuple(range(x.ndim))
    return reduction(x, chosen, bool(keepdims)).to(x.dtype)


def _sum(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    return torch.sum(x, axes, keepdim=keep) if axes else x


def _real(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_floating_point() else x.double()


def _extreme(x: torch.Tensor, axes: tuple[int, ...], keep: bool, empty: Any) -> torch.Tensor:
    if not axes:
        return x
    if all(x.shape[axis] for axis in axes):
        return torch.amax(x, axes, keepdim=keep)
    shape = [1 if i in axes else n for i, n in enumerate(x.shape) if keep or i not in axes]
    return torch.full(shape, empty, dtype=x.dtype, device=x.device)


def _max(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    return _extreme(x, axes, keep, False if x.dtype is torch.bool else lowest(x.dtype))


def _min(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    if x.dtype is torch.bool:
        return ~_extreme(~x, axes, keep, False)
    if not all(x.shape[axis] for axis in axes):
        most = float("inf") if x.is_floating_point() else torch.iinfo(x.dtype).max
        return _extreme(x, axes, keep, most)
    return torch.amin(x, axes, keepdim=keep) if axes else x


def _prod(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def reduce_sum(x: Any, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    if _along_host(x, axes, noop_with_empty_axes):
        return (sum(x),) if keepdims else sum(x)
    return _reduced(_sum, x, axes, keepdims, noop_with_empty_axes)


def reduce_prod(x: Any, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    if _along_host(x, axes, noop_with_empty_axes):
        return (total(x),) if keepdims else total(x)
    return _reduced(_prod, x, axes, keepdims, noop_with_empty_axes)


def reduce_max(x: Any, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    if _along_host(x, axes, noop_with_empty_axes) and x:
        return (max(x),) if keepdims else max(x)
    return _reduced(_max, x, axes, keepdims, noop_with_empty_axes)


def reduce_min(x: Any, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    if _along_host(x, axes, noop_with_empty_axes) and x:
        return (min(x),) if keepdims else min(x)
    return _reduced(_min, x, axes, keepdims, noop_with_empty_axes)


def _along_host(x: Any, axes: Any, noop: int) -> bool:
    return is_host(x) and isinstance(x, tuple) and (bool(numbers(axes)) or not noop)


def reduce_mean(x: torch.Tensor, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> torch.Tensor:
    return _reduced(
        lambda x, axes, keep: torch.mean(_real(x), axes, keepdim=keep) if axes else x,
        x, axes, keepdims, noop_with_empty_axes,
    )  # fmt: skip


def reduce_l1(x: torch.Tensor, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> torch.Tensor:
    return _reduced(lambda x, *how: _sum(x.abs(), *how), x, axes, keepdims, noop_with_empty_axes)


def reduce_l2(x: torch.Tensor, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> torch.Tensor:
    """Return the Euclidean norm; its gradient at zero is zero."""
    return _reduced(
        lambda x, axes, keep: torch.linalg.vector_norm(_real(x), 2, axes, keepdim=keep) if axes else x.abs(),
        x, axes, keepdims, noop_with_empty_axes,
    )  # fmt: skip


def reduce_log_sum(x: torch.Tensor, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> torch.Tensor:
    return _reduced(lambda x, *how: _sum(_real(x), *how).log(), x, axes, keepdims, noop_with_empty_axes)


def reduce_log_sum_exp(
    x: torch.Tensor, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> torch.Tensor:
    return _reduced(
        lambda x, axes, keep: torch.logsumexp(_real(x), axes, keepdim=keep) if axes else x,
        x, axes, keepdims, noop_with_empty_axes,
    )  # fmt: skip


def reduce_sum_square(
    x: torch.Tensor, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> torch.Tensor:
    return _reduced(lambda x, *how: _sum(x * x, *how), x, axes, keepdims, noop_with_empty_axes)


def argmax(x: torch.Tensor, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> torch.Tensor:
    return _position(torch.argmax, x, axis, keepdims, select_last_index)


def argmin(x: torch.Tensor, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> torch.Tensor:
    return _position(torch.argmin, x, axis, keepdims, select_last_index)


def _position(search: Any, x: torch.Tensor, axis: int, keepdims: int, last: int) -> torch.Tensor:
    if last:
        return x.shape[axis] - 1 - search(x.flip(axis), axis, keepdim=bool(keepdims))
    return search(x, axis, keepdim=bool(keepdims))


def topk(
    x: Any, k: Any, axis: int = -1, largest: int = 1, sorted: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the k largest (or smallest) values and their indices, in order: of equal ones the first comes first."""
    order = torch.sort(as_tensor(x), dim=axis, descending=bool(largest), stable=True)
    count = number(k)
    return order.values.narrow(axis, 0, count), order.indices.narrow(axis, 0, count)


TABLE: Table = {
    "ReduceSum": Op(1, reduce_sum, host=True), "ReduceProd": Op(1, reduce_prod, host=True),
    "ReduceMax": Op(1, reduce_max, host=True), "ReduceMin": Op(1, reduce_min, host=True),
    "ReduceMean": Op(1, reduce_mean, host=True), "ReduceL1": Op(1, reduce_l1, host=True),
    "ReduceL2": Op(1, reduce_l2, host=True), "ReduceLogSum": Op(1, reduce_log_sum, host=True),
    "ReduceLogSumExp": Op(1, reduce_log_sum_exp, host=True),
    "ReduceSumSquare": Op(1, reduce_sum_square, host=True),
    "ArgMax": argmax, "ArgMin": argmin, "TopK": Op(1, topk, host=True),
}  # fmt: skip
