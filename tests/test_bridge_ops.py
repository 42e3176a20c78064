"""Operators in torch against ORT: random attributes and shapes, opsets from 9 on, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")

from graphopt.bridge.graph import TrainableGraph
from graphopt.errors import GraphoptError
from graphopt.runtime import Session

Array = np.ndarray[Any, Any]

TOLERANCE = 2e-5
"""Of the largest element: a few roundings of float32."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def model_of(
    op: str, inputs: Sequence[Array | None], opset: int, attributes: dict[str, Any], *, outputs: int, constant: bool
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Return a model of one node with open shapes, and its feeds; integers and later inputs may be constants."""
    names = [f"x{i}" if value is not None else "" for i, value in enumerate(inputs)]
    feeds = {name: value for name, value in zip(names, inputs, strict=True) if value is not None}
    held = {name: v for name, v in feeds.items() if constant and name != "x0" and (v.dtype.kind in "ib" or v.ndim <= 1)}
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], **attributes)
    graph = helper.make_graph(
        [node], op,
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), [f"{n}_{i}" for i in range(v.ndim)])
            for n, v in feeds.items() if n not in held
        ],
        [helper.make_empty_tensor_value_info(f"y{i}") for i in range(outputs)],
        [numpy_helper.from_array(v, n) for n, v in held.items()],
    )  # fmt: skip
    ir = 8 if opset < 19 else 10
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    return model, {name: value for name, value in feeds.items() if name not in held}


def difference(
    op: str,
    inputs: Sequence[Array | None],
    opset: int = 17,
    outputs: int = 1,
    *,
    constant: bool = True,
    **attributes: Any,
) -> float | None:
    """Return the largest difference between ORT and the bridge, relative to the largest element; None: not run by ORT."""
    model, feeds = model_of(op, inputs, opset, attributes, outputs=outputs, constant=constant)
    try:
        wanted = list(Session(model, optimization="off").run(feeds).values())
    except GraphoptError:
        return None
    with torch.no_grad():
        found = list(TrainableGraph(model).module(feeds).values())
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        got = b.numpy()
        assert (a.shape, a.dtype) == (got.shape, got.dtype), f"{op}: {a.dtype}{a.shape}, not {got.dtype}{got.shape}"
        x, y = a.astype(np.float64), got.astype(np.float64)
        assert np.array_equal(np.isfinite(x), np.isfinite(y)), f"{op}: infinite elements"
        finite = np.isfinite(x)
        scale = max(float(np.abs(x[finite]).max(initial=0.0)), 1e-30)
        worst = max(worst, float(np.abs(x[finite] - y[finite]).max(initial=0.0)) / scale)
    return worst
