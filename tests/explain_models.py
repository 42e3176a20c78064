"""Small models, each of which makes ORT do one thing that `explain` must tell; and ways to ask for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from graphopt import base, dry_run, registry
from graphopt.explain import Explanation, NodeRow
from graphopt.explain import explain as run_explain
from graphopt.explained import explanation
from graphopt.pipeline import Pipeline

FLOAT, HALF, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BOOL
N = helper.make_node
Input = tuple[str, int, list[int]]


def numbers(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[Input],
    outputs: str | list[str],
    constants: dict[str, Any] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    names = [outputs] if isinstance(outputs, str) else outputs
    weights = [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(o, FLOAT, None) for o in names], weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def explain(given: Any, **options: Any) -> Explanation:
    return run_explain(given, measure=False, **options)


def rows(found: Explanation) -> dict[str, NodeRow]:
    by_name = {row.name: row for row in found.nodes}
    assert len(by_name) == len(found.nodes)
    return by_name


def shown(found: Explanation, *, everything: bool = False, width: int = 160) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(explanation(found, everything=everything))
    return capture.get().splitlines()


def with_pipeline(monkeypatch: pytest.MonkeyPatch, spec: str, *own: type[base.Pass]) -> None:
    """Let dry runs run `spec`, in which passes of the test's own may be named."""
    registry.all_passes()  # built-ins register when they are first asked for
    for cls in own:  # for this test alone: others go through all that are registered
        monkeypatch.setitem(registry._passes, cls.name, cls)
    monkeypatch.setattr(dry_run, "default_pipeline", lambda: Pipeline(spec))


IMAGE: list[Input] = [("x", FLOAT, [1, 16, 12, 12])]
PAD: dict[str, Any] = {"pads": [1] * 4}


def between(middle: list[onnx.NodeProto], constants: dict[str, Any] | None = None, opset: int = 20) -> onnx.ModelProto:
    """`middle` from tensor a to tensor m, between two convolutions that run blocked."""
    nodes = [N("Conv", ["x", "w0"], ["a"], name="before", **PAD), *middle]
    nodes.append(N("Conv", ["m", "w1"], ["y"], name="after", **PAD))
    weights = {"w0": numbers(16, 16, 3, 3), "w1": numbers(16, 16, 3, 3)}
    return model(nodes, IMAGE, "y", weights | (constants or {}), opset)


def conv_norm_relu() -> onnx.ModelProto:
    middle = [
        N("BatchNormalization", ["a", "s", "s", "s", "s"], ["n"], name="norm"),
        N("Relu", ["n"], ["m"], name="bend"),
    ]
    return between(middle, {"s": np.ones(16, np.float32)})


def scalar_mul() -> onnx.ModelProto:
    middle = [N("Relu", ["a"], ["r"], name="bend"), N("Mul", ["r", "two"], ["m"], name="scale")]
    return between(middle, {"two": np.array(2, np.float32)})


def gemm() -> onnx.ModelProto:
    nodes = [N("MatMul", ["x", "w"], ["p"], name="product"), N("Add", ["p", "b"], ["y"], name="shift")]
    return model(nodes, [("x", FLOAT, [2, 8])], "y", {"w": numbers(8, 4), "b": numbers(4)})


def layer_norm() -> onnx.ModelProto:
    nodes = [
        N("ReduceMean", ["x"], ["mu"], name="mean", axes=[-1]),
        N("Sub", ["x", "mu"], ["d"], name="center"),
        N("Pow", ["d", "two"], ["d2"], name="square"),
        N("ReduceMean", ["d2"], ["v"], name="variance", axes=[-1]),
        N("Add", ["v", "tiny"], ["ve"], name="stable"),
        N("Sqrt", ["ve"], ["s"], name="root"),
        N("Div", ["d", "s"], ["n"], name="normal"),
        N("Mul", ["n", "g"], ["ng"], name="gain"),
        N("Add", ["ng", "b"], ["y"], name="shift"),
    ]
    constants = {"two": np.array(2, np.float32), "tiny": np.array(1e-5, np.float32), "g": numbers(8), "b": numbers(8)}
    return model(nodes, [("x", FLOAT, [2, 3, 8])], "y", constants)


def gelu() -> onnx.ModelProto:
    nodes = [
        N("Div", ["x", "root2"], ["d"], name="scale"),
        N("Erf", ["d"], ["e"], name="erf"),
        N("Add", ["e", "one"], ["s"], name="shift"),
        N("Mul", ["x", "s"], ["t"], name="times"),
        N("Mul", ["t", "half"], ["y"], name="halve"),
    ]
    constants = {k: np.array(v, np.float32) for k, v in (("root2", 2**0.5), ("one", 1), ("half", 0.5))}
    return model(nodes, [("x", FLOAT, [2, 8])], "y", constants)


def tidied() -> onnx.ModelProto:
    """What is folded, shared, removed: sum and exp of constants, two equal Negs, Identity, Cast, a dead node."""
    nodes = [
        N("Add", ["a", "b"], ["s"], name="sum"),
        N("Exp", ["s"], ["e"], name="exp"),
        N("Identity", ["x"], ["i"], name="nothing"),
        N("Cast", ["i"], ["c"], name="same type", to=FLOAT),
        N("Shape", ["c"], ["sh"], name="shape"),
        N("Reshape", ["c", "sh"], ["r"], name="reshape"),
        N("Mul", ["r", "e"], ["m"], name="times"),
        N("Neg", ["m"], ["n1"], name="neg1"),
        N("Neg", ["m"], ["n2"], name="neg2"),
        N("Sin", ["n1"], ["q1"], name="sin"),
        N("Cos", ["n2"], ["q2"], name="cos"),
        N("Abs", ["m"], ["unread"], name="dead"),
        N("Sum", ["m", "q1", "q2"], ["y"], name="total"),
    ]
    return model(nodes, [("x", FLOAT, [3, 4])], "y", {"a": numbers(4), "b": numbers(4)})


def branches(constant: bool) -> onnx.ModelProto:
    """An If whose condition is constant, or an input."""

    def branch(name: str, op: str) -> onnx.GraphProto:
        nodes = [N(op, ["x"], [f"{name}_t"], name=f"{name} {op}"), N("Exp", [f"{name}_t"], [f"{name}_o"], name=name)]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}_o", FLOAT, None)])

    nodes = [
        N("If", ["c"], ["i"], name="choose", then_branch=branch("then", "Sin"), else_branch=branch("else", "Cos")),
        N("Neg", ["i"], ["y"], name="neg"),
    ]
    inputs: list[Input] = [("x", FLOAT, [2, 8])]
    if not constant:
        inputs.append(("c", BOOL, []))
    return model(nodes, inputs, "y", {"c": np.array(True)} if constant else {})


def half() -> onnx.ModelProto:
    nodes = [N("MatMul", ["x", "w"], ["p"], name="product"), N("Softplus", ["p"], ["y"], name="bend")]
    found = model(nodes, [("x", HALF, [2, 8])], "y", {"w": numbers(8, 8, dtype=np.float16)})
    found.graph.output[0].type.tensor_type.elem_type = HALF
    return found


def transposed() -> onnx.ModelProto:
    nodes = [
        N("Transpose", ["x"], ["a"], name="there", perm=[0, 2, 3, 1]),
        N("Relu", ["a"], ["b"], name="bend"),
        N("Transpose", ["b"], ["y"], name="back", perm=[0, 3, 1, 2]),
    ]
    return model(nodes, [("x", FLOAT, [1, 4, 5, 6])], "y")


QUANTIZED = {
    "xs": np.float32(0.02), "z": np.uint8(128), "ws": np.full(16, 0.01, np.float32), "wz": np.zeros(16, np.int8),
    "w": np.random.default_rng(0).integers(-127, 128, (16, 16, 3, 3)).astype(np.int8), "ys": np.float32(0.1),
    "least": np.uint8(0), "five": np.uint8(5), "b": numbers(16), "low": np.float32(0), "high": np.float32(6),
}  # fmt: skip
"""Scales, zero points and weights of the models below."""


def quantized(
    middle: list[onnx.NodeProto] | None = None,
    *,
    zero: str = "z",
    end: str = "c",
    source: str = "xd",
    weight: str = "wd",
    op: str = "Conv",
    tail: list[onnx.NodeProto] | None = None,
    outputs: list[str] | None = None,
) -> onnx.ModelProto:
    """Q, DQ, convolution to c, `middle` from c to `end`, Q, DQ; or `tail` instead of the last two."""
    nodes = [
        N("QuantizeLinear", ["x", "xs", "z"], ["xq"], name="xQ"),
        N("DequantizeLinear", ["xq", "xs", "z"], ["xd"], name="xDQ"),
        N("DequantizeLinear", ["w", "ws", "wz"], ["wd"], name="wDQ", axis=0 if op == "Conv" else 1),
        N(op, [source, weight], ["c"], name="conv", **PAD),
        *(middle or []),
    ]
    last = [
        N("QuantizeLinear", [end, "ys", zero], ["yq"], name="yQ"),
        N("DequantizeLinear", ["yq", "ys", zero], ["y"], name="yDQ"),
    ]
    return model([*nodes, *(last if tail is None else tail)], IMAGE, outputs or ["y"], QUANTIZED)


def quantized_node(nodes: list[onnx.NodeProto], opset: int = 17, **constants: Any) -> onnx.ModelProto:
    """Q, DQ to xd, `nodes` from there to c, Q, DQ."""
    ends = [
        N("QuantizeLinear", ["x", "xs", "z"], ["xq"], name="xQ"),
        N("DequantizeLinear", ["xq", "xs", "z"], ["xd"], name="xDQ"),
        N("QuantizeLinear", ["c", "ys", "z"], ["yq"], name="yQ"),
        N("DequantizeLinear", ["yq", "ys", "z"], ["y"], name="yDQ"),
    ]
    return model([*ends[:2], *nodes, *ends[2:]], IMAGE, "y", QUANTIZED | constants, opset)


def quantized_matmul(*, quantize_output: bool) -> onnx.ModelProto:
    nodes = [
        N("QuantizeLinear", ["x", "xs", "z"], ["xq"], name="xQ"),
        N("DequantizeLinear", ["xq", "xs", "z"], ["xd"], name="xDQ"),
        N("DequantizeLinear", ["w", "s", "o"], ["wd"], name="wDQ"),
        N("MatMul", ["xd", "wd"], ["p"], name="product"),
        N("Add", ["p", "b"], ["a"], name="shift"),
    ]
    if quantize_output:
        nodes.append(N("QuantizeLinear", ["a", "ys", "z"], ["aq"], name="yQ"))
        nodes.append(N("DequantizeLinear", ["aq", "ys", "z"], ["y"], name="yDQ"))
    else:
        nodes.append(N("Tanh", ["a"], ["y"], name="tanh"))
    weight = np.random.default_rng(0).integers(-127, 128, (32, 16)).astype(np.int8)
    constants = QUANTIZED | {"w": weight, "s": np.float32(0.01), "o": np.int8(0)}
    return model(nodes, [("x", FLOAT, [4, 32])], "y", constants)


def weight_only_matmul() -> onnx.ModelProto:
    nodes = [
        N("DequantizeLinear", ["w", "s", "o"], ["wd"], name="wDQ"),
        N("MatMul", ["x", "wd"], ["y"], name="product"),
    ]
    weight = np.random.default_rng(0).integers(-127, 128, (32, 16)).astype(np.int8)
    return model(nodes, [("x", FLOAT, [4, 32])], "y", {"w": weight, "s": np.float32(0.01), "o": np.int8(0)}, 21)


def dynamic_matmul() -> onnx.ModelProto:
    nodes = [
        N("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="quantize"),
        N("MatMulInteger", ["q", "w", "z", "wz"], ["i"], name="product"),
        N("Cast", ["i"], ["f"], name="cast", to=FLOAT),
        N("Mul", ["s", "ws"], ["both"], name="scales"),
        N("Mul", ["f", "both"], ["y"], name="scale"),
    ]
    weight = np.random.default_rng(0).integers(-127, 128, (32, 16)).astype(np.int8)
    return model(nodes, [("x", FLOAT, [4, 32])], "y", {"w": weight, "ws": np.float32(0.01), "wz": np.int8(0)})
