"""Samples -> mean of each channel of some tensors: `collect(model, samples, {tensor: axis})`.

The means are taken inside ORT, which gives back one number for each channel; only the part of the model that makes the
tensors is run.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.errors import DataError
from graphopt.grams import part_for
from graphopt.model import Model
from graphopt.runtime import Session
from graphopt.samples import Samples

Array: TypeAlias = np.ndarray[Any, Any]

_MEAN, _SIZE = "graphopt_mean:", "graphopt_size:"


def collect(
    model: Model, samples: Samples, axes: Mapping[str, tuple[int, int]], *, limit: int = 0, threads: int = 1
) -> dict[str, Array]:
    """Return the mean of each channel over samples and all other axes: float64, (channels,).

    Args:
        model: as it is now; not changed.
        samples: feeds; shapes may differ from one to the next.
        axes: node output of the main graph -> (axis of its channels, its rank).
        limit: feeds read at most (0: all).
        threads: of the session.

    Raises:
        DataError: there are no samples.
        ModelError: ORT refuses the model.
    """
    if not axes:
        return {}
    session = Session(_with_means(model, axes), threads=threads)
    total = {name: np.zeros(()) for name in axes}
    weight = dict.fromkeys(axes, 0.0)
    for feed in itertools.islice(samples, limit or None):
        values = session.run({k: v for k, v in feed.items() if k in session.input_names})
        for name in axes:
            mean, size = np.asarray(values[_MEAN + name], np.float64), float(values[_SIZE + name])
            if size:
                total[name] = total[name] + mean * size
                weight[name] += size
    if not any(weight.values()):
        raise DataError("there are no samples to take means of", hint="give --data")
    return {name: np.asarray(total[name] / weight[name]) for name in axes if weight[name]}


def _with_means(model: Model, axes: Mapping[str, tuple[int, int]]) -> Model:
    """Return the part of a model that makes these tensors, with their means and sizes as its outputs."""
    part = part_for(model, list(axes))
    tensors = {t.name: t for t in part.graph.outputs}
    part.graph.outputs.clear()
    for name, (axis, rank) in axes.items():
        others = [i for i in range(rank) if i != axis % rank]
        mean = gs.Variable(_MEAN + name, np.dtype(np.float32), None)
        size = gs.Variable(_SIZE + name, np.dtype(np.int64), [])
        inputs, attrs = [tensors[name]], {"keepdims": 0}
        if part.opset < 18:
            attrs["axes"] = others  # type: ignore[assignment]
        else:
            inputs.append(gs.Constant(f"graphopt_axes:{name}", np.array(others, np.int64)))
        part.graph.nodes.append(gs.Node("ReduceMean", inputs=inputs, outputs=[mean], attrs=attrs))
        part.graph.nodes.append(gs.Node("Size", inputs=[tensors[name]], outputs=[size]))
        part.graph.outputs += [mean, size]
    return part
