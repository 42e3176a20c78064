"""Inputs standardised inside the graph: statistics from the data, written as the first affine map.

    standard   (x - mean) / deviation, per channel or feature     range   (x - least) / (largest - least)

The graph then takes raw data, in training and after it. The lossless passes fold the map into the layer behind it where
that is exact (`fold-affine`): into a convolution without padding all of it, into a padded one its scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.bridge.batches import TrainingData, load_training_data
from graphopt.bridge.images import channels_last
from graphopt.edit import Edit, make_node, names_defined, replace_uses
from graphopt.errors import DataError, SpecError, did_you_mean
from graphopt.model import Model, Source, load
from graphopt.ops import WEIGHTED
from graphopt.tensors import is_float
from graphopt.training import TrainSettings

Array: TypeAlias = np.ndarray[Any, Any]
Kind: TypeAlias = Literal["standard", "range"]


@dataclass
class Statistics:
    """What is known of each channel of an input; float64 (channels,), or (1,) for all of it together.

    Attributes:
        axis: of the channels; None: statistics are of the whole input.
        count: values per channel.
        mean: of them.
        squares: sum of squared differences from the mean.
        least: the smallest.
        largest: the largest.
    """

    axis: int | None
    count: float
    mean: Array
    squares: Array
    least: Array
    largest: Array

    def joined(self, other: Statistics) -> Statistics:
        """Return the statistics of both (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        gap = other.mean - self.mean
        return Statistics(
            self.axis, count, self.mean + gap * other.count / count,
            self.squares + other.squares + gap**2 * self.count * other.count / count,
            np.minimum(self.least, other.least), np.maximum(self.largest, other.largest),
        )  # fmt: skip

    def affine(self, kind: Kind) -> tuple[Array, Array]:
        """Return scale and shift; a channel that does not vary is only moved to 0."""
        width = np.sqrt(self.squares / self.count) if kind == "standard" else self.largest - self.least
        base = self.mean if kind == "standard" else self.least
        scale = 1.0 / np.where(width > 1e-12 * np.maximum(np.abs(base), 1e-30), width, 1.0)
        return scale, -base * scale


def standardize(
    model: Source, data: Any, *, kind: Kind = "standard", inputs: Sequence[str] = (), axis: int | None = None
) -> Model:
    """Return a model that standardises its float inputs first.

    Args:
        model: left as it is; what it computes of its inputs is to be trained anew, or was trained on such data.
        data: `TrainingData`, or what `load_training_data` takes; the statistics are of these samples.
        kind: `standard` or `range`.
        inputs: names; empty: all of floats with at least two axes.
        axis: of channels or features; None: 1 in front of a convolution, that of the channels of images, else the last.

    Raises:
        SpecError: no such input, or none of floats; an unknown kind.
        DataError: the data are not usable.
    """
    if kind not in ("standard", "range"):
        raise SpecError(f"unknown kind '{kind}'", at="kind", hint="standard or range")
    out = load(model)
    held = data if isinstance(data, TrainingData) else load_training_data(data, out, TrainSettings(), labelled=False)
    chosen = _chosen(out, inputs)
    found = statistics(held, chosen, axis)
    for tensor in chosen:
        scale, shift = found[tensor.name].affine(kind)
        _insert(out, tensor, found[tensor.name].axis, scale, shift)
    return out


def statistics(data: TrainingData, tensors: Iterable[gs.Variable], axis: int | None = None) -> dict[str, Statistics]:
    """Return the statistics of inputs, by name; arguments as in `standardize`."""
    found: dict[str, Statistics] = {}
    wanted = list(tensors)
    for feeds in data.in_order(256):
        for tensor in wanted:
            array = feeds[tensor.name]
            before = found.get(tensor.name)
            along = before.axis if before else _axis(tensor, array, axis)
            if before is not None and along is not None and array.shape[along] != len(before.mean):
                raise DataError(
                    f"input '{tensor.name}' has {array.shape[along]} features, and had {len(before.mean)} before",
                    at=f"axis {along}", hint="name the axis whose size stays the same",
                )  # fmt: skip
            here = _statistics(array, along)
            found[tensor.name] = here if before is None else before.joined(here)
    return found


def _chosen(model: Model, names: Sequence[str]) -> list[gs.Variable]:
    known = {spec.name: spec for spec in model.inputs}
    for name in names:
        if name not in known:
            raise SpecError(f"the model has no input '{name}'", at="inputs",
                            hint=did_you_mean(name, known) or f"its inputs: {', '.join(known)}")  # fmt: skip
        if not is_float(known[name].dtype):
            raise SpecError(f"input '{name}' is of {known[name].dtype}, not of floats", at="inputs")
    meant = set(names) or {n for n, s in known.items() if is_float(s.dtype) and (s.shape is None or len(s.shape) > 1)}
    if not meant:
        raise SpecError("no input is of floats", at=", ".join(map(str, known.values())))
    return [tensor for tensor in model.graph.inputs if tensor.name in meant]


def _axis(tensor: gs.Variable, array: Array, given: int | None) -> int | None:
    if given is not None:
        if not -array.ndim <= given < array.ndim:
            raise SpecError(f"input '{tensor.name}' of rank {array.ndim} has no axis {given}", at="axis")
        return given % array.ndim
    if array.ndim < 2:
        return None
    if any(node.op in WEIGHTED for node in tensor.outputs):
        return 1
    return (3 if channels_last(array.shape) else 1) if array.ndim == 4 else array.ndim - 1


def _statistics(array: Array, axis: int | None) -> Statistics:
    rows = array.astype(np.float64).reshape(1, -1) if axis is None else np.moveaxis(array, axis, 0).astype(np.float64)
    rows = rows.reshape(rows.shape[0], -1)
    mean = rows.mean(axis=1)
    squares = ((rows - mean[:, None]) ** 2).sum(axis=1)
    return Statistics(axis, rows.shape[1], mean, squares, rows.min(axis=1), rows.max(axis=1))


def _insert(model: Model, tensor: gs.Variable, axis: int | None, scale: Array, shift: Array) -> None:
    """Put x * scale + shift behind an input."""
    taken = names_defined(model.graphs())
    rank = None if tensor.shape is None else len(tensor.shape)
    shape = [-1] if axis is None or rank is None else [-1, *[1] * (rank - axis - 1)]

    def name(text: str) -> str:
        found, count = f"{tensor.name}_{text}", 1
        while found in taken:
            found, count = f"{tensor.name}_{text}_{count}", count + 1
        taken.add(found)
        return found

    constants = [
        gs.Constant(name(text), values.reshape(shape).astype(tensor.dtype))
        for text, values in (("scale", scale), ("shift", shift))
    ]
    scaled = gs.Variable(name("scaled"), tensor.dtype, tensor.shape)
    made = gs.Variable(name("standardized"), tensor.dtype, tensor.shape)
    replace_uses(tensor, made)
    with Edit(model.graph) as edit:
        nodes = [
            make_node("Mul", [tensor, constants[0]], [scaled], name=name("standardize_scale")),
            make_node("Add", [scaled, constants[1]], [made], name=name("standardize_shift")),
        ]
        edit.insert_after(None, nodes)
