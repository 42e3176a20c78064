"""Twins of pruned models that owe nothing to the analysis: what was cut is read off the weights.

Random weights hardly ever hold a number twice, so a smaller weight tells by its numbers which slices of the larger one
it is.  `slices` reads that for every constant input of every layer that both models have, by the name of the layer or
of its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import numpy_helper

Array: TypeAlias = np.ndarray[Any, Any]
Use: TypeAlias = tuple[str, int]

MAKES = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1, "Gather": -1, "LSTM": 1, "GRU": 1, "Transpose": 0}
"""Axis of a layer's weight along which its output channels lie; vectors have but one."""


@dataclass(frozen=True)
class Slices:
    """What is left of a constant: for each axis the indices that stay."""

    node: onnx.NodeProto
    values: Array
    kept: tuple[Array, ...]


def slices(before: onnx.ModelProto, after: onnx.ModelProto) -> dict[Use, Slices]:
    """Return what became smaller, by layer name and input; AssertionError where it is no plain slice.

    Constants that hold the same numbers several times (all ones, codes) may not be readable: they are left out then.
    """
    found: dict[Use, Slices] = {}
    smaller = {use: (node, values) for use, node, values in _uses(after)}
    for use, node, values in _uses(before):
        _, cut = smaller.get(use, (node, values))
        if cut.shape == values.shape or values.ndim != cut.ndim or values.dtype.kind != "f":
            continue
        if np.unique(values).size < values.size / 2:
            continue
        kept = tuple(_kept(values, cut, axis) for axis in range(values.ndim))
        if np.array_equal(values[np.ix_(*kept)], cut):
            found[use] = Slices(node, values, kept)
        else:
            assert np.unique(values).size < values.size, f"input {use[1]} of {use[0]} is no slice of what it was"
    return found


def twin(model: onnx.ModelProto, found: Mapping[Use, Slices], *, producers: bool = False) -> onnx.ModelProto:
    """Return the uncut model with zeros where the cut one has nothing; with `producers`, only where layers make it."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        for port, _ in enumerate(node.input):
            if (_label(node), port) in found:
                was = found[_label(node), port]
                axis = _making_axis(was) if producers else None
                values = was.values.copy()
                for place, kept in enumerate(was.kept):
                    if axis in (None, place):
                        gone = np.setdiff1d(np.arange(values.shape[place]), kept)
                        values[(slice(None),) * place + (gone,)] = 0
                node.input[port] = f"{_label(node)}/{port}/twin"
                result.graph.initializer.append(numpy_helper.from_array(values, node.input[port]))
    return result


def _making_axis(was: Slices) -> int:
    rank = was.values.ndim
    if rank == 1:
        return 0
    if was.node.op_type == "Gemm":
        return int(not any(a.name == "transB" and a.i for a in was.node.attribute))
    if was.node.op_type in MAKES:
        return MAKES[was.node.op_type] % rank
    sizes = [len(kept) < size for kept, size in zip(was.kept, was.values.shape, strict=True)]
    return sizes.index(True)


def _label(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def _uses(model: onnx.ModelProto) -> Iterator[tuple[Use, onnx.NodeProto, Array]]:
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants.update((n.output[0], n.attribute[0].t) for n in model.graph.node if n.op_type == "Constant")
    for node in model.graph.node:
        for port, name in enumerate(node.input):
            if name in constants:
                yield (_label(node), port), node, numpy_helper.to_array(constants[name])


def _kept(values: Array, cut: Array, axis: int) -> Array:
    """Return the indices of which most numbers are still there: not all, for other axes are cut too."""
    if cut.shape[axis] == values.shape[axis]:
        return np.arange(values.shape[axis])
    there = np.isin(values, cut).mean(axis=tuple(i for i in range(values.ndim) if i != axis))
    return np.sort(np.argsort(-there, kind="stable")[: cut.shape[axis]])
