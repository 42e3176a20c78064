"""Samples -> second moments of what a layer reads now against what it is to give, layer after layer.

    for fit, split in sweep(model, reference, samples, fits):
        ...                          # the layer's weight may be replaced here: what comes next is measured on that

For a layer with rows X (see `graphopt.layer_inputs`) in the model as it is, and Y, a tensor of another model, of which
each pixel or vector is a row: XᵀX, XᵀY, their means, and the squares of Y.  They are all that linear least squares
needs.  Samples are told apart into those to fit on and those to judge by.

Both models are run once over the samples, in segments from layer to layer (`graphopt.frontier`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from graphopt.errors import DataError
from graphopt.frontier import DISK, MEMORY, Replay, Store
from graphopt.layer_inputs import LARGEST, GramRequest, row_chunks
from graphopt.model import Model
from graphopt.moments import Fit, Moments, Split
from graphopt.samples import Samples

Array: TypeAlias = np.ndarray[Any, Any]

__all__ = ["Fit", "Moments", "Split", "paired_rows", "sweep"]

HELD_OUT = 5
"""Each so many-th sample is held out; of few samples, the last part of so many of each."""

FEW = 10
"""Samples below which the parts that are held out are parts of samples."""

ROWS = 1 << 14
"""Rows of a layer at least, where there are so many."""

ROWS_PER_COLUMN = 16
"""Rows for each column of a row, where there are so many."""


def sweep(
    model: Model,
    reference: Model,
    samples: Samples,
    fits: Sequence[Fit],
    *,
    rows: int = 0,
    threads: int = 1,
    seed: int = 0,
    memory: int = MEMORY,
    disk: int = DISK,
) -> Iterator[tuple[Fit, Split]]:
    """Yield the moments of each fit, of the model as it then is.

    Args:
        model: edited by the caller in between: weights of layers that were yielded, and nodes behind them.
        reference: makes the targets; not changed.
        samples: feeds; shapes may differ from one to the next.
        fits: sorted: no layer before one that it depends on.
        rows: of each layer over all samples, drawn at random (0: as many as its width asks for).
        threads: of the sessions.
        seed: of the draw.
        memory: bytes of values held in memory.
        disk: bytes of values held in all, temporary files included; what goes beyond costs samples.

    Raises:
        DataError: there are no samples, one does not fit, or a tensor has not the layout that a fit says.
        ModelError: ORT refuses a part of a model.
    """
    store = Store(memory, disk)
    try:
        now, then = Replay("model", model, store, threads), Replay("reference", reference, store, threads)
        inputs = [name for fit in fits for name in _inputs(fit)]
        targets = [fit.target for fit in fits]
        count = _start(samples, now, inputs, then, targets)
        for i, fit in enumerate(fits):
            count = now.advance(_inputs(fit), [name for later in fits[i + 1 :] for name in _inputs(later)], count)
            count = then.advance([fit.target], targets[i + 1 :], count)
            yield fit, _moments(fit, now, then, count, rows, [seed, i])
    finally:
        store.close()


def _inputs(fit: Fit) -> list[str]:
    """Return the tensors of the model as it is that a fit reads."""
    return [fit.request.tensor, *([fit.minus] if fit.minus else [])]


def _start(samples: Samples, now: Replay, inputs: Sequence[str], then: Replay, targets: Sequence[str]) -> int:
    """Read the samples; return how many there are."""
    count = 0
    for feed in samples:
        now.start(count, feed, inputs)
        then.start(count, feed, targets)
        count += 1
        if now.store.full:
            break
    if not count:
        raise DataError("there are no samples to measure layers on", hint="give --data")
    return count


def _moments(fit: Fit, now: Replay, then: Replay, count: int, rows: int, seed: list[int]) -> Split:
    """Measure one fit."""
    wanted = rows or max(ROWS, ROWS_PER_COLUMN * fit.request.width)
    limit = max(1, math.ceil(wanted / count))
    split: Split | None = None
    for number in range(count):
        minus = now.get(fit.minus, number) if fit.minus else None
        values = now.get(fit.request.tensor, number)
        x, y = paired_rows(fit, values, then.get(fit.target, number), minus, limit, [*seed, number])
        if split is None and len(x):
            origins = x.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64)
            split = Split(Moments.empty(*origins), Moments.empty(*origins))
        if split is None:
            continue
        if count >= FEW:
            (split.held_out if number % HELD_OUT == HELD_OUT - 1 else split.train).add(x, y)
        else:
            at = len(x) - len(x) // HELD_OUT
            split.train.add(x[:at], y[:at])
            split.held_out.add(x[at:], y[at:])
    if split is None:
        empty = np.zeros((fit.request.group, fit.request.width)), np.zeros((fit.request.group, 0))
        return Split(Moments.empty(*empty), Moments.empty(*empty))
    return split


def paired_rows(
    fit: Fit, values: Array, target: Array, minus: Array | None, limit: int, seed: Sequence[int]
) -> tuple[Array, Array]:
    """Return rows of X and Y of one sample, at most `limit` and usable: float32 (rows, group, columns of a group).

    Raises:
        DataError: there are not as many rows in Y as in X.
    """
    x = _drawn(fit.request, values, limit, seed)
    y = _columns(fit, target, limit, seed)
    if fit.channels is not None:
        y = y.reshape(len(y), -1, math.prod(fit.block))[:, fit.channels].reshape(len(y), -1)
    if minus is not None:
        y = y - _columns(fit, minus, limit, seed)
    if len(x) != len(y) or y.shape[1] % fit.request.group:
        raise DataError(
            f"a layer's input gives {len(x)} rows where its target has {len(y)}",
            at=f"layer '{fit.label}', tensors '{fit.request.tensor}' and '{fit.target}'",
        )
    y = y.reshape(len(y), fit.request.group, -1)
    usable = (np.abs(x) < LARGEST).all(axis=(1, 2)) & (np.abs(y) < LARGEST).all(axis=(1, 2))
    return (x, y) if usable.all() else (x[usable], y[usable])


def _drawn(request: GramRequest, values: Array, limit: int, seed: Sequence[int]) -> Array:
    """Return rows of a tensor; the same draw for all tensors of as many rows."""
    chunks = list(row_chunks(request, values, limit, np.random.default_rng(list(seed))))
    return np.concatenate(chunks) if chunks else np.zeros((0, request.group, request.width), np.float32)


def _columns(fit: Fit, target: Array, limit: int, seed: Sequence[int]) -> Array:
    """Return rows of a target, all groups side by side: (rows, channels), of blocks (rows, channels × block…)."""
    laid = _laid_out(target, fit)
    return _drawn(GramRequest(fit.target, laid.shape[-1]), laid, limit, seed)[:, 0]


def _laid_out(target: Array, fit: Fit) -> Array:
    """Return a target with its columns last: (…, channels), of blocks (N, spatial…, channels × block…)."""
    if not fit.block:
        return np.moveaxis(target, fit.axis, -1)
    spatial = [n for size, block in zip(target.shape[2:], fit.block, strict=True) for n in (size // block, block)]
    axes = len(fit.block)
    cut = target.reshape(*target.shape[:2], *spatial)
    turned = cut.transpose(0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))
    return turned.reshape(*turned.shape[: 1 + axes], -1)
