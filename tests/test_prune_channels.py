"""prune-channels: what is left equals the masked model; what cannot be cut stays, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import kept as notes
from graphopt.analysis import channels
from graphopt.masking import masked
from graphopt.model import Model, load
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.random_feeds import random_feeds
from graphopt.runtime import Session, evaluate
from graphopt.text import to_text

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-5
"""Relative to the largest element: float32 sums of some hundred terms, added up in another order."""

RANDOM = "prune-channels{ratio=0.4,criterion=random,spread=local,round_to=1}"


@dataclass
class Net:
    """Grows a model over x [N, 6, 12, 12] (or another input) with seeded weights."""

    opset: int = 17
    shape: tuple[int | str, ...] = ("N", 6, 12, 12)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(3))

    def weight(self, *shape: int, name: str = "") -> str:
        fan = max(1, int(np.prod(shape[1:])))
        return self.const(np.asarray(self.rng.normal(size=shape) / np.sqrt(fan), np.float32), name)

    def const(self, values: Any, name: str = "") -> str:
        name = name or f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def op(self, kind: str, *inputs: str, outputs: int = 1, name: str = "", **attrs: Any) -> Any:
        number = len(self.nodes)
        names = [f"t{number}" if outputs == 1 else f"t{number}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name or f"n{number}", **attrs))
        return names[0] if outputs == 1 else names

    def conv(self, x: str, read: int, made: int, size: int = 1, *, group: int = 1, name: str = "", **attrs: Any) -> str:
        inputs = [x, self.weight(made, read // group, size, size), self.weight(made)]
        return str(self.op("Conv", *inputs, name=name, group=group, pads=[size // 2] * 4, **attrs))

    def head(self, x: str, channels: int, classes: int = 5) -> str:
        flat = self.op("Flatten", self.op("GlobalAveragePool", x))
        return str(self.op("Gemm", flat, self.weight(classes, channels), self.weight(classes), transB=1, name="head"))

    def model(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs], self.constants,
        )  # fmt: skip
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        return onnx.shape_inference.infer_shapes(proto)


def run(model: onnx.ModelProto | Model, pipeline: str = RANDOM, **settings: Any) -> Result:
    return Pipeline(pipeline).run(model, settings=Settings(verify="off", on_failure="stop", **settings))


def sizes(result: Result) -> dict[str, tuple[int, ...]]:
    return {c.name: tuple(c.shape) for c in result.model.constants()}


def misses(result: Result) -> dict[str, str]:
    return {m["where"]: m["why"] for record in result.report.passes for m in record.blocked}


def cut_groups(model: onnx.ModelProto, result: Result) -> list[tuple[channels.Group, Array]]:
    """Return the groups of the original with the units that are left by what the result's nodes say."""
    before = load(model)
    after = {node.name: node for node in result.model.graph.nodes}
    found = []
    for group in channels.find_groups(before, shapes_of(before), evaluate).prunable():
        site = group.role("makes")[0]
        assert site.node is not None
        left = notes.kept(after[site.node.name])
        if left is not None:
            units = np.unique(site.units[np.isin(np.arange(len(site.units)), left.indices)])
            found.append((group, units[units >= 0]))
    return found


def shapes_of(model: Model) -> Any:
    from graphopt.analysis.shapes import Shapes

    return Shapes(model)


def assert_equals_masked(model: onnx.ModelProto, result: Result, groups: list[tuple[channels.Group, Array]]) -> None:
    """Compare, apart from what the pass did itself, on two sizes of each open dimension."""
    onnx.checker.check_model(result.model.proto, full_check=True)
    original = load(model)
    fresh = {g.name: g for g in channels.find_groups(original, shapes_of(original), evaluate).groups}
    twin = masked(original, [(fresh[g.name], stay) for g, stay in groups])
    a, b = Session(twin, optimization="off"), Session(result.model, optimization="off")
    for feed in random_feeds(load(model), seed=11):
        for (name, wanted), found in zip(a.run(feed).items(), b.run(feed).values(), strict=True):
            assert wanted.shape == found.shape
            assert np.abs(wanted).max() > 0
            np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max(), err_msg=name)


def residual(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 16, 3, name="stem"))
    y = net.op("Relu", net.conv(x, 16, 24, 1, name="expand"))
    y = net.op("Relu", net.conv(y, 24, 24, 3, group=24, name="depthwise"))
    y = net.conv(y, 24, 16, 1, name="project")
    return net.head(net.op("Add", x, y), 16)


def norms(net: Net) -> str:
    x = net.conv("x", 6, 16, 3)
    stats = [net.const(np.asarray(net.rng.uniform(0.5, 2, 16), np.float32)) for _ in range(4)]
    x = net.op("Relu", net.op("BatchNormalization", x, *stats))
    return net.head(net.op("MaxPool", net.conv(x, 16, 12, 3), kernel_shape=[2, 2]), 12)


def grouped(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 32, 1))
    x = net.op("Relu", net.conv(x, 32, 64, 3, group=8))
    return net.head(x, 64)


def transposed(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 16))
    x = net.op("ConvTranspose", x, net.weight(16, 12, 2, 2), net.weight(12), strides=[2, 2], name="up")
    x = net.op("ConvTranspose", x, net.weight(12, 1, 3, 3), group=12, name="depthwise")
    return net.head(x, 12)


def concat(net: Net) -> str:
    a, b = net.op("Relu", net.conv("x", 6, 10)), net.op("Relu", net.conv("x", 6, 14, 3))
    return net.head(net.conv(net.op("Concat", a, b, axis=1), 24, 12), 12)


def split(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 24))
    a, b = net.op("Split", x, net.ints(14, 10), axis=1, outputs=2)
    return net.head(net.op("Concat", net.conv(a, 14, 9), b, axis=1), 19)


def old_split(net: Net) -> str:
    net.opset = 11
    a, b = net.op("Split", net.conv("x", 6, 24), axis=1, split=[12, 12], outputs=2)
    return net.head(net.op("Mul", net.op("Sigmoid", a), b), 12)


def even_split(net: Net) -> str:
    net.opset = 18
    parts = net.op("Split", net.conv("x", 6, 24), axis=1, num_outputs=2, outputs=2)
    return net.head(net.op("Concat", net.op("Relu", parts[0]), parts[1], axis=1), 24)


def sliced(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 24))
    a = net.op("Slice", x, net.ints(0), net.ints(10), net.ints(1))
    b = net.op("Slice", x, net.ints(-14), net.ints(1 << 40), net.ints(1))
    return net.head(net.op("Add", net.conv(a, 10, 8), net.conv(b, 14, 8)), 8)


def picked(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 8))
    order = [7, 0, -6, 3, 1, 6, 4, 5]
    return net.head(net.conv(net.op("Gather", x, net.ints(*order), axis=1), 8, 8), 8)


def shuffled(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 16))
    x = net.op("Reshape", x, net.ints(0, 2, 8, 12, 12))
    x = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 1, 3, 4]), net.ints(-1, 16, 12, 12))
    return net.head(net.conv(x, 16, 8), 8)


def flattened(net: Net) -> str:
    x = net.op("MaxPool", net.conv("x", 6, 8), kernel_shape=[4, 4], strides=[4, 4])
    x = net.op("Reshape", x, net.ints(-1, 72))
    return str(net.op("Gemm", x, net.weight(72, 5)))


def computed_target(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 8))
    batch = net.op("Gather", net.op("Shape", x), net.ints(0), axis=0)
    x = net.op("Reshape", x, net.op("Concat", batch, net.ints(8, 144), axis=0))
    return str(net.op("MatMul", net.op("ReduceMean", x, axes=[2], keepdims=0), net.weight(8, 5)))


def squeeze_excite(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 16, 3))
    gate = net.op("Relu", net.conv(net.op("GlobalAveragePool", x), 16, 8))
    gate = net.op("HardSigmoid", net.conv(gate, 8, 16))
    return net.head(net.op("Mul", x, gate), 16)


def pixel_shuffle(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 32))
    return net.head(net.conv(net.op("DepthToSpace", x, blocksize=2), 8, 6), 6)


def padded(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 8))
    wide = net.op("Pad", x, net.ints(0, 4, 0, 0, 0, 4, 0, 0))
    return net.head(net.op("Add", wide, net.conv(x, 8, 16, 3)), 16)


def resized(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 8))
    size = net.op("Concat", net.op("Shape", x, end=2), net.ints(24, 24), axis=0)
    x = net.op("Resize", x, "", "", size, mode="nearest")
    return net.head(net.conv(x, 8, 6), 6)


def attention(net: Net) -> str:
    net.shape = ("N", "T", 32)
    scale = net.const(np.float32(0.35))
    parts = []
    for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        made = net.op("Add", net.op("MatMul", "x", net.weight(32, 64)), net.weight(64))
        parts.append(net.op("Transpose", net.op("Reshape", made, net.ints(0, 0, 8, 8)), perm=perm))
    weights = net.op("Softmax", net.op("Mul", net.op("MatMul", parts[0], parts[1]), scale), axis=-1)
    out = net.op("Transpose", net.op("MatMul", weights, parts[2]), perm=[0, 2, 1, 3])
    return str(net.op("MatMul", net.op("Reshape", out, net.ints(0, 0, 64)), net.weight(64, 32)))


def recurrent(net: Net, op: str = "LSTM", gates: int = 4) -> str:
    net.shape = ("T", "N", 6)
    inputs = [net.weight(1, gates * 12, 6), net.weight(1, gates * 12, 12), net.weight(1, 2 * gates * 12)]
    y = net.op(op, "x", *inputs, hidden_size=12)
    return str(net.op("MatMul", net.op("Squeeze", y, net.ints(1)), net.weight(12, 5)))


NETS: dict[str, Callable[[Net], str]] = {
    build.__name__: build
    for build in (
        residual, norms, grouped, transposed, concat, split, old_split, even_split, sliced, picked, shuffled, flattened,
        computed_target, squeeze_excite, pixel_shuffle, padded, resized, attention, recurrent,
    )
} | {"gru": lambda net: recurrent(net, "GRU", 3), "rnn": lambda net: recurrent(net, "RNN", 1)}  # fmt: skip


def build(name: str) -> onnx.ModelProto:
    net = Net()
    output = NETS[name](net)
    return net.model(output)


@pytest.mark.parametrize("name", NETS)
def test_equals_the_masked_model(name: str) -> None:
    model = build(name)
    result = run(model)
    assert result.report.passes[0].status == "changed", misses(result)
    assert sum(map(np.prod, sizes(result).values())) < sum(map(np.prod, sizes_of(model).values()))
    assert_equals_masked(model, result, cut_groups(model, result))


def sizes_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.dims) for t in model.graph.initializer}


@pytest.mark.parametrize("name", NETS)
def test_same_request_again_does_nothing(name: str) -> None:
    once = run(build(name))
    twice = run(once.model)
    assert twice.report.passes[0].status != "changed"
    assert to_text(twice.model) == to_text(once.model)
