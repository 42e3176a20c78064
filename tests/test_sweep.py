"""Moments of layers' inputs against a reference: what flows is what is measured, and weights may change in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.data import load_samples
from graphopt.edit import label
from graphopt.errors import DataError
from graphopt.frontier import Store
from graphopt.layer_inputs import request_of
from graphopt.model import Model, load
from graphopt.runtime import Session
from graphopt.samples import Samples
from graphopt.sweep import Fit, Moments, paired_rows, sweep

Array = np.ndarray[Any, Any]


def network(seed: int = 0) -> onnx.ModelProto:
    """Convolutions: plain, per channel, two branches that meet in a sum; a pool, a transposed one, a Gemm, a MatMul."""
    rng = np.random.default_rng(seed)
    inits: dict[str, Array] = {}

    def layer(op: str, x: str, name: str, *shape: int, bias: int = 0, **attrs: Any) -> onnx.NodeProto:
        inits[f"{name}_w"] = np.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])), np.float32)
        inputs = [x, f"{name}_w"]
        if bias:
            inits[f"{name}_b"] = np.asarray(rng.normal(size=bias) * 0.1, np.float32)
            inputs.append(f"{name}_b")
        return helper.make_node(op, inputs, [f"{name}_y"], name=name, **attrs)

    nodes = [
        layer("Conv", "x", "stem", 8, 3, 3, 3, bias=8, pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["stem_y"], ["stem_r"]),
        layer("Conv", "stem_r", "each", 8, 1, 3, 3, bias=8, pads=[1] * 4, group=8),
        helper.make_node("Relu", ["each_y"], ["each_r"]),
        layer("Conv", "each_r", "left", 8, 4, 1, 1, bias=8, group=2),
        layer("Conv", "stem_r", "right", 8, 8, 1, 1),
        helper.make_node("Add", ["left_y", "right_y"], ["sum"]),
        layer("ConvTranspose", "sum", "up", 8, 6, 2, 2, bias=6, strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["up_y"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        layer("Gemm", "flat", "gemm", 5, 6, bias=5, transB=1),
        layer("MatMul", "gemm_y", "matmul", 5, 4),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("matmul_y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(v, k) for k, v in inits.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples_of(model: Model, count: int = 12) -> Samples:
    """Feeds of several shapes."""
    rng = np.random.default_rng(5)
    sizes = rng.integers(6, 12, (count, 2)) // 2 * 2
    return load_samples([{"x": rng.normal(size=(2, 3, *s)).astype(np.float32)} for s in sizes], model)


def fits_of(model: Model) -> list[Fit]:
    found = []
    for node in model.graph.nodes:
        request = request_of(node, node.inputs[1].shape) if isinstance(node.inputs[-1], gs.Constant) else None
        if request is not None:
            axis = -1 if node.op in {"Gemm", "MatMul"} else 1
            block = (2, 2) if node.op == "ConvTranspose" else ()
            found.append(Fit(label(node), request, node.outputs[0].name, axis, None, block))
    return found


def rows_of_all(model: Model, reference: Model, samples: Samples, fit: Fit) -> tuple[Array, Array]:
    """Return all rows, each model run from its inputs."""
    now, then = (Session(m, extra_outputs=[t]) for m, t in ((model, fit.request.tensor), (reference, fit.target)))
    pairs = []
    for feed in samples:
        values, target = now.run(feed, [fit.request.tensor]), then.run(feed, [fit.target])
        pairs.append(paired_rows(fit, values[fit.request.tensor], target[fit.target], None, 1 << 30, [0]))
    x, y = zip(*pairs, strict=True)
    return np.concatenate(x).astype(np.float64), np.concatenate(y).astype(np.float64)


def uncentred(moments: Moments) -> tuple[Array, Array, Array]:
    """Return XᵀX, XᵀY and the sums of Y² about zero."""
    m, n = moments, moments.count
    x, y = m.x_origin, m.y_origin
    xx = m.xx + x[:, :, None] * m.x_sum[:, None] + m.x_sum[:, :, None] * x[:, None] + n * x[:, :, None] * x[:, None]
    xy = m.xy + x[:, :, None] * m.y_sum[:, None] + m.x_sum[:, :, None] * y[:, None] + n * x[:, :, None] * y[:, None]
    return xx, xy, m.yy + 2 * y * m.y_sum + n * y**2


def halve(model: Model, names: Sequence[str]) -> None:
    for node in model.graph.nodes:
        if label(node) in names:
            node.inputs[1].values = np.asarray(node.inputs[1].values) * np.float32(0.5)


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_each_layer_is_measured_as_the_graph_then_is(memory: int) -> None:
    reference, model = load(network()), load(network())
    samples = samples_of(model)
    for fit, split in sweep(model, reference, samples, fits_of(model), rows=1 << 30, memory=memory):
        x, y = rows_of_all(model, reference, samples, fit)
        whole = split.whole
        assert whole.count == len(x) > split.train.count > split.held_out.count > 0
        xx, xy, yy = uncentred(whole)
        # sums of some thousand float32 products, in segments and from the inputs: 1e-4 is far beyond their rounding
        scale = np.abs(xx).max()
        np.testing.assert_allclose(xx, np.einsum("rgi,rgj->gij", x, x), rtol=1e-4, atol=1e-4 * scale)
        np.testing.assert_allclose(xy, np.einsum("rgi,rgo->gio", x, y), rtol=1e-4, atol=1e-4 * np.abs(xy).max())
        np.testing.assert_allclose(yy, np.einsum("rgo,rgo->go", y, y), rtol=1e-4)
        np.testing.assert_allclose(whole.x_mean, x.mean(axis=0), atol=1e-4)
        np.testing.assert_allclose(whole.y_mean, y.mean(axis=0), atol=1e-4)
        halve(model, [fit.label])  # the next are measured behind it


def test_rows_of_a_layer_and_its_target_are_the_same_places() -> None:
    model = load(network())
    for fit, split in sweep(model, model, samples_of(model), fits_of(model), rows=100):
        node = next(n for n in model.graph.nodes if label(n) == fit.label)
        m = split.whole
        assert m.count <= 120
        weight = np.asarray(node.inputs[1].values, np.float64)
        columns = weight if node.op in {"ConvTranspose", "MatMul"} else np.moveaxis(weight, 0, -1)
        columns = columns.reshape(-1, m.xy.shape[2] * (1 if node.op == "ConvTranspose" else m.xy.shape[0]))
        if m.xy.shape[0] > 1 and node.op == "Conv":
            columns = columns.reshape(columns.shape[0], m.xy.shape[0], -1).transpose(1, 0, 2)
        centred_xx = m.xx - m.x_sum[:, :, None] * m.x_sum[:, None] / m.count
        centred_xy = m.xy - m.x_sum[:, :, None] * m.y_sum[:, None] / m.count
        # Y is X W + b exactly, so XᵀY = XᵀX W once the means are off; float32 products: 1e-4
        np.testing.assert_allclose(centred_xx @ columns, centred_xy, atol=1e-4 * np.abs(centred_xy).max())


def test_what_is_added_behind_a_layer_is_taken_off_its_target() -> None:
    model = load(network())
    samples = samples_of(model)
    left = next(f for f in fits_of(model) if f.label == "left")
    with_sum = Fit("left", left.request, "sum", 1, minus="right_y")
    (_, plain), (_, less) = (next(sweep(model, model, samples, [fit])) for fit in (left, with_sum))
    # the sum less its other operand is the layer's output, but for float32 rounding
    np.testing.assert_allclose(less.whole.xy, plain.whole.xy, atol=1e-4 * np.abs(plain.whole.xy).max())


def test_channels_of_the_target_are_chosen() -> None:
    model = load(network())
    stem = fits_of(model)[0]
    chosen = np.array([5, 0, 2])
    (_, all_), (_, some) = (
        next(sweep(model, model, samples_of(model), [Fit("stem", stem.request, stem.target, 1, channels)]))
        for channels in (None, chosen)
    )
    np.testing.assert_array_equal(some.whole.y_mean, all_.whole.y_mean[:, chosen])


def test_few_samples_are_held_out_in_part_and_none_is_an_error() -> None:
    model = load(network())
    _, split = next(sweep(model, model, samples_of(model, 1), fits_of(model)))
    assert split.train.count > split.held_out.count > 0
    with pytest.raises(DataError, match="no samples"):
        next(sweep(model, model, Samples(lambda: iter(()), "nothing"), fits_of(model)))


def test_samples_are_left_out_where_there_is_no_room() -> None:
    model = load(network())
    samples = samples_of(model, 40)
    (_, all_), (_, some) = (
        next(sweep(model, model, samples, fits_of(model), rows=1 << 30, disk=disk)) for disk in (1 << 34, 1 << 16)
    )
    assert 0 < some.whole.count < all_.whole.count


def test_no_node_is_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    make = Session.__init__

    def noted(self: Session, model: Any, **options: Any) -> None:
        ran.extend(node.name or node.output[0] for node in model.graph.node)
        make(self, model, **options)

    model = load(network())
    monkeypatch.setattr(Session, "__init__", noted)
    assert len(list(sweep(model, model, samples_of(model), fits_of(model)))) == 7
    assert max(ran.count(name) for name in ran) == 2  # once in the model, once in the reference


def test_a_sequence_between_two_layers_is_made_again() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> g (float[2,4] x) => (float[2,4] y)
        <float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, int64 one = {1}> {
        a = MatMul(x, w)
        s = SplitToSequence <axis = 1, keepdims = 1> (a)
        e = SequenceAt(s, one)
        b = MatMul(a, w)
        f = SequenceAt(s, one)
        c = Add(b, e)
        d = Add(c, f)
        y = MatMul(d, w) }""")
    model = load(proto)
    samples = load_samples([{"x": np.ones((2, 4), np.float32)}], model)
    assert [split.whole.count for _, split in sweep(model, model, samples, fits_of(model))] == [2, 2, 2]


def test_a_store_counts_what_it_holds() -> None:
    store = Store(memory=100)
    for number, size in enumerate((20, 10, 5)):
        store.put(("a", "t", number), np.full(size, number, np.float32))
    assert store.bytes == 140
    assert store.get(("a", "t", 1)).tolist() == [1.0] * 10
    store.cut(1)
    assert store.bytes == 80
    store.drop(("a", "t", 0))
    assert store.bytes == 0
    store.close()
