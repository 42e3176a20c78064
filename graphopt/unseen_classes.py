"""Classes that samples do not show: what a classifier needs to tell them apart cannot be judged, so it is not cut.

Least squares keep what samples need.  A recogniser of 6,625 characters that is fitted on lines with a thousand of them
loses the others with the channels that its last layer reads, and no sample says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.channels import Channels, Group
from graphopt.model import Model
from graphopt.output_quality import output_kind
from graphopt.runtime import Session
from graphopt.samples import Samples

MANY = 50
"""Classes from which on samples may leave some out."""

SHOWN = 0.5
"""Part of the classes that samples have to show."""

_PASSES = frozenset({
    "Softmax", "LogSoftmax", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose",
    "GlobalAveragePool", "AveragePool", "ReduceMean",
})  # fmt: skip
"""Operators between the scores of classes and an output, or between them and the layer that makes them."""


def unseen(model: Model, groups: Channels, samples: Samples) -> dict[str, str]:
    """Return the groups that layers read which tell classes apart that samples do not show, by name -> why.

    Args:
        model: the model that is to be cut, in float.
        groups: of the model.
        samples: what choice and fit are made on.

    Raises:
        ModelError: ORT refuses the model or a sample.
    """
    heads = {}
    for output in model.graph.outputs:
        makes = _head(output, groups)
        if makes is not None and makes.size >= MANY:
            heads[output.name] = makes
    found: dict[str, str] = {}
    for name, count in _seen(model, heads, samples).items():
        head = heads[name]
        if count >= SHOWN * head.size:
            continue
        weights = {id(site.tensor) for site in head.role("makes")}
        for group in groups.prunable():
            if any(id(site.tensor) in weights for site in group.role("reads")):
                found[group.name] = (
                    f"samples show {count} of the {head.size} classes that it tells apart; --only '*' cuts it, too"
                )
    return found


def _head(output: gs.Tensor, groups: Channels) -> Group | None:
    """Return the group whose units are the classes of an output."""
    tensors: set[int] = set()
    tensor = output
    while True:
        tensors.add(id(tensor))
        node = tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None
        if node is None or node.op not in _PASSES:
            break
        tensor = node.inputs[0]
    carrying = [group for group in groups.groups if any(id(site.tensor) in tensors for site in group.role("carries"))]
    return next((group for group in carrying if group.role("makes")), None)


def _seen(model: Model, heads: Mapping[str, Group], samples: Samples) -> dict[str, int]:
    """Return how many classes of each output are the largest somewhere in the samples."""
    if not heads:
        return {}
    session, tops = Session(model), {name: set[int]() for name in heads}
    for feeds in samples:
        values = session.run(feeds, list(tops))
        for name in list(tops):
            axis = _class_axis(model, name, values[name], heads[name].size)
            if axis is None:
                del tops[name]
            else:
                tops[name].update(np.unique(values[name].argmax(axis=axis)).tolist())
    return {name: len(classes) for name, classes in tops.items()}


def _class_axis(model: Model, name: str, values: np.ndarray[Any, Any], classes: int) -> int | None:
    """Return the axis of the classes; None where the output is not judged by its largest value."""
    axes = [axis for axis, size in enumerate(values.shape) if size == classes]
    return axes[-1] if axes and output_kind(model, name, values) == "classes" else None
