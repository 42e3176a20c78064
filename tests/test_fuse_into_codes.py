"""fuse-into-codes: products and sums that a code can say, and HardSwish between codes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.model import load
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.profile import optimized_graph
from graphopt.runtime import Session

Array = np.ndarray[Any, Any]


def model(body: str, **constants: Any) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]>\nagraph (uint8[N,64] q) => (uint8[N,64] r) {{ {body} }}'
    )
    kinds = {"z": np.uint8, "zo": np.uint8}
    for name, value in {"s": 0.05, "z": 100, "so": 0.03, "zo": 14, **constants}.items():
        tensor = onnx.numpy_helper.from_array(np.array(value, kinds.get(name, np.float32)), name)
        proto.graph.initializer.append(tensor)
    return proto


def fused(proto: onnx.ModelProto) -> Result:
    return Pipeline("fuse-into-codes, eliminate-dead").run(proto, settings=Settings(verify="off", on_failure="stop"))


def codes_apart(before: onnx.ModelProto, after: onnx.ModelProto) -> int:
    """Return how many steps the results differ, over all codes."""
    feed = {"q": np.arange(256, dtype=np.uint8).reshape(4, 64)}
    a, b = (Session(proto, optimization="off").run(feed)["r"].astype(int) for proto in (before, after))
    return int(np.abs(a - b).max())


def ops(result: Result) -> Counter[str]:
    return Counter(node.op_type for node in result.proto.graph.node)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 100.0), st.integers(-90, 90))
def test_products_and_sums_go(factor: float, steps: int) -> None:
    body = "x = DequantizeLinear (q, s, z) y = Mul (x, c) w = Add (y, b) r = QuantizeLinear (w, so, zo)"
    scale = 0.05 * factor  # as large a range as the input's, so that few codes are cut off
    shift = float(np.float32(scale) * steps)
    proto = model(body, c=factor, b=shift, so=scale, zo=128)
    result = fused(proto)
    assert ops(result) == {"DequantizeLinear": 1, "QuantizeLinear": 1}
    assert codes_apart(proto, result.proto) <= 1  # a tie may fall on the other side


@pytest.mark.parametrize(
    ("body", "constants", "why"),
    [
        ("w = Add (x, b)", {"b": 0.1 / 3}, "no whole number"),
        ("w = Add (x, b)", {"b": 30.0}, "leaves the code"),
        ("w = Mul (x, c)", {"c": -2.0}, "not positive"),
        ("w = HardSwish (x)", {"s": 0.051}, "no whole number"),
        ("w = HardSwish (x)", {"z": 10}, "outside of it"),
    ],
)
def test_refused_with_the_reason(body: str, constants: dict[str, Any], why: str) -> None:
    proto = model(f"x = DequantizeLinear (q, s, z) {body} r = QuantizeLinear (w, so, zo)", **constants)
    result = fused(proto)
    (miss,) = result.report.passes[0].blocked
    assert why in miss["why"]
    assert codes_apart(proto, result.proto) == 0


def test_a_value_read_elsewhere_stays() -> None:
    proto = model("x = DequantizeLinear (q, s, z) w = Mul (x, c) r = QuantizeLinear (w, so, zo)", c=2.0)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, ["N", 64]))
    assert ops(fused(proto))["Mul"] == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(20, 120), st.integers(40, 215), st.floats(0.6, 1.4))
def test_hard_swish_becomes_an_integer_product(half: int, zero: int, fit: float) -> None:
    """Scales such that 3 is `half` steps; the result's code from the least of HardSwish to the largest."""
    scale = float(np.float32(3.0 / half))
    if zero - half < 0:
        zero = half
    top = max(0.5, (255 - zero) * scale * fit)
    out = (top + 0.375) / 255
    proto = model(
        "x = DequantizeLinear (q, s, z) w = HardSwish (x) r = QuantizeLinear (w, so, zo)",
        s=scale, z=zero, so=out, zo=round(0.375 / out),
    )  # fmt: skip
    result = fused(proto)
    assert "HardSwish" not in ops(result)
    # the gate is in steps of 1/255, half of which times x is at most top / 510: half a step of the result, and one tie
    allowed = 1 + int(np.ceil((255 - zero) * scale / 510 / out))
    assert codes_apart(proto, result.proto) <= allowed
    graph = optimized_graph(load(result.proto))
    assert graph is not None
    assert sorted(n.op_type for n in graph.graph.node) == ["DequantizeLinear", "QLinearMul", "QuantizeLinear"]
