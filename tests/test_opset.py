"""Opset upgrades: the upgraded model computes what the old one did, and keeps all that it carried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

from graphopt import opset as opset_module
from graphopt.adapters import ADAPTERS, REFUSED
from graphopt.errors import ModelError
from graphopt.model import load
from graphopt.opset import HIGHEST, upgrade
from graphopt.runtime import evaluate

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)


def data(*shape: int, dtype: str = "float32") -> Array:
    return RNG.standard_normal(shape).astype(dtype)


def model_of(
    version: int,
    nodes: Sequence[NodeProto],
    feeds: Mapping[str, Array],
    *,
    weights: Mapping[str, Array] | None = None,
    outputs: Sequence[str] = ("y",),
    dynamic: bool = False,
    ir: int = 8,
) -> onnx.ModelProto:
    inputs = []
    for name, value in feeds.items():
        shape = [f"{name}{i}" for i in range(value.ndim)] if dynamic else list(value.shape)
        inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape))
    graph = helper.make_graph(
        nodes, "g", inputs, [onnx.ValueInfoProto(name=o) for o in outputs],
        [onnx.numpy_helper.from_array(v, k) for k, v in (weights or {}).items()],
    )  # fmt: skip
    if ir < 4:
        graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in graph.initializer)
    imports = [helper.make_opsetid("", version), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=ir)
    for output, value in zip(proto.graph.output, evaluate(proto, feeds).values(), strict=True):
        kind, rank = helper.np_dtype_to_tensor_dtype(value.dtype), value.ndim
        output.CopyFrom(helper.make_tensor_value_info(output.name, kind, [None] * rank))
    return proto


def node(op: str, inputs: str, outputs: str = "y", **attrs: Any) -> NodeProto:
    return helper.make_node(op, [i if i != "_" else "" for i in inputs.split()], outputs.split(), **attrs)


def check_same(proto: onnx.ModelProto, feeds: Mapping[str, Array], target: int) -> onnx.ModelProto:
    """Upgrade, check in full, run both without ORT's optimisations: the outputs must be the same bits."""
    model = load(proto)
    result = upgrade(model, target, required=True)
    assert (result.before, result.after, result.reason) == (load(proto).opset, target, None)
    upgraded = model.proto
    onnx.checker.check_model(upgraded, full_check=True)
    before, after = evaluate(proto, feeds), evaluate(upgraded, feeds)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
        assert after[name].dtype == value.dtype
    return upgraded


X = data(2, 3, 4, 5)
I64 = np.int64

Case = tuple[int, list[NodeProto], dict[str, Array], dict[str, Array]]
SOFTMAX: dict[str, Case] = {
    f"{op} {axis} from {version}": (version, [node(op, "x", axis=axis)], {"x": X}, {})
    for op in ("Softmax", "LogSoftmax", "Hardmax")
    for version, axes in ((7, (0, 1, 2, 3)), (11, (-1, -2, -4, 1)))
    for axis in axes
}
CASES: dict[str, Case] = {
    **SOFTMAX,
    "softmax without axis": (9, [node("Softmax", "x")], {"x": X}, {}),
    "softmax of N,C,1,1": (9, [node("Softmax", "x")], {"x": data(2, 5, 1, 1)}, {}),
    "softmax of nothing": (9, [node("Softmax", "x", axis=1)], {"x": data(2, 3, 0)}, {}),
    "clip both": (7, [node("Clip", "x", min=-0.5, max=0.5)], {"x": X}, {}),
    "clip above": (10, [node("Clip", "x", max=0.5)], {"x": X}, {}),
    "clip nothing": (10, [node("Clip", "x")], {"x": X}, {}),
    "pad constant": (7, [node("Pad", "x", pads=[0, 0, 1, 2, 0, 0, 2, 1], value=1.5)], {"x": X}, {}),
    "pad double": (7, [node("Pad", "x", pads=[1, 1], value=0.1)], {"x": data(4, dtype="float64")}, {}),
    "pad reflect": (9, [node("Pad", "x", pads=[0, 0, 1, 2, 0, 0, 2, 1], mode="reflect", value=3.0)], {"x": X}, {}),
    "slice": (9, [node("Slice", "x", starts=[1, -3], ends=[9, 2**31 - 1], axes=[1, 3])], {"x": X}, {}),
    "slice without axes": (9, [node("Slice", "x", starts=[0, 1], ends=[1, -1])], {"x": X}, {}),
    "topk": (9, [node("TopK", "x", "y i", k=2, axis=-2)], {"x": X}, {}),
    "upsample nearest": (7, [node("Upsample", "x", scales=[1.0, 1.0, 2.0, 3.0])], {"x": X}, {}),
    "upsample linear": (7, [node("Upsample", "x", scales=[1.0, 1.0, 2.0, 2.0], mode="linear")], {"x": X}, {}),
    "upsample 9": (9, [node("Upsample", "x s", mode="nearest")], {"x": X}, {"s": np.array([1, 1, 1.5, 2], "f")}),
    "resize 10 up": (10, [node("Resize", "x s")], {"x": X}, {"s": np.array([1, 1, 2.5, 3], "f")}),
    "resize 10 down": (10, [node("Resize", "x s")], {"x": X}, {"s": np.array([1, 1, 0.5, 0.6], "f")}),
    "resize 10 linear down": (
        10, [node("Resize", "x s", mode="linear")], {"x": X}, {"s": np.array([1, 1, 0.5, 0.6], "f")},
    ),
    "resize 10 linear mixed": (
        10, [node("Resize", "x s", mode="linear")], {"x": X}, {"s": np.array([1, 1, 0.5, 1.7], "f")},
    ),
    "resize 11 sizes": (
        11, [node("Resize", "x r s z", mode="cubic")], {"x": X},
        {"r": np.zeros(0, "f"), "s": np.zeros(0, "f"), "z": np.array([2, 3, 7, 3], I64)},
    ),
    "resize 11 crop": (
        11, [node("Resize", "x r s z", mode="linear", coordinate_transformation_mode="tf_crop_and_resize")],
        {"x": X}, {"r": np.array([0, 0, 0.2, 0.3, 1, 1, 0.8, 1.2], "f"), "s": np.zeros(0, "f"),
                   "z": np.array([2, 3, 3, 3], I64)},
    ),
    "split sizes": (7, [node("Split", "x", "a b", axis=1, split=[1, 2]), node("Concat", "b a", axis=1)], {"x": X}, {}),
    "split evenly": (11, [node("Split", "x", "a b", axis=-2), node("Add", "b a")], {"x": X}, {}),
    "split 13 evenly": (13, [node("Split", "x", "a b", axis=2), node("Add", "b a")], {"x": X}, {}),
    "squeeze": (11, [node("Squeeze", "x", axes=[-1, 0])], {"x": data(1, 3, 1)}, {}),
    "squeeze all": (7, [node("Squeeze", "x")], {"x": data(1, 3, 1)}, {}),
    "unsqueeze": (11, [node("Unsqueeze", "x", axes=[-1, 0])], {"x": X}, {}),
    "reduce sum": (7, [node("ReduceSum", "x", axes=[1, 2], keepdims=0)], {"x": X}, {}),
    "reduce sum all": (11, [node("ReduceSum", "x")], {"x": X}, {}),
    "reduce mean": (11, [node("ReduceMean", "x", axes=[-1, -2])], {"x": X}, {}),
    "reduce max all": (12, [node("ReduceMax", "x", keepdims=0)], {"x": X}, {}),
    "reduce l2": (13, [node("ReduceL2", "x", axes=[2])], {"x": X}, {}),
    "batchnorm": (
        7, [node("BatchNormalization", "x w b m v", epsilon=1e-3, momentum=0.8)], {"x": X},
        {"w": data(3), "b": data(3), "m": data(3), "v": data(3) ** 2},
    ),
    "dropout": (7, [node("Dropout", "x", "d m", ratio=0.25), node("Relu", "d")], {"x": X}, {}),
    "dropout 10": (10, [node("Dropout", "x", "d"), node("Relu", "d")], {"x": X}, {}),
    "scatter": (
        9, [node("Scatter", "x i u", axis=1)], {"x": data(3, 5)},
        {"i": np.array([[1, 3], [0, 2]], I64), "u": data(2, 2)},
    ),
    "roialign": (
        10, [node("RoiAlign", "x r b", output_height=2, output_width=3, spatial_scale=0.5)], {"x": X},
        {"r": np.array([[0, 0, 6, 7], [1, 2, 5, 5]], "f"), "b": np.array([0, 1], I64)},
    ),
    "cast": (7, [node("Cast", "x", to=TensorProto.INT32)], {"x": X * 9}, {}),
    "lstm": (
        7, [node("LSTM", "x w r b", "h y", hidden_size=4)], {"x": data(5, 2, 3)},
        {"w": data(1, 16, 3), "r": data(1, 16, 4), "b": data(1, 32)},
    ),
    "quantize": (
        10, [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z")], {"x": X},
        {"s": np.array(0.02, "f"), "z": np.array(128, np.uint8)},
    ),
    "where, gather": (9, [node("Gather", "x i", axis=1)], {"x": X}, {"i": np.array([2, 0], I64)}),
    "maxpool": (8, [node("MaxPool", "x", "y i", kernel_shape=[2, 2], strides=[2, 2])], {"x": X}, {}),
    "threshold": (7, [node("ThresholdedRelu", "x", alpha=0.3)], {"x": X}, {}),
    "gemm": (7, [node("Gemm", "x w b", transB=1)], {"x": data(2, 3)}, {"w": data(4, 3), "b": data(4)}),
    "argmax": (11, [node("ArgMax", "x", axis=1)], {"x": X}, {}),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_to_17_and_21(name: str, dynamic: bool) -> None:
    version, nodes, feeds, weights = CASES[name]
    proto = model_of(version, nodes, feeds, weights=weights, dynamic=dynamic)
    for target in (17, 21):
        check_same(proto, feeds, target)


@pytest.mark.parametrize("target", [11, 12, 13, 14, 18, 24, HIGHEST])
def test_every_target(target: int) -> None:
    for name in ("softmax without axis", "clip both", "upsample nearest", "split evenly", "reduce mean", "squeeze"):
        version, nodes, feeds, weights = CASES[name]
        if version < target:
            check_same(model_of(version, nodes, feeds, weights=weights), feeds, target)


def test_types_of_new_inputs_follow_the_data() -> None:
    """ONNX Runtime has no Clip for float64 before opset 12, so NumPy says what is right."""
    x = data(4, dtype="float64")
    info = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, [4]) for n in "xy"]
    graph = helper.make_graph([node("Clip", "x", min=0.1)], "g", info[:1], info[1:])
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 7)], ir_version=3))
    upgrade(model, 17, required=True)
    np.testing.assert_array_equal(evaluate(model, {"x": x})["y"], np.clip(x, np.float32(0.1), None))


def branch(name: str, nodes: Sequence[NodeProto], output: str) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])


def test_subgraphs_and_captured_values() -> None:
    """The nodes of both branches read tensors of the graph around them."""
    then = branch("then", [node("Softmax", "x", "t", axis=1), node("Squeeze", "t", "t2", axes=[0])], "t2")
    other = branch("else", [node("Neg", "x", "e"), node("ReduceSum", "e", "e2", axes=[0], keepdims=0)], "e2")
    nodes = [node("If", "c", then_branch=then, else_branch=other)]
    for choice in (True, False):
        feeds = {"c": np.array(choice), "x": data(1, 2, 3)}
        upgraded = check_same(model_of(11, nodes, feeds), feeds, 17)
        assert {a.name for a in upgraded.graph.node[0].attribute} == {"then_branch", "else_branch"}


def test_loop_body() -> None:
    float_info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("s", "s2", "o")]
    body = helper.make_graph(
        [
            node("Identity", "k", "k2"),
            node("Split", "x", "p q", axis=1, split=[1, 2]),
            node("ReduceSum", "q", "r", axes=[1]),
            node("Add", "s r", "s2"),
            node("Unsqueeze", "s2", "o", axes=[0]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("k", TensorProto.BOOL, []),
            float_info[0],
        ],
        [helper.make_tensor_value_info("k2", TensorProto.BOOL, []), *float_info[1:]],
    )
    feeds = {"x": data(2, 3), "zero": data(2, 1)}
    weights = {"n": np.array(3, I64), "true": np.array(True)}
    nodes = [node("Loop", "n true zero", "y z", body=body)]
    check_same(model_of(11, nodes, feeds, weights=weights, outputs=("y", "z")), feeds, 17)


def legacy(op: str, rhs: Sequence[int], **attrs: Any) -> onnx.ModelProto:
    """A binary operator with the broadcasting of opset 6, which ONNX Runtime does not run."""
    infos = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4, 5]),
        helper.make_tensor_value_info("b", TensorProto.FLOAT, rhs),
    ]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 4, 5])]
    graph = helper.make_graph([node(op, "x b", **attrs)], "g", infos, out)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 6)], ir_version=3)


@pytest.mark.parametrize(
    ("rhs", "attrs", "aligned"),
    [
        ([3], {"broadcast": 1, "axis": 1}, (3, 1, 1)),
        ([3, 4], {"broadcast": 1, "axis": 1}, (3, 4, 1)),
        ([2], {"broadcast": 1, "axis": -4}, (2, 1, 1, 1)),
        ([4, 5], {"broadcast": 1}, (4, 5)),
        ([2, 3, 4, 5], {}, (2, 3, 4, 5)),
    ],
)
def test_broadcasting_of_opset_6(rhs: list[int], attrs: dict[str, int], aligned: tuple[int, ...]) -> None:
    model = load(legacy("Sub", rhs, **attrs))
    upgrade(model, 17, required=True)
    feeds = {"x": X, "b": data(*rhs)}
    np.testing.assert_array_equal(evaluate(model, feeds)["y"], X - feeds["b"].reshape(aligned))


def test_prelu_of_opset_6() -> None:
    model = load(legacy("PRelu", [3]))
    upgrade(model, 17, required=True)
    feeds = {"x": X, "b": data(3)}
    expected = np.where(X < 0, X * feeds["b"].reshape(3, 1, 1), X)
    np.testing.assert_array_equal(evaluate(model, feeds)["y"], expected)


@pytest.mark.parametrize("constant", [True, False])
def test_group_normalization_21(constant: bool) -> None:
    x, scale, bias = data(2, 6, 4), data(3), data(3)
    affine = {"s": scale, "b": bias}
    feeds = {"x": x} if constant else {"x": x, **affine}
    proto = model_of(18, [node("GroupNormalization", "x s b", num_groups=3)], feeds, weights=affine if constant else {})
    check_same(proto, feeds, 21)


def test_dft_20() -> None:
    x = data(1, 4, 6, 1)
    choices: list[dict[str, Any]] = [{"axis": 2}, {}, {"axis": 1, "onesided": 1}]
    for attrs in choices:
        check_same(model_of(17, [node("DFT", "x", **attrs)], {"x": x}), {"x": x}, 20)


def test_gridsample_20() -> None:
    feeds = {"x": data(1, 2, 4, 4), "g": np.clip(data(1, 3, 3, 2), -1, 1)}
    for mode in ("bilinear", "bicubic", "nearest"):
        check_same(model_of(16, [node("GridSample", "x g", mode=mode)], feeds), feeds, 20)


REFUSALS = {
    "mask": (9, [node("Dropout", "x", "d m"), node("Identity", "m")], {"x": X}, "masks"),
    "scales": (10, [node("Resize", "x s")], {"x": X, "s": np.array([1, 1, 2, 2], "f")}, "scales are computed"),
    "tf": (
        11, [node("Resize", "x r s", coordinate_transformation_mode="tf_half_pixel_for_nn")],
        {"x": X, "r": np.zeros(0, "f"), "s": np.array([1, 1, 2, 2], "f")}, "tf_half_pixel_for_nn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_changes_nothing(name: str) -> None:
    version, nodes, feeds, reason = REFUSALS[name]
    proto = model_of(version, [*nodes], feeds)
    proto.graph.node[0].name = "the node"
    model = load(proto)
    result = upgrade(model, 17)
    assert (result.before, result.after) == (version, version)
    assert reason in str(result.reason)
    assert "'the node'" in str(result.reason)
    assert model.proto == proto
    with pytest.raises(ModelError, match=reason):
        upgrade(load(proto), 17, required=True)


def test_never_lowers_and_refuses_unknown_opsets() -> None:
    proto = model_of(18, [node("Relu", "x")], {"x": X})
    model = load(proto)
    assert upgrade(model, 17).after == 18
    assert model.proto == proto
    for wrong in (0, HIGHEST + 1, 1000):
        with pytest.raises(ModelError, match="cannot upgrade"):
            upgrade(model, wrong)


def test_everything_else_is_kept() -> None:
    """Names, doc strings, metadata, annotations, types, custom operators; only the upgraded parts differ."""
    feeds = {"x": X}
    nodes = [node("Upsample", "x s", "u", mode="nearest"), node("Gelu", "u", "v", domain="com.microsoft")]
    proto = model_of(9, [*nodes, node("Softmax", "v")], feeds, weights={"s": np.array([1, 1, 2, 2], "f")})
    proto.doc_string, proto.producer_name, proto.model_version = "model doc", "me", 7
    proto.metadata_props.add(key="k", value="model")
    proto.graph.doc_string = "graph doc"
    proto.graph.metadata_props.add(key="k", value="graph")
    proto.graph.value_info.append(helper.make_tensor_value_info("u", TensorProto.FLOAT, [2, 3, 8, 10]))
    proto.graph.quantization_annotation.add(tensor_name="u").quant_parameter_tensor_names.add(key="SCALE", value="s")
    for i, each in enumerate(proto.graph.node):
        each.name, each.doc_string = f"node {i}", f"doc {i}"
        each.metadata_props.add(key="k", value=f"value {i}")
    upgraded = check_same(proto, feeds, 17)
    by_name = {n.name: n for n in upgraded.graph.node}
    assert by_name["node 0"].op_type == "Resize"
    for i, each in enumerate(proto.graph.node):
        assert by_name[each.name].doc_string == f"doc {i}"
        assert list(by_name[each.name].metadata_props) == list(each.metadata_props)
    assert by_name["node 1"] == proto.graph.node[1]
    for field in ("doc_string", "metadata_props", "value_info", "quantization_annotation", "input", "output"):
        assert getattr(upgraded.graph, field) == getattr(proto.graph, field)
    for field in ("doc_string", "producer_name", "model_version", "metadata_props", "ir_version"):
        assert getattr(upgraded, field) == getattr(proto, field)


def test_ir_3_constants_leave_the_inputs_overridable_ones_stay() -> None:
    weights = {"w": data(5)}
    proto = model_of(9, [node("Add", "x w")], {"x": X}, weights=weights, ir=3)
    upgraded = check_same(proto, {"x": X}, 17)
    assert upgraded.ir_version == helper.find_min_ir_version_for(list(upgraded.opset_import), ignore_unknown=True)
    assert [i.name for i in upgraded.graph.input] == ["x"]
    proto = model_of(9, [node("Add", "x w")], {"x": X}, weights=weights, ir=4)
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [5]))
    upgraded = check_same(proto, {"x": X}, 17)
    assert [i.name for i in upgraded.graph.input] == ["x", "w"]
    new = data(5)
    np.testing.assert_array_equal(evaluate(upgraded, {"x": X, "w": new})["y"], X + new)


def test_local_functions_are_upgraded_too() -> None:
    imports = [helper.make_opsetid("", 12), helper.make_opsetid("local", 1)]
    body = [node("Squeeze", "a", "s", axes=[0]), node("Softmax", "s", "b", axis=0)]
    function = helper.make_function("local", "F", ["a"], ["b"], body, imports[:1])
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 2, 3]), ("y", [2, 3]))]
    graph = helper.make_graph([node("F", "x", domain="local")], "g", info[:1], info[1:])
    proto = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)
    feeds = {"x": data(1, 2, 3)}
    upgraded = check_same(proto, feeds, 17)
    assert [o.version for o in upgraded.functions[0].opset_import] == [17]


def test_function_parameters_cannot_become_inputs() -> None:
    imports = [helper.make_opsetid("", 12), helper.make_opsetid("local", 1)]
    squeeze = node("Squeeze", "a", "b")
    squeeze.attribute.add(name="axes", ref_attr_name="which", type=onnx.AttributeProto.INTS)
    function = helper.make_function("local", "F", ["a"], ["b"], [squeeze], imports[:1], attributes=["which"])
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 2]), ("y", [2]))]
    graph = helper.make_graph([node("F", "x", domain="local", which=[0])], "g", info[:1], info[1:])
    proto = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)
    model = load(proto)
    assert "parameter of the function" in str(upgrade(model, 17).reason)
    assert model.proto == proto


def test_new_names_are_new() -> None:
    feeds = {"x": X}
    nodes = [node("Clip", "x", "m/min", min=0.0, name="n"), node("Clip", "m/min", min=0.5, name="m")]
    check_same(model_of(10, nodes, feeds), feeds, 17)


def test_every_schema_change_up_to_the_highest_opset_is_decided() -> None:
    """A step of an operator is adapted, refused, or leaves a bare node as it was: nothing is overlooked."""
    history = opset_module._history()
    open_questions = []
    for op, by_version in history.items():
        versions = sorted(by_version)
        for old, new in pairwise(versions):
            if new > HIGHEST or (op, new) in ADAPTERS or (op, new) in REFUSED:
                continue
            a, b = by_version[old], by_version[new]
            used = set(a.attributes) - {"consumed_inputs"}
            inputs = min(len(a.inputs), a.max_input)
            found = [
                *opset_module.changes(a, b, used, inputs, len(a.outputs)),
                *opset_module.changes(a, b, set(), a.min_input, a.min_output),
            ]
            open_questions += [f"{op} {old} -> {new}: {problem}" for problem in found]
    assert not open_questions
