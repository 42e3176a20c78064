"""Reading and writing elements by index, as functions of torch.  Indices below zero count from the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.bridge.host import as_tensor, is_host, total
from graphopt.bridge.operands import aligned, number, positive
from graphopt.bridge.table import Op, Table

REDUCE = {"mul": "prod", "max": "amax", "min": "amin"}
"""Reduction of the ONNX operators -> torch's name."""


def _wrapped(indices: torch.Tensor, length: Any, device: Any = None) -> torch.Tensor:
    indices = indices.long().to(device)  # small ones may come from Python, to a module elsewhere
    return torch.where(indices < 0, indices + length, indices)


def gather(x: Any, indices: Any, axis: int = 0) -> Any:
    if is_host(x) and is_host(indices):
        return tuple(x[i] for i in indices) if isinstance(indices, tuple) else x[indices]
    x = as_tensor(x)
    if is_host(indices) and not isinstance(indices, tuple):
        return x.select(axis, indices)
    axis = positive(axis, x.ndim)
    places = _wrapped(as_tensor(indices), x.shape[axis], x.device)
    return x.index_select(axis, places.flatten()).reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


def gather_elements(x: torch.Tensor, indices: torch.Tensor, axis: int = 0) -> torch.Tensor:
    return torch.gather(x, axis, _wrapped(indices, x.shape[axis], x.device))


def scatter_elements(
    x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, axis: int = 0, reduction: str = "none"
) -> torch.Tensor:
    places = _wrapped(indices, x.shape[axis], x.device)
    return _written(x, axis, places, updates, reduction)


def _written(x: torch.Tensor, axis: int, places: torch.Tensor, updates: torch.Tensor, reduction: str) -> torch.Tensor:
    updates = updates.to(x)
    if reduction == "none":
        return x.scatter(axis, places, updates)
    if reduction == "add":
        return x.scatter_add(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, REDUCE[reduction])


def _linear(indices: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return index tuples (along the last axis) as places in the flattened axes of these sizes."""
    places = torch.zeros(indices.shape[:-1], dtype=torch.long, device=indices.device)
    for i, length in enumerate(sizes):
        places = places * length + _wrapped(indices[..., i], length)
    return places


def gather_nd(x: torch.Tensor, indices: torch.Tensor, batch_dims: int = 0) -> torch.Tensor:
    depth = indices.shape[-1]
    batch, inner = tuple(x.shape[:batch_dims]), tuple(x.shape[batch_dims : batch_dims + depth])
    rest = tuple(x.shape[batch_dims + depth :])
    places = _linear(indices.to(x.device).reshape(total(batch), -1, depth), inner)
    places = places + torch.arange(total(batch), device=x.device)[:, None] * total(inner)
    taken = x.reshape(total(batch) * total(inner), *rest).index_select(0, places.flatten())
    return taken.reshape(*indices.shape[:-1], *rest)


def scatter_nd(x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, reduction: str = "none") -> torch.Tensor:
    depth = indices.shape[-1]
    inner, rest = tuple(x.shape[:depth]), tuple(x.shape[depth:])
    places = _linear(indices.to(x.device), inner).flatten()
    flat = updates.reshape(places.shape[0], total(rest))
    places = places[:, None].expand(flat.shape)
    return _written(x.reshape(total(inner), total(rest)), 0, places, flat, reduction).reshape(x.shape)


def one_hot(indices: torch.Tensor, depth: Any, values: Any, axis: int = -1) -> torch.Tensor:
    count = number(depth)
    values = as_tensor(values).to(indices.device)
    axis = positive(axis, indices.ndim + 1)
    wanted = torch.arange(count, device=indices.device).reshape([-1] + [1] * (indices.ndim - axis))
    found = _wrapped(indices, count).unsqueeze(axis) == wanted
    return torch.where(found, values[1], values[0])


def non_zero(x: torch.Tensor) -> torch.Tensor:
    return torch.nonzero(x).t()


def compress(x: torch.Tensor, condition: torch.Tensor, axis: int | None = None) -> torch.Tensor:
    x, axis = (x.flatten(), 0) if axis is None else (x, axis)
    return x.index_select(axis, torch.nonzero(condition.to(x.device)).flatten())


def reverse_sequence(
    x: torch.Tensor, sequence_lens: torch.Tensor, batch_axis: int = 1, time_axis: int = 0
) -> torch.Tensor:
    moved = x.movedim((time_axis, batch_axis), (0, 1))
    return reversed_steps(moved, sequence_lens).movedim((0, 1), (time_axis, batch_axis))


def reversed_steps(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return x (steps, batch, …) with the first `lengths[b]` steps of each row reversed."""
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    lengths = lengths.long().to(x.device)[None, :]
    places = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x[places, torch.arange(x.shape[1], device=x.device)[None, :]]


def unique(
    x: torch.Tensor, axis: int | None = None, sorted: int = 1
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Return the different elements (or slices), where each is first, which one each element is, and how many."""
    values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True, dim=axis)
    flat = inverse.flatten()
    places = torch.arange(flat.shape[0], device=x.device)
    first = torch.full(counts.shape, flat.shape[0], device=x.device).scatter_reduce(0, flat, places, "amin")
    if sorted:
        return values, first, flat, counts
    order = torch.argsort(first)
    return values.index_select(axis or 0, order), first[order], torch.argsort(order)[flat], counts[order]


def tensor_scatter(
    x: torch.Tensor, update: torch.Tensor, write_indices: Any = None, axis: int = -2, mode: str = "linear"
) -> torch.Tensor:
    """Return a cache (batch, …) with `update` written from a place of each row on along an axis."""
    axis, length = positive(axis, x.ndim), update.shape[axis]
    starts = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    starts = starts if write_indices is None else aligned(x, write_indices)[1].long()
    places = starts[:, None] + torch.arange(length, device=x.device)
    places = places % x.shape[axis] if mode == "circular" else places
    places = places.reshape([x.shape[0] if i == 0 else length if i == axis else 1 for i in range(x.ndim)])
    return x.scatter(axis, places.expand(update.shape), update.to(x))


TABLE: Table = {
    "Gather": Op(1, gather, host=True), "GatherElements": gather_elements, "GatherND": gather_nd,
    "ScatterElements": scatter_elements, "Scatter": scatter_elements, "ScatterND": scatter_nd,
    "TensorScatter": tensor_scatter, "OneHot": one_hot, "NonZero": non_zero, "Compress": compress,
    "ReverseSequence": reverse_sequence, "Unique": unique,
}  # fmt: skip
