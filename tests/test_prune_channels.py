"""prune-channels: what is left equals the masked model; what cannot be cut stays, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import kept as notes
from graphopt.analysis import channels
from graphopt.analysis.shapes import Shapes
from graphopt.errors import SpecError
from graphopt.exporter import untouched
from graphopt.masking import masked
from graphopt.model import Model, load
from graphopt.passes import prune_channels
from graphopt.pipeline import Pipeline, Result, Settings, StopPipelineError
from graphopt.random_feeds import random_feeds
from graphopt.runtime import Session, evaluate
from graphopt.tensors import LazyTensor
from graphopt.text import to_text
from tests.test_passes_properties import models

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


def shapes_of(model: Model) -> Shapes:
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


def odd_slices(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 24))
    a = net.op("Slice", x, net.ints(0), net.ints(24), net.ints(1), net.ints(2))
    b = net.op("Slice", x, net.ints(-1), net.ints(-(1 << 60)), net.ints(1), net.ints(-2))
    return net.head(net.conv(net.op("Concat", a, b, axis=1), 24, 8), 8)


def slices_of_int32(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 24))
    ends = [net.const(np.array([n], np.int32)) for n in (8, 24, 1)]
    return net.head(net.conv(net.op("Slice", x, *ends), 16, 8), 8)


def open_target(net: Net) -> str:
    net.shape = ("N", 6, "H", "W")
    x = net.op("Relu", net.conv("x", 6, 16))
    shape = net.op("Shape", x)
    target = net.op("Concat", net.op("Gather", shape, net.ints(0)), net.ints(4, 4),
                    net.op("Gather", shape, net.ints(2, 3)), axis=0)  # fmt: skip
    x = net.op("Transpose", net.op("Reshape", x, target), perm=[0, 2, 1, 3, 4])
    return net.head(net.conv(net.op("Relu", net.op("Reshape", x, shape)), 16, 8), 8)


def tiled(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 6, 8))
    gate = net.op("ReduceMean", x, axes=[1], keepdims=1)
    x = net.op("Mul", net.conv(x, 8, 12), net.op("Tile", gate, net.ints(1, 12, 1, 1)))
    return net.head(net.op("Add", x, net.op("Expand", gate, net.ints(1, 12, 1, 1))), 12)


def shared(net: Net) -> str:
    bias = net.weight(16, name="bias")
    x = net.op("Relu", net.op("Conv", "x", net.weight(16, 6, 1, 1), bias))
    y = net.op("Relu", net.op("Conv", x, net.weight(16, 16, 1, 1), bias))
    return net.head(y, 16)


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
        residual, norms, grouped, transposed, concat, split, old_split, even_split, sliced, odd_slices,
        slices_of_int32, open_target, tiled, shared, picked, shuffled, flattened,
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
@pytest.mark.parametrize(
    "asked", [RANDOM, "prune-channels{ratio=0.2,of=macs}", "prune-channels{ratio=0.7,criterion=l1,round_to=1}"]
)
def test_same_request_again_does_nothing(name: str, asked: str) -> None:
    once = run(build(name), asked)
    twice = run(once.model, asked)
    assert twice.report.passes[0].status != "changed"
    assert to_text(twice.model) == to_text(once.model)


def test_what_is_left_is_what_matters_most() -> None:
    model = build("residual")
    result = run(model, 'prune-channels{criterion=l1,counts=["stem=9","expand=13"]}')
    after = sizes(result)
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert after["c0"] == (9, 6, 3, 3)
    assert after["c2"] == (13, 9, 1, 1)
    left = notes.kept(node_of(result, "expand"))
    assert left is not None
    strength = np.abs(weights["c2"]).sum(axis=(1, 2, 3)) + np.abs(weights["c4"]).sum(axis=(1, 2, 3))
    assert np.array_equal(left.indices, np.sort(np.argsort(-strength)[:13]))
    assert node_of(result, "depthwise").attrs["group"] == 13


def node_of(result: Result, name: str) -> Any:
    return next(node for node in result.model.graph.nodes if node.name == name)


def test_more_later_counts_from_the_first_widths() -> None:
    model = build("residual")
    step = run(run(model, RANDOM.replace("0.4", "0.25")).model, RANDOM.replace("0.4", "0.5"))
    assert [r.status for r in step.report.passes] == ["changed"]
    assert "pruned before" in step.report.passes[0].notes[0]
    stem, expand = (notes.kept(node_of(step, name)) for name in ("stem", "expand"))
    assert stem is not None
    assert expand is not None
    assert (stem.width, len(stem.indices), expand.width, len(expand.indices)) == (16, 8, 24, 12)
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    after = {c.name: c.values for c in step.model.constants()}
    assert np.array_equal(after["c2"], weights["c2"][np.ix_(expand.indices, stem.indices)])
    less = run(step.model, RANDOM)
    assert less.report.passes[0].status == "unchanged"


def test_a_shared_initializer_is_cloned_for_each_reader() -> None:
    result = run(build("shared"), "prune-channels{counts='n0=12'}")
    assert sizes(result)["bias"] == (16,)
    assert node_of(result, "n0").inputs[2].shape == (12,)
    assert node_of(result, "n2").inputs[2].name == "bias"


def test_weights_that_lose_nothing_are_not_copied() -> None:
    model = load(build("concat"))
    result = Pipeline("prune-channels{counts='n0=5'}").run(model, settings=Settings(verify="off"), own=True)
    whole = {c.name: c._values for c in load(build("concat")).constants()}
    same = [c for c in result.model.constants() if tuple(c.shape) == tuple(whole[c.name].shape)]
    assert same
    assert all(isinstance(untouched(c), LazyTensor) for c in same)


def mistaken(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[channels.Site], channels.Site]) -> None:
    """Make the analysis wrong about one group."""
    find = channels.find_groups

    def wrong(*given: Any, **options: Any) -> channels.Channels:
        found = find(*given, **options)
        for place, group in enumerate(found.groups):
            if group.name == name:
                found.groups[place] = replace(group, sites=tuple(map(change, group.sites)))
        return found

    monkeypatch.setattr(prune_channels, "find_groups", wrong)


@pytest.mark.parametrize("role", ["makes", "holds"])
def test_a_wrong_cut_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    """Units in another order at some sites: shapes fit, numbers do not."""
    mistaken(monkeypatch, "expand", lambda s: replace(s, units=s.units[::-1].copy()) if s.role == role else s)
    model = build("residual")
    result = run(model)
    assert "masked" in misses(result)["expand"]
    assert "rounding" in misses(result)["expand"]
    assert sizes(result)["c0"][0] == 10
    assert sizes(result)["c2"][0] == 24
    monkeypatch.undo()
    assert_equals_masked(model, result, cut_groups(model, result))


def test_a_cut_that_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    mistaken(monkeypatch, "expand", lambda s: replace(s, units=np.full_like(s.units, -1)) if s.role == "reads" else s)
    result = run(build("residual"))
    assert "does not run" in misses(result)["expand"]
    assert sizes(result)["c0"][0] == 10


def test_part_of_the_changes_is_proved_again() -> None:
    model = build("residual")
    result = run(model, limit=1)
    assert sizes(result)["c0"][0] == 10
    assert sizes(result)["c2"][0] == 24
    assert_equals_masked(model, result, cut_groups(model, result))


def test_only_and_skip_choose_groups() -> None:
    assert sizes(run(build("residual"), RANDOM.replace("}", ",only='exp*'}")))["c0"][0] == 16
    after = sizes(run(build("residual"), RANDOM.replace("}", ",skip='exp*'}")))
    assert (after["c0"][0], after["c2"][0]) == (10, 24)


def test_frozen_groups_say_why() -> None:
    assert "output" in misses(run(build("residual"), "prune-channels"))["head"]


def test_normalization_is_cut_when_asked() -> None:
    net = Net(shape=("N", "T", 6))
    x = net.op("MatMul", "x", net.weight(6, 16), name="first")
    x = net.op("LayerNormalization", x, net.weight(16), net.weight(16), name="norm")
    model = net.model(net.op("MatMul", x, net.weight(16, 5)))
    assert "statistics" in misses(run(model))["first"]
    result = run(model, RANDOM.replace("}", ",normalization=true}"))
    assert sizes(result)["c0"] == (6, 10)
    onnx.checker.check_model(result.model.proto, full_check=True)


def test_models_before_ir_4_list_their_constants() -> None:
    model = build("norms")
    model.ir_version = 3
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in model.graph.initializer
    )
    result = run(model)
    assert result.report.passes[0].status == "changed"
    assert_equals_masked(model, result, cut_groups(model, result))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("ratio=1.0", "ratio is from 0"),
        ("ratio=-0.1", "ratio is from 0"),
        ("ratio=nan", "ratio is from 0"),
        ("of=flops", "of is one of"),
        ("criterion=l3", "criterion is one of"),
        ("spread=wide", "spread is one of"),
        ("aggregate=min", "aggregate is one of"),
        ("least=0", "least"),
        ("counts=stem", "GROUP=UNITS"),
        ("counts=stem=0", "GROUP=UNITS"),
        ('ratio=0.5,counts="stem=3"', "both say"),
    ],
)
def test_options_without_meaning(options: str, what: str) -> None:
    if options.startswith("counts=stem"):
        options = 'counts="' + options.removeprefix("counts=") + '"'
    with pytest.raises(SpecError, match=what):
        Pipeline(f"prune-channels{{{options}}}")


def test_unknown_group_is_named() -> None:
    with pytest.raises(SpecError, match="no channel group 'stam'") as error:
        run(build("residual"), 'prune-channels{counts="stam=3"}')
    assert "stem" in str(error.value)


def test_too_much_is_refused_with_what_can_be_had() -> None:
    with pytest.raises(StopPipelineError, match="cannot be removed"):
        run(build("residual"), "prune-channels{ratio=0.99,of=macs,least=8}")


def test_notes_compose() -> None:
    node = load(build("residual")).graph.nodes[0]
    assert notes.kept(node) is None
    notes.record(node, 16, np.array([0, 1, 2, 5, 9, 10, 15]))
    first = load(build("residual")).graph.nodes[0]
    notes.record(first, 16, np.array([0, 1, 2, 5, 9, 10, 15]))
    notes.record(node, 7, np.array([1, 3, 6]))
    left = notes.kept(node)
    assert left is not None
    assert left.width == 16
    assert left.indices.tolist() == [1, 5, 15]
    assert notes.positions(first, node, 7).tolist() == [1, 3, 6]
    assert notes.positions(load(build("residual")).graph.nodes[0], node, 16).tolist() == [1, 5, 15]
    assert notes.positions(first, first, 7).tolist() == list(range(7))


@settings(max_examples=60)
@given(models, st.booleans())
def test_random_graphs(model: onnx.ModelProto, canonical: bool) -> None:
    lead = "canonicalize, fold-constants, " if canonical else ""
    result = run(model, f"{lead}{RANDOM}")
    onnx.checker.check_model(result.model.proto, full_check=True)
    assert [str(s) for s in result.model.inputs] == [str(s) for s in load(model).inputs]
    again = run(result.model)
    assert again.report.passes[0].status == "unchanged"
    assert not [why for why in misses(result).values() if "the masked one" in why or "does not run" in why]
