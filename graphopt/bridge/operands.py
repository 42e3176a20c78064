"""What functions of the operator tables share: host values and tensors side by side, axes, dtypes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.bridge.host import as_tensor, is_host

Function = Callable[..., Any]


def hosted(on_host: Function, on_tensors: Function, *values: Any) -> Any:
    """Apply an elementwise function: `on_host` to numbers where all values are host values, else `on_tensors`."""
    if all(map(is_host, values)):
        return spread(on_host, *values)
    return on_tensors(*aligned(*values))


def spread(function: Function, *values: Any) -> Any:
    """Apply a function of numbers elementwise to host values, which broadcast."""
    lengths = {len(value) for value in values if isinstance(value, tuple)}
    if not lengths:
        return function(*values)
    length = 0 if 0 in lengths else max(lengths)
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    rows = [row * length if len(row) == 1 else row for row in rows]
    return tuple(function(*items) for items in zip(*rows, strict=True))


def aligned(*values: Any) -> tuple[torch.Tensor, ...]:
    """Return values as tensors on one device; host values take the dtype of the first tensor."""
    like = next((value for value in values if isinstance(value, torch.Tensor)), None)
    if like is None:
        return tuple(map(as_tensor, values))
    device = next((v.device for v in values if isinstance(v, torch.Tensor) and v.device.type != "cpu"), like.device)
    return tuple(value.to(device) if isinstance(value, torch.Tensor) else as_tensor(value, like) for value in values)


def numbers(value: Any) -> tuple[Any, ...]:
    """Return a host value or a tensor of rank 0 or 1 as a tuple of Python numbers; None is none at all."""
    if value is None:
        return ()
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def number(value: Any) -> Any:
    """Return a host value or a tensor of one element as a Python number."""
    (only,) = numbers(value.reshape(1) if isinstance(value, torch.Tensor) else value)
    return only


def positive(axis: int, rank: int) -> int:
    """Return an axis counted from the front."""
    return axis + rank if axis < 0 else axis


def product(sizes: Sequence[int]) -> int:
    """Return the product of sizes, 1 of none."""
    return functools.reduce(lambda a, b: a * b, sizes, 1)


def lowest(dtype: torch.dtype) -> float | int:
    """Return what is below all values of a dtype: minus infinity, or the least integer."""
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def along(values: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    """Return a vector shaped to broadcast along one axis of a tensor of this rank."""
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])
