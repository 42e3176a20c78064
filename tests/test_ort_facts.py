"""What ONNX Runtime does, as `explain` tells it: what it adds and why, what stays blocked, what becomes integer.

These hold `kernels.py`, `layout.py` and `analysis/quantized.py` against the ORT that is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from graphopt import kernels
from graphopt.analysis.quantized import INTEGER_FORMS
from tests import explain_models as models
from tests.explain_models import explain, rows, shown, with_pipeline

N = helper.make_node


@pytest.fixture(autouse=True)
def _tidy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with_pipeline(monkeypatch, "eliminate-identity")


# --- what ORT adds


def test_reorders_and_the_node_that_forces_them() -> None:
    found = explain(models.scalar_mul())
    inner = [m for m in found.moves if m.forced_op == "Mul"]
    assert [(m.op, m.node, m.why) for m in inner] == [
        ("ReorderOutput", "scale", "its operand 'two' is a scalar constant"),
        ("ReorderInput", "scale", "its operand 'two' is a scalar constant"),
    ]
    assert [(m.op, m.node, m.forced_op) for m in found.moves if m not in inner] == [
        ("ReorderInput", "x", "input"), ("ReorderOutput", "y", "output"),
    ]  # fmt: skip
    assert found.reorders[0] == 4
    assert found.reorders[1] == pytest.approx(sum(m.share for m in found.moves))
    assert found.blocked_kernels == 2
    assert found.elementwise_outside == rows(found)["scale"].share


def test_the_node_before_is_named_where_it_is_the_cause() -> None:
    """Relu would take a blocked tensor: what keeps it from getting one is the operator before it."""
    middle = [N("Exp", ["a"], ["e"], name="exp"), N("Relu", ["e"], ["m"], name="bend")]
    found = explain(models.between(middle))
    assert {m.node for m in found.moves if m.forced_op == "Exp"} == {"exp"}
    assert not [m for m in found.moves if m.node == "bend"]


def reorders(middle: list[onnx.NodeProto], constants: dict[str, Any] | None = None) -> int:
    """How many reorders stand between the two convolutions around `middle`."""
    found = explain(models.between(middle, constants))
    return sum(1 for m in found.moves if m.op in kernels.REORDERS and m.forced_op not in ("input", "output"))


POOL: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1] * 4}
SPECIAL: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
    "Conv": ([N("Conv", ["a", "w1"], ["m"], **models.PAD)], {}),
    "MaxPool": ([N("MaxPool", ["a"], ["m"], **POOL)], {}),
    "AveragePool": ([N("AveragePool", ["a"], ["m"], **POOL)], {}),
    "BatchNormalization": (
        [N("Relu", ["a"], ["r"]), N("BatchNormalization", ["r", "s", "s", "s", "s"], ["m"])],
        {"s": np.ones(16, np.float32)},
    ),
    "QuickGelu": ([N("Sigmoid", ["a"], ["s"]), N("Mul", ["a", "s"], ["m"])], {}),
}


@pytest.mark.parametrize("op", sorted(kernels.BLOCKED_ALWAYS))
def test_operators_that_stay_blocked(op: str) -> None:
    # a pool before it: so that nothing becomes the activation of the convolution
    plain = [N("MaxPool", ["a"], ["p"], **POOL), N(op, ["p"], ["m"])]
    middle, constants = SPECIAL.get(op, (plain, {}))
    assert reorders(middle, constants) == 0


@pytest.mark.parametrize("op", sorted(kernels.BLOCKED_ACTIVATIONS))
def test_activations_that_stay_blocked_only_after_a_convolution(op: str) -> None:
    bounds = {"low": np.float32(-1), "high": np.float32(1)} if op == "Clip" else {}
    assert reorders([N(op, ["a", *bounds], ["m"])], bounds) == 0
    assert reorders([N("MaxPool", ["a"], ["p"], **POOL), N(op, ["p", *bounds], ["m"])], bounds) == 2


@pytest.mark.parametrize("op", sorted(kernels.BLOCKED_SUMS - {"Concat"}))
def test_sums_that_stay_blocked_only_where_all_operands_are(op: str) -> None:
    pool = [N("Relu", ["a"], ["r"]), N("MaxPool", ["r"], ["p"], **POOL)]
    assert reorders([*pool, N(op, ["r", "p"], ["m"])]) == 0
    assert reorders([*pool, N(op, ["p", "k"], ["m"])], {"k": np.array(2, np.float32)}) == 2
    assert reorders([*pool, N(op, ["p", "x"], ["m"])]) == 2


@pytest.mark.parametrize("op", ["Exp", "Neg", "Elu", "Softplus", "Abs", "Softmax"])
def test_operators_without_a_blocked_kernel(op: str) -> None:
    assert op not in kernels.BLOCKED_ALWAYS
    found = explain(models.between([N(op, ["a"], ["m"], name="it")]))
    assert {m.why for m in found.moves if m.node == "it"} == {"has no kernel in the blocked layout"}


def test_channels_last_integer_convolutions_force_transposes() -> None:
    found = explain(models.quantized())
    assert [(m.op, m.node, m.why) for m in found.moves] == [
        ("Transpose", "conv", "its integer kernel runs channels-last")
    ] * 2
    assert rows(found)["conv"].kernel == "QLinearConv"


def test_casts_around_what_has_no_kernel_for_its_type() -> None:
    found = explain(models.half())
    assert [(m.op, m.node) for m in found.moves] == [("Cast", "product"), ("Cast", "bend")]
    assert all("no kernel for its type" in m.why for m in found.moves)


# --- integers


def test_integer_kernels_count_as_integer() -> None:
    for make in (models.quantized, models.weight_only_matmul, models.dynamic_matmul):
        found = explain(make())
        assert found.macs["float"] == 0, make
        assert found.macs["integer"] > 0, make
        assert found.floats == (), make
    row = rows(explain(models.dynamic_matmul()))
    assert {one.kernel for one in row.values()} == {"DynamicQuantizeMatMul"}
    assert row["product"].how.startswith("runs as DynamicQuantizeMatMul")


NEG = [N("Neg", ["c"], ["y"], name="neg")]
FLOATS: dict[str, tuple[Callable[[], onnx.ModelProto], str, str]] = {
    "no Q": (lambda: models.quantized(tail=NEG), "conv", "no QuantizeLinear on its output: Neg 'neg' reads it"),
    "output": (lambda: models.quantized(tail=[], outputs=["c"]), "conv", "its raw output is an output of the model"),
    "read twice": (
        lambda: models.quantized([N("Exp", ["c"], ["e"], name="exp")], outputs=["y", "e"]),
        "conv",
        "its raw output is also read by Exp 'exp'",
    ),
    "zero point": (
        lambda: models.quantized([N("Relu", ["c"], ["r"], name="bend")], end="r", zero="five"),
        "conv",
        "Relu 'bend' stays: the zero point behind it is 5, not 0",
    ),
    "leaky": (
        lambda: models.quantized([N("LeakyRelu", ["c"], ["r"], name="bend")], end="r"),
        "conv",
        "LeakyRelu 'bend' stands between it and QuantizeLinear: quantize in between too",
    ),
    "weight only": (
        lambda: models.quantized(source="x", tail=NEG),
        "conv",
        "only its weight is quantized: input 'x' is float",
    ),
    "ConvTranspose": (
        lambda: models.quantized(op="ConvTranspose"), "conv", "ConvTranspose has no integer kernel",
    ),
    "clip": (
        lambda: models.quantized([N("Clip", ["c", "low", "high"], ["r"], name="cut")], end="r", zero="least"),
        "conv",
        "Clip 'cut' stays: the QuantizeLinear behind it has another range",
    ),
    "two Q": (
        lambda: models.quantized(
            [N("QuantizeLinear", ["c", "xs", "z"], ["q"]), N("DequantizeLinear", ["q", "xs", "z"], ["y2"])],
            outputs=["y", "y2"],
        ),
        "conv",
        "several QuantizeLinear read its output",
    ),
    "16 bits": (
        lambda: models.quantized_node(
            [N("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0), N("Conv", ["xd", "wd"], ["c"], name="conv")],
            21, z=np.uint16(30000),
        ),
        "conv",
        "'xd' has 16 bits",
    ),
    "float constant": (
        lambda: models.quantized_node([N("Add", ["xd", "high"], ["c"], name="it")]),
        "it",
        "its constant input 'high' is float",
    ),
    "float input": (
        lambda: models.quantized_node([N("Mul", ["xd", "x"], ["c"], name="it")]), "it", "its input 'x' is float",
    ),
    "MatMul + Add": (
        lambda: models.quantized_matmul(quantize_output=False),
        "product",
        "ORT makes one Gemm of it and Add 'shift', with no QuantizeLinear behind",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOATS)
def test_what_stays_float_between_quantizers_and_why(case: str) -> None:
    make, name, why = FLOATS[case]
    found = explain(make())
    assert [(row.name, row.why) for row in found.floats] == [(name, why)]
    assert found.macs["integer"] == 0
    assert found.macs["float"] > 0 or name == "it"
    assert rows(found)[name].arithmetic == "float"
    assert any("float inside Q/DQ" in line for line in shown(found))


@pytest.mark.parametrize("op", ["Relu", "Tanh", "HardSwish", "Sub", "Erf"])
def test_operators_without_an_integer_kernel(op: str) -> None:
    found = explain(models.quantized_node([N(op, ["xd"] * (2 if op == "Sub" else 1), ["c"], name="it")]))
    assert [row.why for row in found.floats] == [f"{op} has no integer kernel"]


@pytest.mark.parametrize("op", sorted({*INTEGER_FORMS} - {"Conv", "MatMul", "Gemm", "Where"}))
def test_operators_with_an_integer_kernel(op: str) -> None:
    special: dict[str, dict[str, Any]] = {"AveragePool": {"kernel_shape": [2, 2]}, "Concat": {"axis": 1}}
    inputs = ["xd"] * (2 if op in ("Add", "Mul", "Concat") else 1)
    found = explain(models.quantized_node([N(op, inputs, ["c"], name="it", **special.get(op, {}))]))
    assert found.floats == ()
    assert rows(found)["it"].arithmetic == "integer"


def test_the_same_with_what_was_missing_is_integer() -> None:
    relu = [N("Relu", ["c"], ["r"], name="bend")]
    bias = models.quantized()  # ORT quantizes float biases and weights by itself
    next(n for n in bias.graph.node if n.name == "conv").input.append("b")
    for model in (
        bias,
        models.quantized(relu, end="r", zero="least"),
        models.quantized_matmul(quantize_output=True),
    ):
        found = explain(model)
        assert found.floats == ()
        assert found.macs["float"] == 0
