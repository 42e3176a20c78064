"""What ONNX Runtime makes of dequantize -> operator -> quantize: the facts that placement by target stands on.

Each row is one small model and the operators of the graph that ORT ran instead.  Where a newer ORT differs, the row
says which fact of `graphopt/targets.py` and `graphopt/analysis/quantized.py` to look at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.analysis.quantized import INTEGER_FORMS
from graphopt.runtime import Session
from graphopt.targets import CPU_FORMS

Array = np.ndarray[Any, Any]
Nodes = list[onnx.NodeProto]
N = helper.make_node
rng = np.random.default_rng(0)

IMAGE = {"x": [1, 16, 8, 8]}
ROWS = {"x": [4, 64]}
OPEN_ROWS: dict[str, list[Any]] = {"x": ["N", "K", 64]}

CODES: dict[str, Any] = {
    "xs": np.float32(0.05), "xz": np.uint8(128), "ys": np.float32(0.05), "yz": np.uint8(128),
    "other_s": np.float32(0.1), "other_z": np.uint8(100),
}  # fmt: skip
FILTER: dict[str, Any] = {
    "w": rng.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8), "ws": np.full(16, 0.01, np.float32),
    "wz": np.zeros(16, np.int8), "b": rng.integers(-99, 99, 16).astype(np.int32),
    "bs": np.full(16, np.float32(0.05) * np.float32(0.01), np.float32), "bz": np.zeros(16, np.int32),
    "fb": np.ones(16, np.float32),
}  # fmt: skip
MATRIX: dict[str, Any] = {
    "w": rng.integers(-127, 128, (64, 32)).astype(np.int8), "ws": np.full(32, 0.01, np.float32),
    "wz": np.zeros(32, np.int8), "b": rng.integers(-99, 99, 32).astype(np.int32),
    "bs": np.full(32, np.float32(0.05) * np.float32(0.01), np.float32), "bz": np.zeros(32, np.int32),
    "fb": np.ones(32, np.float32),
}  # fmt: skip
PAD: dict[str, Any] = {"pads": [1] * 4}


def model(
    nodes: Nodes, constants: Mapping[str, Any], inputs: Mapping[str, Sequence[Any]] = IMAGE,
    outputs: Sequence[str] = ("y",), opset: int = 17,
) -> onnx.ModelProto:  # fmt: skip
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in inputs.items()],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in used],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def quantize(source: str, made: str, code: str = "x") -> onnx.NodeProto:
    return N("QuantizeLinear", [source, f"{code}s" if len(code) == 1 else f"{code}_s", _zero(code)], [made])


def dequantize(source: str, made: str, code: str = "x", axis: int | None = None) -> onnx.NodeProto:
    attrs: dict[str, Any] = {} if axis is None else {"axis": axis}
    return N("DequantizeLinear", [source, f"{code}s" if len(code) == 1 else f"{code}_s", _zero(code)], [made], **attrs)


def _zero(code: str) -> str:
    return f"{code}z" if len(code) == 1 else f"{code}_z"


def front(code: str = "x") -> Nodes:
    return [quantize("x", "xq", code), dequantize("xq", "xd", code)]


def wrapped(
    middle: Nodes, constants: Mapping[str, Any] | None = None, *, end: str = "m", code: str = "y", **options: Any
) -> onnx.ModelProto:
    """Return Q -> DQ -> `middle` (from xd to `end`) -> Q -> DQ."""
    nodes = [*front(), *middle, quantize(end, "mq", code), dequantize("mq", "y", code)]
    return model(nodes, CODES | dict(constants or {}), **options)


@pytest.fixture
def compiled(tmp_path: Path) -> Any:
    """Return a function from a model to the operators that ORT runs, without Q, DQ and layout changes."""

    def run(given: onnx.ModelProto, *, all_of_them: bool = False, **options: Any) -> Counter[str]:
        path = tmp_path / "compiled.onnx"
        Session(given, optimized_path=path, **options)
        found = Counter(node.op_type for node in onnx.load(path).graph.node)
        for name in () if all_of_them else ("QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput"):
            del found[name]
        return found

    return run


# --- operators between DQ and Q

WITH_KERNEL: dict[str, tuple[int, dict[str, Any], str]] = {
    "Sigmoid": (1, {}, "QLinearSigmoid"),
    "LeakyRelu": (1, {}, "QLinearLeakyRelu"),
    "Softmax": (1, {}, "QLinearSoftmax"),
    "AveragePool": (1, {"kernel_shape": [2, 2]}, "QLinearAveragePool"),
    "GlobalAveragePool": (1, {}, "QLinearGlobalAveragePool"),
    "Add": (2, {}, "QLinearAdd"),
    "Mul": (2, {}, "QLinearMul"),
    "Concat": (2, {"axis": 1}, "QLinearConcat"),
}


@pytest.mark.parametrize("op", WITH_KERNEL)
@pytest.mark.parametrize("code", ["y", "other"])
def test_operators_with_an_integer_kernel_whatever_the_code(op: str, code: str, compiled: Any) -> None:
    count, attrs, kernel = WITH_KERNEL[op]
    assert compiled(wrapped([N(op, ["xd"] * count, ["m"], **attrs)], code=code)) == {kernel: 1}
    assert op in INTEGER_FORMS
    assert not CPU_FORMS[op].keeps


def test_where_has_an_integer_kernel(compiled: Any) -> None:
    found = compiled(wrapped([N("Where", ["c", "xd", "xd"], ["m"])], {"c": np.ones((1, 1, 8, 8), bool)}))
    assert found == {"QLinearWhere": 1}
    assert "Where" in INTEGER_FORMS


KEEPING: dict[str, tuple[list[str], dict[str, Any], dict[str, Any]]] = {
    "MaxPool": ([], {"kernel_shape": [2, 2]}, {}),
    "Resize": (["", "sc"], {"mode": "nearest"}, {"sc": np.array([1, 1, 2, 2], np.float32)}),
    "ReduceMax": ([], {"axes": [2]}, {}),
    "ReduceMin": ([], {"axes": [2]}, {}),
    "Reshape": (["s"], {}, {"s": np.array([1, -1])}),
    "Transpose": ([], {"perm": [0, 2, 3, 1]}, {}),
    "Flatten": ([], {}, {}),
    "Squeeze": (["s"], {}, {"s": np.array([0])}),
    "Unsqueeze": (["s"], {}, {"s": np.array([0])}),
    "DepthToSpace": ([], {"blocksize": 2}, {}),
    "Slice": (["s", "e"], {}, {"s": np.array([0]), "e": np.array([1])}),
    "Gather": (["s"], {"axis": 1}, {"s": np.array([0, 3])}),
    "Expand": (["s"], {}, {"s": np.array([2, 1, 1, 1])}),
    "Tile": (["s"], {}, {"s": np.array([2, 1, 1, 1])}),
}


@pytest.mark.parametrize("op", KEEPING)
def test_what_keeps_values_runs_on_codes_where_both_sides_have_one_code(op: str, compiled: Any) -> None:
    more, attrs, constants = KEEPING[op]
    node = N(op, ["xd", *more], ["m"], **attrs)
    same, other = (compiled(wrapped([node], constants, code=c), all_of_them=True) for c in ("y", "other"))
    assert same == {"QuantizeLinear": 1, op: 1, "DequantizeLinear": 1}
    assert other["QuantizeLinear"] == other["DequantizeLinear"] == 2


@pytest.mark.parametrize("op", [op for op, form in CPU_FORMS.items() if form.keeps and op != "Split"])
def test_the_target_table_names_only_what_keeps(op: str) -> None:
    assert op in KEEPING


@pytest.mark.parametrize(("code", "expected"), [("y", (1, 2)), ("other", (3, 3))])
def test_split_runs_on_codes_where_all_sides_have_one_code(code: str, expected: tuple[int, int], compiled: Any) -> None:
    nodes = [*front(), N("Split", ["xd", "s"], ["m", "n"], axis=1)]
    nodes += [quantize("m", "mq", code), dequantize("mq", "y", code), quantize("n", "nq", code)]
    nodes.append(dequantize("nq", "y2", code))
    found = compiled(model(nodes, CODES | {"s": np.array([8, 8])}, outputs=["y", "y2"]), all_of_them=True)
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == expected


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("places", ["half_pixel", "asymmetric", "align_corners"])
def test_resize_that_interpolates_is_float(mode: str, places: str, compiled: Any) -> None:
    node = N("Resize", ["xd", "", "sc"], ["m"], mode=mode, coordinate_transformation_mode=places)
    found = compiled(wrapped([node], {"sc": np.array([1, 1, 2, 2], np.float32)}), all_of_them=True)
    assert found == {"QuantizeLinear": 2, "DequantizeLinear": 2, "Resize": 1}


VECTOR = {"g": np.ones(16, np.float32)}
WITHOUT_KERNEL: dict[str, tuple[list[str], dict[str, Any], dict[str, Any]]] = {
    **{op: ([], {}, {}) for op in ("Relu", "HardSigmoid", "Tanh", "Erf", "ReduceMean", "Neg", "Exp", "Abs", "Elu")},
    **{op: ([], {}, {}) for op in ("Softplus", "GlobalMaxPool")},
    **{op: (["xd"], {}, {}) for op in ("Sub", "Div", "Max", "Min", "Pow")},
    "SpaceToDepth": ([], {"blocksize": 2}, {}),
    "Pad": (["s"], {}, {"s": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
    "LayerNormalization": (["g"], {}, {"g": np.ones(8, np.float32)}),
    "BatchNormalization": (["g"] * 4, {}, VECTOR),
    "InstanceNormalization": (["g"] * 2, {}, VECTOR),
    "PRelu": (["g"], {}, {"g": np.ones((16, 1, 1), np.float32)}),
    "ConvTranspose": (["wd"], {}, FILTER),
}


@pytest.mark.parametrize("op", WITHOUT_KERNEL)
def test_operators_without_an_integer_kernel_even_with_one_code(op: str, compiled: Any) -> None:
    more, attrs, constants = WITHOUT_KERNEL[op]
    weight = [dequantize("w", "wd", "w", axis=0)] if "wd" in more else []
    found = compiled(wrapped([*weight, N(op, ["xd", *more], ["m"], **attrs)], constants), all_of_them=True)
    assert found["QuantizeLinear"] == 2
    assert found[op] == 1
    assert op not in CPU_FORMS


def test_hardswish_is_taken_apart(compiled: Any) -> None:
    assert compiled(wrapped([N("HardSwish", ["xd"], ["m"])])) == {"HardSigmoid": 1, "Mul": 1}


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_a_constant_operand_must_be_quantized_too(op: str, compiled: Any) -> None:
    plain = compiled(wrapped([N(op, ["xd", "k"], ["m"])], {"k": np.float32(2)}))
    codes = compiled(wrapped([dequantize("k", "kd"), N(op, ["xd", "kd"], ["m"])], {"k": np.uint8(168)}))
    assert (plain, codes) == ({op: 1}, {f"QLinear{op}": 1})


# --- convolutions

FILTERED = dequantize("w", "wd", "w", axis=0)
BIAS = dequantize("b", "bd", "b", axis=0)
CONV = N("Conv", ["xd", "wd"], ["m"], **PAD)
FIRST = {"yz": np.uint8(0)}
"""A zero point at the type's minimum: nothing below zero comes through."""

CONVS: dict[str, tuple[onnx.ModelProto, bool]] = {
    "plain": (wrapped([FILTERED, CONV], FILTER), True),
    "int32 bias": (wrapped([FILTERED, BIAS, N("Conv", ["xd", "wd", "bd"], ["m"], **PAD)], FILTER), True),
    "float bias": (wrapped([FILTERED, N("Conv", ["xd", "wd", "fb"], ["m"], **PAD)], FILTER), True),
    "bias of another scale": (
        wrapped([FILTERED, BIAS, N("Conv", ["xd", "wd", "bd"], ["m"], **PAD)], FILTER | {"bs": 2 * FILTER["bs"]}),
        False,
    ),
    "depthwise": (
        wrapped([FILTERED, N("Conv", ["xd", "wd"], ["m"], group=16, **PAD)], FILTER | {"w": FILTER["w"][:, :1]}), True,
    ),
    "one dimension": (
        wrapped(
            [FILTERED, N("Conv", ["xd", "wd"], ["m"])], FILTER | {"w": FILTER["w"][:, :, 0]}, inputs={"x": [1, 16, 8]}
        ), True,
    ),
    "no Q behind": (model([*front(), FILTERED, N("Conv", ["xd", "wd"], ["y"], **PAD)], CODES | FILTER), False),
    "raw output read by a float": (
        model(
            [*front(), FILTERED, CONV, quantize("m", "mq"), dequantize("mq", "y"), N("Exp", ["m"], ["e"])],
            CODES | FILTER, outputs=["y", "e"],
        ), False,
    ),
    "Relu, zero point at the minimum": (
        wrapped([FILTERED, CONV, N("Relu", ["m"], ["r"])], FILTER | FIRST, end="r"), True
    ),
    "Relu, zero point above it": (
        wrapped([FILTERED, CONV, N("Relu", ["m"], ["r"])], FILTER | {"yz": np.uint8(5)}, end="r"), False
    ),
    "LeakyRelu with nothing between": (wrapped([FILTERED, CONV, N("LeakyRelu", ["m"], ["r"])], FILTER, end="r"), False),
    "Clip at the range of Q": (
        wrapped(
            [FILTERED, CONV, N("Clip", ["m", "lo", "hi"], ["r"])],
            FILTER | FIRST | {"ys": np.float32(6 / 255), "lo": np.float32(0), "hi": np.float32(6)}, end="r",
        ), True,
    ),
    "Clip inside the range of Q": (
        wrapped(
            [FILTERED, CONV, N("Clip", ["m", "lo", "hi"], ["r"])],
            FILTER | FIRST | {"ys": np.float32(8 / 255), "lo": np.float32(0), "hi": np.float32(6)}, end="r",
        ), False,
    ),
    "16 bits": (
        wrapped([FILTERED, CONV], FILTER | {"xz": np.uint16(3), "yz": np.uint16(3)}, opset=21), False
    ),
    "weight alone": (model([FILTERED, N("Conv", ["x", "wd"], ["y"], **PAD)], FILTER), False),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVS)
def test_convolutions(case: str, compiled: Any) -> None:
    given, integer = CONVS[case]
    found = compiled(given)
    assert (found["QLinearConv"], found["Conv"] + found["FusedConv"]) == ((1, 0) if integer else (0, 1))


def activations(kind: type[np.generic], nodes: Nodes, outputs: Sequence[str]) -> onnx.ModelProto:
    zero: Any = kind(0)
    codes = CODES | {"xz": zero, "yz": zero}
    back = [quantize("m", "mq", "y"), dequantize("mq", "y", "y")]
    return model([*front(), FILTERED, CONV, *back, *nodes], codes | FILTER, outputs=outputs)


@pytest.mark.parametrize(("kind", "shared"), [(np.uint8, 1), (np.int8, 0)])
def test_signed_activations_that_are_shared_leave_convolutions_in_float(
    kind: type[np.generic], shared: int, compiled: Any
) -> None:
    alone = activations(kind, [], ["y"])
    read_twice = activations(kind, [N("Exp", ["xd"], ["e"])], ["y", "e"])
    assert compiled(alone)["QLinearConv"] == 1
    assert compiled(read_twice)["QLinearConv"] == shared


@pytest.mark.parametrize(("factor", "integer"), [(1.0, True), (1.009, True), (1.03, False), (0.97, False)])
def test_a_bias_scale_that_is_nearly_right_is_taken_for_right(factor: float, integer: bool, compiled: Any) -> None:
    """Up to about 1 % off, the kernel takes x scale * w scale for it; beyond, the layer is float."""
    off = FILTER | {"bs": FILTER["bs"] * np.float32(factor), "b": np.full(16, 12000, np.int32)}
    given = wrapped([FILTERED, BIAS, N("Conv", ["xd", "wd", "bd"], ["m"], **PAD)], off)
    assert bool(compiled(given)["QLinearConv"]) is integer
    if integer:
        y = Session(given).run({"x": np.zeros(IMAGE["x"], np.float32)})["y"]
        np.testing.assert_allclose(y, 6.0, atol=1e-4)  # the output's step is 0.05; 1.009 would give 6.05


# --- products

COLUMNS = dequantize("w", "wd", "w", axis=1)
PRODUCT = N("MatMul", ["xd", "wd"], ["m"])
SHIFTED = [COLUMNS, PRODUCT, N("Add", ["m", "fb"], ["r"])]


def raw(nodes: Nodes, inputs: Mapping[str, Sequence[Any]] = ROWS) -> onnx.ModelProto:
    """Return a model without Q on its output y."""
    return model([*front(), *nodes], CODES | MATRIX, inputs)


def gemm(made: str, *bias: str, **attrs: Any) -> onnx.NodeProto:
    return N("Gemm", ["xd", "wd", *bias], [made], **attrs)


def two(made: str) -> Nodes:
    return [quantize("z", "zq"), dequantize("zq", "zd"), N("MatMul", ["xd", "zd"], [made])]


PAIR = {"x": [4, 64], "z": [64, 4]}

PRODUCTS: dict[str, tuple[onnx.ModelProto, dict[str, int]]] = {
    "MatMul": (wrapped([COLUMNS, PRODUCT], MATRIX, inputs=ROWS), {"QLinearMatMul": 1}),
    "MatMul without Q": (raw([COLUMNS, N("MatMul", ["xd", "wd"], ["y"])]), {"MatMulIntegerToFloat": 1}),
    "MatMul of activations": (wrapped(two("m"), inputs=PAIR), {"QLinearMatMul": 1}),
    "MatMul of activations without Q": (raw(two("y"), PAIR), {"MatMulIntegerToFloat": 1}),
    "MatMul and Add, static, without Q: one Gemm, float": (
        raw([COLUMNS, PRODUCT, N("Add", ["m", "fb"], ["y"])]), {"Gemm": 1},
    ),
    "MatMul and Add, dynamic, without Q": (
        raw([COLUMNS, PRODUCT, N("Add", ["m", "fb"], ["y"])], OPEN_ROWS), {"MatMulIntegerToFloat": 1, "Add": 1},
    ),
    "MatMul and Add, static, Q behind": (wrapped(SHIFTED, MATRIX, inputs=ROWS, end="r"), {"QGemm": 1}),
    "MatMul and Add, dynamic, Q behind": (
        wrapped(SHIFTED, MATRIX, inputs=OPEN_ROWS, end="r"), {"MatMulIntegerToFloat": 1, "Add": 1},
    ),
    "Gemm": (wrapped([COLUMNS, gemm("m")], MATRIX, inputs=ROWS), {"QGemm": 1}),
    "Gemm, int32 bias": (wrapped([COLUMNS, BIAS, gemm("m", "bd")], MATRIX, inputs=ROWS), {"QGemm": 1}),
    "Gemm, float bias": (wrapped([COLUMNS, gemm("m", "fb")], MATRIX, inputs=ROWS), {"QGemm": 1}),
    "Gemm without Q": (raw([COLUMNS, gemm("y")]), {"QGemm": 1}),
    "Gemm without Q, int32 bias": (raw([COLUMNS, BIAS, gemm("y", "bd")]), {"QGemm": 1}),
    "Gemm without Q, float bias": (raw([COLUMNS, gemm("y", "fb")]), {"Gemm": 1}),
    "Gemm, alpha 2, int32 bias": (
        wrapped([COLUMNS, BIAS, gemm("m", "bd", alpha=2.0)], MATRIX, inputs=ROWS), {"Gemm": 1},
    ),
    "int8 activations": (
        wrapped([COLUMNS, PRODUCT], MATRIX | {"xz": np.int8(0), "yz": np.int8(0)}, inputs=ROWS), {"QLinearMatMul": 1},
    ),
    "weight alone": (model([COLUMNS, N("MatMul", ["x", "wd"], ["y"])], MATRIX, ROWS, opset=21), {"MatMulNBits": 1}),
    "weight alone, blocks": (
        model(
            [N("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0, block_size=32), N("MatMul", ["x", "wd"], ["y"])],
            MATRIX | {"ws": np.full((2, 32), 0.01, np.float32), "wz": np.zeros((2, 32), np.int8)}, ROWS, opset=21,
        ), {"MatMulNBits": 1},
    ),
    "embedding alone": (
        model([COLUMNS, N("Gather", ["wd", "i"], ["e"]), N("Add", ["e", "x"], ["y"])],
              MATRIX | {"i": np.array([1, 2])}, {"x": [2, 32]}), {"Gather": 1, "Add": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PRODUCTS)
def test_products(case: str, compiled: Any) -> None:
    given, expected = PRODUCTS[case]
    assert compiled(given) == expected


def dynamic(op: str, constants: Mapping[str, Any], inputs: Mapping[str, Sequence[Any]]) -> onnx.ModelProto:
    nodes = [
        N("DynamicQuantizeLinear", ["x"], ["xq", "s", "z"]), N(op, ["xq", "w", "z", "none"], ["i"]),
        N("Cast", ["i"], ["f"], to=TensorProto.FLOAT), N("Mul", ["s", "one"], ["both"]), N("Mul", ["f", "both"], ["y"]),
    ]  # fmt: skip
    return model(nodes, dict(constants) | {"none": np.int8(0), "one": np.float32(0.01)}, inputs)


def test_dynamic_products_fuse_and_dynamic_convolutions_do_not(compiled: Any) -> None:
    assert compiled(dynamic("MatMulInteger", MATRIX, ROWS)) == {"DynamicQuantizeMatMul": 1}
    found = compiled(dynamic("ConvInteger", FILTER, IMAGE))
    assert found["ConvInteger"] == 1
    assert found["DynamicQuantizeLinear"] == 1


def test_weight_only_products_round_activations_unless_told_otherwise() -> None:
    """MatMulNBits computes with int8 activations by default; accuracy level 1 asks for float32."""
    given, _ = PRODUCTS["weight alone"]
    x = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    exact = x @ (MATRIX["w"].astype(np.float32) * MATRIX["ws"])
    largest = np.abs(exact).max()
    default, told = (
        np.abs(Session(given, config=config).run({"x": x})["y"] - exact).max() / largest
        for config in ({}, {"session.qdq_matmulnbits_accuracy_level": "1"})
    )
    assert told < 1e-5  # sums of 64 float32 products
    assert 1e-4 < default < 2e-2  # 8 bits per activation, in blocks
