"""What tests of rule families share: small models as text, what a pipeline makes of them, and equal outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser

from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-5
"""The exactness rule of passes: relative to the largest element of an output."""


def parsed(
    body: str,
    *,
    opset: int = 17,
    inputs: str = "float[N,4,6] x",
    outputs: str = "float[N,4,6] y",
    constants: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """Return a model of one line of text; constants are floats of `dtype` unless they are arrays of integers."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    used = {name for node in model.graph.node for name in node.input}
    for name, values in (constants or {}).items():
        if name in used:
            held = np.asarray(values)
            held = held if held.dtype.kind == "i" else held.astype(dtype)
            model.graph.initializer.append(onnx.numpy_helper.from_array(held, name))
    return model


def run(model: onnx.ModelProto, pipeline: str) -> Result:
    """Run passes, nothing caught and nothing checked."""
    return Pipeline(pipeline).run(model, settings=Settings(verify="off", on_failure="stop"))


def ops(result: Result) -> str:
    """Return the operators of the result, in order."""
    return " ".join(node.op_type for node in result.model.proto.graph.node)


def reasons(result: Result) -> list[str]:
    """Return the reasons of all near misses."""
    return [b["why"] for record in result.report.passes for b in record.blocked]


def feeds(model: onnx.ModelProto, *, size: int = 3, seed: int = 0, scale: float = 2.0) -> dict[str, Array]:
    """Return random floats and small integers; symbolic dimensions are `size`."""
    rng = np.random.default_rng(seed)
    constant = {t.name for t in model.graph.initializer}
    found: dict[str, Array] = {}
    for info in model.graph.input:
        if info.name in constant:
            continue
        tensor = info.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else size for d in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype.kind == "i":
            found[info.name] = np.asarray(rng.integers(0, 2, shape), dtype)
        else:
            found[info.name] = np.asarray(rng.normal(size=shape) * scale, dtype)
    return found


def assert_equal_outputs(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    *,
    tolerance: float = TOLERANCE,
    scales: tuple[float, ...] = (2.0,),
    sizes: tuple[int, ...] = (3,),
) -> None:
    """Compare in ORT, its own optimisations off and on, against the untouched model."""
    reference = Session(before, optimization="off")
    changed = [Session(after, optimization="off"), Session(after, optimization="all")]
    for seed, (scale, size) in enumerate((a, b) for a in scales for b in sizes):
        given = feeds(before, seed=seed, scale=scale, size=size)
        wanted = reference.run(given)
        for session in changed:
            for name, found in session.run(given).items():
                _same(name, wanted[name], found, tolerance)


def _same(name: str, wanted: Array, found: Array, tolerance: float) -> None:
    assert found.dtype == wanted.dtype, name
    assert found.shape == wanted.shape, name
    if wanted.dtype.kind in "iub":
        np.testing.assert_array_equal(found, wanted, err_msg=name)
        return
    wide, finite = wanted.astype(np.float64), np.isfinite(wanted.astype(np.float64))
    largest = np.abs(wide[finite]).max(initial=1e-30)
    np.testing.assert_allclose(found.astype(np.float64), wide, rtol=0, atol=tolerance * largest, err_msg=name)
